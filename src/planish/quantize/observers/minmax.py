"""The whole range that was seen: no value of the calibration data is clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import Grid, Quantizer, quantizer_from_range


class MinMax:
    """Covers every value that was watched: the right choice where single large values matter, and the coarsest grid.

    Args:
        grid: the integers that the tensor is mapped to.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Widen the range to `values`."""
        low, high = value_range(values.detach(), self.grid.axis)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def quantizer(self) -> Quantizer:
        """The quantizer of the range watched so far."""
        if self._low is None or self._high is None:
            raise ValueError("observer: at least one batch must be watched before a quantizer is asked for; got none")
        return quantizer_from_range(self._low, self._high, self.grid)


def value_range(values: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest value: of the tensor, shape [], or of each index of `axis`, shape [channels]."""
    if axis is None:
        low, high = torch.aminmax(values)
    else:
        low, high = torch.aminmax(values.movedim(axis, 0).flatten(1), dim=1)
    return low.float(), high.float()
