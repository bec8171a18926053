"""The average of the ranges of batches: one batch with a rare value hardly widens it."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer, quantizer_from_range
from planish.quantize.observers.minmax import nothing_watched, value_range

MOMENTUM = 0.9


class MovingAverage:
    """Follows the smallest and largest values of batches with an exponential average, corrected for its start.

    Args:
        grid: the integers that the tensor is mapped to.

    Differs: the paper starts at the first batch's range; here all batches count as they would after infinitely many.

    References:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018, section 3.1.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._low = self._high = torch.zeros(())
        self._weight = 0.0

    def update(self, values: Tensor) -> None:
        """Move the range towards that of `values`."""
        low, high = value_range(values.detach(), self.grid.axis)
        self._low = MOMENTUM * self._low + (1 - MOMENTUM) * low
        self._high = MOMENTUM * self._high + (1 - MOMENTUM) * high
        self._weight = MOMENTUM * self._weight + (1 - MOMENTUM)

    def quantizer(self) -> Quantizer:
        """The quantizer of the averaged range."""
        if not self._weight:
            raise nothing_watched()
        return quantizer_from_range(self._low / self._weight, self._high / self._weight, self.grid)
