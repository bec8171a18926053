"""Reads what a run ended with, and writes the page that shows it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from planish.artifact import open_artifact, study_folder
from planish.artifact.manifest import RESULT, SHRUNK, read_small
from planish.errors import ArtifactError, UsageError
from planish.report.page import MARK, page
from planish.result import Summary


def read_summary(path: Path) -> Summary:
    """What a run ended with, from its artifact or, where nothing was written, from the study beside it.

    Raises:
        MissingFile, ArtifactError: neither is there, or one was changed.
    """
    kept = study_folder(path) / RESULT
    raw = read_small(kept) if not path.exists() and kept.exists() else open_artifact(path).result_json()
    if raw is None:
        account = path / SHRUNK
        raise ArtifactError(
            f"{path} is of `planish shrink`, which searches nothing, so that there is no page; {account} says what was done"
            if account.exists()
            else f"{path} does not hold {RESULT}, which a page is made from; optimize it again"
        )
    try:
        return msgspec.json.decode(raw, type=Summary)
    except msgspec.MsgspecError as err:
        raise ArtifactError(f"{path}: {RESULT} cannot be read: {err}") from err


def check_page(output: Path, command: str) -> None:
    """Refuse a place where a page must not be written.

    Args:
        output: where the page would go; a page of ours that is there may be replaced, nothing else.
        command: which writes it, for the message.

    Raises:
        UsageError: something else is there.
    """
    if output.is_dir() or output.is_symlink():
        raise UsageError(f"{command}: {output} is no file; give another -o")
    if output.exists():
        with output.open("rb") as file:
            if MARK.encode() not in file.read(2000):
                raise UsageError(f"{command}: {output} is there and is no page of planish; it is not overwritten: give another -o")


def write_page(text: str, output: Path, command: str) -> Path:
    """A page at `output`, written whole or not at all.

    Args:
        text: the page.
        output: where it goes.
        command: which writes it, for the message.

    Raises:
        UsageError: it cannot be written, or something else is there.
    """
    check_page(output, command)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{command}: {output} could not be written: {err.strerror}") from err
    return output


def write_report(summary: Summary, output: Path) -> Path:
    """The report page of a run; raises what `write_page` does."""
    check_page(output, "report")
    return write_page(page(summary), output, "report")
