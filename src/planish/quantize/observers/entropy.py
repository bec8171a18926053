"""The range whose rounded values are distributed most like the values themselves (KL divergence)."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer, quantizer_from_range
from planish.quantize.observers.histogram import Histogram

_RATIOS = torch.linspace(1.0, 0.05, 96)
_BINS = 2048
_SMOOTHED = 1e-9


class Entropy:
    """Clips where what is clipped and what becomes coarse together change the distribution least. Per channel nothing is clipped.

    Args:
        grid: the integers that the tensor is mapped to.

    Differs: TensorRT's calibration knows only symmetric ranges of 128 steps; here the ends move together towards zero, on the grid's own steps.

    References:
        Migacz, 8-bit Inference with TensorRT, 2017.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._histogram = Histogram(grid.axis)

    def update(self, values: Tensor) -> None:
        """Add one batch of values."""
        self._histogram.add(values.detach().float())

    def quantizer(self) -> Quantizer:
        """The quantizer of the range with the least divergence; the widest of equals."""
        lowest, highest = self._histogram.ends()
        low, high = lowest.clamp(max=0.0), highest.clamp(min=0.0)
        if self.grid.axis is not None or not bool(high > low):
            return quantizer_from_range(lowest, highest, self.grid)
        values, count = self._histogram.points()
        divergences = torch.stack([self._divergence(values, count.double(), ratio * low, ratio * high) for ratio in _RATIOS])
        best = _RATIOS[int(divergences.argmin())]
        return quantizer_from_range(best * low, best * high, self.grid)

    def _divergence(self, values: Tensor, count: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """KL divergence of the clipped values' distribution, over the bins of the range, from what a step's even spread makes of it."""
        steps = self.grid.high - self.grid.low
        place = ((values.clamp(low, high) - low) / (high - low)).double()
        bins = (place * (_BINS - 1)).round().long()
        inside = (values >= low) & (values <= high)
        clipped = torch.zeros(_BINS, dtype=torch.float64).scatter_add_(0, bins, count)
        kept = torch.zeros(_BINS, dtype=torch.float64).scatter_add_(0, bins[inside], count[inside])
        step = (torch.arange(_BINS) * (steps / (_BINS - 1))).round().long()
        used = (kept > 0).double()
        mass, places = (torch.zeros(steps + 1, dtype=torch.float64).scatter_add_(0, step, given) for given in (kept, used))
        spread = used * (mass / places.clamp_min(1))[step]
        p, q = (given / given.sum().clamp_min(1) + _SMOOTHED for given in (clipped, spread))
        return (p * (p / q).log()).sum()
