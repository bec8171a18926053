"""Answers as text: the tables that the command line prints, as wide as the terminal at most."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

from planish.measurement import Estimate
from planish.report import figures
from planish.report import sensitivity as words
from planish.report.figures import NOTHING, plain

if TYPE_CHECKING:
    from planish.measurement import Measurement
    from planish.result import Summary, Trial


_LEAST_FOLDED = 16
_NAMED = 5


def _columns() -> int | None:
    """Columns of the terminal; None where the answer goes to a file or a pipe and nobody said otherwise."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return max(40, int(columns))
    try:
        return max(40, os.get_terminal_size(1).columns)
    except OSError:
        return None


def width() -> int:
    """Columns to fold to: the terminal's, or 120 in a file or a pipe, where only tables may be wider."""
    return _columns() or 120


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    fold: Sequence[int] | None = None,
    spare: Sequence[int] = (),
) -> str:
    """A table that is folded to a terminal, or loses columns that can be spared; records under each other where even that does not fit.

    Control codes are written only to a terminal that wants them.

    Args:
        columns: the headings.
        rows: a cell for each heading; control characters in them are shown as `?`.
        right: indices of columns that are aligned to the right.
        fold: indices of columns that may be folded; the last by default.
        spare: indices of columns that may be left out, the first of them first; a line says which.
    """
    shown = [[plain(cell) for cell in row] for row in rows]
    folds = (len(columns) - 1,) if fold is None else fold
    widths = [max(map(len, (name, *(row[i] for row in shown)))) for i, name in enumerate(columns)]
    kept, out_of_room = list(range(len(columns))), ""
    if _columns() is not None:
        least = [_least(columns[i], [row[i] for row in shown]) if i in folds else each for i, each in enumerate(widths)]
        for i in spare:
            if _total(least, kept) > width():
                kept.remove(i)
        if _total(least, kept) > width():
            return _records(columns, shown)
        widths = _shared_out(widths, least, kept)
        out_of_room = ", ".join(columns[i] for i in sorted(spare) if i not in kept)
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i in kept:
        justify: Literal["left", "right"] = "right" if i in right else "left"
        out.add_column(Text(columns[i]), justify=justify, overflow="fold", no_wrap=i not in folds, width=widths[i])
    for row in shown:
        out.add_row(*(Text(row[i]) for i in kept))
    bare = sys.stdout is None or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=not bare,
        color_system=None if bare else "standard",
        highlight=False,
        markup=False,
        width=max(width(), _total(widths, kept)),
    )
    console.print(out)
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
    return text + (folded(f"(no room for {out_of_room}; a wider terminal shows more)") if out_of_room else "")


def _least(heading: str, cells: Sequence[str]) -> int:
    """To how many columns cells may be folded; a heading is broken between words only."""
    return min(max(map(len, (heading, *cells))), max(*map(len, heading.split()), 1, min(_LEAST_FOLDED, max(map(len, cells), default=0))))


