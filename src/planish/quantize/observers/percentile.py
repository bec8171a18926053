"""The range that holds all but a few of the values, whatever those few are."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer, quantizer_from_range
from planish.quantize.observers.histogram import Histogram
from planish.quantize.observers.minmax import value_range

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
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._histogram = Histogram()

    def update(self, values: Tensor) -> None:
        """Add one batch of values."""
        values = values.detach().float()
        low, high = value_range(values, self.grid.axis)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self.grid.axis is None:
            self._histogram.add(values, float(torch.maximum(-low, high)))

    def quantizer(self) -> Quantizer:
        """The quantizer of what lies between the two percentiles."""
        if self._low is None or self._high is None:
            raise ValueError("observer: at least one batch must be watched before a quantizer is asked for; got none")
        if self.grid.axis is not None:
            return quantizer_from_range(self._low, self._high, self.grid)
        values, count = self._histogram.points()
        share = count.double().cumsum(0) / count.double().sum()
        low = values[int((share > OUTSIDE).nonzero()[0])]
        high = values[int((share >= 1 - OUTSIDE).nonzero()[0])]
        # a bin holds many values: its mean stands for all of them, so an end in the outermost bin is the end itself
        low = self._low if int((share > OUTSIDE).nonzero()[0]) == 0 else low
        high = self._high if int((share >= 1 - OUTSIDE).nonzero()[0]) == len(values) - 1 else high
        return quantizer_from_range(low, high, self.grid)
