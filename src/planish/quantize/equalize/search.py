"""The search for how an activation is best smoothed: by the error of what reads it, when both of their operands are rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.quantize.arithmetic import TINY_RANGE, UINT8, Grid, fake_quantize, int8_weights
from planish.quantize.contract import Observer
from planish.quantize.observers.minmax import MinMax

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the factors max |x|^a / max |w|^(1-a). Of MiniLM-L6's 24 activations none did best below 0.7, and most at 0.9 or above."""
OUTLIER = 2.0
"""Activations whose largest channel is less than this many times their median one are not smoothed: little is to be gained there."""
PAYS = 0.5
"""The squared error must fall to this share, or nothing is changed: a multiplication more costs time, and half is 3 dB."""
_LEAST = 1e-4  # channels smaller than this share of the largest count as this large: their factors stay in float32's bounds


@dataclass
class Sample:
    """What is kept of an activation: some of its rows, and the range of each channel over all of them.

    Args:
        rows: [rows, channels] each.
        low: [channels].
        high: [channels].
    """

    rows: list[Tensor]
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Reader:
    """A linear map that reads an activation: its weight [outputs, inputs], and the largest integer of the grid that it is rounded to."""

    weight: Tensor
    largest: int


@dataclass(frozen=True)
class Choice:
    """How an activation is prepared for its quantizer.

    Args:
        factors: what it is divided by and its readers' weights are multiplied with, [channels]; None: left as it is.
        is_clipped: whether the observer chooses its range; else the quantizer covers all of it.
    """

    factors: Tensor | None = None
    is_clipped: bool = True


def search(sample: Sample, readers: Sequence[Reader], make: Callable[[Grid], Observer]) -> Choice:
    """The strength, and whether to clip, with the least error of the outputs; what changes nothing wins unless another has half its error.

    Clipping is searched too, since the least error of an activation is not that of the outputs: a few tokens of a Transformer carry values
    some 15 times as large as all others, which an observer of squared errors cuts off, and half of those tokens' outputs with them.

    Args:
        sample: of the activation.
        readers: all linear maps that read it rounded.
        make: an observer for the activation's grid. Weights are rounded in their full range, which 8 bits hardly tell from a searched one.
    """
    size = torch.maximum(sample.high, -sample.low)
    weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
    is_finite = bool(torch.isfinite(size).all() and torch.isfinite(weights).all())
    if not is_finite or min(float(size.max()), float(weights.max())) <= TINY_RANGE:
        return Choice()
    trial = _Trial(sample, readers)
    observers = {True: make, False: MinMax}
    plain = {clip: trial.error(None, observer) for clip, observer in observers.items()}
    unsmoothed = Choice(None, plain[False] >= PAYS * plain[True])
    if float(size.max()) < OUTLIER * float(size.median()):
        return unsmoothed
    smoothed = [
        (trial.error(factors, observer), Choice(factors, clip))
        for factors in (_factors(size, weights, strength) for strength in STRENGTHS)
        for clip, observer in observers.items()
    ]
    least, choice = min(smoothed, key=lambda found: found[0])
    return choice if least < PAYS * plain[unsmoothed.is_clipped] else unsmoothed


def _factors(size: Tensor, weights: Tensor, strength: float) -> Tensor:
    """max |x|^a / max |w|^(1-a) of each channel, with a geometric mean of 1: a common factor changes no grid."""
    size, weights = (ranges.clamp(min=_LEAST * float(ranges.max())) for ranges in (size, weights))
    logarithm = strength * size.log() - (1 - strength) * weights.log()
    return (logarithm - logarithm.mean()).exp()


class _Trial:
    """The outputs of an activation's readers, to compare rounded ones with."""

    def __init__(self, sample: Sample, readers: Sequence[Reader]) -> None:
        self._rows = torch.cat(sample.rows)
        self._extremes = torch.stack([sample.low, sample.high])  # the rows alone may lack what the range must cover
        self._readers = [(reader, self._rows @ reader.weight.t()) for reader in readers]

    def error(self, factors: Tensor | None, make: Callable[[Grid], Observer]) -> float:
        """The squared error of the outputs, each relative to its size."""
        scale = torch.ones_like(self._extremes[0]) if factors is None else factors
        rows = self._rows / scale
        watcher = make(UINT8)
        watcher.update(torch.cat([rows, self._extremes / scale]))
        rounded = fake_quantize(rows, watcher.quantizer())
        total = 0.0
        for reader, output in self._readers:
            weight = reader.weight * scale
            weights = MinMax(int8_weights(reader.largest))
            weights.update(weight)
            found = rounded @ fake_quantize(weight, weights.quantizer()).t()
            total += float((found - output).square().sum() / output.square().sum().clamp(min=TINY_RANGE))
        return total
