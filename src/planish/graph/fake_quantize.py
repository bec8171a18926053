"""Rounding to a grid, in float, with a straight-through gradient: one grid for a tensor, each call or step, each channel or group of weights.

For a whole tensor `aten.fake_quantize_per_tensor_affine` branches on every value: on activations it takes 2 to 20 times as long as these four passes, and half
the time of a quantized ResNet's forward pass.

Scales that ask for a gradient get the one of learned step sizes (LSQ): with `t = x / scale`, `round(t) - t` where the grid holds the value, and the end
of the grid where it is clipped, times `1 / sqrt(values per scale * largest integer)`. Without that factor a scale's gradient is a sum over
all values that share it, and would rule the clipping of the whole net's. In the forward pass it costs nothing: what the backward pass takes besides
are the operator's own input and output, which its neighbors keep anyway.

References: Esser et al., Learned Step Size Quantization, 2020, equations 3 to 5 and section 2.2.

Differs: half a step beyond the ends still counts as inside, as in torch; a value that is on the grid already, and is rounded once more, would else
be clipped or not by the last bit of a division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

LARGEST_BIAS = 2.0**30
"""Runtimes turn a bias into int32 with the scale of input times weight; half the range is kept for the sum."""


PER_CHANNEL = torch.ops.aten.fake_quantize_per_channel_affine.default
"""What rounds per channel in a program that does not train."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        rounded = (x * scale.reciprocal()).round_()
        inside = rounded.clamp(low - zero_point, high - zero_point)
        is_inside = rounded == inside if any(ctx.needs_input_grad) else None
        values = inside.mul_(scale)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(is_inside, x, values, scale, torch.maximum(high - zero_point, zero_point - low))
        elif is_inside is not None:
            ctx.save_for_backward(is_inside)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        is_inside, *learned = ctx.saved_tensors
        passed = gradients[0] * is_inside
        return passed, _scale_gradient(gradients[0], passed, *learned) if learned else None, None, None, None


def _scale_gradient(gradient: Tensor, passed: Tensor, x: Tensor, values: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
    """LSQ's gradient of a scale, whose every term is `(gradient * values - passed * x) / scale`.

    Args:
        gradient: of the rounded values.
        passed: `gradient` where the value is inside, else 0.
        values: the rounded values.
        scale: of a shape that broadcasts to theirs.
        largest: the grid's largest integer, counted from the zero point; shape as `scale`.
    """
    if scale.numel() == 1:
        total = (_dot(gradient, values) - _dot(passed, x)).view(scale.shape)
    else:
        total = (gradient * values - passed * x).sum_to_size(scale.shape)
    return total / scale * (largest.float() * (x.numel() // scale.numel())).rsqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products, in one pass over both where they lie in memory alike."""
    is_dense = a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))
    if is_dense and a.stride() == b.stride():
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


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
    rows, columns = x.shape
    grouped = pad(x, (0, scale.shape[1] * group - columns)).reshape(rows, -1, group)
    found: Tensor = _StraightThrough.apply(grouped, scale[:, :, None], zero_point[:, :, None], low, high)  # type: ignore[no-untyped-call]
    return found.view(rows, -1)[:, :columns]


def fake_quantize_per_channel_affine(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, low: int, high: int) -> Tensor:
    """`x` rounded to a grid for every index of an axis: what `aten.fake_quantize_per_channel_affine` gives, whose scales cannot learn.

    Args:
        x: float32, any shape.
        scale: float32, [x.shape[axis]].
        zero_point: int32, same shape.
    """
    shape = [-1 if axis == d else 1 for d in range(x.dim())]
    found: Tensor = _StraightThrough.apply(x, scale.view(shape), zero_point.view(shape), low, high)  # type: ignore[no-untyped-call]
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
