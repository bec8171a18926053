"""The tree of errors, drawn at its top: everything planish raises on purpose derives from `PlanishError`.

PlanishError                          exit code
├── UsageError (ValueError)             2   what the caller gave cannot be used
│   ├── BudgetError                         a limit or a drop that makes no sense
│   ├── UnknownName                         a name nobody registered, with the nearest ones that exist
│   ├── DataError                           data that is empty, ragged, of the wrong shape or not finite
│   ├── CaptureError                        a model that torch.export cannot trace, with the line to blame
│   ├── PlanError                           a plan that does not fit this graph
│   ├── ArtifactError                       a directory that is no artifact, or was changed since it was written
│   ├── StudyError                          a study that belongs to another job, or is held by another process
│   ├── OutputExists                        the output is already there and --overwrite was not given
│   ├── MissingPackage (ImportError)        an optional package that is not installed
│   └── MissingFile (FileNotFoundError)     a job, artifact or study that is not there
├── RuntimeFailed (RuntimeError)        1   a runtime crashed, hung or refused a model; carries the Outcome's kind
└── Infeasible                          3   raised only where no result can carry the verdict

Bugs are not in this tree: they propagate with their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlanishError(Exception):
    """Base of every error that planish raises on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(PlanishError, ValueError):
    """What the caller gave cannot be used; the message says what, where, and what to do."""

    exit_code = 2


class BudgetError(UsageError):
    """A limit or a drop that makes no sense; the message shows the accepted forms."""


class UnknownName(UsageError):
    """A name that nobody registered.

    Args:
        kind: what was looked for, as the user would call it ("runtime", "saliency", "group").
        name: what came.
        known: every name that would have been accepted.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        if near:
            hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif len(self.known) <= 12:
            hint = "known: " + ", ".join(self.known) if self.known else "none is known"
        else:
            hint = f"{len(self.known)} are known, among them " + ", ".join(self.known[:8])
        super().__init__(f"there is no {kind} named {name[:120]!r}; {hint}")


class DataError(UsageError):
    """Data that is empty, ragged, of the wrong shape or dtype, or not finite; the message names batch and field."""


class CaptureError(UsageError):
    """A model that cannot be captured; the message names the line of the model that is to blame."""


class PlanError(UsageError):
    """A plan that names a group, operator or block that this graph has not, or a width that it cannot take."""


class ArtifactError(UsageError):
    """A directory that is no artifact, or whose files do not match its manifest; the message names the file."""


class StudyError(UsageError):
    """A study that belongs to another job, or is held by another process; the message says what differs."""


class OutputExists(UsageError):
    """The output is already there and overwriting was not asked for."""


class MissingPackage(UsageError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package {package!r}, which is not installed; pip install 'planish[{extra}]'")


class MissingFile(UsageError, FileNotFoundError):
    """A job file, artifact or study that is not there."""


class RuntimeFailed(PlanishError, RuntimeError):
    """A runtime crashed, hung, ran out of memory or refused a model, in the measuring process.

    Args:
        kind: the `Outcome` kind that a trial ends with ("unsupported", "timed out", "out of memory", "crashed", ...).
        message: one sentence for the user.
    """

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Infeasible(PlanishError):
    """No plan holds the budget, and the caller asked for an exception instead of a verdict."""

    exit_code = 3
