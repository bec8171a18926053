"""Estimates against closed forms, and interleaving against probes whose times are made up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from planish.errors import UsageError
from planish.measure.latency import Timing, estimate, interleaved, middle, pooled, ratio, warm_up
from planish.measure.probe import Sample
from planish.measurement import Estimate


@pytest.mark.parametrize(
    # Largest k with 2 * P(Binomial(n, 1/2) < k) <= 5 %, from published tables of the sign test.
    ("n", "k"),
    [(6, 1), (8, 1), (9, 2), (10, 2), (11, 2), (12, 3), (20, 6), (25, 8), (50, 18)],
)
def test_interval_is_between_the_right_order_statistics(n, k):
    values = np.random.default_rng(n).permutation(np.arange(1, n + 1))
    found = estimate(values)
    assert (found.low, found.high) == (k, n + 1 - k)
    assert found.median == (n + 1) / 2
    assert found.n == n


def test_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = np.exp(rng.standard_normal((2000, 11)))  # median 1, skewed
    covered = sum(e.low <= 1 <= e.high for e in map(estimate, samples)) / 2000
    # Exact coverage with n = 11, k = 2 is 98.8 %; four standard errors of 2,000 trials are 1 %.
    assert abs(covered - 0.9883) < 0.01


def test_few_or_scattered_values_are_not_trusted():
    assert not estimate([1.0] * 5).trustworthy
    assert estimate([1.0] * 6).trustworthy
    assert not estimate([1.0, 1.2] * 6).trustworthy
    assert estimate([1.0, 1.2] * 6, widest=0.5).trustworthy
    assert (estimate([3.0]).low, estimate([3.0]).high) == (3.0, 3.0)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(UsageError, match="at least one finite value"):
            estimate(bad)


@dataclass
class FakeProbe:
    """A probe whose calls take what `seconds(number of the block)` says; `log` is shared and notes who was asked."""

    name: str
    log: list[str]
    seconds: object
    cpu_share: float = 1.0
    blocks: int = field(default=0)

    def time(self, flat, min_seconds, min_calls=1, max_calls=10**6):
        self.log.append(self.name)
        self.blocks += 1
        wall = self.seconds(self.blocks)
        return Sample([wall] * 5, [wall * self.cpu_share] * 5)


def drifting(base: float):
    """Settled after 3 blocks; then the machine slows down by 5 % a block, for all probes alike."""
    return lambda block: base * (2.0 if block <= 3 else 1.0) * 1.05 ** max(0, block - 6)


def test_rounds_rotate_and_reverse():
    log: list[str] = []
    probes = {name: FakeProbe(name, log, lambda block: 1e-3) for name in "abc"}
    interleaved(probes, [], seconds=0.01, min_rounds=6, block_s=0.01)
    counted = log[-18:]
    rounds = ["".join(counted[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_a_ratio_is_paired_by_round():
    log: list[str] = []
    probes = {"slow": FakeProbe("slow", log, drifting(2e-3)), "fast": FakeProbe("fast", log, drifting(1e-3))}
    found = interleaved(probes, [], seconds=0.01, min_rounds=12, block_s=0.01)
    assert not found["slow"].latency_s.trustworthy, "the machine drifted"
    paired = ratio(found["slow"], found["fast"])
    assert (paired.median, paired.trustworthy) == (pytest.approx(2.0), True)
    assert paired.low == pytest.approx(2.0)
    with pytest.raises(UsageError, match="same rounds"):
        ratio(found["slow"], Timing(paired, paired, 0, (1.0,), (1.0,)))


def test_timings_of_several_times_are_one_with_all_their_rounds():
    log: list[str] = []
    probes = {name: FakeProbe(name, log, lambda block: 1e-3) for name in "ab"}
    first, second = (interleaved(probes, [], seconds=0.01, min_rounds=rounds, block_s=0.01) for rounds in (6, 8))
    whole = {name: pooled([first[name], second[name]]) for name in "ab"}
    assert whole["a"].rounds == first["a"].rounds + second["a"].rounds
    assert whole["a"].latency_s.n == whole["a"].cpu_s.n == ratio(whole["a"], whole["b"]).n == 14
    assert whole["a"].warm_up == first["a"].warm_up + second["a"].warm_up


def test_stretches_that_disagree_are_not_made_sound_by_their_number():
    """Each of five is sound in itself, in a state of its own: their rounds together seem to tell the ratio to a hundredth."""
    rng = np.random.default_rng(0)

    def timing(seconds):
        rounds = tuple((seconds * rng.normal(1, 0.01, 22)).tolist())
        found = estimate(rounds)
        return Timing(found, found, 1, rounds, rounds)

    stretches = [(timing(share), timing(1.0)) for share in (0.30, 0.30, 0.30, 0.39, 0.39)]
    first, second = (pooled([pair[side] for pair in stretches]) for side in (0, 1))
    found = ratio(first, second)
    assert found.median == pytest.approx(0.30, rel=0.05)
    assert found.low < 0.31 < 0.38 < found.high and not found.trustworthy
    assert first.latency_s.high > 0.38 and not first.latency_s.trustworthy
    assert ratio(pooled([stretches[0][0]] * 3), pooled([stretches[0][1]] * 3)).trustworthy, "where they agree, it is"


def test_a_process_that_was_kept_waiting_is_not_trusted():
    log: list[str] = []
    probes = {"a": FakeProbe("a", log, lambda b: 1e-3), "waiting": FakeProbe("waiting", log, lambda b: 1e-3, cpu_share=0.5)}
    found = interleaved(probes, [], seconds=0.01, min_rounds=8, block_s=0.01)
    assert found["a"].latency_s.trustworthy
    assert not found["waiting"].latency_s.trustworthy
    assert not ratio(found["a"], found["waiting"]).trustworthy


def test_warm_up_ends_when_times_have_settled():
    log: list[str] = []
    probe = FakeProbe("a", log, lambda block: 1e-3 * (1 + 2.0**-block))
    calls = warm_up(probe, [], 0.01, limit_s=60)
    # Blocks k .. k+2 agree within 2 % once (1 + 2^-k) / (1 + 2^-(k+2)) <= 1.02: first at k = 6, so 8 blocks of 5 calls.
    assert calls == 8 * 5


def test_warm_up_of_a_restless_machine_ends_at_the_limit():
    log: list[str] = []
    probe = FakeProbe("a", log, lambda block: 1e-3 * (1 + block % 2))
    assert warm_up(probe, [], 0.01, limit_s=0.05) >= 5


def test_each_probe_may_have_its_own_inputs_and_progress_is_told():
    log: list[str] = []
    probes = {name: FakeProbe(name, log, lambda block: 1e-3) for name in "ab"}
    shares: list[float] = []
    found = interleaved(probes, {"a": [], "b": []}, seconds=0.01, min_rounds=7, block_s=0.01, progress=shares.append)
    assert shares[-1] == 1.0
    assert len(shares) == len(found["a"].rounds) == 7


def test_visits_at_different_times_give_their_median_and_their_range():
    visits = [Estimate(0.4, 0.39, 0.41, 20), Estimate(0.6, 0.5, 0.7, 20), Estimate(0.42, 0.4, 0.43, 20)]
    assert middle(visits) == Estimate(0.42, 0.39, 0.7, 60, False)
    assert middle(visits[:1]) == visits[0]
    noisy = Estimate(0.5, 0.4, 0.6, 20, trustworthy=False)
    alone = msgspec.structs.replace(visits[0], trustworthy=False)
    assert middle([noisy, visits[0]]) == middle([visits[0], noisy]) == alone, "of two the trustworthy one counts, and a third is wanted"
    assert middle([msgspec.structs.replace(noisy, median=0.41), visits[0]]) == visits[0], "they agree"
    still = Estimate(0.246, 0.242, 0.247, 20)
    others = [msgspec.structs.replace(noisy, median=median) for median in (0.363, 0.394)]
    assert middle([others[0], still, others[1]]).median == 0.363, "a machine that held still in an unusual state decides nothing alone"
    assert middle([noisy, noisy]).median == 0.5 and not middle([noisy, noisy]).trustworthy
    assert middle([visits[0], Estimate(0.41, 0.4, 0.42, 10)]).trustworthy
