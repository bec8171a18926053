"""Batch norms of a captured program as per-channel maps, and the statistics that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

_USABLE = 1e-4  # a channel scaled by less than this gives no hint of what its input should be


@dataclass
class Norm:
    """The tensors of a batch norm with running statistics, as the map y = scale (x - mean) + shift per channel."""

    gain: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    epsilon: float

    @staticmethod
    def of(node: Node, tensors: Mapping[str, Tensor]) -> Norm | None:
        """The batch norm at `node`, or None where it has no scale, shift or statistics of its own."""
        names = [str(argument.target) if isinstance(argument, Node) else "" for argument in node.args[1:5]]
        if any(name not in tensors for name in names):
            return None
        gain, shift, mean, variance = (tensors[name] for name in names)
        return Norm(gain, shift, mean, variance, float(str(node.args[7])))

    @property
    def scale(self) -> Tensor:
        """[channels]"""
        return self.gain / (self.variance + self.epsilon).sqrt()

    @property
    def usable(self) -> Tensor:
        """[channels], whether the map can be inverted."""
        return self.scale.abs() > _USABLE

    def inverse(self, y: Tensor) -> Tensor:
        """The input that gives `y` [rows, channels]; 0 where the map cannot be inverted."""
        return torch.where(self.usable, (y - self.shift) / torch.where(self.usable, self.scale, 1.0) + self.mean, 0.0)

    def absorb_(self, mean: Tensor, variance: Tensor, intercept: Tensor) -> None:
        """Takes on new statistics, in place, with gain and shift such that the map becomes x -> the old map of x + intercept."""
        scale = self.scale
        self.shift.copy_(self.shift + scale * (mean + intercept - self.mean))
        self.gain.copy_(scale * (variance + self.epsilon).sqrt())
        self.recalibrate_(mean, variance)

    def recalibrate_(self, mean: Tensor, variance: Tensor) -> None:
        """Takes on new statistics, in place."""
        self.mean.copy_(mean)
        self.variance.copy_(variance)


def statistics(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, variance) of each channel (axis 1) over several batches."""
    rows = [value.movedim(1, -1).reshape(-1, value.shape[1]) for value in values]
    weights = torch.tensor([float(len(value)) for value in rows])
    weights /= weights.sum()
    means = torch.stack([value.mean(0) for value in rows])
    squares = torch.stack([value.square().mean(0) for value in rows])
    mean = (weights[:, None] * means).sum(0)
    return mean, ((weights[:, None] * squares).sum(0) - mean.square()).clamp_min(0)
