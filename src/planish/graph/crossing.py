"""Two readings of one program: where a view makes parts of channels (heads of places), one reading has the parts for units and the other what is
in them. A unit of the one crosses all units of the other, and both may go: what stays is what stays in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Group
from planish.graph.ids import Val
from planish.graph.naming import unique
from planish.graph.program import Program

Key = tuple[str, int]


@dataclass(frozen=True)
class Crossing:
    """A group of one reading that crosses groups of the other.

    Args:
        group: which.
        where: name of a group that it crosses -> the dimensions that both run through.
        is_inside: its units are found again in every unit of the others, as places are in heads; else theirs are in its.
    """

    group: Group
    where: Mapping[str, tuple[Key, ...]]
    is_inside: bool


def crossing_of(group: Group, others: Mapping[str, Group]) -> Crossing | None:
    """What a group of another reading crosses; None if it crosses none, or not everywhere where it meets one.

    Two groups cross where every unit of the one meets every unit of the other at equally many indices: what is left of a dimension is then as
    large as a product of their widths, whichever units go.
    """
    where: dict[str, tuple[Key, ...]] = {}
    is_inside = False
    for name, other in others.items():
        for key in (key for key in other.unit_of if key in group.unit_of):
            both = (group.unit_of[key] >= 0) & (other.unit_of[key] >= 0)
            mine, its = group.unit_of[key][both], other.unit_of[key][both]
            if not len(mine):
                continue
            meetings = np.bincount(its * group.units + mine, minlength=other.units * group.units)
            if meetings.min() != meetings.max():
                return None
            if not where:
                is_inside = int(np.count_nonzero(np.diff(mine))) > int(np.count_nonzero(np.diff(its)))
            where[name] = (*where.get(name, ()), key)
    return Crossing(group, where, is_inside) if where else None


def joined(groups: Mapping[str, Group], crossing: Sequence[Crossing]) -> tuple[dict[str, Group], dict[str, str]]:
    """The groups of both readings in one order, and what those of the second, by their names there, are called.

    NAME.size is what is in each of some parts, NAME.parts those parts.
    """
    found: dict[str, Group] = {}
    names: dict[str, str] = {}
    for name, group in groups.items():
        outer = [(one.group, one.where[name]) for one in crossing if name in one.where and not one.is_inside]
        found[name] = _recurring(group, outer)
        for one in crossing:
            if next(iter(one.where)) == name:
                outer = [(groups[other], keys) for other, keys in one.where.items() if one.is_inside]
                base = f"{one.group.name.partition('#')[0]}.{'size' if one.is_inside else 'parts'}"
                names[one.group.name] = unique(base, {**groups, **found})
                found[names[one.group.name]] = replace(_recurring(one.group, outer), name=names[one.group.name])
    return found, names


def _recurring(group: Group, outer: Sequence[tuple[Group, Sequence[Key]]]) -> Group:
    recurs: Counter[Key] = Counter()
    for other, keys in outer:
        recurs.update(dict.fromkeys(keys, other.units))
    return replace(group, recurs=dict(recurs))


def lay_across(first: Program, second: Program, counts: NDArray[np.bool_]) -> None:
    """Give every value of one reading the ids that it has in the other, in place, numbered on from its own.

    Args:
        first: has all labels afterwards.
        second: of the same program and facts.
        counts: for each id of `second`, whether its unit is one that crosses; dimensions without any are left out.
    """

    def lay(val: Val | None, other: Val | None) -> None:
        if val is not None and other is not None:
            val.across = {d: ids + first.ids.size for d, ids in other.ids.items() if counts[ids.numpy()].any()}

    for name, result in first.vals.items():
        other = second.vals[name]
        if isinstance(result, list) and isinstance(other, list):
            for pair in zip(result, other, strict=True):
                lay(*pair)
        elif isinstance(result, Val) and isinstance(other, Val):
            lay(result, other)
    for consumer, val in first.copies.items():
        lay(val, second.copies[consumer])
    for name, val in first.parameters.items():
        lay(val, second.parameters[name])
