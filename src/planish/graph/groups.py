"""Groups from index propagation: ids that are tied are one unit, units that run through the same parameter dimensions are one group."""

from __future__ import annotations

import collections
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch.fx import GraphModule

import planish.graph.rules  # noqa: F401  (registers the rules)
from planish.errors import UnknownName
from planish.graph.blocks import find_blocks
from planish.graph.crossing import Crossing, crossing_of, joined, lay_across
from planish.graph.facts import Facts, at_batch, observe
from planish.graph.graph import Analysis, Graph, Group, Size
from planish.graph.ids import Signature, Val
from planish.graph.naming import module_path, unique
from planish.graph.operators import Labels, find_operators
from planish.graph.program import Program

Key = tuple[str, int]
Places = dict[int, tuple[str, int]]
"""Number of a unit -> (group, unit in it)."""
Family = tuple[tuple[int, int], ...]
"""What units of one group share: the numbers of the dimensions that they run through, with how many indices they have along each."""

# Another way to keep a kind of place rectangular must make this much more of the parameters prunable to be preferred.
_WORTH = 1.01
_BATCH = 2  # a batch of 1 would look like a neutral dimension


@dataclass(frozen=True)
class Solved:
    """A program whose ties were solved.

    Args:
        program: the ids.
        unit: for each id, a number that all ids of one unit share, or -1 where the id is fixed.
        inexact: for each unit, whether a statistic runs over it.
        routed: for each unit, how many of its kind a router picks at a time; 0 where none does.
    """

    program: Program
    unit: NDArray[np.int64]
    inexact: NDArray[np.bool_]
    routed: NDArray[np.int64]

    @functools.cached_property
    def members(self) -> tuple[dict[Key, NDArray[np.int64]], dict[Family, list[int]]]:
        """The unit of each index per dimension, and the units by family."""
        labelled = {key: self.unit[val.ids[key[1]].numpy()] for key, val in dimensions(self.program).items()}
        through: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        for number, units in enumerate(labelled.values()):
            for unit, count in zip(*(found.tolist() for found in np.unique(units, return_counts=True)), strict=True):
                if unit >= 0:
                    through[unit].append((number, count))
        families: dict[Family, list[int]] = collections.defaultdict(list)
        for unit, crossed in through.items():
            families[tuple(crossed)].append(unit)
        return labelled, families


def solve(program: Program) -> Solved:
    """Connected components of the ties; a component with a fixed id is fixed as a whole."""
    ids = program.ids
    a = np.concatenate([np.zeros(0, np.int64), *ids.left])
    b = np.concatenate([np.zeros(0, np.int64), *ids.right])
    count, component = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(ids.size, ids.size)), directed=False)
    fixed = np.zeros(count, bool)
    fixed[component[0]] = True
    for vector, _ in ids.fixes:
        fixed[component[vector]] = True
    inexact = np.zeros(count, bool)
    for vector in ids.inexact:
        inexact[component[vector]] = True
    routed = np.zeros(count, np.int64)
    for vector, picked in ids.routed:
        np.maximum.at(routed, component[vector], picked)
    return Solved(program, np.where(fixed[component], -1, component).astype(np.int64), inexact, routed)


def dimensions(program: Program) -> dict[Key, Val]:
    """Every labelled dimension of parameters, buffers and constants, in the order in which the program uses them."""
    found: dict[Key, Val] = {}
    shared = program.first_copies()
    for node in program.module.graph.nodes:
        name = program.canonical(str(node.target)) if node.op == "get_attr" else ""
        if name in program.parameters:
            val = shared.get(node.name, program.parameters[name])
            for d in val.ids:
                found.setdefault((name, d), val)
    rank = {key: position for position, key in enumerate(program.ids.roles)}
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))


def coverage(solved: Solved) -> float:
    """How much could be pruned: for each parameter dimension the elements of its parameter times the share of indices that may go.

    Indices of a group that is too coarse to lose a quarter (fewer than four units) count for less.
    """
    labelled, families = solved.members
    prunable = np.zeros(int(solved.unit.max(initial=0)) + 2)
    for units in families.values():
        prunable[units] = min(1.0, (1 - 1 / len(units)) / 0.75)
    sizes = {name: parameter.numel() for name, parameter in solved.program.module.named_parameters(remove_duplicate=False)}
    return float(sum(sizes.get(key[0], 0) * prunable[units].mean() for key, units in labelled.items()))


