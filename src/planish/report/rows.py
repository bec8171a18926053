"""The tables of the page as rows of text: every figure already formatted, nothing escaped (the template does that)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planish.report import figures
from planish.report import sensitivity as words
from planish.report.figures import NOTHING, plain
from planish.report.plots import front, relative_latency
from planish.verdict import held

if TYPE_CHECKING:
    from planish.budget import Limit
    from planish.measurement import Measurement
    from planish.result import OperatorRow, Summary, Trial


@dataclass(frozen=True)
class Line:
    """One row of a table on the page, every cell as it is shown; `state` is "good", "bad", "muted" or ""; `values` are what columns are sorted by."""

    cells: tuple[str, ...]
    state: str = ""
    full: str = ""
    share_before: float = 0.0
    share_after: float = 0.0
    values: tuple[float | None, ...] = ()


def tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """(large figure, what it is, how surely) of what a reader looks for first."""
    one, two, tiles = summary.original, summary.optimized, []
    if (ratio := summary.ratios.get("latency")) is not None and two is not None:
        times, surely = figures.factor_around(ratio)
        if not ratio.trustworthy:
            surely += ", not trustworthy"
        change = f"{figures.seconds(one.latency_s.median)} → {figures.seconds(two.latency_s.median)} a call"
        tiles.append((times, "as fast", f"{change} ({surely})"))
    if summary.drop is not None:
        tiles.append((figures.signed(summary.drop), figures.drop_of(summary), figures.around_drop(summary)))
    for name, what, unit, before, after in (
        ("size", "of the size", figures.size, one.size_bytes, two.size_bytes if two else None),
        ("memory", "of the peak memory", figures.size, one.peak_memory_bytes, two.peak_memory_bytes if two else None),
        ("macs", "of the MACs", figures.count, one.macs, two.macs if two else None),
    ):
        if name in summary.ratios and after is not None:
            tiles.append((figures.ratio(summary.ratios[name].median), what, f"{unit(before)} → {unit(after)}"))
    return tiles


def _measured(limit: Limit, measurement: Measurement) -> float | None:
    if limit.quantity == "throughput":
        return measurement.batch / measurement.latency_s.median
    return {
        "latency": measurement.latency_s.median,
        "size": measurement.size_bytes,
        "memory": measurement.peak_memory_bytes,
        "macs": measurement.macs / measurement.batch,
    }.get(limit.quantity)


def _figure(quantity: str, value: float | None) -> str:
    if quantity == "throughput":
        return NOTHING if value is None else f"{figures.digits(value)}/s"
    return {"latency": figures.seconds, "size": figures.size, "memory": figures.size, "macs": figures.count}.get(quantity, figures.count)(
        value
    )


def limits(summary: Summary) -> list[Line]:
    """What was asked, what that is in figures, what was measured, and whether it holds, as the verdict has it."""
    one, two = summary.original, summary.optimized
    states: dict[str, str] = {}
    if two is not None and "latency" in summary.ratios:
        found = held(summary.budget, one, two, summary.ratios["latency"], summary.drop, summary.drop_interval)
        states = {line.quantity: line.state for line in found}
    lines = []
    for limit in summary.budget.limits:
        before, after = _measured(limit, one), _measured(limit, two) if two else None
        asked = figures.ratio(limit.value) if limit.relative else _figure(limit.quantity, limit.value)
        bound = _figure(limit.quantity, limit.bound(before)) if before is not None else NOTHING
        state = states.get(limit.quantity, "") if after is not None else ""
        lines.append(_judged(limit.quantity, asked, bound, _figure(limit.quantity, after), state))
    if summary.drop is not None and one.quality is not None:
        allowed = summary.budget.allowed_drop.allowed(one.quality)
        judged = summary.drop
        if summary.budget.confidence is not None and summary.drop_interval is not None:
            judged = summary.drop_interval[1]
        measured = figures.signed(judged) + (" (upper end)" if summary.budget.confidence is not None else "")
        lines.append(_judged("drop", str(summary.budget.allowed_drop), f"{allowed:.4g}", measured, states.get("drop", "")))
    return lines


def _judged(quantity: str, asked: str, bound: str, measured: str, held: str) -> Line:
    shown = {"holds": ("holds", "good"), "missed": ("missed", "bad"), "doubtful": ("too noisy to tell", "muted")}
    word, state = shown.get(held, ("not measured", "muted"))
    return Line((quantity, asked, bound, measured, word), state)


def sides(summary: Summary) -> list[Line]:
    """Original and optimized side by side: label, original, optimized, optimized ÷ original, what the figure means."""
    one, two, ratios = summary.original, summary.optimized, summary.ratios

    def ratio(name: str) -> str:
        return figures.ratio_span(ratios[name]) if name in ratios else NOTHING

    def cells(label: str, show: Any, change: str, hint: str) -> Line:
        return Line((label, show(one), show(two) if two is not None else NOTHING, change, hint))

    def surely(measurement: Measurement) -> str:
        return figures.quality_around(measurement.quality, measurement.quality_interval)

    def kernels(measurement: Measurement) -> str:
        proof = measurement.proof
        return NOTHING if proof is None else f"{proof.int8_kernels} int8, {proof.float_kernels} float on {proof.device}"

    def bound(measurement: Measurement) -> str:
        if measurement.roofline_s is None:
            return NOTHING
        return f"{figures.seconds(measurement.roofline_s)} ({measurement.roofline_s / measurement.latency_s.median:.0%} reached)"

    drop = f"{figures.signed(summary.drop)} lost" if summary.drop is not None else NOTHING
    where = f" on {one.split}" if one.split else ""
    lines = [
        cells(f"{plain(summary.metric, 40)}{where}", surely, drop, "from the artifact's own outputs, 95 % interval"),
        cells(
            "latency",
            lambda m: figures.around(m.latency_s),
            ratio("latency"),
            "wall time of a call",
        ),
        cells("threads", lambda m: str(m.threads), NOTHING, "of a call: as many as suit it"),
        cells(
            "CPU time",
            lambda m: figures.around(m.cpu_s),
            NOTHING,
            "process time of a call, all threads",
        ),
        cells("size", lambda m: figures.size(m.size_bytes), ratio("size"), "the runtime model on disk"),
        cells("peak memory", lambda m: figures.size(m.peak_memory_bytes), ratio("memory"), "of the process, less the bare runtime"),
        cells("MACs", lambda m: figures.count(m.macs), ratio("macs"), "multiply-accumulates of a call"),
        cells(
            "bit operations",
            lambda m: figures.count(m.bit_operations),
            ratio("bit_operations"),
            "MACs times the bits of both factors, as planned",
        ),
        cells("roofline", bound, NOTHING, "the least time that this machine allows for the graph"),
        cells("executed kernels", kernels, NOTHING, "read back from the runtime"),
        cells(
            "export fidelity",
            lambda m: NOTHING if m.sqnr_db is None else f"{m.sqnr_db:.0f} dB",
            NOTHING,
            "exported outputs against the module's",
        ),
    ]
    if summary.control_quality is not None:
        control = f"{figures.quality(summary.control_quality)} (the net as it was, tuned as long)"
        change = f"{figures.signed(summary.control_drop)} lost against it"
        lines.insert(1, Line(("dense control", control, NOTHING, change, "tuned on as many samples as the recovery")))
    return lines


def baselines(summary: Summary) -> list[Line]:
    """The original in every runtime, quickest first: name, latency, peak memory, what the artifact gains on it."""
    rows = dict(summary.baselines)
    rows[summary.original.runtime] = summary.original
    return [
        Line(
            (
                name,
                figures.around(other.latency_s),
                figures.size(other.peak_memory_bytes),
                figures.gained(summary, name),
            ),
            "target" if name == summary.original.runtime else "",
        )
        for name, other in sorted(rows.items(), key=lambda item: item[1].latency_s.median)
    ]


def on_front(summary: Summary) -> set[int]:
    """Indices of the measured trials that no other dominates in latency and drop."""
    points = [
        (i, trial.latency_ratio.median, trial.drop)
        for i, trial in enumerate(summary.trials)
        if trial.latency_ratio is not None and trial.drop is not None
    ]
    return {points[k][0] for k in front([(x, y) for _, x, y in points])}


def trials(summary: Summary) -> list[Line]:
    """Every trial, in order: number, stage, outcome, latency, drop, loss, size, MACs, seconds, plan, why."""
    return [
        Line(
            (
                str(number + 1),
                trial.stage,
                trial.outcome.kind,
                _trial_latency(trial, summary),
                figures.signed(trial.drop),
                figures.digits(trial.loss) if trial.loss is not None else NOTHING,
                figures.size(trial.size_bytes),
                figures.count(trial.macs),
                figures.duration(trial.seconds),
                _changes(trial),
                plain(trial.outcome.detail, 300),
            ),
            "good" if trial.stage == "winner" else "" if trial.outcome.kind == "measured" else "muted",
        )
        for number, trial in enumerate(summary.trials)
    ]


def _trial_latency(trial: Trial, summary: Summary) -> str:
    if trial.latency_ratio is not None:
        return figures.ratio_span(trial.latency_ratio)
    predicted = relative_latency(trial, summary)
    return NOTHING if predicted is None else f"about {figures.ratio(predicted)}"


def _changes(trial: Trial) -> str:
    plan = trial.plan
    parts = [
        (len(plan.widths), "width", "widths"),
        (len(plan.blocks), "block", "blocks"),
        (len(plan.adaptors), "adaptor", "adaptors"),
        *((n, scheme, scheme) for scheme, n in sorted(Counter(plan.precisions.values()).items()) if scheme != "fp32"),
        (len(plan.masks), "mask", "masks"),
    ]
    return ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in parts if n) or "nothing changed"


def operators(summary: Summary) -> list[Line]:
    """Every operator: name, kind, width, precision, time before and after, why; bars relative to the slowest."""
    longest = max((row.time_before_s or 0.0 for row in summary.operators), default=0.0) or 1.0
    return [
        Line(
            (
                plain(row.name),
                row.kind,
                _width(row),
                row.precision,
                figures.seconds(row.time_before_s),
                _after(row),
                plain(row.why, 400) or _gain(row),
            ),
            "removed" if row.precision == "removed" else "" if _is_faster(row) else "muted",
            full=plain(row.name, 4000),
            share_before=100 * min(1.0, (row.time_before_s or 0.0) / longest),
            share_after=100 * min(1.0, (row.time_after_s or 0.0) / longest),
        )
        for row in summary.operators
    ]


def sensitivity(summary: Summary) -> list[Line]:
    """Operators by what they lose: name, scheme, alone in int8, as planned, all but it, quality of all but it, clipped, cure."""
    if summary.diagnosis is None:
        return []
    return [
        Line(
            (
                plain(row.name),
                row.scheme,
                words.alone(row, words.STATIC),
                words.now(row),
                words.decibels(row.sqnr_without_db),
                figures.quality(row.quality_without),
                words.clipped(row),
                plain(words.cure(row)),
            ),
            full=plain(row.name, 4000),
            values=(
                row.sqnr_alone_db.get(words.STATIC),
                words.EQUAL_DB if row.scheme == "fp32" else row.sqnr_alone_db.get(row.scheme),
                row.sqnr_without_db,
                row.quality_without,
                row.clipped,
            ),
        )
        for row in summary.diagnosis.operators
    ]


def _is_faster(row: OperatorRow) -> bool:
    return row.time_before_s is not None and row.time_after_s is not None and row.time_after_s < 0.98 * row.time_before_s


def _width(row: OperatorRow) -> str:
    if row.width_before is None:
        return NOTHING
    if row.precision == "removed":
        return f"{row.width_before} → 0"
    return str(row.width_before) if row.width_after in (None, row.width_before) else f"{row.width_before} → {row.width_after}"


def _after(row: OperatorRow) -> str:
    return "0" if row.precision == "removed" else figures.seconds(row.time_after_s)


def _gain(row: OperatorRow) -> str:
    if row.precision == "removed":
        return "bypassed with its block"
    if _is_faster(row) and row.time_before_s and row.time_after_s:
        return f"{row.time_before_s / row.time_after_s:.1f}× as fast"
    return ""


def groups(summary: Summary) -> list[Line]:
    """Prunable groups: name, units before, units after."""
    return [Line((name, str(before), str(after)), "" if before != after else "muted") for name, (before, after) in summary.groups.items()]


def stages(summary: Summary) -> list[Line]:
    """Where the run's own time went: stage, seconds, share."""
    total = summary.seconds.get("total", 0.0) or sum(summary.seconds.values()) or 1.0
    stages = {name: seconds for name, seconds in summary.seconds.items() if name != "total"}
    rest = total - sum(stages.values())
    if rest > 0.01 * total:
        stages["everything else"] = rest
    return [
        Line((plain(name), figures.duration(seconds), f"{seconds / total:.0%}"), share_after=100 * min(1.0, seconds / total))
        for name, seconds in stages.items()
    ]


