"""The account of a run, for its reader: every operator before and after, why it is not faster, and what the search says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from planish.errors import RuntimeFailed
from planish.measure.memory import size_bytes
from planish.plan import FULL_PRECISION
from planish.prune.masks.subjects import masked_weights
from planish.pursuit import Pursuit
from planish.report import figures
from planish.result import OperatorRow, Search, Trial
from planish.trial import measure_beside
from planish.winners import Winner
from planish.workbench import Workbench


def nearest(pursuit: Pursuit) -> tuple[int, ...]:
    """Of the trials, the nearest on each limit (the fastest where there is none), and the one that loses least."""
    picks: list[int] = []
    trials = pursuit.trials.all
    keys: dict[str, Callable[[Trial], float]] = {
        "latency": lambda t: t.latency_ratio.median if t.latency_ratio else math.inf,
        "size": lambda t: t.size_bytes or math.inf,
        "memory": lambda t: t.peak_memory_bytes or math.inf,
        "macs": lambda t: t.macs if t.macs is not None and t.latency_ratio else math.inf,
        "drop": lambda t: t.drop if t.drop is not None and t.stage != "trial" else math.inf,
    }
    for quantity in (*(pursuit.bounds or ("latency",)), "drop"):
        key = keys[quantity]
        index = min(range(len(trials)), key=lambda i: key(trials[i]), default=None)
        if index is not None and key(trials[index]) < math.inf and index not in picks:
            picks.append(index)
    return tuple(picks)


def operator_rows(bench: Workbench, pursuit: Pursuit, winner: Winner | None, before_s: float, after_s: float) -> tuple[OperatorRow, ...]:
    """Every operator before and after; where the target has a latency table, with its share of what each net was measured to take."""
    costs = pursuit.costs
    seconds_before: Mapping[str, float] = {}
    seconds_after: Mapping[str, float] = {}
    if costs is not None and costs.effort == "latency":
        seconds_before = _shared_out(before_s, costs.shares(costs.space.identity))
        if winner is not None:
            chosen = costs.space.assignment(winner.plan.replace(recovery=costs.space.template.recovery))
            seconds_after = _shared_out(after_s, costs.shares(chosen))
    rows = []
    for name, operator in bench.analysis.operators.items():
        after = winner.analysis.operators.get(name) if winner else operator
        width = _width(operator)
        precision = winner.plan.floats if winner is not None else FULL_PRECISION
        if winner is not None and after is None:
            precision = "removed"
        elif winner is not None and name not in winner.skipped:
            precision = winner.plan.precisions.get(name, winner.plan.floats)
        new_width = None if after is None else _width(after)
        rows.append(
            OperatorRow(
                name=name,
                kind=operator.kind,
                width_before=width,
                width_after=new_width,
                precision=precision,
                time_before_s=seconds_before.get(name),
                time_after_s=0.0 if precision == "removed" else seconds_after.get(name),
                why=_why(bench, pursuit, winner, name, precision, width, new_width),
            )
        )
    return tuple(rows)


def _shared_out(seconds: float, shares: Mapping[str, float]) -> dict[str, float]:
    total = sum(shares.values())
    return {name: seconds * share / total for name, share in shares.items()} if total > 0 else {}


def _width(operator: Any) -> int | None:
    if operator.kind not in ("conv", "linear", "lstm", "gru", "embedding"):
        return None
    axis = 1 if operator.kind == "conv" else len(operator.output) - 1
    return int(operator.output[axis].full)


def _why(
    bench: Workbench, pursuit: Pursuit, winner: Winner | None, name: str, precision: str, before: int | None, after: int | None
) -> str:
    """Why an operator was not made faster: everything that holds it back, or ""."""
    if precision == "removed":
        return ""
    operator = bench.analysis.operators[name]
    reasons = []
    offered = {(o.technique, o.subject) for o in pursuit.options}
    if winner is not None and name in winner.skipped:
        reasons.append(f"int8: {winner.skipped[name]}")
    elif precision in (FULL_PRECISION, "bf16") and operator.kind in ("conv", "linear", "matmul", "attention", "lstm", "gru"):
        if ("precision", name) not in offered:
            reasons.append("int8 is not offered here")
        else:
            reasons.append("int8 was predicted to lose more than its time is worth")
    if before is not None and after == before:
        why = bench.analysis.reasons.get(operator.weight or "", "")
        if why:
            reasons.append(f"width: {why}")
        elif not any(technique == "width" for technique, _ in offered):
            reasons.append("width: pruning was not asked for, or offers no multiple of what the target likes")
        else:
            reasons.append("width: narrower was predicted to lose more than its time is worth")
    if winner is not None and name in winner.plan.masks:
        reasons.append(f"mask: its zeros ({winner.plan.masks[name]}) are multiplied like other weights")
    return "; ".join(reasons)


def group_widths(bench: Workbench, winner: Winner | None) -> dict[str, tuple[int, int]]:
    """Units of every group before and after; 0 after where it went with a block."""
    out = {}
    for name, group in bench.analysis.groups.items():
        width = group.units if winner is None else winner.plan.widths.get(name, group.units)
        out[name] = (group.units, 0 if winner is not None and name not in winner.analysis.groups and width == group.units else width)
    return out


def masks_note(bench: Workbench, winner: Winner) -> str:
    """What masks did, as measured against the same net without a zero: nothing for its speed, and something for its file; "" without masks."""
    masked, path = masked_weights(winner.analysis, winner.plan.masks), winner.exported.path
    if not masked or path is None:
        return ""
    dense = winner.final.copy()
    zeros = 0
    with torch.no_grad():
        for name in masked:
            weight = dense.module.get_parameter(name)
            is_zero = weight == 0
            zeros += int(is_zero.sum())
            weight.masked_fill_(is_zero, float(weight.abs().max()))
    weights = sum(value.numel() for value in dense.module.parameters() if value.dim() > 1)
    home = bench.home(winner.plan)
    folder = bench.folder / "without zeros"
    folder.mkdir(parents=True, exist_ok=True)
    other = home.runtime.export(dense, folder)
    try:
        found = figures.ratio(measure_beside(bench, winner.exported.target or home.target, path, other).median)
        speed = f"takes {found} of the time of the same net without zeros"
    except RuntimeFailed as err:
        speed = f"could not be timed without them ({err})"
    sizes = f"{figures.size(size_bytes(path))} instead of {figures.size(size_bytes(other))}"
    return (
        f"masks: {zeros} of {weights} weights are zero; {home.runtime.name} multiplies by them as by others: the net {speed}; "
        f"the file has {sizes}"
    )


def search_account(pursuit: Pursuit) -> Search:
    """What the search says of itself: how many plans it judged, its gap and residual, the correction of its tables."""
    method = pursuit.search
    if method is None:
        return Search(method="none")
    standing = method.standing
    counts = {stage: sum(t.stage == stage for t in pursuit.trials.all) for stage in ("candidate", "trial")}
    return Search(
        method=type(method).__name__.lower(),
        candidates=counts["candidate"],
        trials=counts["trial"],
        gap=_number(standing.gap),
        kkt_residual=_number(standing.kkt),
        affine=(standing.correction.offset, standing.correction.slope) if standing.correction is not None else None,
        tilt=dict(standing.tilt),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
