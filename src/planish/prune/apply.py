"""A plan's blocks and widths, carried out on a copy of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planish.errors import PlanError, UnknownName
from planish.graph.blocks import bypass
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.groups import analyse
from planish.graph.surgery import prune
from planish.plan import Plan, rank_of
from planish.prune.order import Going, Orders, merge_


@dataclass(frozen=True)
class Applied:
    """What a plan left.

    Args:
        graph: the smaller graph; names of nodes and parameters are the original's.
        kept: (parameter or buffer, dimension) -> indices of the original's that survive, for every dimension that shrank.
        removed: group of the original -> units that went.
        spared: group of the original -> units that the plan asked for beyond what could go, because their scores are not finite.
    """

    graph: Graph
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    removed: Mapping[str, NDArray[np.int64]]
    spared: Mapping[str, int]


def check(analysis: Analysis, plan: Plan) -> None:
    """Refuse a plan that does not fit the graph.

    Raises:
        PlanError: a group or block that the graph has not (with the nearest names), or a width that the group cannot take.
    """
    for kind, given, known in (("group", plan.widths, analysis.groups), ("block", plan.blocks, analysis.blocks)):
        for name in given:
            if name not in known:
                raise PlanError(f"plan: {UnknownName(kind, name, known)}")
    for name, adaptor in plan.adaptors.items():
        if name not in plan.blocks or not analysis.blocks[name].adaptor:
            raise PlanError(
                f"plan: {name!r} must be bypassed and be a block of one linear stream to leave an adaptor; leave the adaptor out"
            )
        try:
            rank_of(adaptor)
        except ValueError as err:
            raise PlanError(f"plan: {name!r}: {err}") from err
    for name, width in plan.widths.items():
        group = analysis.groups[name]
        if not group.least <= width <= group.units:
            raise PlanError(f"plan: the width of {name!r} must be in [{group.least}, {group.units}]; got {width}; choose one of its levels")
        if width < group.units and group.pinned:
            raise PlanError(f"plan: the width of {name!r} must stay {group.units} ({group.pinned}); got {width}; leave the group out")
        if width < group.units and width % group.multiple:
            raise PlanError(f"plan: the width of {name!r} must be a multiple of {group.multiple}; got {width}; choose one of its levels")


def removals(analysis: Analysis, plan: Plan, orders: Orders) -> tuple[dict[str, Going], dict[str, int]]:
    """What a plan removes from each group: the units that go first, never those that must stay; and how many it asked for beyond that.

    Raises:
        PlanError: no order for a group that is to be narrowed.
    """
    removed: dict[str, Going] = {}
    spared: dict[str, int] = {}
    for name, width in plan.widths.items():
        units = analysis.groups[name].units
        if width == units:
            continue
        if name not in orders or len(orders[name].scores) != units:
            raise PlanError(f"plan: saliency {plan.saliency!r} must give {units} scores for group {name!r}; it gave none or others")
        going = orders[name].going(units - width)
        if len(going.units) < units - width:
            spared[name] = units - width - len(going.units)
        if len(going.units):
            removed[name] = going
    return removed, spared


def apply(graph: Graph, analysis: Analysis, plan: Plan, orders: Orders) -> Applied:
    """Bypasses the plan's blocks, then removes the units that go first from each group that it narrows, merged where their order says so.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        plan: `widths` and `blocks` are read. A width of a group that vanishes with a block is no error.
        orders: of the original's groups.

    Raises:
        PlanError: see `check`; or an order is missing.
    """
    check(analysis, plan)
    going, spared = removals(analysis, plan, orders)
    removed = {name: its.units for name, its in going.items()}
    current, now = _merged(graph, analysis, going), analysis
    if plan.blocks:
        current = bypass(current, analysis, plan.blocks, plan.adaptors)
        now = analyse(current)
    pruned = prune(current, now, translated(now, analysis, removed))
    return Applied(pruned.graph, pruned.kept, removed, spared)


def translated(now: Analysis, original: Analysis, removed: Mapping[str, NDArray[np.int64]]) -> dict[str, list[int]]:
    """The units that go from each group of a graph whose blocks were bypassed, where those of the original's groups go."""
    return {name: units for name, group in now.groups.items() if (units := _translate(group, original, removed))}


def _merged(graph: Graph, analysis: Analysis, going: Mapping[str, Going]) -> Graph:
    """The graph itself where nothing is merged, else a copy in which the units that stay have taken over what the others carried."""
    merging = {name: its for name, its in going.items() if (its.into >= 0).any()}
    if not merging:
        return graph
    copied = graph.copy()
    parameters = {name: value.detach() for name, value in copied.module.named_parameters(remove_duplicate=False)}
    for name, its in merging.items():
        merge_(parameters, analysis.groups[name], its)
    return copied


def _translate(group: Group, original: Analysis, removed: Mapping[str, NDArray[np.int64]]) -> list[int]:
    """The units of a group of the bypassed graph all of whose indices belong to removed units of the original.

    A bypass may merge, split or rename groups, but parameters and their dimensions stay, so these tell which unit is which.
    """
    goes = np.ones(group.units, bool)
    known = np.zeros(group.units, bool)
    for key, unit_of in group.unit_of.items():
        if key[0] not in original.ids.program.parameters:
            continue  # an adaptor's: it has no units of its own
        gone = np.zeros(len(unit_of), bool)
        for name, units in removed.items():
            before = original.groups[name].unit_of.get(key)
            if before is not None:
                gone |= np.isin(before, units)
        mine = unit_of >= 0
        known[unit_of[mine]] = True
        goes[unit_of[mine & ~gone]] = False
    return [int(unit) for unit in np.flatnonzero(goes & known)]
