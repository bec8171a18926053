"""Where a run's time goes, and how much of it is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from planish.events import Events

SEARCH_SHARE, SENSITIVITY_SHARE, TABLES_SHARE = 0.28, 0.1, 0.12
"""Of the time that is left, what the search, the sensitivities of one technique and the latency tables may take."""
FINAL_S = 25.0
"""Seconds that the final measurement takes, as a rule."""
DIAGNOSIS_S = 30.0
"""Seconds that the diagnosis of quantization takes at most, once the winner is measured."""


class Clock:
    """Wall seconds by stage, against a limit.

    Args:
        limit_s: seconds of the whole run; None: none.
        events: is told of each stage.
    """

    def __init__(self, limit_s: float | None, events: Events) -> None:
        self.started = time.monotonic()
        self.limit_s = limit_s
        self.seconds: dict[str, float] = {}
        self._events = events

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float:
        """Seconds until the limit; infinite without one."""
        return float("inf") if self.limit_s is None else self.limit_s - self.elapsed_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the run, announced and timed; entered again, its seconds add up."""
        self._events.stage(name)
        before = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - before
