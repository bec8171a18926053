"""Surgery: removing units selects the surviving indices in every parameter, buffer and constant, and recomputes every literal size."""

from __future__ import annotations

import collections
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.fx import GraphModule, Node

from planish.errors import PlanError, UnknownName
from planish.graph.edit import EDITS, Edit, Survivors
from planish.graph.facts import attribute, rule_name
from planish.graph.graph import Analysis, Graph
from planish.graph.ids import Val
from planish.graph.operators import Labels
from planish.graph.program import Program
from planish.graph.reference import run_masked

aten = torch.ops.aten
_STALE = ("val", "tensor_meta", "example_value")


@dataclass(frozen=True)
class Pruned:
    """A smaller graph.

    Args:
        graph: the result; names of surviving nodes and parameters are those of the original.
        kept: (parameter or buffer, dimension) -> surviving indices, for every dimension that shrank.
    """

    graph: Graph
    kept: Mapping[tuple[str, int], NDArray[np.int64]]


def survivors(analysis: Analysis, removed: Mapping[str, Sequence[int]]) -> Survivors:
    """Which ids stay when units are removed.

    Raises:
        UnknownName: a group that the analysis has not.
        PlanError: a unit that the group has not, no unit left, or a pinned group.
    """
    labels = analysis.ids
    assert isinstance(labels, Labels)
    gone: set[tuple[str, int]] = set()
    for name, units in removed.items():
        if name not in analysis.groups:
            raise UnknownName("group", name, analysis.groups)
        group = analysis.groups[name]
        wrong = [int(u) for u in units if not 0 <= int(u) < group.units]
        if wrong:
            raise PlanError(f"surgery: units of group {name!r} must be in [0, {group.units}); got {wrong[0]}; choose among those")
        live = [int(u) for u in units if group.idle and int(u) not in group.idle]
        if live:
            raise PlanError(
                f"surgery: of group {name!r} only channels that never vary may go, {list(group.idle)}; got {live[0]}; leave it out"
            )
        if len(units) and group.pinned:
            raise PlanError(f"surgery: group {name!r} must keep all its units ({group.pinned}); got {len(units)} to remove; leave it out")
        if len({int(u) for u in units}) > group.units - group.least:
            least = "one" if group.least == 1 else str(group.least)
            gone_now = "all" if len({int(u) for u in units}) >= group.units else str(len({int(u) for u in units}))
            raise PlanError(
                f"surgery: group {name!r} must keep at least {least} of its {group.units} units; {gone_now} were to go; keep {least}"
            )
        gone |= {(name, int(u)) for u in units}
    keep = np.ones(int(labels.unit.max(initial=0)) + 2, bool)
    for number, place in labels.place.items():
        keep[number] = place not in gone
    keep[-1] = True
    return Survivors(keep[labels.unit])


