"""Rounding that is learned: how far each weight goes from the grid point below it to the one above, driven to 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from planish.graph.fake_quantize import along_groups
from planish.quantize.contract import Layer, Rounded

_LOW, _HIGH = -0.1, 1.1
"""What the sigmoid is stretched to before it is clipped, so that 0 and 1 are reached."""
_WARM_UP = 0.2
"""The share of the steps before anything is driven to 0 or 1."""
_SHARPEST, _FLATTEST = 2.0, 20.0


class Soft:
    """One layer's weights between two grid points each; the shares begin where they give the weights as they are.

    Args:
        layer: whose weights these are.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        quantizer, columns = layer.quantizer, layer.weight.shape[1]
        self.scale, zero_point = (along_groups(of, quantizer.group, columns) for of in (quantizer.scale, quantizer.zero_point))
        self.low, self.high = quantizer.grid.low - zero_point, quantizer.grid.high - zero_point
        steps = layer.weight / self.scale
        self.floor = steps.floor()
        inside = ((steps - self.floor).clamp(0.01, 0.99) - _LOW) / (_HIGH - _LOW)
        self.free = inside.logit().requires_grad_()

    def shares(self) -> Tensor:
        """How far each weight is from the point below to the one above, in [0, 1]."""
        return (self.free.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def at(self, shares: Tensor) -> Tensor:
        """The weights at such shares."""
        return torch.minimum(torch.maximum(self.floor + shares, self.low), self.high) * self.scale

    def undecided(self, sharpness: float) -> Tensor:
        """How far all shares together are from 0 and 1."""
        return (1 - (2 * self.shares() - 1).abs().pow(sharpness)).sum()

    def rounded(self) -> Rounded:
        """The nearer of the two points."""
        quantizer = self.layer.quantizer
        return Rounded(quantizer.rounded(self.at((self.shares() > 0.5).float()).detach()), quantizer)


def learn(softs: Sequence[Soft], loss: Callable[[], Tensor], steps: int, rate: float, pull: float) -> None:
    """Drives the shares of layers to 0 or 1 where the loss is least.

    The pull has no force at first; then it acts on shares near 1/2 last: the power falls from 20 to 2 along half a cosine.

    Args:
        softs: changed.
        loss: of the soft weights as they are; about 1 for each weight at plain rounding.
        steps: of Adam.
        rate: its learning rate.
        pull: how much a share of 1/2 costs.
    """
    free = [soft.free for soft in softs]
    optimizer = torch.optim.Adam(free, lr=rate)
    warm = int(_WARM_UP * steps)
    with torch.enable_grad():
        for step in range(steps):
            total = loss()
            if step >= warm:
                at = (step - warm) / max(steps - warm, 1)
                sharpness = _SHARPEST + 0.5 * (_FLATTEST - _SHARPEST) * (1 + math.cos(math.pi * at))
                for soft in softs:
                    total = total + pull * soft.undecided(sharpness)
            for value, gradient in zip(free, torch.autograd.grad(total, free), strict=True):
                value.grad = gradient
            optimizer.step()
