"""Which operators the units of a group run through, as what, and how much of the net they make up."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping

from planish.graph.facts import Shape
from planish.graph.graph import Analysis, Group, Operator, Size

Members = Mapping[str, tuple[str, ...]]
"""Role of `ROLES` -> names of operators, in the order of the program."""

ROLES = ("out", "in", "affine", "passes")
"""What an operator is to a group: it issues the units, reads them, holds parameters per unit, or lets them through without any."""


def _carried(shapes: Iterable[tuple[Size, ...]]) -> set[str]:
    """Names of the groups whose units run along a dimension of these shapes."""
    return {group for shape in shapes for size in shape for group in size.groups}


def members(analysis: Analysis) -> dict[str, Members]:
    """For each group the operators that its units run through, by role, in the order of the program.

    An operator may issue and read the same group (a recurrent layer), and then stands under both roles.

    Args:
        analysis: what was found.

    Returns:
        The members by the group's name.
    """
    users: dict[str, list[Operator]] = collections.defaultdict(list)
    for operator in analysis.operators.values():
        for tensor in operator.tensors:
            users[tensor].append(operator)
    taken = {name: _carried(operator.inputs) for name, operator in analysis.operators.items()}
    given = {name: _carried([operator.output]) for name, operator in analysis.operators.items()}
    found: dict[str, Members] = {}
    for name, group in analysis.groups.items():
        by_role: dict[str, set[str]] = {role: set() for role in ROLES}
        for (tensor, _), role in group.roles.items():
            for operator in users[tensor]:
                # The roles are those of the tensor's first use; where a tied weight is used again, what runs in and out decides.
                goes_in, goes_out = name in taken[operator.name], name in given[operator.name]
                turned = {"out": goes_in and not goes_out, "in": goes_out and not goes_in}.get(role, False)
                by_role[{"out": "in", "in": "out"}[role] if turned else role].add(operator.name)
        own = set().union(*by_role.values())
        by_role["passes"] = {o for o in analysis.operators if o not in own and name in taken[o] | given[o]}
        found[name] = {role: tuple(o for o in analysis.operators if o in some) for role, some in by_role.items()}
    return found


def unit_name(group: Group, analysis: Analysis, by_role: Members) -> str:
    """What the units of a group are: "experts" of a mixture, "cells" of a recurrent layer, "heads" of an attention, "places" in each of its heads, or
    "channels".

    Args:
        group: one of `analysis`.
        analysis: what was found.
        by_role: the group's entry in `members`.
    """
    if group.routed:
        return "experts"
    layers = any(analysis.operators[name].kind in ("lstm", "gru") for name in by_role["out"])
    if layers or any(role == "out" and tensor.rpartition(".")[2].startswith("weight_hh") for (tensor, _), role in group.roles.items()):
        return "cells"
    attending = [operator for operator in analysis.operators.values() if operator.kind in ("attention", "softmax")]
    heads = _carried(shape[:-2] for operator in attending for shape in operator.inputs)
    if group.name in heads:
        return "heads"
    return "places" if any(key in analysis.groups[head].unit_of for head in heads for key in group.recurs) else "channels"


def held(group: Group, shapes: Mapping[str, Shape]) -> int:
    """How many elements of parameters hold a unit of a group: what would go if all its units went.

    Args:
        group: its elements are counted once, also where both dimensions of a weight are the group's.
        shapes: of the parameters, by name; buffers and constants are left out there.
    """
    kept: dict[str, float] = {}
    for (tensor, _), units in group.unit_of.items():
        if tensor in shapes:
            kept[tensor] = kept.get(tensor, 1.0) * float((units < 0).mean())
    sizes = {tensor: math.prod(shapes[tensor]) for tensor in kept}
    return round(sum(sizes[tensor] * (1 - share) for tensor, share in kept.items()))