def _replace(module: GraphModule, name: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        setattr(owner, leaf, tensor)


def _selected(tensor: torch.Tensor, val: Val, stay: Survivors) -> torch.Tensor:
    for d in val.dims:
        if stay.changed(val, d):
            tensor = tensor.index_select(d, torch.from_numpy(stay.indices(val, d)).to(tensor.device))
    return tensor


def _copy_but_for(graph: Graph, program: Program, stay: Survivors) -> Graph:
    """A deep copy that still shares the tensors that will be replaced: a large net is not held three times."""
    shared = {}
    for name, val in program.parameters.items():
        if any(stay.changed(val, d) for d in val.dims):
            tensor = attribute(graph.module, name)
            shared[id(tensor)] = tensor
    return Graph(copy.deepcopy(graph.module, shared), graph.signature, graph.example, list(graph.notes), graph.idle, graph.floats)


def _shrink_parameters(module: GraphModule, program: Program, stay: Survivors) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Select in every parameter and buffer, under all of its names; what was kept, per dimension that shrank."""
    kept: dict[tuple[str, int], NDArray[np.int64]] = {}
    names: dict[int, list[str]] = collections.defaultdict(list)
    for store in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in store:
            names[id(tensor)].append(name)
    shared = program.first_copies()
    originals = {node.name: program.canonical(str(node.target)) for node in program.module.graph.nodes if node.op == "get_attr"}
    for node in list(module.graph.nodes):
        name = originals.get(node.name, "")
        if name not in program.parameters or any((name, d) in kept for d in range(program.parameters[name].rank)):
            continue
        val = shared.get(node.name, program.parameters[name])
        if not any(stay.changed(val, d) for d in val.dims):
            continue
        old = attribute(module, name)
        new = _selected(old.detach(), val, stay).clone(memory_format=torch.contiguous_format)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for alias in dict.fromkeys([name, *names[id(old)]]):
            _replace(module, alias, new)
        kept.update({(name, d): stay.indices(val, d) for d in val.dims if stay.changed(val, d)})
    return kept


def _part_constants(module: GraphModule, program: Program, stay: Survivors) -> None:
    """Where consumers of one constant keep different indices of it, each gets a constant of its own; before parameters shrink."""
    nodes = {node.name: node for node in module.graph.nodes}
    consumers: dict[str, list[tuple[str, Val]]] = collections.defaultdict(list)
    for (constant, consumer), val in program.copies.items():
        consumers[constant].append((consumer, val))
    for constant, several in consumers.items():
        node = nodes[constant]
        first = _marks(several[0][1], stay)
        for consumer, val in several[1:]:
            if _marks(val, stay) == first:
                continue
            with module.graph.inserting_before(nodes[consumer]):
                own = _own_constant(module, node, nodes[consumer], val, stay)
            nodes[consumer].replace_input_with(node, own)


def _marks(val: Val, stay: Survivors) -> tuple[tuple[int, bytes], ...]:
    return tuple((d, stay.mask(val, d).tobytes()) for d in sorted(val.dims) if stay.changed(val, d))


def _own_constant(module: GraphModule, node: Node, consumer: Node, val: Val, stay: Survivors) -> Node:
    if node.op == "get_attr":
        name = f"{node.name}_of_{consumer.name}"
        module.register_buffer(name, _selected(attribute(module, str(node.target)).detach(), val, stay).clone())
        return module.graph.get_attr(name)
    own = module.graph.node_copy(node, lambda n: n)
    sizes = [
        stay.count(val, d) if isinstance(size, int) and stay.changed(val, d) else size
        for d, size in enumerate(node.args[0 if isinstance(node.args[0], (list, tuple)) else 1])  # type: ignore[arg-type]
    ]
    own.update_arg(0 if isinstance(node.args[0], (list, tuple)) else 1, sizes)
    return own


def _keep_the_caller_s_input(module: GraphModule, program: Program, stay: Survivors, name: str) -> None:
    """An input is as wide as before, so that the caller changes nothing: what survives is picked from what comes in."""
    val = program.vals[name]
    given = next(node for node in module.graph.nodes if node.name == name)
    assert isinstance(val, Val)
    for d in val.dims:
        if not stay.changed(val, d):
            continue
        module.register_buffer(f"{name}_kept_{d}", torch.from_numpy(stay.indices(val, d)))
        users = list(given.users)
        with module.graph.inserting_after(given):
            kept = module.graph.get_attr(f"{name}_kept_{d}")
        with module.graph.inserting_after(kept):
            picked = module.graph.call_function(aten.index_select.default, (given, d, kept))
        for user in users:
            user.replace_input_with(given, picked)
        given = picked


def _keep_the_caller_s_state(module: GraphModule, program: Program, stay: Survivors, name: str, position: int) -> None:
    """A state comes out as wide as it goes in: with zeros in the places of what is gone."""
    val = program.vals[name]
    output = next(node for node in module.graph.nodes if node.op == "output")
    assert isinstance(val, Val)
    for d in val.dims:
        if not stay.changed(val, d):
            continue
        indices = torch.from_numpy(stay.indices(val, d))
        places = torch.full((val.shape[d],), len(indices))  # the zero that is put behind what survives
        places[indices] = torch.arange(len(indices))
        module.register_buffer(f"{name}_places_{d}", places)
        assert isinstance(output.args[0], tuple)
        outputs = list(output.args[0])
        with module.graph.inserting_before(output):
            padded = module.graph.call_function(
                aten.constant_pad_nd.default, (outputs[position], [*[0, 0] * (val.rank - 1 - d), 0, 1], 0.0)
            )
            outputs[position] = module.graph.call_function(
                aten.index_select.default, (padded, d, module.graph.get_attr(f"{name}_places_{d}"))
            )
        output.args = (tuple(outputs),)


def prune(graph: Graph, analysis: Analysis, removed: Mapping[str, Sequence[int]]) -> Pruned:
    """A copy of a graph without the removed units.

    Args:
        graph: the graph that was analysed, or a copy of it with other weights; its module is not touched.
        analysis: what `analyse` found in it.
        removed: group -> units to remove, each in [0, units).

    Returns:
        The smaller graph, and which indices stayed. Parameters keep their names, dtype, `requires_grad` and ties.

    Raises:
        UnknownName: a group that the analysis has not.
        PlanError: units that cannot be removed.
    """
    stay = survivors(analysis, removed)
    program: Program = analysis.ids.program
    result = _copy_but_for(graph, program, stay)
    module = result.module
    originals = {node.name: node for node in program.module.graph.nodes}
    _part_constants(module, program, stay)
    kept = _shrink_parameters(module, program, stay)
    if kept:
        for node in list(module.graph.nodes):
            original = originals.get(node.name)
            if node.op == "call_function" and original is not None and rule_name(node.target) in EDITS:
                EDITS[rule_name(node.target)](Edit(program, stay, module, node, original))
        for name in (*program.state, *program.idle):
            _keep_the_caller_s_input(module, program, stay, name)
        for name, position in program.state.items():
            _keep_the_caller_s_state(module, program, stay, name, position)
        for node in module.graph.nodes:
            for stale in _STALE:
                node.meta.pop(stale, None)
        module.graph.lint()
        module.recompile()
    return Pruned(result, kept)


def mask(graph: Graph, analysis: Analysis, removed: Mapping[str, Sequence[int]]) -> Graph:
    """A copy in which the parameters of the removed units are zero, at the same shapes: quick, and exact for exact groups.

    Contracted dimensions are zeroed too, so that an activation with `f(0) != 0` does not leak.
    """
    survivors(analysis, removed)
    result = graph.copy()
    parameters = dict(result.module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, units in removed.items():
            for (parameter, dim), unit_of in analysis.groups[name].unit_of.items():
                if parameter in parameters:
                    gone = torch.from_numpy(np.flatnonzero(np.isin(unit_of, np.asarray(list(units), np.int64))))
                    parameters[parameter].index_fill_(dim, gone.to(parameters[parameter].device), 0.0)
    return result


def masked_reference(
    graph: Graph, analysis: Analysis, removed: Mapping[str, Sequence[int]], flat_inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The outputs of the original program if the removed units were absent: every element of theirs is zero, in every value, and
    statistics run over the survivors.

    Args:
        graph: the graph that was analysed.
        analysis: what `analyse` found in it.
        removed: group -> units.
        flat_inputs: any batch; other axes as in the example.

    Returns:
        The flat outputs, which surgery must reproduce.
    """
    assert analysis.ids.program.module is graph.module
    return run_masked(analysis.ids.program, survivors(analysis, removed), flat_inputs)
