"""Convolutions and linear maps as products of a matrix with rows of columns: output positions of a convolution, or tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.graph.parts import parameter_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """A convolution or linear map whose weight is a parameter: what is needed to read its input as rows of columns.

    Args:
        node: the fx node.
        weight: the parameter's name; the weight is [out, in / groups, *kernel].
        bias: the bias's name, or None.
        stride, dilation: per spatial dimension; empty for a linear map.
        padding: (before, after) per spatial dimension.
        groups: independent systems.
    """

    node: Node
    weight: str
    bias: str | None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def draw(self, output: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random positions of `output`, at most `rows` (all of them where it has no more), as index tensors for all axes but the channel's."""
        sizes = [size for axis, size in enumerate(output.shape) if axis != self.channel_axis(output)]
        total = math.prod(sizes)
        chosen = torch.arange(total) if total <= rows else torch.randint(total, (rows,), generator=generator)
        return torch.unravel_index(chosen, sizes)

    def channel_axis(self, output: Tensor) -> int:
        """The axis of the output channels."""
        return 1 if self.stride else output.dim() - 1

    def rows(self, output: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        """[rows, out]: an output, or something in its shape, at the drawn positions."""
        return output.movedim(self.channel_axis(output), -1)[positions]

    def columns(self, value: Tensor, weight: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        """[groups, rows, columns]: the patch that each drawn position reads, columns in the order of the flattened weight."""
        if not self.stride:
            return value[positions][None]
        value = torch.nn.functional.pad(value, [side for pair in reversed(self.padding) for side in pair])
        spatial, kernel = value.stride()[2:], weight.shape[2:]
        shape = [
            (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(value.shape[2:], kernel, self.stride, self.dilation, strict=True)
        ]
        steps = [of * s for of, s in zip(spatial, self.stride, strict=True)] + [
            of * d for of, d in zip(spatial, self.dilation, strict=True)
        ]
        patches = value.as_strided((*value.shape[:2], *shape, *kernel), (*value.stride()[:2], *steps))
        rows = patches.movedim(1, 1 + len(kernel))[positions]  # [rows, in, *kernel]
        return rows.reshape(len(rows), self.groups, -1).movedim(1, 0)


def contraction(node: Node, parameters: Mapping[str, Tensor]) -> Contraction | None:
    """How to read `node` as a linear map of its input, or None where it is no convolution or linear map with parameters of its own, rounded or not.

    Args:
        node: any node of a captured module.
        parameters: of that module, by every name.
    """
    if node.op != "call_function" or node.target not in _SIGNATURES:
        return None
    given: dict[str, Any] = dict(zip(_SIGNATURES[node.target], node.args, strict=False))
    given.update(node.kwargs)
    weight, bias = given["weight"], given.get("bias")
    if isinstance(weight, Node):
        weight = parameter_of(weight)
    if (
        weight is None
        or any(not isinstance(a, Node) or str(a.target) not in parameters for a in (weight, bias) if a is not None)
        or given.get("transposed")
    ):
        return None
    names = str(weight.target), str(bias.target) if bias is not None else None
    if node.target is aten.linear.default:
        return Contraction(node, *names)
    kernel = parameters[names[0]].shape[2:]
    dims = len(kernel)
    stride, dilation = _spread(given.get("stride", 1), dims), _spread(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in _spread(padding, dims))
    return Contraction(node, *names, stride, sides, dilation, int(given.get("groups", 1)))


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    aten.linear.default: ("input", "weight", "bias"),
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.convolution.default: ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"),
}
