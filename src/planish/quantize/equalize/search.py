"""The search for how an activation is best smoothed, by the error of what reads it when both of their operands are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.quantize.arithmetic import TINY_RANGE, UINT8, Quantizer, fake_quantize, int8_weights, quantizer_from_range
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
        counts: how many rows each of them stands for, [rows] each.
        low: [channels].
        high: [channels].
        is_matrix: whether it has one row for each sample.
    """

    rows: list[Tensor]
    counts: list[Tensor]
    low: Tensor
    high: Tensor
    is_matrix: bool = False

    def divided(self, factors: Tensor) -> Sample:
        """The same of the activation divided by a factor per channel."""
        return Sample([rows / factors for rows in self.rows], self.counts, self.low / factors, self.high / factors)

    def whole(self) -> Quantizer:
        """The quantizer that just covers all of the activation."""
        return quantizer_from_range(self.low.min(), self.high.max(), UINT8)


@dataclass(frozen=True)
class Reader:
    """A linear map that reads an activation: its weight [outputs, inputs], and the largest integer of the grid that it is rounded to."""

    weight: Tensor
    largest: int


def search(sample: Sample, readers: Sequence[Reader]) -> Tensor | None:
    """What an activation is divided by and its readers' weights are multiplied with, [channels]: of the strength with the least error.

    None where leaving it as it is has less than twice that error. Ranges are whole ones, which 8 bits hardly tell from searched ones
    except where those are clipped: `full_range` is for that.

    Args:
        sample: of the activation.
        readers: all linear maps that read it rounded.
    """
    size = torch.maximum(sample.high, -sample.low)
    weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
    is_finite = bool(torch.isfinite(size).all() and torch.isfinite(weights).all())
    if not is_finite or min(float(size.max()), float(weights.max())) <= TINY_RANGE or float(size.max()) < OUTLIER * float(size.median()):
        return None
    errors = {}
    for strength in (None, *STRENGTHS):
        factors = torch.ones_like(size) if strength is None else _factors(size, weights, strength)
        scaled = [Reader(reader.weight * factors, reader.largest) for reader in readers]
        divided = sample.divided(factors)
        errors[strength] = output_error(divided, scaled, divided.whole()), factors
    least, factors = min(errors.values(), key=lambda found: found[0])
    return factors if least < PAYS * errors[None][0] else None


def full_range(sample: Sample, readers: Sequence[Reader], quantizer: Quantizer) -> Quantizer | None:
    """The quantizer that covers all of an activation, if its readers' outputs then have less than half their error; else None.

    The least error of an activation is not that of the outputs: a few tokens of a Transformer carry values some 15 times as large as all
    others, which an observer of squared errors cuts off, and half of those tokens' outputs with them.

    Args:
        sample: of the activation, divided as it will be.
        readers: with their weights multiplied.
        quantizer: what an observer chose.
    """
    whole = sample.whole()
    if float(whole.scale) <= 1.01 * float(quantizer.scale):
        return None
    return whole if output_error(sample, readers, whole) < PAYS * output_error(sample, readers, quantizer) else None


def output_error(sample: Sample, readers: Sequence[Reader], quantizer: Quantizer) -> float:
    """The squared error of the readers' outputs, each relative to the size of its output, when activation and weights are rounded."""
    rows, counts = torch.cat(sample.rows), torch.cat(sample.counts)
    rounded = fake_quantize(rows, quantizer)
    total = 0.0
    for reader in readers:
        weights = MinMax(int8_weights(reader.largest))
        weights.update(reader.weight)
        output = rows @ reader.weight.t()
        error = rounded @ fake_quantize(reader.weight, weights.quantizer()).t() - output
        total += float(error.square().sum(1) @ counts) / max(float(output.square().sum(1) @ counts), TINY_RANGE)
    return total


def _factors(size: Tensor, weights: Tensor, strength: float) -> Tensor:
    """max |x|^a / max |w|^(1-a) of each channel, with a geometric mean of 1: a common factor changes no grid."""
    size, weights = (ranges.clamp(min=_LEAST * float(ranges.max())) for ranges in (size, weights))
    logarithm = strength * size.log() - (1 - strength) * weights.log()
    return (logarithm - logarithm.mean()).exp()
