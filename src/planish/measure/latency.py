"""Latency of several models side by side: warm-up left out, rounds of short blocks in rotating order, medians with intervals.

Machines drift: clocks change, neighbours come and go. So no model is timed in one go. Each round gives each probe one short block
while all others are idle; a probe's figure of a round is the median call of its block; its estimate is the median over rounds with
a 95 % interval; and a ratio of two probes is taken round by round, where most of the drift cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from planish.errors import UsageError
from planish.measure.probe import Probe
from planish.measurement import Estimate
from planish.runtimes.contract import Array

K = TypeVar("K", bound=Hashable)

WIDEST = 0.10
"""An interval wider than this share of its median decides nothing: the estimate is not trustworthy."""
IDLE = 0.8
"""A process that gets less CPU time than this share of the wall time was kept waiting by others: its wall time decides nothing."""
FEWEST = 6
"""With fewer repeats not even their whole range holds the median with 95 % confidence (2 * 0.5 ** 6 = 3 %)."""


@dataclass(frozen=True)
class Timing:
    """What `interleaved` found for one probe.

    Args:
        latency_s: wall seconds of one call.
        cpu_s: process CPU seconds of one call, all threads.
        warm_up: calls made before counting.
        rounds: wall seconds of one call in each round, in order; rounds of all probes of one `interleaved` are paired.
        cpu_rounds: CPU seconds of one call in each.
        stretches: how many of the rounds were taken at each time, where they were taken at several (see `pooled`).
    """

    latency_s: Estimate
    cpu_s: Estimate
    warm_up: int
    rounds: tuple[float, ...]
    cpu_rounds: tuple[float, ...]
    stretches: tuple[int, ...] = ()

    @property
    def is_disturbed(self) -> bool:
        """Whether the process was kept waiting for a processor: a call that computes all the time uses at least its wall time."""
        return self.cpu_s.median < IDLE * self.latency_s.median


def estimate(values: ArrayLike, widest: float = WIDEST) -> Estimate:
    """The median of `values` and a distribution-free interval that holds the true median with at least 95 %.

    The interval is between order statistics: the k-th smallest and the k-th largest, with the largest k for which
    2 * P(Binomial(n, 1/2) < k) <= 5 %. With fewer than `FEWEST` values it is their range, and not trustworthy.

    Args:
        values: at least one repeat, independent of each other.
        widest: the share of the median that the interval may span and still be trustworthy.

    References: Conover, Practical Nonparametric Statistics (1999), section 3.2.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    n = len(ordered)
    if n == 0 or not np.isfinite(ordered).all():
        raise UsageError(f"estimate: it takes at least one finite value; got {n}, of which {int(np.isfinite(ordered).sum())} are finite")
    tail, k = 0.5**n, 0
    while 2 * tail <= 0.05:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    low, high = float(ordered[max(k - 1, 0)]), float(ordered[n - max(k, 1)])
    median = float(np.median(ordered))
    return Estimate(median, low, high, n, n >= FEWEST and high - low <= widest * abs(median))


def ratio(a: Timing, b: Timing) -> Estimate:
    """a ÷ b, paired by round: the median of the rounds' ratios, with its interval. Both must come from one `interleaved`."""
    if len(a.rounds) != len(b.rounds):
        raise UsageError(f"ratio: both timings must come from the same rounds; got {len(a.rounds)} and {len(b.rounds)}")
    found = _over_stretches(np.divide(a.rounds, b.rounds), a.stretches)
    is_sure = found.trustworthy and not (a.is_disturbed or b.is_disturbed)
    return msgspec.structs.replace(found, trustworthy=is_sure)


def middle(visits: Sequence[Estimate]) -> Estimate:
    """Several estimates of one figure, taken at different times: their median, within their range.

    Of two, a trustworthy one counts alone against one that is not, and stays trustworthy only if they agree. Of more, all count: that a
    machine held still for a second does not say that it was in its usual state.
    """
    if len(visits) == 2 and visits[0].trustworthy != visits[1].trustworthy:
        sure, other = sorted(visits, key=lambda visit: not visit.trustworthy)
        return msgspec.structs.replace(sure, trustworthy=abs(other.median - sure.median) <= WIDEST * sure.median)
    if len(visits) == 1:
        return visits[0]
    medians = [visit.median for visit in visits]
    median = float(np.median(medians))
    is_sure = all(visit.trustworthy for visit in visits) and max(medians) - min(medians) <= WIDEST * median
    return Estimate(
        median, min(visit.low for visit in visits), max(visit.high for visit in visits), sum(visit.n for visit in visits), is_sure
    )