def decide(module: GraphModule, facts: Facts, state: Mapping[str, int], idle: Mapping[str, int]) -> Solved:
    """Propagate ids; wherever a kind of place can be kept rectangular in several ways, take the one that covers most."""
    best = solve(Program(module, facts, state=state, idle=idle))
    covered, chosen = coverage(best), dict[Signature, int]()
    tried: set[Signature] = set()
    while True:
        open_ = sorted((s for s in best.program.ids.options if s not in tried), key=repr)
        if not open_:
            return best
        signature = open_[0]
        tried.add(signature)
        for choice in range(1, best.program.ids.options[signature]):
            other = solve(Program(module, facts, {**chosen, signature: choice}, state, idle))
            if (more := coverage(other)) > covered * _WORTH:
                best, covered = other, more
                chosen = {**chosen, signature: choice}


def _groups(solved: Solved, pins: Mapping[str, str], idle: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Group], Places]:
    """The groups in program order, and the place of each unit."""
    labelled, families = solved.members
    keys = list(labelled)
    parameters = {name for name, _ in solved.program.module.named_parameters(remove_duplicate=False)}
    roles = solved.program.ids.roles
    groups: dict[str, Group] = {}
    place: Places = {}
    of_input: dict[int, tuple[str, int]] = {}  # unit -> (input whose channel it is, which one)
    for node, axis in solved.program.idle.items():
        given = solved.program.vals[node]
        assert isinstance(given, Val)
        if axis in given.ids:
            of_input.update({int(u): (node, i) for i, u in enumerate(solved.unit[given.ids[axis].numpy()]) if u >= 0})

    def producing(family: Family) -> int:
        """The first dimension that issues the units (a weight before a bias), else the first parameter's."""
        issuing = [n for n, _ in family if roles.get(keys[n]) == "out"]
        weights = [n for n in issuing if not keys[n][0].endswith("bias")]
        own = [n for n, _ in family if keys[n][0] in parameters]
        return (weights or issuing or own or [family[0][0]])[0]

    for family, units in sorted(families.items(), key=lambda item: (producing(item[0]), item[0])):
        if len(units) < max(2, int(solved.routed[units].max()) + 1) or not any(keys[n][0] in parameters for n, _ in family):
            continue
        first = producing(family)
        _, positions = np.unique(labelled[keys[first]], return_index=True)
        order = {int(labelled[keys[first]][p]): p for p in positions}
        ranked = sorted(units, key=lambda u: order[u])
        number_of = np.full(int(solved.unit.max()) + 2, -1, np.int64)
        number_of[ranked] = np.arange(len(ranked))
        entrance = next((of_input[u] for u in ranked if u in of_input), None)
        never: tuple[int, ...] = ()
        if entrance is not None:  # of several inputs, and of padding beside them, each unit is judged for itself
            never = tuple(n for n, u in enumerate(ranked) if u in of_input and of_input[u][1] in idle[of_input[u][0]][1])
            if not never or len(never) == len(ranked):
                continue
            name = unique(f"input.{idle[entrance[0]][0]}", groups)
        else:
            name = unique(module_path(keys[first][0]), groups)
        member = [keys[n] for n, _ in family]
        groups[name] = Group(
            name,
            len(ranked),
            {key: number_of[labelled[key]] for key in member},
            {key: roles.get(key, "affine") for key in member},
            exact=not bool(solved.inexact[ranked].any()),
            pinned=next((pins[p] for p, _ in member if p in pins), ""),
            routed=int(solved.routed[ranked].max()),
            idle=never,
        )
        place.update({unit: (name, position) for position, unit in enumerate(ranked)})
    return groups, place


def _second(
    first: Solved, groups: Mapping[str, Group], pins: Mapping[str, str], idle: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[Solved, list[Crossing], Places] | None:
    """Another reading of the program: wherever the first could keep a place rectangular in several ways, another way.

    Of several ways it takes the last that leaves units there that cross the first's, and where none does, the first's own. None where no
    unit crosses.
    """
    program = first.program
    ways = {
        signature: [way for way in range(program.ids.options[signature]) if way != program.ids.decisions.get(signature, 0)]
        for signature in program.ids.rectangles
    }
    while ways:
        decisions = {**program.ids.decisions, **{signature: left[-1] for signature, left in ways.items()}}
        second = solve(Program(program.module, program.facts, decisions, program.state, program.idle))
        others, place = _groups(second, pins, idle)
        crossing = [found for group in others.values() if not group.idle and (found := crossing_of(group, groups)) is not None]
        names = {found.group.name for found in crossing}
        place = {unit: where for unit, where in place.items() if where[0] in names}
        has = np.zeros(int(second.unit.max(initial=0)) + 2, bool)
        has[list(place)] = True
        kept = second.program.ids.rectangles
        dead = next((s for s in ways if not any(has[second.unit[ids.numpy()]].any() for ids in kept.get(s, ()))), None)
        if dead is None:
            return second, crossing, place
        ways[dead].pop()
        ways = {signature: left for signature, left in ways.items() if left}
    return None


def _label(first: Solved, pins: Mapping[str, str], idle: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Group], Labels]:
    """The groups, those that cross one behind it, and the labels that surgery needs."""
    groups, place = _groups(first, pins, idle)
    unit, found = first.unit, _second(first, groups, pins, idle)
    if found is not None:
        second, crossing, others = found
        lay_across(first.program, second.program, np.isin(second.unit, list(others)))
        start = int(first.unit.max(initial=0)) + 1
        unit = np.concatenate([first.unit, np.where(second.unit < 0, -1, second.unit + start)])
        groups, names = joined(groups, crossing)
        place |= {start + number: (names[name], position) for number, (name, position) in others.items()}
    return groups, Labels(first.program, unit, place, {name: group.units for name, group in groups.items()})