def search(summary: Summary) -> list[tuple[str, str]]:
    """What the search says of itself."""
    search = summary.search
    lines = [("method", search.method), ("candidates", str(search.candidates)), ("exported and measured", str(search.trials))]
    if search.gap is not None:
        lines.append(("duality gap", f"{search.gap:.2%} of what it minimised"))
    if search.kkt_residual is not None:
        lines.append(("KKT residual of its last solution", f"{search.kkt_residual:.2g}"))
    if search.affine is not None:
        tilt = "".join(f", {precision} × {figures.digits(factor)}" for precision, factor in sorted(search.tilt.items()))
        lines.append(("table correction", f"{figures.seconds(search.affine[0])} + {figures.digits(search.affine[1])} × predicted{tilt}"))
    return lines


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Where and how it was measured."""
    made = summary.optimized or summary.original
    lines = [("target", summary.target), ("threads", str(made.threads)), ("batch", str(made.batch))]
    lines += [("repeats", f"{made.latency_s.n} counted after {made.warm_up} to warm up"), ("seed", str(summary.seed))]
    if (machine := summary.machine or made.machine) is not None:
        lines += [
            ("processor", f"{machine.processor}, {machine.cores} cores, {machine.isa}"),
            ("memory", figures.size(machine.memory_bytes)),
            ("system", f"{machine.system}, Python {machine.python}"),
            ("machine fingerprint", machine.fingerprint),
        ]
    lines += [(name, version) for name, version in sorted(made.versions.items())]
    if summary.plan is not None:
        lines.append(("plan", f"{summary.plan.digest} ({summary.plan.saliency}, {summary.plan.schedule}, {summary.plan.observer})"))
    return lines
