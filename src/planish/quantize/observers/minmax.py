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
        self._range = WatchedRange(grid.axis)

    def update(self, values: Tensor) -> None:
        """Widen the range to `values`."""
        self._range.widen(values.detach())

    def quantizer(self) -> Quantizer:
        """The quantizer of the range watched so far."""
        return quantizer_from_range(*self._range.ends(), self.grid)


class WatchedRange:
    """The smallest and largest values of all batches: of the tensor, or of each index of an axis."""

    def __init__(self, axis: int | None) -> None:
        self._axis = axis
        self._ends: tuple[Tensor, Tensor] | None = None

    def widen(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in a batch; returns its own range."""
        low, high = value_range(values, self._axis)
        self._ends = (low, high) if self._ends is None else (torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high))
        return low, high

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value, shape [] or [channels].

        Raises:
            ValueError: nothing was watched.
        """
        if self._ends is None:
            raise nothing_watched()
        return self._ends


def nothing_watched() -> ValueError:
    """What an observer says that is asked for a quantizer too early."""
    return ValueError("observer: at least one batch must be watched before a quantizer is asked for; got none")


def value_range(values: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest value: of the tensor, shape [], or of each index of `axis`, shape [channels]."""
    if axis is None:
        low, high = torch.aminmax(values)
    else:
        low, high = torch.aminmax(values.movedim(axis, 0).flatten(1), dim=1)
    return low.float(), high.float()
