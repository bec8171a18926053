"""What operators lose when they leave fp32, in words: for the terminal, for `inspect` and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from planish.measurement import Diagnosis, Sensitivity
from planish.report import figures

STATIC = "int8"
EQUAL_DB = 200.0


def decibels(value: float | None) -> str:
    """`31.2`, `equal` where nothing was lost, `–` where it was not measured."""
    if value is None:
        return figures.NOTHING
    return "equal" if value >= EQUAL_DB else f"{value:.1f}".replace("-", "−")


def cure(row: Sensitivity) -> str:
    """What was chosen for an operator, beside static int8."""
    if row.scheme == "fp32":
        return "kept in fp32"
    if row.scheme == STATIC:
        return "none: left in int8"
    if row.scheme.endswith("-weights"):
        return f"weights alone, in {row.scheme.removesuffix('-weights')}"
    return f"{row.scheme} instead of int8"


def alone(row: Sensitivity, scheme: str) -> str:
    """The ratio with an operator alone in a scheme."""
    return decibels(row.sqnr_alone_db.get(scheme))


def now(row: Sensitivity) -> str:
    """The ratio with an operator alone in what the plan has it compute in; in fp32 nothing is lost."""
    return "equal" if row.scheme == "fp32" else alone(row, row.scheme)


def summed_up(found: Diagnosis) -> str:
    """One sentence on the net with all operators as planned."""
    kept = "stay as they are" if found.sqnr_db >= EQUAL_DB else f"keep {decibels(found.sqnr_db)} dB"
    text = f"with all as planned the outputs {kept}"
    if found.quality_all is not None and found.quality is not None:
        metric = figures.plain(found.metric, 40)
        text += f", {metric} {figures.quality(found.quality_all)} ({figures.quality(found.quality)} in float)"
    samples = "one sample" if found.samples == 1 else f"{found.samples} samples"
    return f"{text}; {samples} of {found.split}, rounded after training, before any recovery"


def clipped(row: Sensitivity) -> str:
    """The share of an operator's activations that static int8 clips."""
    return figures.NOTHING if row.clipped is None else f"{100 * row.clipped:.2g} %"


def schemes_of(rows: Sequence[Sensitivity]) -> list[str]:
    """The schemes that operators were tried in alone, static int8 first."""
    found = dict.fromkeys(scheme for row in rows for scheme in row.sqnr_alone_db)
    return sorted(found, key=lambda scheme: scheme != STATIC)