def _total(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + 3 * (len(kept) - 1)


def _shared_out(widths: Sequence[int], least: Sequence[int], kept: Sequence[int]) -> list[int]:
    """`least`, and what the terminal has beyond it: a column at a time to the narrowest of those that are folded."""
    found = list(least)
    for _ in range(width() - _total(least, kept)):
        short = [i for i in kept if found[i] < widths[i]]
        if not short:
            break
        found[min(short, key=lambda i: found[i])] += 1
    return found


def _records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Each row as its first cell, with the others named below it."""
    lines = []
    for row in rows:
        named = [f"{name} {cell}".strip() for name, cell in zip(columns[1:], row[1:], strict=True) if cell not in ("", NOTHING)]
        lines += [folded(row[0]), folded(", ".join(named), "  ")]
    return "".join(lines)


def folded(text: str, indent: str = "") -> str:
    """A paragraph, folded to the terminal's width."""
    import textwrap

    return textwrap.fill(plain(text, 4000), width(), initial_indent=indent, subsequent_indent=" " * len(indent)) + "\n"


def result_text(summary: Summary) -> str:
    """The verdict, both nets side by side, what other runtimes make of the original, and what else must be known."""
    parts = [folded(f"{summary.name}: {summary.said}"), _sides(summary), _others(summary)]
    if summary.verdict == "infeasible" and summary.nearest:
        limited = [limit.quantity for limit in summary.budget.limits]
        parts.append("nearest trials:\n" + trials_text([summary.trials[i] for i in summary.nearest], limited))
    if summary.verdict == "infeasible" and summary.artifact is None:
        more = "give more time, loosen the limit or the drop" if summary.time_limited else "loosen the limit or the drop"
        parts.append(
            folded(
                f"nothing was written: {more}, or take the nearest with --accept-nearest "
                "(`planish resume` takes it too, as it takes more time, and goes on from what was tried)"
            )
        )
    parts.append(_worst(summary))
    parts += [folded(note, "- ") for note in summary.notes]
    seconds = summary.seconds.get("total")
    if summary.artifact is not None:
        parts.append(f"written: {plain(summary.artifact)}" + (f" after {figures.duration(seconds)}" if seconds else "") + "\n")
    return "\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _sides(summary: Summary) -> str:
    one, two = summary.original, summary.optimized
    ratios = {name: figures.ratio(estimate.median) for name, estimate in summary.ratios.items()}
    ratio, between = figures.ratio_around(summary.ratios["latency"]) if "latency" in summary.ratios else ("", "")
    moved = two is not None and two.runtime != one.runtime

    def line(label: str, show: Callable[[Measurement], str], ratio: str = "") -> tuple[str, str, str, str]:
        return label, show(one), show(two) if two is not None else NOTHING, ratio

    rows = [
        line(
            summary.metric if one.split == summary.metric else f"{summary.metric} ({one.split or 'no data'})",
            lambda m: figures.quality(m.quality),
        ),
        line("latency", lambda m: figures.interval(m.latency_s)[0], ratio),
        line("  95 % interval", lambda m: figures.interval(m.latency_s)[1], between),
        line("threads", lambda m: str(m.threads)),
        line("CPU time", lambda m: figures.seconds(m.cpu_s.median)),
        line("size", lambda m: figures.size(m.size_bytes), ratios.get("size", "")),
        line("peak memory", lambda m: figures.size(m.peak_memory_bytes), ratios.get("memory", "")),
        line("MACs", lambda m: figures.count(m.macs), ratios.get("macs", "")),
        line("bit operations", lambda m: figures.count(m.bit_operations), ratios.get("bit_operations", "")),
    ]
    parts = [
        folded(f"{summary.target}, batch {one.batch}"),
        table(("", f"original in {one.runtime}" if moved else "original", "optimized", "ratio"), rows, right=(1, 2, 3), fold=(1, 2, 3)),
    ]
    if summary.drop is not None and one.quality is not None:
        parts.append(folded(f"{figures.drop_of(summary)}: {figures.signed(summary.drop)}, {figures.around_drop(summary)}"))
    if summary.control_drop is not None:
        parts.append(folded(f"drop against the net as it was, tuned as long: {figures.signed(summary.control_drop)}"))
    return "".join(parts)


def _others(summary: Summary) -> str:
    if not summary.baselines:
        return ""
    rows = [(name, figures.seconds(other.latency_s.median), figures.gained(summary, name)) for name, other in summary.baselines.items()]
    return table(("the original elsewhere", "latency at first", "optimized is"), rows, right=(1, 2))


def _worst(summary: Summary) -> str:
    """The operators that lose most in static int8, each with what was chosen for it, and what stands out; "" without a diagnosis."""
    found = summary.diagnosis
    if found is None or not found.operators:
        return ""
    worst = found.operators[:_NAMED]
    rows = [
        (row.name, words.alone(row, words.STATIC), words.now(row), words.decibels(row.sqnr_without_db), words.cure(row)) for row in worst
    ]
    many = "the operator that loses" if len(worst) == 1 else f"the {len(worst)} operators that lose"
    parts = [
        folded(f"{many} most in int8 (signal to noise of the outputs in dB, more is better): {words.summed_up(found)}"),
        table(("operator", "alone in int8", "as planned", "all but it", "cure"), rows, right=(1, 2, 3), fold=(0, 4)),
        *(folded(said, "- ") for said in found.findings),
    ]
    return "".join(parts)


def trials_text(trials: Sequence[Trial], limited: Collection[str] = ()) -> str:
    """Trials, one a line.

    Args:
        trials: in the order in which they are shown.
        limited: the quantities that are of interest: their columns are never left out.
    """
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
    spare = [i for i, quantity in ((4, "macs"), (3, "size")) if quantity not in limited]
    columns = ("stage", "outcome", "latency", "size", "MACs", "drop (validation)", "why")
    return table(columns, rows, right=(2, 3, 4, 5), fold=(5, 6), spare=spare)


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


def work_plan_text(data: dict[str, Any]) -> str:
    """What `optimize --dry-run` found: the stages with their estimated seconds."""
    capped = {name: data["stages"][name] for name in data["at_most"]}
    rows = [(name, ("at most " if name in capped else "") + figures.duration(seconds)) for name, seconds in data["stages"].items()]
    beside = "".join(f", and at most {figures.duration(seconds)} of {name}" for name, seconds in capped.items())
    said = "".join(folded(note, "- ") for note in data["notes"])
    return (
        folded(
            f"{data['name']}: {data['groups']} groups, {data['blocks']} block{'' if data['blocks'] == 1 else 's'}, {data['options']} options in "
            f"{', '.join(data['targets'])}; about {figures.duration(data['seconds'] - sum(capped.values()))}{beside}"
        )
        + table(("stage", "takes about"), rows, right=(1,))
        + said
    )


def verification_text(data: dict[str, Any]) -> str:
    """What an artifact does here, beside what it claims."""
    now, then = data["latency_s"], data["claimed_latency_s"]
    rows = [
        ("latency", _span(then), _span(now)),
        ("size", figures.size(data["claimed_size_bytes"]), figures.size(data["size_bytes"])),
        ("peak memory", figures.size(data["claimed_peak_memory_bytes"]), figures.size(data["peak_memory_bytes"])),
        ("outputs", NOTHING, "equal" if data["sqnr_db"] is None else f"{data['sqnr_db']:.0f} dB"),
        (
            f"quality on {data['split']}" if data["split"] else "quality",
            figures.quality(data["claimed_quality"]),
            figures.quality(data["quality"]),
        ),
    ]
    verdict = f"{data['artifact']} on {data['target']}: {'holds' if data['holds'] else 'does not hold'}"
    return (
        folded(verdict)
        + "\n"
        + table(("", "claimed", "here and now"), rows, right=(1, 2), fold=(1, 2))
        + "".join(folded(f, "- ") for f in data["findings"])
    )


def bench_text(rows: Sequence[dict[str, Any]]) -> str:
    """Several models, measured in turn, in one table."""
    lines = [
        (
            row["name"],
            row["target"],
            str(row["threads"] or NOTHING),
            _span(row["latency_s"]),
            figures.seconds(row["cpu_s"]["median"]) if row["cpu_s"] else NOTHING,
            figures.ratio(row["ratio"]["median"]) if row["ratio"] else NOTHING,
            figures.size(row["size_bytes"]),
            figures.quality(row["quality"]),
            "" if row["outcome"] == "measured" else row["outcome"],
        )
        for row in rows
    ]
    columns = ("model", "target", "threads", "latency", "CPU time", "÷ best original", "size", "quality", "")
    return table(columns, lines, right=(2, 3, 4, 5, 6, 7), fold=(0, 1, 3, 5, 8), spare=(4, 2, 6))


def _span(estimate: dict[str, Any] | None) -> str:
    """Median and interval of an estimate of seconds that was turned into plain data."""
    return figures.around(None if estimate is None else Estimate(**estimate))
