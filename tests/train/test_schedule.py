"""The schedule decays to zero: exactly when nothing presses, by the deadline when something does."""

from __future__ import annotations

import pytest

from planish.train.schedule import Schedule


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_samples_seen_over_samples_planned() -> None:
    schedule = Schedule(1000, warm_up=0.1)
    factors = []
    for step in range(10):
        assert schedule.progress == pytest.approx(step / 10)
        factors.append(schedule.factor(100))
        schedule.advance(100)
    assert schedule.is_finished and schedule.progress == pytest.approx(1)
    # the middle of each step: warm-up ends at 0.1, then (1 - m) / 0.9
    assert factors == pytest.approx([0.5, *[(1 - (0.1 * k + 0.05)) / 0.9 for k in range(1, 10)]])


@pytest.mark.parametrize("slow_down", [1.0, 3.0])
def test_a_slow_machine_ends_with_a_complete_schedule(slow_down: float) -> None:
    clock = Clock()
    schedule = Schedule(100_000, deadline=100.0, clock=clock)
    factors = []
    while not schedule.is_finished:
        factors.append(schedule.factor(64))
        clock.now += 0.5 * (slow_down if clock.now > 50 else 1.0)
        schedule.advance(64)
    # the step that is running when time is up may end late, and the mean of the speed lags by ten steps
    assert 95 < clock.now < 102
    assert schedule.progress > 0.97 and factors[-1] < 0.03
    assert max(factors) > 0.95 and schedule.done < 100_000


def test_a_deadline_that_does_not_bind_changes_nothing() -> None:
    clock = Clock()
    free, bound = Schedule(6400), Schedule(6400, deadline=1e6, clock=clock)
    while not free.is_finished:
        assert free.factor(64) == bound.factor(64)
        free.advance(64)
        clock.now += 0.1
        bound.advance(64)
    assert bound.is_finished


def test_a_deadline_in_the_past_is_finished() -> None:
    assert Schedule(10, deadline=-1.0, clock=Clock()).is_finished
