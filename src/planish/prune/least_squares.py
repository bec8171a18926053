"""Ridge regression of a linear operator's output on its input, from moments; rows are output positions of a convolution, or tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

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
    """How to read `node` as a linear map of its input, or None where it is no convolution or linear map with parameters of its own.

    Args:
        node: any node of a captured module.
        parameters: of that module, by every name.
    """
    if node.op != "call_function" or node.target not in _SIGNATURES:
        return None
    given: dict[str, Any] = dict(zip(_SIGNATURES[node.target], node.args, strict=False))
    given.update(node.kwargs)
    weight, bias = given["weight"], given.get("bias")
    if any(not isinstance(a, Node) or str(a.target) not in parameters for a in (weight, bias) if a is not None) or given.get("transposed"):
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


class Moments:
    """Sums over rows of x x^T, x y^T and their means, per group: enough for every regression of y on a subset of x.

    Args:
        groups: independent systems g.
        columns: inputs c of each.
        outputs: outputs o of each; 0 where only the input's moments are wanted.
    """

    def __init__(self, groups: int, columns: int, outputs: int = 0) -> None:
        self.rows = 0
        self.sum_x = torch.zeros(groups, columns, dtype=torch.float64)
        self.sum_y = torch.zeros(groups, outputs, dtype=torch.float64)
        self.sum_yy = torch.zeros(groups, outputs, dtype=torch.float64)
        self.gram = torch.zeros(groups, columns, columns)
        self.cross = torch.zeros(groups, columns, outputs)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows: x is [groups, rows, columns], y is [rows, groups * outputs] in the order of the weight's output dimension."""
        x = x.float()
        self.rows += x.shape[1]
        self.sum_x += x.sum(1, dtype=torch.float64)
        self.gram += x.transpose(1, 2) @ x
        if y is not None:
            y = y.float().reshape(len(y), len(x), -1).movedim(1, 0)
            self.sum_y += y.sum(1, dtype=torch.float64)
            self.sum_yy += y.square().sum(1, dtype=torch.float64)
            self.cross += x.transpose(1, 2) @ y

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        total = Moments(*self.cross.shape)
        total.rows = self.rows + other.rows
        for name in ("sum_x", "sum_y", "sum_yy", "gram", "cross"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def second(self, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(x x^T [g, c, c], x y^T [g, c, o], y^2 [g, o]) per row, about the means where `centered`."""
        gram, cross = self.gram.double() / self.rows, self.cross.double() / self.rows
        power = self.sum_yy / self.rows
        if centered:
            x, y = self.sum_x / self.rows, self.sum_y / self.rows
            gram = gram - x[:, :, None] * x[:, None, :]
            cross = cross - x[:, :, None] * y[:, None, :]
            power = power - y.square()
        return gram, cross, power

    def offset(self, weight: Tensor) -> Tensor:
        """The intercept that goes with a weight [g, o, c]: E[y] - W E[x], [g * o]."""
        return ((self.sum_y - (weight @ self.sum_x[:, :, None])[:, :, 0]) / self.rows).reshape(-1)

    def error(self, weight: Tensor, offset: Tensor | None = None) -> float:
        """E|y - W x - b|^2 summed over outputs.

        Args:
            weight: [g, o, c].
            offset: b, [g * o]; None: no intercept.
        """
        gram, cross, power = self.second(centered=offset is not None)
        explained = 2 * (weight * cross.transpose(1, 2)).sum(2) - ((weight @ gram) * weight).sum(2)
        error = (power - explained).sum().clamp_min(0)
        return float(error if offset is None else error + (self.offset(weight) - offset).square().sum())


def fit(train: Moments, held_out: Moments | None, current: Tensor, strengths: Sequence[float], centered: bool) -> Tensor:
    """The ridge solution at the strength that predicts held-out rows best, from all rows; `current` where none is better.

    Args:
        train: moments that each strength is tried on.
        held_out: moments that it is judged on; None where there are too few samples: then the first strength is taken.
        current: [g, o, c], what the weights are pulled towards.
        strengths: see `ridge`.
        centered: whether the intercept is free.

    Returns:
        [g, o, c], in double precision.
    """
    if held_out is None:
        return ridge(*train.second(centered)[:2], current, strengths[0])
    gram, cross, _ = train.second(centered)
    best, least = None, held_out.error(current, train.offset(current) if centered else None)
    for strength in strengths:
        solved = ridge(gram, cross, current, strength)
        error = held_out.error(solved, train.offset(solved) if centered else None)
        if error < least:
            best, least = strength, error
    return current if best is None else ridge(*(train + held_out).second(centered)[:2], current, best)


def ridge(gram: Tensor, cross: Tensor, current: Tensor, strength: float) -> Tensor:
    """argmin over W of E|y - W x|^2 + lambda |W - current|^2, lambda = strength times the mean diagonal of the Gram matrix.

    Args:
        gram: E[x x^T], [g, c, c].
        cross: E[x y^T], [g, c, o].
        current: [g, o, c], what the weights are pulled towards.
        strength: above 0; the smaller, the closer to plain least squares.

    Returns:
        [g, o, c], in double precision; `current` for a group whose inputs are all zero.
    """
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    penalty = strength * scale.clamp_min(torch.finfo(torch.float32).tiny)
    system = gram + torch.diag_embed(penalty[:, None].expand(-1, gram.shape[1]))
    right = cross + penalty[:, None, None] * current.double().transpose(1, 2)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):  # round-off in a float32 Gram matrix of collinear inputs: a stronger pull makes it definite
        return ridge(gram, cross, current, strength * 10) if strength < 1 else current.double()
    solution = torch.cholesky_solve(right, factor).transpose(1, 2)
    return torch.where((scale > 0)[:, None, None], solution, current.double())
