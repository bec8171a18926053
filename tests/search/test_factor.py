"""The factor graph's minimum against brute force, its order of elimination, and its local search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.search.factor import FactorGraph, elimination_order


@st.composite
def instances(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    scopes = draw(st.lists(st.sets(st.integers(0, len(sizes) - 1), max_size=3).map(lambda s: tuple(sorted(s))), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tables = [rng.normal(size=[sizes[v] for v in scope]) for scope in scopes]
    if draw(st.booleans()):
        tables = [np.where(rng.random(t.shape) < 0.2, np.inf, t) for t in tables]
    return sizes, scopes, tables


def brute(graph, tables):
    return min(graph.value(tables, x) for x in itertools.product(*(range(s) for s in graph.sizes)))


@settings(max_examples=150, deadline=None)
@given(instances())
def test_elimination_finds_the_least_sum(instance):
    sizes, scopes, tables = instance
    graph = FactorGraph(sizes, scopes)
    found = graph.minimise(tables)
    assert found.exact
    assert found.value == graph.value(tables, found.assignment)
    assert found.value == pytest.approx(brute(graph, tables), rel=1e-12, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(instances())
def test_local_search_says_so_and_cannot_be_improved_by_one_flip(instance):
    sizes, scopes, tables = instance
    tables = [np.where(np.isfinite(t), t, 50.0) for t in tables]
    graph = FactorGraph(sizes, scopes, limit=0)
    found = graph.minimise(tables)
    assert not found.exact
    assert found.value >= brute(graph, tables) - 1e-9
    for v, size in enumerate(sizes):
        for other in range(size):
            flipped = [*found.assignment[:v], other, *found.assignment[v + 1 :]]
            assert graph.value(tables, flipped) >= found.value - 1e-9


def test_local_search_finds_the_optimum_of_small_loops_nearly_always():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(20):
        scopes = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 3)]
        tables = [rng.normal(size=(3, 3)) for _ in scopes]
        graph = FactorGraph([3] * 5, scopes, limit=0)
        hits += graph.minimise(tables).value <= brute(graph, tables) + 1e-9
    assert hits >= 19


def test_a_chain_with_one_global_variable_stays_narrow():
    """Each block holds (stream, width, next width): eliminating along the chain needs tables of stream x width x width."""
    blocks = 60
    scopes = [(0, i, i + 1) for i in range(1, blocks)]
    _, largest = elimination_order([8] * (blocks + 1), scopes)
    assert largest == 8**3


def test_conditional_keeps_leading_axes_and_sums_what_touches_the_free_variables():
    rng = np.random.default_rng(0)
    graph = FactorGraph([2, 3, 4], [(0, 1), (1, 2), (2,)])
    tables = [rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 3, 4)), rng.normal(size=(5, 4))]
    got = graph.conditional(tables, (1, 2, 3), (0, 2))
    want = tables[0][:, :, 2][:, :, None] + tables[1][:, 2, :][:, None, :] + tables[2][:, None, :]
    np.testing.assert_allclose(got, want)


def test_scopes_that_are_not_ascending_are_refused():
    with pytest.raises(ValueError, match="ascending, distinct and below 2"):
        FactorGraph([2, 2], [(1, 0)])
