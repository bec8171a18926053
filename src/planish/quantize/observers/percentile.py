"""The range that holds all but a few of the values, whatever those few are."""

from __future__ import annotations

from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer, quantizer_from_range
from planish.quantize.observers.histogram import Histogram

OUTSIDE = 1e-4
"""The share of values that may lie outside at either end."""


class Percentile:
    """Clips one value in ten thousand at either end. Per channel (weights, watched whole) nothing is clipped: a channel has too few values.

    Args:
        grid: the integers that the tensor is mapped to.

    References:
        Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation, 2020, section 5.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._histogram = Histogram(grid.axis)

    def update(self, values: Tensor) -> None:
        """Add one batch of values."""
        self._histogram.add(values.detach().float())

    def quantizer(self) -> Quantizer:
        """The quantizer of what lies between the two percentiles."""
        lowest, highest = self._histogram.ends()
        if self.grid.axis is not None:
            return quantizer_from_range(lowest, highest, self.grid)
        values, count = self._histogram.points()
        share = count.double().cumsum(0) / count.double().sum()
        first, last = (int(is_inside.nonzero()[0]) for is_inside in (share > OUTSIDE, share >= 1 - OUTSIDE))
        # a bin holds many values: its mean stands for all of them, so an end in the outermost bin is the end itself
        low = lowest if first == 0 else values[first]
        high = highest if last == len(values) - 1 else values[last]
        return quantizer_from_range(low, high, self.grid)
