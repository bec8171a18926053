"""A graph net that holds its graph: the axis of its nodes is as long as that graph has nodes, and what it makes of the edges is a constant."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from planish.graph.facts import arguments, attribute, rule_name
from planish.graph.program import CREATED

_SCATTERING = frozenset({"scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "index_put"})
_KEEPS_STATISTICS = frozenset({"batch_norm", "instance_norm"})
_CHEAP = CREATED | frozenset(
    {
        *("arange", "expand", "expand_as", "repeat", "clone", "detach"),
        *("view", "flatten", "select", "slice", "unbind", "unsqueeze"),
    }
)
"""Operators on constants that are left where they are: they cost nothing, and what they give may be larger than what they take."""


def graph_axes(program: torch.export.ExportedProgram) -> set[str] | None:
    """The symbols of the axes along which a program scatters by indices that it holds; None where it scatters by no such indices.

    Args:
        program: as exported, with symbols for the sizes of its values.
    """
    given = {str(name) for name in program.graph_signature.user_inputs}
    axes: set[str] | None = None
    for node in program.graph.nodes:
        if node.op != "call_function" or rule_name(node.target) not in _SCATTERING:
            continue
        named, shape = arguments(node), node.meta["val"].shape
        by_dim = dict(enumerate(named["indices"])) if "indices" in named else {named["dim"]: named["index"]}
        by_dim = {dim: index for dim, index in by_dim.items() if index is not None}
        sources = _sources(list(by_dim.values()))
        if sources & given or not sources:
            continue
        lengths = [shape[dim] for dim in by_dim if isinstance(shape[dim], torch.SymInt)]
        axes = (axes or set()) | {str(symbol) for length in lengths for symbol in length.node.expr.free_symbols}
    return axes


def _sources(nodes: list[fx.Node]) -> set[str]:
    """The placeholders (inputs, and what the program holds) from whose values, rather than sizes, these are computed."""
    seen: set[fx.Node] = set()
    stack = nodes
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack += _read(one)
    return {node.name for node in seen if node.op == "placeholder"}


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a node computes with; of others it only takes the size or the type."""
    name = rule_name(node.target) if node.op == "call_function" else ""
    if name.startswith(("new_", "sym_size", "sym_numel")) or name.endswith("_like"):
        return [other for other in node.all_input_nodes if other is not node.args[0]]
    return [node.args[0]] if name == "expand_as" and isinstance(node.args[0], fx.Node) else node.all_input_nodes


def fold_constants(module: fx.GraphModule) -> None:
    """Compute once what depends on buffers alone, in place: normalised edges, degrees, edges whose number is known from their values only.

    Parameters, and buffers that training changes, are no constants.

    Args:
        module: without in-place operators on values, and with its nodes' meta["val"].
    """
    changing = {
        str(read.target)
        for node in module.graph.nodes
        if node.op == "call_function" and (rule_name(node.target) in _KEEPS_STATISTICS or _is_impure(node))
        for read in node.all_input_nodes
        if read.op == "get_attr"
    }
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in changing:
                value = attribute(module, str(node.target))
                if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                    known[node] = value
            elif node.op == "call_function" and not _is_impure(node):
                _evaluate(node, known)
    kept: list[tuple[Tensor, fx.Node]] = []
    for node in list(module.graph.nodes):
        if node not in known:
            for constant in _dear(node.all_input_nodes, known):
                _replace(module, constant, known[constant], kept)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_impure(node: fx.Node) -> bool:
    """Whether an operator writes to an operand, or draws random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> None:
    """Add the value of a node to `known` if all that it takes is there; a tensor that is made like another needs its type alone."""
    made = rule_name(node.target).startswith("new_")

    def value(other: fx.Node) -> Any:
        return known[other] if other in known else torch.empty((), dtype=other.meta["val"].dtype)

    if all(other in known or (made and other is node.args[0]) for other in node.all_input_nodes):
        args, kwargs = map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        known[node] = node.target(*args, **kwargs)


def _dear(nodes: Iterable[fx.Node], known: dict[fx.Node, Any]) -> list[fx.Node]:
    """The constants that are worth keeping, among these values and what cheap operators make them of."""
    found: list[fx.Node] = []
    for node in nodes:
        if node in known and node.op == "call_function":
            found += [node] if _is_dear(node) else _dear(node.all_input_nodes, known)
    return found


def _is_dear(node: fx.Node) -> bool:
    """Whether what a node gives is kept, rather than what it takes; of several results each is."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and rule_name(source.target) not in _CHEAP
    return rule_name(node.target) not in _CHEAP


def _replace(module: fx.GraphModule, node: fx.Node, value: Any, kept: list[tuple[Tensor, fx.Node]]) -> None:
    """Put a constant, or the number that it is, in the place of a node; equal ones, as every layer makes them, are kept once."""
    if not isinstance(value, Tensor):
        for user in list(node.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda other: value if other is node else other)
        return
    same = next((read for other, read in kept if other.dtype == value.dtype and torch.equal(other, value)), None)
    if same is None:
        name = f"{node.name}_constant"
        module.register_buffer(name, value.clone())
        with module.graph.inserting_before(next(other for other in module.graph.nodes if other.op == "call_function")):
            same = module.graph.get_attr(name)
        kept.append((value, same))
    node.replace_all_uses_with(same)
