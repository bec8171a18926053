"""A histogram of the values of one tensor, in bounded memory and one pass: what observers search on."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import TINY_RANGE
from planish.quantize.observers.minmax import WatchedRange

BINS = 4096  # on each side of zero: after a doubling at least 2048 are in use, 8 to 16 per step of an 8-bit grid
VALUES_PER_UPDATE = 1 << 18  # more than that are thinned out: 2^18 give the error of an 8-bit grid to well under 1 %


class Histogram:
    """The range of values, and for one scale per tensor their counts, in bins that double in width when a value falls outside.

    Args:
        axis: of the grid; with one there are ranges alone.
    """

    def __init__(self, axis: int | None) -> None:
        self._axis, self._range = axis, WatchedRange(axis)
        self._width = 0.0  # of a bin; 0 until a value other than zero was seen
        self._count = torch.zeros(2 * BINS, dtype=torch.float64)
        self._sum = torch.zeros(2 * BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in float values."""
        low, high = self._range.widen(values)
        if self._axis is None:
            self._count_values(thinned(values.flatten(), 0), float(torch.maximum(-low, high)))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value; ValueError where nothing was watched."""
        return self._range.ends()

    def _count_values(self, values: Tensor, largest: float) -> None:
        if largest > TINY_RANGE and self._width == 0:
            self._width = largest / (BINS - 2)
        while self._width > 0 and largest >= self._width * (BINS - 1):
            self._width *= 2
            self._count, self._sum = _merged(self._count), _merged(self._sum)
        if self._width == 0:
            self._count[BINS] += values.numel()
            return
        bins = (values / self._width).floor().long() + BINS
        self._count += torch.bincount(bins, minlength=2 * BINS)
        self._sum += torch.bincount(bins, weights=values.double(), minlength=2 * BINS)

    def points(self) -> tuple[Tensor, Tensor]:
        """The mean of each bin that holds values, ascending, and how many it holds: the zeros of a rectifier stay exact."""
        used = self._count > 0
        count = self._count[used]
        return (self._sum[used] / count).float(), count.float()


def _merged(bins: Tensor) -> Tensor:
    """The same histogram with bins of double width: bin i goes to floor(i / 2), counted from zero."""
    out = torch.zeros_like(bins)
    half = bins.view(-1, 2).sum(1)
    out[BINS // 2 : BINS // 2 + len(half)] = half
    return out


def thinned(values: Tensor, dim: int, most: int = VALUES_PER_UPDATE) -> Tensor:
    """At most about `most` indices of `dim`, evenly spread; the step is odd, so that it does not keep in step with sizes that are powers of 2."""
    step = -(-values.shape[dim] // most)
    if step > 1:
        step += 1 - step % 2
    index = [slice(None)] * values.dim()
    index[dim] = slice(None, None, step)
    return values[tuple(index)]
