"""Answers as text: the tables that the command line prints, as wide as the terminal at most."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.report import figures
from planish.report.figures import NOTHING, plain

if TYPE_CHECKING:
    from planish.measurement import Measurement
    from planish.result import Summary, Trial


def width() -> int:
    """Columns of the terminal; 120 where the answer goes to a file or a pipe and nobody said otherwise."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return max(40, int(columns))
    try:
        return max(40, os.get_terminal_size(1).columns)
    except OSError:
        return 120


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """A table; long cells are folded, never cut, and control codes are written to a terminal that wants them only.

    Args:
        columns: the headings.
        rows: a cell for each heading; control characters in them are shown as `?`.
        right: indices of columns that are aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        out.add_column(Text(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(plain(cell)) for cell in row))
    bare = sys.stdout is None or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    buffer = io.StringIO()
    console = Console(
        file=buffer, force_terminal=not bare, color_system=None if bare else "standard", highlight=False, markup=False, width=width()
    )
    console.print(out)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def folded(text: str, indent: str = "") -> str:
    """A paragraph, folded to the terminal's width."""
    import textwrap

    return textwrap.fill(plain(text, 4000), width(), initial_indent=indent, subsequent_indent=" " * len(indent)) + "\n"


def result_text(summary: Summary) -> str:
    """The verdict, both nets side by side, what other runtimes make of the original, and what else must be known."""
    parts = [folded(f"{summary.name}: {summary.verdict}: {summary.reason}"), _sides(summary), _others(summary)]
    if summary.verdict == "infeasible" and summary.nearest:
        parts.append("nearest trials:\n" + trials_text([summary.trials[i] for i in summary.nearest]))
    parts += [folded(note, "- ") for note in summary.notes]
    seconds = summary.seconds.get("total")
    if summary.artifact is not None:
        parts.append(f"written: {plain(summary.artifact)}" + (f" after {figures.duration(seconds)}" if seconds else "") + "\n")
    return "\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _sides(summary: Summary) -> str:
    one, two = summary.original, summary.optimized
    ratios = {name: figures.ratio(estimate.median) for name, estimate in summary.ratios.items()}
    if summary.drop is not None:
        low, high = summary.drop_interval or (summary.drop, summary.drop)
        change = f"drop {figures.signed(summary.drop)} ({figures.signed(low)} … {figures.signed(high)})"
    else:
        change = NOTHING
    rows: list[tuple[object, ...]] = [
        (
            f"{summary.metric} ({one.split or 'no data'})",
            figures.quality(one.quality),
            figures.quality(two.quality) if two else NOTHING,
            change,
        ),
        ("latency", _latency(one), _latency(two), ratios.get("latency", NOTHING)),
        ("CPU time", figures.seconds(one.cpu_s.median), figures.seconds(two.cpu_s.median) if two else NOTHING, ""),
        ("size", figures.size(one.size_bytes), figures.size(two.size_bytes) if two else NOTHING, ratios.get("size", NOTHING)),
        (
            "peak memory",
            figures.size(one.peak_memory_bytes),
            figures.size(two.peak_memory_bytes) if two else NOTHING,
            ratios.get("memory", NOTHING),
        ),
        ("MACs", figures.count(one.macs), figures.count(two.macs) if two else NOTHING, ratios.get("macs", NOTHING)),
    ]
    heading = f"{summary.target}, {one.threads} thread{'s' if one.threads > 1 else ''}, batch {one.batch}"
    return table((heading, "original", "optimized", "optimized ÷ original"), rows, right=(1, 2, 3))


def _latency(measurement: Measurement | None) -> str:
    if measurement is None:
        return NOTHING
    return f"{figures.seconds(measurement.latency_s.median)} ({figures.interval(measurement.latency_s)})"


def _others(summary: Summary) -> str:
    if not summary.baselines:
        return ""
    two = summary.optimized
    rows = [
        (
            name,
            figures.seconds(other.latency_s.median),
            figures.speed_up(two.latency_s.median / other.latency_s.median) if two else NOTHING,
        )
        for name, other in summary.baselines.items()
    ]
    return table(("the original elsewhere", "latency", "optimized is"), rows, right=(1, 2))


def trials_text(trials: Sequence[Trial]) -> str:
    """Trials, one a line."""
    rows = [
        (
            trial.stage,
            trial.outcome.kind,
            figures.ratio(trial.latency_ratio.median) if trial.latency_ratio else NOTHING,
            figures.size(trial.size_bytes),
            figures.count(trial.macs),
            figures.signed(trial.drop),
            trial.outcome.detail,
        )
        for trial in trials
    ]
    return table(("stage", "outcome", "latency", "size", "MACs", "drop", "why"), rows, right=(2, 3, 4, 5))


def doctor_text(data: dict[str, Any]) -> str:
    """What `planish doctor` found."""
    machine, facts = data["machine"], data["facts"]
    lines = [
        f"planish {data['planish']} on Python {machine['python']}, {machine['system']}",
        f"{machine['processor']}: {machine['cores']} cores, {figures.size(machine['memory_bytes'])}, {facts['isa']}"
        + (", int8 dot products" if facts["has_int8_dot"] else ", no int8 dot products (8-bit weights are kept within ±63)")
        + (", bf16" if facts["has_bf16"] else ""),
        f"channels are cheap in multiples of {facts['width_multiple']}",
    ]
    rows = [
        (
            ", ".join(runtime["targets"]),
            ", ".join(runtime["precisions"]),
            ", ".join(f"{name} {version}" for name, version in runtime["versions"].items()),
            runtime["missing"] or "ready",
        )
        for runtime in data["runtimes"]
    ]
    packages = [f"{name} {version or 'is not installed'}" for name, version in data["packages"].items()]
    parts = [folded(line) for line in lines] + [
        "\n",
        table(("target", "precisions", "versions", "state"), rows),
        "\n",
        folded(", ".join(packages)),
    ]
    parts += [folded(f"known hole: {hole}") for hole in data["holes"]] or ["no known holes\n"]
    return "".join(parts)


def any_text(data: Any) -> str:
    """Plain data as text: figures on lines of their own, lists of records as tables."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        columns = list(dict.fromkeys(key for item in data for key in item))
        return table(columns, [[_cell(item.get(key)) for key in columns] for item in data])
    if isinstance(data, dict):
        flat = [(key, _cell(value)) for key, value in data.items() if not isinstance(value, (dict, list))]
        parts = [table(("", ""), flat)] if flat else []
        for key, value in data.items():
            if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
                value = [{"name": name, **item} for name, item in value.items()]
            if isinstance(value, (dict, list)) and value:
                parts.append(f"{plain(key)}:\n{any_text(value)}")
        return "\n".join(parts)
    if isinstance(data, list):
        return "".join(folded(_cell(item), "- ") for item in data)
    return folded(_cell(data))


def _cell(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return figures.digits(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)
