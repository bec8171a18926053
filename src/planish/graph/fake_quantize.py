"""Rounding to a grid, in float, with a straight-through gradient: one grid for a tensor, one for each call or step, one for each group of weights.

For a whole tensor `aten.fake_quantize_per_tensor_affine` branches on every value: on activations it takes 2 to 20 times as long as these four passes, and half
the time of a quantized ResNet's forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        rounded = (x * scale.reciprocal()).round_()
        inside = rounded.clamp(low - zero_point, high - zero_point)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(rounded == inside)
        return inside.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (is_inside,) = ctx.saved_tensors
        return gradients[0] * is_inside, None, None, None, None


def fake_quantize_per_tensor_affine(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`x` rounded to `scale * (integer - zero_point)` with integers in [low, high]; NaN stays NaN.

    Args:
        x: float32, any shape.
        scale: float32, one element.
        zero_point: int32, one element.
    """
    found: Tensor = _StraightThrough.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    return found


class _NearestStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_codebook(x: Tensor, values: Tensor) -> Tensor:
    """`x` with every number at the nearest of `values`.

    Args:
        x: float32, any shape.
        values: float32, ascending, [count].
    """
    found: Tensor = _NearestStraightThrough.apply(x, values)  # type: ignore[no-untyped-call]
    return found


class _DynamicStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / 255.0
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = (-low / scale).round().clamp(0, 255)
        return (x / scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """`x` rounded to the 256 steps that just cover its own range and zero, as ONNX's DynamicQuantizeLinear does.

    Args:
        x: float32, any shape; the range is that of the whole tensor.
    """
    found: Tensor = _DynamicStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return found


def along_groups(values: Tensor, group: int, size: int) -> Tensor:
    """Values of each group, `[rows, groups]`, repeated for every column: `[rows, size]`; the last group may be shorter."""
    return values.repeat_interleave(group, 1)[:, :size]


def fake_quantize_per_group(x: Tensor, scale: Tensor, zero_point: Tensor, group: int, low: int, high: int) -> Tensor:
    """A matrix rounded to a grid for every `group` columns of a row.

    Args:
        x: float32, [rows, columns].
        scale: float32, [rows, groups]; the last group may be shorter.
        zero_point: int32, [rows, groups].
    """
    scale, zero_point = (along_groups(values, group, x.shape[1]) for values in (scale, zero_point))
    found: Tensor = _StraightThrough.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    return found


def dynamic_lstm(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs and final states of an LSTM whose hidden state is rounded before every step, in the range that it has there.

    This is what ONNX Runtime's DynamicQuantizeLSTM computes in one thread, given an input and weights that are rounded already. In more threads it
    may give each a part of the batch, whose range is then its own, and smaller. Arguments are those of `aten.lstm.input`, of one layer and direction.

    Args:
        x: float32, [steps, batch, inputs], or batch before steps.
        states: hidden and cell state, [1, batch, hidden] each.
        weights: of the input and of the hidden state, [4 * hidden, ...] in torch's order of gates, and biases.
    """
    h, c = (state[0] for state in states)
    of_input, of_hidden, *biases = weights
    gates = linear(x, of_input, biases[0] + biases[1] if has_biases else None)
    outputs = []
    for step in gates.unbind(1 if batch_first else 0):
        i, f, g, o = (step + linear(fake_quantize_dynamic(h), of_hidden)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1 if batch_first else 0), h.unsqueeze(0), c.unsqueeze(0)
