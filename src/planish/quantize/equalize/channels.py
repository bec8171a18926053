"""Input and output channels of weights: their ranges, and multiplying each with a factor of its own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.interpret import attribute
from planish.graph.modes import short_name
from planish.graph.parts import Parts, bias_of, parts_of, tensor_of

POINTWISE = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_", "dropout", "dropout_", "alias", "contiguous", "clone"})
"""Operators with f(s x) = s f(x) for every number and s > 0 (in eval mode). ReLU6 is none: its upper bound stays where it is."""


def weight_node(node: Node) -> Node | None:
    """The parameter of a convolution or linear map whose channels can be scaled; None for anything else."""
    parts = parts_of(node)
    if not isinstance(parts, Parts) or parts.weight is None or parts.kind not in ("conv", "linear", "matmul"):
        return None
    weight = node.args[parts.weight]
    assert isinstance(weight, Node)
    return weight if weight.op == "get_attr" and (parts.kind != "matmul" or parts.axis == 1) else None


def is_read_by(module: GraphModule, parameter: Node, readers: Collection[Node]) -> bool:
    """Whether nobody else reads a parameter, under this name or another."""
    value = attribute(module, str(parameter.target))
    same = [node for node in module.graph.nodes if node.op == "get_attr" and attribute(module, str(node.target)) is value]
    return all(user in readers for node in same for user in node.users)


def input_ranges(module: GraphModule, node: Node) -> Tensor:
    """The largest magnitude of a weight along each input channel of its operator, [inputs]."""
    weight = _by_groups(module, node).abs()
    return weight.amax([1, *range(3, weight.dim())]).flatten()


def output_ranges(module: GraphModule, node: Node) -> Tensor:
    """The largest magnitude of a weight along each output channel of its operator, [outputs]."""
    return _by_groups(module, node).abs().flatten(2).amax(2).flatten()


def scale_inputs_(module: GraphModule, node: Node, factors: Tensor) -> None:
    """Multiplies a weight along its input channels, in place: the operator then wants an input that is divided by `factors`."""
    weight = _by_groups(module, node)
    weight.mul_(factors.view(len(weight), 1, -1, *[1] * (weight.dim() - 3)))


def scale_outputs_(module: GraphModule, node: Node, factors: Tensor) -> None:
    """Multiplies a weight and its bias along the output channels, in place."""
    weight = _by_groups(module, node)
    weight.mul_(factors.view(len(weight), -1, *[1] * (weight.dim() - 2)))
    bias = bias_of(node)
    if bias is not None:
        tensor_of(module, bias).mul_(factors)


def _by_groups(module: GraphModule, node: Node) -> Tensor:
    """The weight as [groups, outputs per group, inputs per group, ...], a view of the parameter."""
    weight, parts = weight_node(node), parts_of(node)
    assert weight is not None and isinstance(parts, Parts)
    values = tensor_of(module, weight)
    position = 8 if short_name(node) == "convolution" else 6
    groups = node.args[position] if parts.kind == "conv" and len(node.args) > position else 1
    assert isinstance(groups, int)
    grouped: Tensor = torch.unflatten(values.t() if parts.axis else values, 0, (groups, -1))
    return grouped
