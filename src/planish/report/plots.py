"""The figures of the page as plotly data: plain dictionaries, drawn in the browser by the script that the page carries."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.report import figures
from planish.report import sensitivity as words
from planish.report.figures import plain

if TYPE_CHECKING:
    from planish.measurement import Measurement
    from planish.result import Summary, Trial

Figure = dict[str, Any]
_NAMED, _MOST_DB = 10, 80.0
"""Operators in the figure of what quantization loses, and where its bars end: beyond, nobody tells the outputs apart."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates (both coordinates: less is better), by the first coordinate.

    Of equal points only the first is kept, so that what is returned is an antichain.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def relative_latency(trial: Trial, summary: Summary) -> float | None:
    """Latency of a trial as a share of the original's: measured, else what the tables said, else None."""
    if trial.latency_ratio is not None:
        return trial.latency_ratio.median
    if trial.predicted_latency_s is not None and summary.original.latency_s.median > 0:
        return trial.predicted_latency_s / summary.original.latency_s.median
    return None


def trials_figure(summary: Summary) -> Figure | None:
    """Every trial by latency and drop, the Pareto front of the measured ones, and the budget as a shaded corner."""
    shown = [
        (trial, x, trial.drop)
        for trial in summary.trials
        if (x := relative_latency(trial, summary)) is not None and trial.drop is not None and math.isfinite(x + trial.drop)
    ]
    if not shown:
        return None
    traces: list[Figure] = []
    for name, color, symbol, size, wanted in (
        ("candidate (predicted)", "muted", "circle-open", 7, lambda t: t.latency_ratio is None),
        ("trial (measured)", "accent", "circle", 9, lambda t: t.latency_ratio is not None and t.stage != "winner"),
        ("winner", "good", "star", 16, lambda t: t.latency_ratio is not None and t.stage == "winner"),
    ):
        some = [(trial, x, y) for trial, x, y in shown if wanted(trial)]
        if not some:
            continue
        ratios = [trial.latency_ratio for trial, _, _ in some]
        trace: Figure = {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [x for _, x, _ in some],
            "y": [y for _, _, y in some],
            "text": [_hover(trial) for trial, _, _ in some],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": color, "symbol": symbol, "size": size},
        }
        if all(ratio is not None for ratio in ratios):
            trace["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": [ratio.high - ratio.median for ratio in ratios if ratio],
                "arrayminus": [ratio.median - ratio.low for ratio in ratios if ratio],
                "color": color,
                "thickness": 1,
                "width": 3,
            }
        traces.append(trace)
    measured = [(x, y) for trial, x, y in shown if trial.latency_ratio is not None and y is not None]
    if len(best := front(measured)) > 1:
        line = {"color": "accent", "shape": "hv", "width": 1.5, "dash": "dot"}
        corner = {"x": [measured[i][0] for i in best], "y": [measured[i][1] for i in best]}
        traces.insert(0, {"type": "scatter", "mode": "lines", "name": "Pareto front", "line": line, "hoverinfo": "skip", **corner})
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "original",
            "x": [1.0],
            "y": [0.0],
            "text": ["the original"],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": "ink", "symbol": "diamond", "size": 10},
        }
    )
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "latency, optimized ÷ original"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": f"drop of {html.escape(plain(summary.metric, 40))}"}},
            "shapes": _budget_corner(summary),
        },
        "label": "Every trial by its latency relative to the original and its loss of quality; lower left is better.",
    }


def _budget_corner(summary: Summary) -> list[Figure]:
    limit = next((limit for limit in summary.budget.limits if limit.quantity == "latency"), None)
    right = 1.0 if limit is None else limit.bound(summary.original.latency_s.median) / summary.original.latency_s.median
    shape: Figure = {"type": "rect", "xref": "x", "yref": "y domain", "layer": "below", "x0": 0, "x1": right, "y0": 0, "y1": 1}
    if summary.original.quality is not None:
        shape |= {"yref": "y", "y0": "bottom", "y1": summary.budget.allowed_drop.allowed(summary.original.quality)}
    return [shape | {"fillcolor": "good", "opacity": 0.1, "line": {"width": 0}}]


def _hover(trial: Trial) -> str:
    parts = [f"<b>{trial.stage}</b> {trial.plan.digest}", f"{trial.outcome.kind} {html.escape(plain(trial.outcome.detail, 80))}".strip()]
    if trial.latency_ratio is not None:
        parts.append(f"latency {figures.ratio(trial.latency_ratio.median)}")
    parts.append(f"drop {figures.signed(trial.drop)}, MACs {figures.count(trial.macs)}, size {figures.size(trial.size_bytes)}")
    return "<br>".join(parts)


