"""How the learning rate goes: a short linear warm-up, then linear decay to zero, finished in time on any machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_SETTLING_STEPS = 2  # the first steps allocate memory and say nothing about speed


class Schedule:
    """Progress from 0 to 1 over `samples` training samples, or over as many as fit before `deadline`.

    While the deadline does not bind, progress is exactly samples seen ÷ samples planned, so the same seed gives the same run. Where the
    machine is too slow, each step covers a larger part of what is left, so that the decay still ends at zero by the deadline.

    Args:
        samples: how many training samples are planned; at least 1.
        warm_up: the share of the progress over which the rate rises, in [0, 1).
        deadline: on `clock`, in seconds; None: no limit.
        clock: monotonic seconds.

    References:
        Linear decay to zero in a short budget: Li, Yumer and Ramanan 2020 ("Budgeted training"); Zimmer et al. 2023 (BIMP).
    """

    def __init__(
        self, samples: int, warm_up: float = 0.05, deadline: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert samples >= 1 and 0 <= warm_up < 1
        self.planned, self.warm_up, self.deadline, self.clock = samples, warm_up, deadline, clock
        self.done = 0
        self.progress = 0.0
        self.steps = 0
        self._began = clock()
        self._seconds_per_sample = 0.0

    def resume(self, done: int, progress: float) -> None:
        """Go on from where another schedule was left."""
        self.done, self.progress = done, progress

    @property
    def remaining(self) -> int:
        """How many samples are still to come, as far as is known now."""
        left = 0 if self.progress >= 1.0 else self.planned - self.done
        if self.deadline is None:
            return max(0, left)
        seconds = self.deadline - self.clock()
        if seconds <= 0:
            return 0
        if self._seconds_per_sample <= 0:
            return max(0, left)
        return max(0, min(left, math.floor(seconds / self._seconds_per_sample)))

    @property
    def is_finished(self) -> bool:
        """Whether no further step should be made."""
        return self.remaining <= 0

    def factor(self, batch: int) -> float:
        """The share of the peak rate for a step of `batch` samples that begins now, in (0, 1]."""
        middle = min(1.0, self.progress + 0.5 * self._share(batch))
        if middle < self.warm_up:
            return middle / self.warm_up
        return (1.0 - middle) / (1.0 - self.warm_up)

    def advance(self, batch: int) -> None:
        """Say that a step of `batch` samples was made."""
        self.progress = min(1.0, self.progress + self._share(batch))
        self.done += batch
        self.steps += 1
        now = self.clock()
        seconds, self._began = (now - self._began) / batch, now
        if self.steps == _SETTLING_STEPS + 1:
            self._seconds_per_sample = seconds
        elif self.steps > _SETTLING_STEPS:
            self._seconds_per_sample += 0.1 * (seconds - self._seconds_per_sample)

    def _share(self, batch: int) -> float:
        return (1.0 - self.progress) * min(1.0, batch / max(batch, self.remaining))
