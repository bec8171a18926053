"""Members of groups: which operators issue, read and pass on units, what the units are, and how much of a net they hold."""

from __future__ import annotations

import numpy as np
import pytest

import families
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Group
from planish.graph.groups import analyse
from planish.graph.members import held, members, unit_name


def analysed(name: str) -> Analysis:
    net, inputs = families.build(name)
    return analyse(capture(net, inputs, families.STATE.get(name)))


@pytest.mark.parametrize("name", ["inception", "unet", "gpt2", "vit", "policy", "weight_norm"])
def test_every_member_is_held_by_an_operator_in_its_role(name: str) -> None:
    found = analysed(name)
    by_group = members(found)
    assert by_group.keys() == found.groups.keys()
    for group in found.groups.values():
        for tensor, _ in group.unit_of:
            users = {operator.name for operator in found.operators.values() if tensor in operator.tensors}
            lit = set().union(*by_group[group.name].values())
            assert users and users <= lit, (group.name, tensor)
        assert by_group[group.name]["out"] or by_group[group.name]["affine"], group.name


def test_units_are_heads_places_cells_or_channels() -> None:
    for name, wanted in {"vit": {"heads", "places", "channels"}, "policy": {"cells", "channels"}, "unet": {"channels"}}.items():
        found = analysed(name)
        by_group = members(found)
        assert {unit_name(group, found, by_group[group.name]) for group in found.groups.values()} == wanted, name


def test_what_a_group_holds_counts_each_element_once() -> None:
    every = np.arange(4)
    group = Group(
        "g",
        4,
        {("square", 0): every, ("square", 1): every, ("half", 1): np.array([0, 1, 2, 3, -1, -1, -1, -1]), ("running_mean", 0): every},
        {("square", 0): "out", ("square", 1): "in", ("half", 1): "in", ("running_mean", 0): "affine"},
    )
    assert held(group, {"square": (4, 4), "half": (3, 8), "other": (9,)}) == 16 + 12
