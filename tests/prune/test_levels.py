"""Widths are multiples in indices, not in units, and something always stays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.graph.graph import Group
from planish.prune.levels import unit_multiple, width_levels


def group(units: int, covered: int = 1, multiple: int = 1, pinned: str = "") -> Group:
    unit_of = {("a.weight", 0): np.repeat(np.arange(units), covered), ("n.weight", 0): np.arange(units)}
    return Group("a", units, unit_of, {("a.weight", 0): "out", ("n.weight", 0): "affine"}, multiple=multiple, pinned=pinned)


@pytest.mark.parametrize(
    ("units", "covered", "levels"),
    [
        (16, 1, (16, 8)),
        (20, 1, (20, 16, 8)),
        (64, 1, (64, 56, 48, 40, 32, 24, 16, 8)),
        (8, 1, (8,)),
        (6, 1, (6,)),
        (12, 64, (12, 10, 9, 8, 6, 4, 3, 2)),  # heads of 64 channels: any number of heads will do
        (6, 4, (6, 4, 2)),
        (512, 1, (512, 448, 384, 320, 256, 192, 128, 64)),
    ],
)
def test_levels_by_hand(units: int, covered: int, levels: tuple[int, ...]) -> None:
    assert width_levels(group(units, covered), 8) == levels


def test_an_elementwise_dimension_does_not_decide() -> None:
    assert unit_multiple(group(12, 64), 8) == 1


def test_a_group_may_ask_for_more() -> None:
    assert width_levels(group(24, multiple=3), 4) == (24, 12)


def test_a_pinned_group_has_one_level() -> None:
    assert width_levels(group(64, pinned="keep=a.*"), 8) == (64,)


@given(st.integers(1, 3000), st.sampled_from([1, 2, 3, 4, 64]), st.sampled_from([1, 4, 8, 16]))
def test_levels_fall_and_end_above_zero(units: int, covered: int, multiple: int) -> None:
    levels = width_levels(group(units, covered), multiple)
    assert levels[0] == units and len(levels) <= 8 and levels[-1] >= 1
    assert all(wide > narrow for wide, narrow in itertools.pairwise(levels))
    assert all(level * covered % multiple == 0 for level in levels[1:])
