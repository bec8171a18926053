"""Schemes whose operators stand alone: weights rounded where they are read, activations left in float or rounded in each call's range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import pad

from planish.graph.fake_quantize import fake_quantize_dynamic, fake_quantize_per_group
from planish.graph.parts import Parts, bias_of, parts_of, tensor_of
from planish.quantize.arithmetic import TINY_RANGE, Grid, Quantizer, fake_quantize, int8_weights
from planish.quantize.contract import Observer, Scheme, group_size
from planish.quantize.insert import insert, own_values
from planish.quantize.placement import Read
from planish.quantize.subjects import unsupported
from planish.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupQuantizer:
    """Grids of a matrix `[rows, columns]`, one for each `group` columns of a row.

    Args:
        grid: the integers.
        group: how many columns share a scale; the last group of a row may be shorter.
        scale: float32, [rows, groups].
        zero_point: int32, [rows, groups].
    """

    grid: Grid
    group: int
    scale: Tensor
    zero_point: Tensor

    def rounded(self, matrix: Tensor) -> Tensor:
        """The matrix on its grids, in float."""
        return fake_quantize_per_group(matrix, self.scale, self.zero_point, self.group, self.grid.low, self.grid.high)


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
    weight = weight_of(module, node)
    if not bool(torch.isfinite(weight).all()):
        return "its weight is not finite"
    if float(weight.abs().max()) <= TINY_RANGE:
        return "its weight is zero"
    bias = bias_of(node)
    return "its bias is not finite" if bias is not None and not bool(torch.isfinite(tensor_of(module, bias)).all()) else ""


def weight_of(module: GraphModule, node: Node) -> Tensor:
    """The weight of an operator that has one."""
    return tensor_of(module, _argument(node, _parts(node).weight))


def local_quantizer(
    weight: Tensor, parts: Parts, scheme: Scheme, target: Target, make: Callable[[Grid], Observer]
) -> Quantizer | GroupQuantizer:
    """The quantizer of a weight: grouped along its inputs where the scheme says so, else per output (per row of an embedding)."""
    if scheme.group and parts.kind != "embedding":
        matrix = weight if parts.axis == 0 else weight.t()
        return group_quantizer(matrix, Grid(0, 2**scheme.weight_bits - 1), group_size(scheme.group, matrix.shape[1]), make)
    watcher = make(int8_weights(scheme.largest_weight(target.weight_range), parts.axis))
    watcher.update(weight)
    return watcher.quantizer()


def rounded(weight: Tensor, parts: Parts, quantizer: Quantizer | GroupQuantizer) -> Tensor:
    """A weight on its grid, in float, in its own layout."""
    if isinstance(quantizer, Quantizer):
        return fake_quantize(weight, quantizer)
    return quantizer.rounded(weight) if parts.axis == 0 else quantizer.rounded(weight.t()).t()


def quantize_locally(module: GraphModule, chosen: Mapping[str, Scheme], target: Target, make: Callable[[Grid], Observer]) -> None:
    """Puts the quantizers of schemes without static activations into a program. The caller recompiles.

    A weight that several operators of one kind read in one scheme is rounded once; an activation likewise.

    Args:
        module: changed in place.
        chosen: fx node name -> scheme, each of which `why_not_locally` allows.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    readers: dict[tuple[Node, str, str, int], list[Node]] = {}
    dynamic: dict[Node, list[Node]] = {}
    for name, scheme in chosen.items():
        node = by_name[name]
        parts = _parts(node)
        readers.setdefault((_argument(node, parts.weight), scheme.name, parts.kind, parts.axis), []).append(node)
        if scheme.activations == "dynamic":
            for position in parts.activations:
                dynamic.setdefault(_argument(node, position), []).append(node)
    for (weight, *_), nodes in readers.items():
        parts = _parts(nodes[0])
        quantizer = local_quantizer(tensor_of(module, weight), parts, chosen[nodes[0].name], target, make)
        _insert_weight(module, weight, nodes, quantizer)
    for value, nodes in dynamic.items():
        with module.graph.inserting_before(min(nodes)):
            rounded_value = module.graph.call_function(fake_quantize_dynamic, (value,))
        rounded_value.meta = own_values(value)
        for node in nodes:
            for position in _parts(node).activations:
                node.update_arg(position, rounded_value)


def _insert_weight(module: GraphModule, weight: Node, nodes: list[Node], quantizer: Quantizer | GroupQuantizer) -> None:
    parts = _parts(nodes[0])
    reads = [Read(node.name, position) for node in nodes if (position := _parts(node).weight) is not None]
    if isinstance(quantizer, Quantizer):
        insert(module, weight.name, reads, quantizer)
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
    for read in reads:
        next(node for node in nodes if node.name == read.node).update_arg(read.position, value)


def _parts(node: Node) -> Parts:
    parts = parts_of(node)
    assert isinstance(parts, Parts), parts
    return parts


def _argument(node: Node, position: int | None) -> Node:
    assert position is not None
    value = node.args[position]
    assert isinstance(value, Node), node.format_node()
    return value
