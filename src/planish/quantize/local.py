"""Schemes whose operators stand alone: weights rounded where they are read, activations left in float or rounded in each call's range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import pad

from planish.graph.attention import static_attention
from planish.graph.fake_quantize import dynamic_lstm, fake_codebook, fake_quantize_dynamic, fake_quantize_per_group
from planish.graph.parts import RECURRENT, Parts, known_parts, weights_of
from planish.quantize.arithmetic import Grid, GroupQuantizer, Quantizer, fake_quantize, int8_weights
from planish.quantize.codebook import CodebookQuantizer, fit_codebook
from planish.quantize.contract import Observer, Scheme, group_size
from planish.quantize.insert import insert, own_values, replace_argument, unfit_parameters
from planish.quantize.placement import Read
from planish.quantize.subjects import unsupported
from planish.target import Target

aten = torch.ops.aten


WeightQuantizer = Quantizer | GroupQuantizer | CodebookQuantizer


def group_quantizer(matrix: Tensor, grid: Grid, group: int, make: Callable[[Grid], Observer]) -> GroupQuantizer:
    """The quantizer of a matrix `[rows, columns]` whose groups each get the scale that an observer chooses."""
    rows, columns = matrix.shape
    count = -(-columns // group)
    watcher = make(Grid(grid.low, grid.high, grid.symmetric, axis=0))
    watcher.update(pad(matrix, (0, count * group - columns)).reshape(rows * count, group))
    found = watcher.quantizer()
    return GroupQuantizer(grid, group, found.scale.view(rows, count), found.zero_point.view(rows, count))


def why_not_locally(module: GraphModule, node: Node, scheme: Scheme) -> str:
    """Why an operator cannot take a scheme that has no static activations, or "" where it can."""
    if reason := unsupported(node, scheme):
        return reason
    parameters = [value for value in node.all_input_nodes if value.op == "get_attr"]
    return unfit_parameters(module, weights_of(node, known_parts(node)), parameters)


def form_of(node: Node, scheme: Scheme) -> Callable[..., Any]:
    """What computes an operator in a scheme, given rounded weights and activations: itself, unless it rounds something between its steps."""
    assert callable(node.target), node.format_node()
    kind = known_parts(node).kind
    if (kind, scheme.activations) == ("attention", "static"):
        return static_attention
    return dynamic_lstm if (kind, scheme.activations) == ("lstm", "dynamic") else node.target


def local_quantizer(weight: Tensor, parts: Parts, scheme: Scheme, target: Target, make: Callable[[Grid], Observer]) -> WeightQuantizer:
    """The quantizer of a weight: grouped along its inputs where the scheme says so, else per output (per row of an embedding or a recurrent layer)."""
    if scheme.codebook:
        return fit_codebook(weight, scheme.codebook, 2**scheme.weight_bits)
    if scheme.group and parts.kind != "embedding" and parts.kind not in RECURRENT:
        matrix = weight if parts.axis == 0 else weight.t()
        return group_quantizer(matrix, Grid(0, 2**scheme.weight_bits - 1), group_size(scheme.group, matrix.shape[1]), make)
    watcher = make(int8_weights(scheme.largest_weight(target.weight_range), parts.axis))
    watcher.update(weight)
    return watcher.quantizer()


def rounded(weight: Tensor, parts: Parts, quantizer: WeightQuantizer) -> Tensor:
    """A weight on its grid, in float, in its own layout."""
    if isinstance(quantizer, Quantizer):
        return fake_quantize(weight, quantizer)
    if isinstance(quantizer, CodebookQuantizer):
        return quantizer.rounded(weight)
    return quantizer.rounded(weight) if parts.axis == 0 else quantizer.rounded(weight.t()).t()


def quantize_locally(module: GraphModule, chosen: Mapping[str, Scheme], choose: Callable[[Node, Parts, Scheme], WeightQuantizer]) -> None:
    """Puts the quantizers of schemes without static activations into a program. The caller recompiles.

    A weight that several operators of one kind read in one scheme is rounded once; an activation likewise.

    Args:
        module: changed in place.
        chosen: fx node name -> scheme, each of which `why_not_locally` allows.
        choose: the quantizer of a weight (its node) for an operator with these parts in a scheme.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    readers: dict[tuple[Node, str, str, int], list[Node]] = {}
    dynamic: dict[Node, list[Node]] = {}
    for name, scheme in chosen.items():
        node = by_name[name]
        parts = known_parts(node)
        for weight in weights_of(node, parts):
            readers.setdefault((weight, scheme.name, parts.kind, parts.axis), []).append(node)
        if scheme.activations == "dynamic":
            for position in parts.activations:
                dynamic.setdefault(_argument(node, position), []).append(node)
    for (weight, *_), nodes in readers.items():
        parts = known_parts(nodes[0])
        _insert_weight(module, weight, nodes, choose(weight, parts, chosen[nodes[0].name]))
    for value, nodes in dynamic.items():
        with module.graph.inserting_before(min(nodes)):
            rounded_value = module.graph.call_function(fake_quantize_dynamic, (value,))
        rounded_value.meta = own_values(value)
        for node in nodes:
            for position in known_parts(node).activations:
                node.update_arg(position, rounded_value)
    for name, scheme in chosen.items():
        by_name[name].target = form_of(by_name[name], scheme)


def _insert_weight(module: GraphModule, weight: Node, nodes: list[Node], quantizer: WeightQuantizer) -> None:
    parts = known_parts(nodes[0])
    assert parts.weight is not None
    if isinstance(quantizer, Quantizer):
        insert(module, weight.name, [Read(node.name, parts.weight) for node in nodes], quantizer)
        return
    if isinstance(quantizer, CodebookQuantizer):
        module.register_buffer(f"{weight.name}_codebook", quantizer.values.clone())
        with module.graph.inserting_before(min(nodes)):
            values = module.graph.get_attr(f"{weight.name}_codebook")
            found = module.graph.call_function(fake_codebook, (weight, values))
        found.meta = own_values(weight)
        for node in nodes:
            replace_argument(node, parts.weight, weight, found)
        return
    names = [f"{weight.name}_group_scale", f"{weight.name}_group_zero_point"]
    for name, tensor in zip(names, (quantizer.scale, quantizer.zero_point), strict=True):
        module.register_buffer(name, tensor.clone())
    graph = module.graph
    with graph.inserting_before(min(nodes)):
        scale, zero_point = (graph.get_attr(name) for name in names)
        value = weight if parts.axis == 0 else graph.call_function(aten.t.default, (weight,))
        grid = quantizer.grid
        value = graph.call_function(fake_quantize_per_group, (value, scale, zero_point, quantizer.group, grid.low, grid.high))
        if parts.axis:
            value = graph.call_function(aten.t.default, (value,))
    value.meta = own_values(weight)
    for node in nodes:
        replace_argument(node, parts.weight, weight, value)


def _argument(node: Node, position: int) -> Node:
    value = node.args[position]
    assert isinstance(value, Node), node.format_node()
    return value
