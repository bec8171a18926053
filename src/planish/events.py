"""What a long run tells its caller while it works: stages, progress and remarks. The command line draws them; a script may ignore them."""

from __future__ import annotations

from typing import Protocol


class Events(Protocol):
    """Called by the flow, from the thread that called it; implementations must return quickly and never raise."""

    def stage(self, title: str) -> None:
        """A new stage begins ("measuring the original"); the one before has ended."""

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are finished."""

    def say(self, text: str) -> None:
        """A sentence that the user should see (never an error, which is raised)."""


class Silent:
    """Events that nobody hears."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""