def interleaved(
    probes: Mapping[K, Probe],
    flat: list[Array] | Mapping[K, list[Array]],
    seconds: float = 2.0,
    min_rounds: int = 11,
    block_s: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[K, Timing]:
    """Time several models against each other.

    Args:
        probes: name -> open probe. Only one of them computes at a time.
        flat: the inputs of one call, in the order of the signatures; or for each name its own.
        seconds: of counted time for each probe; warm-up comes on top and is about as long at most.
        min_rounds: rounds at least, whatever `seconds` says; each has at least one call of each probe.
        block_s: length of one probe's block in a round; by default what spreads `seconds` over 2 * `min_rounds` rounds, within
            [10 ms, 250 ms].
        progress: called after each round with the share that is done.

    Returns:
        name -> timing. With noise that does not go away an estimate says that it is not trustworthy.
    """
    inputs = {name: flat[name] if isinstance(flat, Mapping) else flat for name in probes}
    block = block_s or min(0.25, max(0.01, seconds / (2 * min_rounds)))
    warm = {name: warm_up(probe, inputs[name], block, seconds) for name, probe in probes.items()}
    wall: dict[K, list[float]] = {name: [] for name in probes}
    cpu: dict[K, list[float]] = {name: [] for name in probes}
    n = max(min_rounds, math.ceil(seconds / block))
    order = list(probes)
    end = time.monotonic() + 3 * seconds * len(order)
    for i in range(n):
        for name in _rotated(order, i):
            sample = probes[name].time(inputs[name], block, min_calls=1)
            # The first call of a block finds caches that another process has filled.
            kept = slice(1, None) if len(sample.wall) > 3 else slice(None)
            wall[name].append(float(np.median(sample.wall[kept])))
            cpu[name].append(float(np.mean(sample.cpu[kept])))
        if progress is not None:
            progress((i + 1) / n)
        if i + 1 >= min_rounds and time.monotonic() > end:
            break
    return {name: _timing(wall[name], cpu[name], warm[name]) for name in probes}


def pooled(timings: Sequence[Timing]) -> Timing:
    """One probe's timings at several times as one, whose median is that of all rounds."""
    wall = [seconds for timing in timings for seconds in timing.rounds]
    cpu = [seconds for timing in timings for seconds in timing.cpu_rounds]
    return _timing(wall, cpu, sum(timing.warm_up for timing in timings), tuple(len(timing.rounds) for timing in timings))


def _over_stretches(values: ArrayLike, stretches: Sequence[int]) -> Estimate:
    """An estimate of all values; its interval holds the median of every stretch too, since rounds of one share the machine's state.

    The medians of five stretches alone hold the true median between them with 94 %.
    """
    found = estimate(values)
    if len(stretches) < 2:
        return found
    medians = [float(np.median(part)) for part in np.split(np.asarray(values, dtype=np.float64), np.cumsum(stretches)[:-1])]
    low, high = min(found.low, *medians), max(found.high, *medians)
    is_sure = found.trustworthy and high - low <= WIDEST * found.median
    return msgspec.structs.replace(found, low=low, high=high, trustworthy=is_sure)


def _timing(wall: Sequence[float], cpu: Sequence[float], warm: int, stretches: tuple[int, ...] = ()) -> Timing:
    timing = Timing(_over_stretches(wall, stretches), estimate(cpu), warm, tuple(wall), tuple(cpu), stretches)
    is_sure = timing.latency_s.trustworthy and not timing.is_disturbed
    return replace(timing, latency_s=msgspec.structs.replace(timing.latency_s, trustworthy=is_sure))


def _rotated(order: Sequence[K], i: int) -> list[K]:
    """The order of round `i`: rotated by one each round, and reversed in every second cycle, so that no probe always follows the same."""
    shift, cycle = i % len(order), i // len(order)
    rotated = [*order[shift:], *order[:shift]]
    return rotated[::-1] if cycle % 2 else rotated


def warm_up(probe: Probe, flat: list[Array], block_s: float, limit_s: float) -> int:
    """Call a model until its running median has settled: three blocks in a row within 2 % of each other; at most `limit_s`.

    Returns:
        The number of calls that were made.
    """
    medians: list[float] = []
    calls, end = 0, time.monotonic() + limit_s
    while True:
        sample = probe.time(flat, block_s / 2, min_calls=1)
        calls += len(sample.wall)
        medians.append(float(np.median(sample.wall)))
        last = medians[-3:]
        if (len(last) == 3 and max(last) <= 1.02 * min(last)) or time.monotonic() > end:
            return calls
