"""The parts of an operator that quantization speaks of: its activations, its weight and the dimension of its outputs, its bias."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.modes import short_name

aten = torch.ops.aten
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
MATMULS = frozenset({"matmul", "bmm", "mm"})
RECURRENT = {"lstm": "lstm", "dynamic_lstm": "lstm", "gru": "gru"}
"""Short name of an operator that runs over a sequence -> its kind."""


@dataclass(frozen=True)
class Parts:
    """Positions among `node.args`.

    Args:
        kind: "conv", "conv_transpose", "linear", "matmul", "attention", "embedding", "lstm" or "gru".
        activations: what gets activation quantizers.
        weight: the parameter, or a list that begins with the matrices of a recurrent layer; None where both operands are activations.
        axis: the weight's dimension that has a scale per index: outputs, or rows of an embedding.
        bias: position of the bias, where there may be one.
    """

    kind: str
    activations: tuple[int, ...]
    weight: int | None = None
    axis: int = 0
    bias: int | None = None


def parts_of(node: Node) -> Parts | str:
    """The parts of an operator, or why it has no form but floating point."""
    name = short_name(node)
    if name in CONVOLUTIONS:
        is_transposed = name == "convolution" and node.args[6]
        return _weighted(node, Parts("conv_transpose", (0,), 1, 1, 2) if is_transposed else Parts("conv", (0,), 1, 0, 2))
    if name.startswith("conv_transpose"):
        return _weighted(node, Parts("conv_transpose", (0,), 1, 1, 2))
    if name == "linear":
        return _weighted(node, Parts("linear", (0,), 1, 0, 2))
    if name == "addmm" and node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1:
        return _weighted(node, Parts("linear", (1,), 2, 1, 0))
    if name == "embedding":
        return _weighted(node, Parts("embedding", (), 0, 0))
    if name in RECURRENT:
        if len(node.args[2]) not in (2, 4):  # type: ignore[arg-type]
            return "an LSTM that projects its state has no int8 kernel"
        return _weighted(node, Parts(RECURRENT[name], (0,), 2))
    if name in MATMULS:
        left, right = node.args[0], node.args[1]
        if is_parameter(left):
            return "its left operand is a parameter"
        if is_parameter(right):
            assert isinstance(right, Node)
            held = parameter_of(right)
            assert held is not None and held.graph.owning_module is not None
            axis = tensor_of(held.graph.owning_module, held).dim() - 1
            return Parts("matmul", (0,), 1, axis) if axis > 0 else "its right operand is a vector"
        return Parts("matmul", (0, 1))
    if name in ("scaled_dot_product_attention", "static_attention"):
        is_grouped = node.kwargs.get("enable_gqa", False)
        return "attention whose queries share keys has no int8 form" if is_grouped else Parts("attention", (0, 1, 2))
    return f"{name or node.op} has no int8 kernel"


def steps_of(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Stride and dilation of a transposed convolution, which may be one number for all axes, and its groups."""
    at = (3, 5, 8) if short_name(node) == "convolution" else (3, 7, 6)
    stride, dilation, groups = (node.args[i] if len(node.args) > i else 1 for i in at)
    spread = [tuple(value) if isinstance(value, (list, tuple)) else (value,) for value in (stride, dilation)]
    return spread[0], spread[1], int(groups)  # type: ignore[arg-type]


def known_parts(node: Node) -> Parts:
    """The parts of an operator that is known to have a form."""
    parts = parts_of(node)
    assert isinstance(parts, Parts), parts
    return parts


def _weighted(node: Node, parts: Parts) -> Parts | str:
    return parts if all(map(is_parameter, weights_of(node, parts))) else "its weight is computed by the program, not a parameter"


def weights_of(node: Node, parts: Parts) -> tuple[Node, ...]:
    """The values that an operator's matrices are read from, rounded or not: one, or those of a layer's inputs and of its hidden state."""
    value = node.args[parts.weight] if parts.weight is not None else ()
    found = tuple(value[:2]) if isinstance(value, (list, tuple)) else (value,)
    assert all(isinstance(weight, Node) for weight in found), node.format_node()
    return found


def is_parameter(value: object) -> bool:
    """Whether an argument is a parameter or a buffer, read as it is or rounded."""
    return isinstance(value, Node) and parameter_of(value) is not None


def parameter_of(value: Node) -> Node | None:
    """The parameter or buffer that a value is, rounded or not; None for a value that the program computes."""
    is_turned = (
        value.target is aten.t.default and isinstance(value.args[0], Node) and short_name(value.args[0]) == "fake_quantize_per_group"
    )
    if is_turned or short_name(value).startswith("fake_"):
        source = value.args[0]
        assert isinstance(source, Node), value.format_node()
        if source.target is aten.t.default and isinstance(source.args[0], Node):
            source = source.args[0]
        return parameter_of(source)
    return value if value.op == "get_attr" else None


def bias_of(node: Node) -> Node | None:
    """The node of an operator's bias parameter, or None."""
    parts = parts_of(node)
    position = parts.bias if isinstance(parts, Parts) else 2
    bias = node.args[position] if position is not None and len(node.args) > position else node.kwargs.get("bias")
    return bias if isinstance(bias, Node) and bias.op == "get_attr" else None


def tensor_of(module: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a node fetches, detached."""
    found: Tensor = operator.attrgetter(str(node.target))(module)
    return found.detach()
