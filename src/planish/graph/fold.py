"""Folding batch norm into the convolution or linear map before it: the same function in eval mode, with fewer operators."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from planish.graph.graph import Graph
from planish.graph.interpret import attribute
from planish.graph.modes import short_name

aten = torch.ops.aten
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_GROUPS_ARGUMENT = 6  # of conv_transpose


def fold_batch_norm(graph: Graph) -> Graph:
    """A copy in which each batch norm that alone reads a convolution or linear map is part of its weight and bias.

    The weight keeps its parameter's name; the bias is named after it ("conv1.bias"). A weight that several operators read is
    folded into a parameter of its own ("conv1.weight_2") for each. A norm that normalises by the batch itself, or that has no
    such operator before it, stays.

    Args:
        graph: not changed; running statistics are used whatever its mode.
    """
    folded = graph.copy()
    module = folded.module
    for node in list(module.graph.nodes):
        if short_name(node) == "batch_norm" and node.args[3] is not None:
            _fold(module, node)
    module.graph.eliminate_dead_code()
    clean = fx.GraphModule(module, module.graph)
    for submodule in clean.modules():
        submodule.training = module.training
    folded.module = clean
    return folded


def _output_shape(name: str, weight: Tensor, groups: int) -> tuple[list[int], int]:
    """How a per-channel factor must be viewed to scale `weight`, and the number of output channels."""
    if name in _TRANSPOSED:
        return [1, -1, *[1] * (weight.dim() - 2)], weight.shape[1] * groups
    return [-1, *[1] * (weight.dim() - 1)], weight.shape[0]


def _constant(module: fx.GraphModule, node: object, default: float, size: int) -> Tensor:
    """The value of a norm's optional tensor argument, in double precision."""
    if isinstance(node, fx.Node):
        value: Tensor = attribute(module, str(node.target))
        return value.detach().double()
    return torch.full((size,), default, dtype=torch.float64)


def _fold(module: fx.GraphModule, norm: fx.Node) -> None:
    before = norm.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return
    name = short_name(before)
    if name not in (*_CONVOLUTIONS, *_TRANSPOSED, "linear"):
        return
    weight_node = before.args[1]
    bias_node = before.args[2] if len(before.args) > 2 else None
    if not isinstance(weight_node, fx.Node) or weight_node.op != "get_attr":
        return
    if bias_node is not None and (not isinstance(bias_node, fx.Node) or bias_node.op != "get_attr"):
        return
    groups = before.args[_GROUPS_ARGUMENT] if name in _TRANSPOSED and len(before.args) > _GROUPS_ARGUMENT else 1
    assert isinstance(groups, int)
    weight: Tensor = attribute(module, str(weight_node.target))
    view, channels = _output_shape(name, weight, groups)
    _, gamma, beta, mean, variance, *_ = norm.args
    epsilon = norm.args[7]
    assert isinstance(epsilon, float)
    scale = _constant(module, gamma, 1.0, channels) / torch.sqrt(_constant(module, variance, 1.0, channels) + epsilon)
    bias = _constant(module, bias_node, 0.0, channels)
    new_bias = (bias - _constant(module, mean, 0.0, channels)) * scale + _constant(module, beta, 0.0, channels)
    if name in _TRANSPOSED and groups > 1:
        blocks = weight.detach().double().reshape(groups, -1, *weight.shape[1:])
        new_weight = (blocks * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        new_weight = weight.detach().double() * scale.view(view)
    graph = module.graph
    weight_name = _name(module, str(weight_node.target), shared=_is_shared(module, weight_node, weight))
    bias_name = _name(module, f"{weight_name.rpartition('.')[0]}.bias".lstrip("."), shared=bias_node is None or len(bias_node.users) > 1)
    if bias_node is not None and len(bias_node.users) == 1 and not _is_shared(module, bias_node, attribute(module, str(bias_node.target))):
        bias_name = str(bias_node.target)
    _put(module, weight_name, new_weight.to(weight.dtype), weight.requires_grad)
    _put(module, bias_name, new_bias.to(weight.dtype), weight.requires_grad)
    with graph.inserting_before(before):
        weight_read = weight_node if weight_name == weight_node.target else graph.get_attr(weight_name)
        reuse = bias_node is not None and bias_name == bias_node.target
        bias_read = bias_node if reuse else graph.get_attr(bias_name)
    before.args = (before.args[0], weight_read, bias_read, *before.args[3:])
    norm.replace_all_uses_with(before)
    graph.erase_node(norm)


def _is_shared(module: fx.GraphModule, node: fx.Node, value: Tensor) -> bool:
    """Whether another node reads the same parameter, under this name or another."""
    readers = [
        user
        for other in module.graph.nodes
        if other.op == "get_attr" and (other is node or attribute(module, str(other.target)) is value)
        for user in other.users
    ]
    return len(readers) > 1


def _name(module: nn.Module, wanted: str, shared: bool) -> str:
    """`wanted`, or where that is taken by another, the first free "wanted_2", "wanted_3", ..."""
    if not shared:
        return wanted
    parent, _, leaf = wanted.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    if getattr(owner, leaf, None) is None:
        return wanted
    number = 2
    while getattr(owner, f"{leaf}_{number}", None) is not None:
        number += 1
    return f"{wanted}_{number}"


def _put(module: nn.Module, path: str, value: Tensor, requires_grad: bool) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=requires_grad))