def runtimes_figure(summary: Summary) -> Figure | None:
    """Latency of the original in every runtime and of the artifact, as bars with their intervals."""
    rows: list[tuple[str, Measurement, str]] = [(f"original, {name}", other, "bar") for name, other in summary.baselines.items()]
    rows.append((f"original, {summary.original.runtime}", summary.original, "bar"))
    rows.sort(key=lambda row: -row[1].latency_s.median)
    if summary.optimized is not None:
        rows.append((f"optimized, {summary.target}", summary.optimized, "accent"))
    if len(rows) < 2:
        return None
    latencies = [row[1].latency_s for row in rows]
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": [html.escape(plain(name, 60)) for name, _, _ in rows],
                "x": [latency.median * 1e3 for latency in latencies],
                "hovertemplate": "%{y}: %{x:.3g} ms<extra></extra>",
                "marker": {"color": [color for _, _, color in rows]},
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [(latency.high - latency.median) * 1e3 for latency in latencies],
                    "arrayminus": [(latency.median - latency.low) * 1e3 for latency in latencies],
                    "color": "ink",
                    "thickness": 1,
                    "width": 3,
                },
            },
            {
                "type": "scatter",
                "mode": "text",
                "y": [html.escape(plain(name, 60)) for name, _, _ in rows],
                "x": [max(latency.high, latency.median) * 1e3 for latency in latencies],
                "text": [f"  {figures.seconds(latency.median)}" for latency in latencies],
                "textposition": "middle right",
                "cliponaxis": False,
                "hoverinfo": "skip",
            },
        ],
        "layout": {
            "xaxis": {"title": {"text": "latency of one call, ms"}, "rangemode": "tozero"},
            "showlegend": False,
            "height": 90 + 40 * len(rows),
        },
        "label": "Latency of the original in every runtime, and of the optimized net.",
    }


def sensitivity_figure(summary: Summary) -> Figure | None:
    """The operators that lose most: what is left of the outputs with one alone in int8, and in what was chosen for it."""
    found = summary.diagnosis
    rows = found.operators[:_NAMED] if found is not None else ()
    if not rows:
        return None
    labels = [html.escape(plain(row.name, 40)) for row in rows]
    static = [row.sqnr_alone_db.get(words.STATIC) for row in rows]
    planned = [None if row.scheme in ("fp32", words.STATIC) else row.sqnr_alone_db.get(row.scheme) for row in rows]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [None if value is None else max(0.0, min(value, _MOST_DB)) for value in values],
            "text": [words.decibels(value) if value is not None else "" for value in values],
            "hovertemplate": "%{y}: %{text} dB<extra></extra>",
            "marker": {"color": color},
        }
        for name, values, color in (("alone in int8", static, "bar"), ("alone as planned", planned, "accent"))
        if any(value is not None for value in values)
    ]
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "signal to noise of the outputs, dB"}, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed"},
            "barmode": "group",
            "height": 110 + 32 * len(rows),
        },
        "label": "The operators that lose most in int8, and what the outputs keep with each alone; longer is better.",
    }


def history_figure(summary: Summary) -> Figure | None:
    """Every figure of the plan's schedule over its steps, one below the other: multiplier, violation and KKT residual, say."""
    ticks = next((name for name in ("step", "round") if summary.history and name in summary.history[0]), None)
    if ticks is None:
        return None
    names = [name for name in summary.history[0] if name != ticks]
    height = 1 / len(names)
    layout: Figure = {"xaxis": {"title": {"text": ticks}, "anchor": f"y{len(names)}" if len(names) > 1 else "y"}, "showlegend": False}
    layout["height"] = 90 + 110 * len(names)
    data = []
    for place, name in enumerate(names):
        axis = "" if place == 0 else str(place + 1)
        layout[f"yaxis{axis}"] = {
            "title": {"text": html.escape(plain(name, 20))},
            "domain": [1 - (place + 0.85) * height, 1 - place * height],
            "anchor": "x",
        }
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(summary.history) < 20 else "lines",
                "x": [step.get(ticks) for step in summary.history],
                "y": [step.get(name) for step in summary.history],
                "yaxis": f"y{axis}",
                "line": {"color": "accent"},
                "hovertemplate": f"{ticks} %{{x}}: %{{y:.3g}}<extra></extra>",
            }
        )
    return {"data": data, "layout": layout, "label": f"How {', '.join(names)} went while units left."}
