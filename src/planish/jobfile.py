"""Loads the user's `job.py`: runs it as a module from its own folder and hands back the `job` that it defines."""

from __future__ import annotations

import difflib
import sys
import traceback
import types
from pathlib import Path
from typing import TYPE_CHECKING

from planish.errors import MissingFile, PlanishError, UsageError

if TYPE_CHECKING:
    from planish.workload import Workload

MODULE = "planish_job"
_LARGEST = 16 * 2**20


def read_source(path: Path) -> str:
    """The text of a job file; what cannot be one is refused without running it.

    Raises:
        MissingFile: nothing is there.
        UsageError: a directory, not text, larger than 16 MB, or an HTML page.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], n=1)
        raise MissingFile(
            f"{path} does not exist; " + (f"did you mean {path.with_name(near[0])}?" if near else "give the file that defines `job`")
        )
    if not path.is_file():
        raise UsageError(f"{path} is no file; give the Python file that defines `job`")
    if path.stat().st_size > _LARGEST:
        raise UsageError(f"{path} has {path.stat().st_size} bytes; give the Python file that defines `job`, not data")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise UsageError(f"{path} is not text; give the Python file that defines `job`") from err
    if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        raise UsageError(f"{path} is a web page, not Python; give the Python file that defines `job`")
    return text


def load_job(path: Path) -> Workload:
    """The `job` of a job file.

    The file's folder is importable while it runs and afterwards, as if it had been started as a script.

    Raises:
        MissingFile: nothing is there.
        UsageError: it is not Python, fails while it runs (the message names its line), or defines no `job`.
    """
    source = read_source(path)
    try:
        code = compile(source, str(path), "exec")
    except (SyntaxError, ValueError) as err:
        line = getattr(err, "lineno", None)
        reason = getattr(err, "msg", None) or str(err)
        raise UsageError(
            f"{path}{f', line {line}' if line else ''} is not Python: {reason}; give the Python file that defines `job`"
        ) from err
    module = types.ModuleType(MODULE)
    module.__file__ = str(path.resolve())
    sys.modules[MODULE] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        exec(code, module.__dict__)  # noqa: S102  running the user's own file is what was asked for
    except PlanishError as err:
        err.args = (f"{_place(err, path)}{err.args[0] if err.args else ''}", *err.args[1:])
        raise
    except SystemExit as err:
        raise UsageError(f"{path} ended the program with sys.exit({err.code!r}) instead of defining `job`") from err
    # The file is the user's program: whatever it raises is told as a fault of that file, with its line, and -v shows the rest.
    except Exception as err:
        cure = f"; install it for {sys.executable}" if isinstance(err, ModuleNotFoundError) else ""
        raise UsageError(f"{_place(err, path)}{type(err).__name__}: {err}{cure}") from err
    from planish.workload import Workload

    job = module.__dict__.get("job")
    if not isinstance(job, Workload):
        came = "it defines none" if job is None else f"its `job` is a {type(job).__name__}"
        raise UsageError(f"{path} must define `job = planish.Workload(...)`; {came}")
    return job


def _place(err: BaseException, path: Path) -> str:
    """`job.py, line 3: `, of the last frame in the job file itself."""
    lines = [frame.lineno for frame in traceback.extract_tb(err.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}: " if lines else f"{path}: "
