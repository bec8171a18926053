"""The widths that a group may take: multiples of what the target likes, from full down to one multiple."""

from __future__ import annotations

import math

import numpy as np

from planish.graph.graph import Group

_SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)


def unit_multiple(group: Group, multiple: int) -> int:
    """The step between widths, in units, at which every weight dimension of the group is a multiple of `multiple` indices.

    A unit that covers several indices of a dimension (the 64 channels of an attention head, the four gates of an LSTM cell) needs fewer
    units for the same multiple. Dimensions that are merely element-wise (role "affine") do not decide. Of places in heads, which recur in every
    head, those of one head must be a multiple, however many heads there are.

    Args:
        group: the group; only its `unit_of`, `roles`, `recurs` and `multiple` are read.
        multiple: indices, at least 1: the target's `facts.width_multiple`.

    Returns:
        units, at least 1.
    """
    step = max(group.multiple, 1)
    if group.routed:
        return step  # experts: what a router has of each is one row of scores
    for key, unit_of in group.unit_of.items():
        covered = np.count_nonzero(unit_of == 0) // group.recurs.get(key, 1)
        if covered and group.roles[key] in ("out", "in"):
            step = math.lcm(step, multiple // math.gcd(multiple, covered))
    return step


def width_levels(group: Group, multiple: int) -> tuple[int, ...]:
    """The widths that are worth considering, in units, from full to narrow: at most eight.

    The full width always comes first, even where it is no multiple itself. Up to eight multiples are all offered; a larger group is
    offered the shares 7/8, 3/4, 5/8, 1/2, 3/8, 1/4 and 1/8, rounded to multiples. At least one multiple stays.

    Args:
        group: the group.
        multiple: indices, at least 1: the target's `facts.width_multiple`.
    """
    if group.pinned:
        return (group.units,)
    if group.idle:
        return (group.units, group.least)
    step = unit_multiple(group, multiple)
    available = (group.units - 1) // step  # multiples that are narrower than the full width
    if available < len(_SHARES) + 1:
        counts = set(range(1, available + 1))
    else:
        counts = {max(1, round(share * group.units / step)) for share in _SHARES}
    return (group.units, *(step * count for count in sorted(counts, reverse=True) if step * count >= group.least))
