"""Least loss under ceilings against brute force; the bound, the gap and the KKT residual; infeasible ceilings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.search import lagrangian
from planish.search.lagrangian import Problem, solve


def chain(seed, variables=6, levels=4, costs=1):
    """Losses that rise along each variable; costs that are products of neighbours' widths, as of layers in a row."""
    rng = np.random.default_rng(seed)
    loss = [((v,), np.concatenate(([0.0], np.sort(rng.exponential(size=levels - 1))))) for v in range(variables)]
    rows = {"loss": loss}
    for number in range(costs):
        widths = [np.linspace(1.0, 0.1, levels) for _ in range(variables)]
        rows[f"cost{number}"] = [
            ((v, v + 1), rng.uniform(0.5, 2.0) * np.outer(widths[v], widths[v + 1]) + 0.05 * rng.random()) for v in range(variables - 1)
        ]
    return Problem([levels] * variables, rows)


def every(problem):
    sizes = problem.graph.sizes
    return problem.values_of(np.stack([axis.ravel() for axis in np.indices(sizes)], axis=1))


def ceilings_of(problem, share):
    full = problem.values([0] * len(problem.graph.sizes))
    return {row: share * full[number] for number, row in enumerate(problem.rows) if row != "loss"}


@pytest.fixture
def relaxed(monkeypatch):
    """Never enumerate."""
    monkeypatch.setattr(lagrangian, "ENUMERATED", 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 1.0), st.integers(1, 3), st.booleans())
def test_bound_below_optimum_below_solution_and_limits_hold(seed, share, costs, enumerated):
    problem = chain(seed, variables=5, levels=3, costs=costs)
    ceilings = ceilings_of(problem, share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lagrangian, "ENUMERATED", 2**13 if enumerated else 0)
        found = solve(problem, "loss", ceilings)
    values = every(problem)
    inside = np.all([values[problem.rows.index(row)] <= bound * (1 + 1e-12) for row, bound in ceilings.items()], axis=0)
    if enumerated or costs == 1:
        assert found.feasible == inside.any()
    if not found.feasible:
        return
    optimum = values[0][inside].min()
    assert all(found.values[row] <= bound * (1 + 1e-11) for row, bound in ceilings.items())
    assert found.objective == problem.values(found.assignment)[0]
    assert found.objective >= optimum - 1e-12
    if enumerated:
        assert found.objective == optimum and found.gap == 0
    assert found.bound <= optimum + 1e-9
    assert found.gap == pytest.approx(found.objective - found.bound, abs=1e-12)


@pytest.mark.parametrize("costs", [1, 2])
def test_the_relaxation_with_local_search_is_nearly_always_optimal(relaxed, costs):
    hits = 0
    for seed in range(30):
        problem = chain(seed, costs=costs)
        ceilings = ceilings_of(problem, 0.45)
        values = every(problem)
        inside = np.all([values[problem.rows.index(row)] <= bound for row, bound in ceilings.items()], axis=0)
        found = solve(problem, "loss", ceilings)
        assert found.method == "elimination" and found.feasible
        hits += found.objective <= values[0][inside].min() + 1e-9
    assert hits >= 26


def test_gap_and_kkt_vanish_at_a_point_of_the_hull(relaxed):
    """Two independent knapsack items whose cheapest trade is exactly the ceiling: the dual is tight.

    Losses 1 and 10 for saving 1 each, of 2; ceiling 1: take the first, multiplier between 1 and 10, bound 1.
    """
    problem = Problem(
        [2, 2],
        {
            "loss": [((0,), np.array([0.0, 1.0])), ((1,), np.array([0.0, 10.0]))],
            "cost": [((0,), np.array([1.0, 0.0])), ((1,), np.array([1.0, 0.0]))],
        },
    )
    found = solve(problem, "loss", {"cost": 1.0})
    assert found.assignment == (1, 0)
    assert found.bound == pytest.approx(1.0) and found.gap == pytest.approx(0.0, abs=1e-9)
    assert found.kkt == pytest.approx(0.0, abs=1e-9)
    assert 1.0 - 1e-9 <= found.multipliers["cost"] <= 10.0 + 1e-9


def test_gap_between_hull_points_is_what_the_line_leaves(relaxed):
    """One item that saves 2 at a loss of 4, ceiling 1 of 2: the hull's line from (2, 0) to (0, 4) gives 2 at cost 1; the item loses 4."""
    problem = Problem([2], {"loss": [((0,), np.array([0.0, 4.0]))], "cost": [((0,), np.array([2.0, 0.0]))]})
    found = solve(problem, "loss", {"cost": 1.0})
    assert found.assignment == (1,)
    assert found.multipliers["cost"] == pytest.approx(2.0)
    assert found.bound == pytest.approx(2.0) and found.gap == pytest.approx(2.0)
    assert found.kkt == pytest.approx(2.0 * 1.0 / 4.0)  # complementary slackness: multiplier times unused cost, over the objective


@pytest.mark.parametrize("enumerated", [0, 2**13])
def test_an_impossible_ceiling_is_flagged_with_the_cheapest_for_each(monkeypatch, enumerated):
    monkeypatch.setattr(lagrangian, "ENUMERATED", enumerated)
    problem = chain(3, costs=2)
    values = every(problem)
    found = solve(problem, "loss", {"cost0": 0.9 * values[1].min(), "cost1": 1e9})
    assert not found.feasible and found.gap is None and found.bound is None
    assert problem.values(found.nearest["cost0"])[1] == pytest.approx(values[1].min())
    assert problem.values(found.nearest["cost1"])[2] == pytest.approx(values[2].min())
    assert found.values["cost0"] == pytest.approx(values[1].min())


def test_a_loose_ceiling_changes_nothing(relaxed):
    found = solve(chain(0), "loss", {"cost0": 1e9})
    assert found.objective == 0 and found.gap == 0 and found.kkt == 0 and found.multipliers == {"cost0": 0.0}


def test_without_exact_minimisation_no_bound_is_claimed(relaxed):
    small = chain(1)
    problem = Problem(
        small.graph.sizes,
        {row: [(s, t[n]) for s, t in zip(small.graph.scopes, small.stacks, strict=True)] for n, row in enumerate(small.rows)},
        largest_table=2,
    )
    found = solve(problem, "loss", ceilings_of(problem, 0.5))
    assert found.method == "local search" and found.feasible and found.bound is None and found.gap is None


def test_a_replaced_row_changes_only_that_row():
    problem = chain(2)
    other = problem.replaced("loss", [((0,), np.array([0.0, 7.0, 8.0, 9.0]))])
    before, after = (p.values([1, 0, 0, 0, 0, 0]) for p in (problem, other))
    assert after[0] == 7.0 and after[1] == before[1]
    assert problem.values([1, 0, 0, 0, 0, 0])[0] == before[0]


def test_a_large_chain_is_solved_within_a_thousandth_of_its_bound():
    problem = chain(1, variables=100, levels=8)
    found = solve(problem, "loss", ceilings_of(problem, 0.5))
    assert found.feasible and found.gap / found.objective < 2e-3