def _reasons(solved: Solved, groups: Mapping[str, Group]) -> dict[str, str]:
    """Why output dimensions stay as they are: the first thing in the program that fixes one of their ids."""
    ids = solved.program.ids
    a = np.concatenate([np.zeros(0, np.int64), *ids.left])
    b = np.concatenate([np.zeros(0, np.int64), *ids.right])
    count, component = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(ids.size, ids.size)), directed=False)
    first = np.full(count, len(ids.fixes), np.int64)
    for number, (vector, _) in enumerate(ids.fixes):
        np.minimum.at(first, component[vector], number)
    covered = {key for group in groups.values() for key in group.unit_of}
    found: dict[str, str] = {}
    for key, val in dimensions(solved.program).items():
        if ids.roles.get(key) != "out" or key in covered or key[0].endswith("bias"):
            continue
        number = int(first[component[val.ids[key[1]].numpy()]].min())
        found[key[0]] = ids.fixes[number][1] if number < len(ids.fixes) else "all its indices are tied to one another"
    for group in groups.values():
        if group.pinned:
            found.update({name: group.pinned for (name, _), role in group.roles.items() if role == "out"})
    return found


def _pins(module: GraphModule, keep: Sequence[str]) -> dict[str, str]:
    """Parameters that a glob names -> "keep=GLOB"."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    pins: dict[str, str] = {}
    for glob in keep:
        matched = fnmatch.filter(names, glob)
        if not matched:
            raise UnknownName("parameter", glob, names)
        for name in matched:
            pins.setdefault(name, f"keep={glob}")
    tied: dict[int, set[str]] = collections.defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied[id(parameter)].add(name)
    for same in tied.values():
        for pinned in [pins[name] for name in sorted(same) if name in pins][:1]:
            pins.update(dict.fromkeys(same - pins.keys(), pinned))
    return pins


def _states(graph: Graph) -> dict[str, int]:
    """Name of a placeholder that the caller feeds from the step before -> position of the output that it is fed from."""
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    inputs = {spec.name: node.name for spec, node in zip(graph.signature.inputs, placeholders, strict=True)}
    outputs = [spec.name for spec in graph.signature.outputs]
    return {inputs[name]: outputs.index(source) for name, source in graph.signature.state.items()}


def _idle(graph: Graph) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of a placeholder some of whose channels never vary -> the input's name, and these channels."""
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    named = {spec.name: node.name for spec, node in zip(graph.signature.inputs, placeholders, strict=True)}
    return {named[name]: (name, channels) for name, (_, channels) in graph.idle.items() if name not in graph.signature.state}


def analyse(graph: Graph, keep: Sequence[str] = ()) -> Analysis:
    """What can be removed from a graph, what its operators cost, and why the rest stays.

    Args:
        graph: a captured program; it is run on its example twice, and stays as it is.
        keep: globs over parameter names; groups that run through a matching parameter are pinned.

    Returns:
        Groups, blocks and operators in the order of the program.

    Raises:
        UnknownName: a glob that matches no parameter.
    """
    pins = _pins(graph.module, keep)
    idle = _idle(graph)
    axes = {node: graph.idle[name][0] for node, (name, _) in idle.items()}
    solved = decide(graph.module, observe(graph.module, at_batch(graph, _BATCH)), _states(graph), axes)
    groups, labels = _label(solved, pins, idle)
    facts = observe(graph.module, graph.example)
    operators = find_operators(graph.module, labels, facts)

    def sizes(name: str) -> tuple[Size, ...]:
        val = solved.program.vals.get(name)
        return labels.sizes(val if isinstance(val, Val) else None, facts.shape(name))

    blocks = find_blocks(solved.program, operators, sizes)
    unknown = {name: tuple(nodes) for name, nodes in solved.program.unknown.items()}
    return Analysis(groups, blocks, operators, unknown, _reasons(solved, groups), labels)
