"""Exponential moving average of weights, with its bias corrected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """The moving average `a <- decay * a + (1 - decay) * w` from zero, divided by `1 - decay ** updates`.

    Args:
        parameters: floating-point tensors; read by `update`, written by `swap`.
        decay: in [0, 1); the average reaches back about `1 / (1 - decay)` updates.

    References:
        Kingma and Ba 2015, section 3, for the correction.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        assert 0 <= decay < 1
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self._sums = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values in."""
        torch._foreach_lerp_(self._sums, [p.detach() for p in self.parameters], 1 - self.decay)
        self.updates += 1

    def values(self) -> list[Tensor]:
        """The average, one tensor per parameter; the present values before the first update."""
        if self.updates == 0:
            return [p.detach().clone() for p in self.parameters]
        correction = 1 - self.decay**self.updates
        return [total / correction for total in self._sums]


@torch.no_grad()
def write_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy `values` into `parameters`."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
