"""The arithmetic of uniform quantization as plain functions: grids, scales from ranges, fake quantization with a straight-through gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.graph.fake_quantize import fake_quantize_per_group, fake_quantize_per_tensor_affine

TINY_RANGE = 1e-20
"""Ranges below this count as zero: the reciprocal of their scale would leave float32 in the runtimes."""


@dataclass(frozen=True)
class Grid:
    """The integers that a tensor is mapped to.

    Args:
        low: the smallest integer, e.g. 0 or -63.
        high: the largest integer, e.g. 255 or 63.
        symmetric: whether the zero point is 0, so that the range is [-r, r].
        axis: the dimension that has a scale per index, or None for one scale per tensor.
    """

    low: int
    high: int
    symmetric: bool = False
    axis: int | None = None


def unsigned(bits: int) -> Grid:
    """The grid of activations: affine, one scale per tensor. Unsigned, since ONNX Runtime fuses few signed ones (4 of 11 convolutions)."""
    return Grid(0, 2**bits - 1)


UINT8 = unsigned(8)
SIGNED8 = Grid(-128, 127, symmetric=True)
"""Of activations that are multiplied with each other, where a zero point would have to be subtracted first."""


def int8_weights(largest: int, axis: int = 0) -> Grid:
    """The grid of weights in [-largest, largest]: symmetric, one scale per index of `axis`.

    -128 is never used: with it the grid would not be symmetric, and u8 x s8 pairs would come closer to saturation.
    """
    return Grid(-largest, largest, symmetric=True, axis=axis)


@dataclass(frozen=True)
class Quantizer:
    """A grid laid over the real numbers: `real = scale * (integer - zero_point)`.

    Args:
        grid: the integers.
        scale: float32, positive and finite; shape [] per tensor, [channels] per channel.
        zero_point: int32 in [grid.low, grid.high], same shape; real 0 is exactly this integer.
    """

    grid: Grid
    scale: Tensor
    zero_point: Tensor

    @property
    def low(self) -> Tensor:
        """The smallest representable number; shape as `scale`."""
        return self.scale * (self.grid.low - self.zero_point)

    @property
    def high(self) -> Tensor:
        """The largest representable number; shape as `scale`."""
        return self.scale * (self.grid.high - self.zero_point)


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


def quantizer_from_range(low: Tensor, high: Tensor, grid: Grid) -> Quantizer:
    """The quantizer whose grid just covers [low, high] and zero.

    Args:
        low: float, shape [] or [channels], finite.
        high: likewise, `high >= low`.
        grid: the integers.

    Returns:
        A quantizer that is finite whatever the range: a range below `TINY_RANGE` (a dead channel, an activation that is always zero)
        gets scale 1, which maps its zeros to zero.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018, eq. 1 and 13.
    """
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if grid.symmetric:
        span, steps = torch.maximum(-low, high), grid.high
    else:
        span, steps = high - low, grid.high - grid.low
    scale = (span / steps).float()
    scale = torch.where(span > TINY_RANGE, scale, torch.ones_like(scale))
    if grid.symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = (grid.low - (low / scale).round()).clamp(grid.low, grid.high).to(torch.int32)
    return Quantizer(grid, scale, zero_point)


def fake_quantize(values: Tensor, quantizer: Quantizer) -> Tensor:
    """`values` rounded to the quantizer's grid, in float; the gradient passes straight through inside the range and is 0 outside.

    Args:
        values: float, any shape; dimension `grid.axis` has as many indices as there are scales.
        quantizer: where to round to.
    """
    grid = quantizer.grid
    if grid.axis is None:
        return fake_quantize_per_tensor_affine(values, quantizer.scale, quantizer.zero_point, grid.low, grid.high)
    return torch.fake_quantize_per_channel_affine(values, quantizer.scale, quantizer.zero_point, grid.axis, grid.low, grid.high)


def sqnr_db(reference: Tensor, values: Tensor) -> float:
    """The signal to quantization noise ratio of `values` against `reference`, in dB; infinite where they are equal."""
    noise = (reference.double() - values.double()).square().sum()
    signal = reference.double().square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))
