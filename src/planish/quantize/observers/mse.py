"""The range with the least squared error: rare large values are clipped where that pays for a finer grid."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.quantize.arithmetic import TINY_RANGE, Grid, Quantizer, fake_quantize, quantizer_from_range
from planish.quantize.observers.minmax import value_range

BINS = 4096  # on each side of zero: after a doubling at least 2048 are in use, 8 to 16 per step of an 8-bit grid
VALUES_PER_UPDATE = 1 << 18  # more than that are thinned out: 2^18 give the error of an 8-bit grid to well under 1 %
RATIOS = torch.linspace(1.0, 0.2, 81)  # clipped ranges that are tried, as shares of the full one, widest first
CLOSE = 1.2  # ranges whose error is within this factor of the least count as equal, and the widest of them is taken


class MeanSquaredError:
    """Chooses the widest range whose mean squared error is close to the least, by search over clipped ranges.

    Around the optimum the error hardly changes with the range, but what is clipped is what later layers listen to: with the optimum
    itself ResNet-20's outputs lost more (27.0 dB, KL 1.45e-3) than without clipping (29.3 dB, 1.20e-3); so chosen, less (29.1 dB, 1.03e-3).

    One scale per tensor: values go into a histogram whose bins double in width when a value falls outside, so that memory is
    bounded and no second pass is needed; each bin is represented by the mean of its values, so that the zeros of a rectifier stay exact.
    Per channel (weights, watched whole): all channels are searched at once on the values themselves.

    Args:
        grid: the integers that the tensor is mapped to.

    Differs: the papers take the minimum itself.

    References:
        Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment, 2019 (clipping by expected error);
        Nagel et al., A White Paper on Neural Network Quantization, 2021, section 3.1 (MSE range setting by grid search).
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._width = 0.0  # of a bin; 0 until a value other than zero was seen
        self._count = torch.zeros(2 * BINS, dtype=torch.float64)
        self._sum = torch.zeros(2 * BINS, dtype=torch.float64)
        self._channels: list[Tensor] = []

    def update(self, values: Tensor) -> None:
        """Add one batch of values."""
        values = values.detach().float()
        low, high = value_range(values, self.grid.axis)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        if self.grid.axis is None:
            self._add_to_histogram(_thinned(values.flatten(), 0), float(torch.maximum(-low, high)))
        else:
            self._add_channels(values.movedim(self.grid.axis, 0).flatten(1))

    def quantizer(self) -> Quantizer:
        """The quantizer with the least squared error on what was watched so far."""
        if self._low is None or self._high is None:
            raise ValueError("observer: at least one batch must be watched before a quantizer is asked for; got none")
        if self.grid.axis is None:
            return self._search_tensor(self._low, self._high)
        return self._search_channels(self._low, self._high, torch.cat(self._channels, dim=1))

    def _add_channels(self, rows: Tensor) -> None:
        kept = sum(r.shape[1] for r in self._channels)
        budget = max(VALUES_PER_UPDATE * 64 // max(len(rows), 1), 256)
        if kept < budget:
            self._channels.append(_thinned(rows, 1, budget - kept).clone())

    def _add_to_histogram(self, values: Tensor, largest: float) -> None:
        if largest > TINY_RANGE and self._width == 0:
            self._width = largest / (BINS - 2)
        while self._width > 0 and largest >= self._width * (BINS - 1):
            self._width *= 2
            self._count, self._sum = _merged(self._count), _merged(self._sum)
        if self._width == 0:
            self._count[BINS] += values.numel()
            return
        bins = (values / self._width).floor().long() + BINS
        self._count += torch.bincount(bins, minlength=2 * BINS)
        self._sum += torch.bincount(bins, weights=values.double(), minlength=2 * BINS)

    def _search_tensor(self, low: Tensor, high: Tensor) -> Quantizer:
        used = self._count > 0
        count = self._count[used]
        values, count = (self._sum[used] / count).float(), count.float()

        def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
            """The widest candidate range whose error is close to the least."""
            candidates = quantizer_from_range(lows, highs, Grid(self.grid.low, self.grid.high, self.grid.symmetric, axis=0))
            rounded = fake_quantize(values.expand(len(lows), -1).contiguous(), candidates)
            error = (rounded - values).square() @ count
            chosen = int((error <= CLOSE * error.min()).nonzero()[0])
            return lows[chosen], highs[chosen]

        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        full_low, full_high = low, high
        low, high = best(RATIOS * full_low, RATIOS * full_high)
        if not self.grid.symmetric:
            for _ in range(2):
                if full_high > 0:
                    low, high = best(low.expand(len(RATIOS)), RATIOS * full_high)
                if full_low < 0:
                    low, high = best(RATIOS * full_low, high.expand(len(RATIOS)))
        return quantizer_from_range(low, high, self.grid)

    def _search_channels(self, low: Tensor, high: Tensor, rows: Tensor) -> Quantizer:
        grid = Grid(self.grid.low, self.grid.high, self.grid.symmetric, axis=0)
        errors = torch.empty(len(RATIOS), len(rows))
        for index, ratio in enumerate(RATIOS):
            rounded = fake_quantize(rows, quantizer_from_range(ratio * low, ratio * high, grid))
            errors[index] = (rounded - rows).square().sum(1)
        is_close = errors <= CLOSE * errors.min(0).values
        chosen = RATIOS[is_close.int().argmax(0)]
        return quantizer_from_range(chosen * low, chosen * high, self.grid)


def _merged(bins: Tensor) -> Tensor:
    """The same histogram with bins of double width: bin i goes to floor(i / 2), counted from zero."""
    out = torch.zeros_like(bins)
    half = bins.view(-1, 2).sum(1)
    out[BINS // 2 : BINS // 2 + len(half)] = half
    return out


def _thinned(values: Tensor, dim: int, most: int = VALUES_PER_UPDATE) -> Tensor:
    """At most about `most` indices of `dim`, evenly spread; the step is odd, so that it does not keep in step with sizes that are powers of 2."""
    step = -(-values.shape[dim] // most)
    if step > 1:
        step += 1 - step % 2
    index = [slice(None)] * values.dim()
    index[dim] = slice(None, None, step)
    return values[tuple(index)]
