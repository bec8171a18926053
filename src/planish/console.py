"""What the command line shows: progress with the time left on stderr, tables or one JSON object on stdout, and nothing else there."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from planish.report.figures import duration, finite, plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_QUIET_S = 10.0


def open_standard_files() -> None:
    """Give closed standard files /dev/null, or the next file that is opened would become stdout."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  it lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  it lives as long as the process


_TELLING = 3
"""With fewer steps done nothing is said of the time left: the first is often the longest."""


class Console:
    """Events of a run on stderr, its answer on stdout.

    Args:
        as_json: the answer is one JSON object; whatever else is written to stdout, by anybody, goes to stderr.
        verbose: events say more.

    Attributes:
        limit_s: seconds that the whole command may take: no estimate of the time left says more.
    """

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.limit_s: float | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._began, self._started, self._spoke = "", time.monotonic(), time.monotonic(), 0.0
        self._stdout: TextIO | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[Console]:
        """Keep stdout for the answer while a command runs; the terminal is as it was found when this ends, however it ends."""
        saved = None
        python_stdout = sys.stdout
        if self.as_json:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            saved = os.dup(1)
            self._stdout = open(saved, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  closed below, after the answer
            os.dup2(2, 1)
            sys.stdout = sys.stderr
        try:
            yield self
        finally:
            self.end_stage()
            if saved is not None:
                os.dup2(saved, 1)
                os.close(saved)
                sys.stdout = python_stdout

    def stage(self, title: str) -> None:
        """A new stage begins."""
        self.end_stage()
        self._title, self._began, self._spoke = plain(title), time.monotonic(), time.monotonic()
        if self._is_lively():
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=_rich(sys.stderr), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=None)
        else:
            self._line(f"[{duration(time.monotonic() - self._started)}] {self._title}")

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` steps of the stage are finished."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if 0 < done < total and now - self._spoke > _QUIET_S:
            self._spoke = now
            left = (now - self._began) / done * (total - done)
            if self.limit_s is not None:
                left = min(left, max(0.0, self.limit_s - (now - self._started)))
            told = f", about {duration(left)} left" if done >= _TELLING else ""
            self._line(f"[{duration(now - self._started)}] {self._title}: {done} of {total}{told}")

    def say(self, text: str) -> None:
        """A sentence that the user should see."""
        line = plain(text, 2000)
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, emoji=False)
        else:
            self._line(line)

    def end_stage(self) -> None:
        """Take the progress bar away; a line says how long the stage took."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
            self._line(f"✓ {self._title} ({duration(time.monotonic() - self._began)})")

    def _is_lively(self) -> bool:
        return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(_encodable(text, sys.stderr), file=sys.stderr, flush=True)

    def answer(self, data: dict[str, Any], text: str) -> None:
        """The command's answer: `data` as JSON, or `text`; a reader that went away is no error."""
        self.end_stage()
        out = self._stdout if self.as_json and self._stdout is not None else sys.stdout
        shown = json.dumps(finite(data), ensure_ascii=False, allow_nan=False) + "\n" if self.as_json else text
        try:
            out.write(_encodable(shown, out))
            out.flush()
        except (BrokenPipeError, ValueError):
            forget_stdout()

    def error(self, message: str, exit_code: int, **details: Any) -> None:
        """An error: one sentence on stderr, and with --json an object on stdout too."""
        self.end_stage()
        if self.as_json:
            self.answer({"error": message, "exit_code": exit_code, **details}, "")
        self._line(f"planish: {plain(message, 4000)}")


def forget_stdout() -> None:
    """Point stdout to nowhere, so that Python's own flush at exit does not fail on a pipe without a reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _encodable(text: str, file: Any) -> str:
    """`text` with what the file's encoding cannot express (a C locale, say) as `?`."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _rich(file: Any) -> Any:
    from rich.console import Console as RichConsole

    bare = bool(os.environ.get("NO_COLOR")) or not file.isatty()
    return RichConsole(file=file, color_system=None if bare else "auto", highlight=False, markup=False, emoji=False, soft_wrap=False)
