"""The conclusion: winner and original measured side by side one last time, the verdict, and the artifact with its proof."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from planish.artifact import Artifact, write
from planish.artifact.manifest import RESULT
from planish.budget import Limit
from planish.errors import BudgetError
from planish.graph.graph import Analysis, Graph
from planish.graph.macs import macs, operator_macs
from planish.graph.modules import as_module
from planish.measure.latency import Timing, interleaved, ratio
from planish.measure.machine import machine
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.probe import Probe
from planish.measure.roofline import roofline_s
from planish.measurement import Estimate, Measurement
from planish.metrics import interval, paired_interval
from planish.plan import Plan
from planish.pursuit import Pursuit
from planish.result import OperatorRow, Result, Search, Summary, Verdict
from planish.study.store import Study
from planish.trial import drop, module_outputs_of_example
from planish.winners import Winner
from planish.workbench import Array, Baseline, Workbench, outputs_of, predictor, sqnr_db

if TYPE_CHECKING:
    from pathlib import Path

    from planish.flow import Request

_SECONDS = 3.0
_ATTEMPTS = 4
_PAUSE_S = 5.0
LOOKED = "looked at test"
"""The event that counts a look at the test split."""
_EXACT = 1


@dataclass(frozen=True)
class _Side:
    """One of the two nets of the final comparison."""

    baseline: Baseline
    path: Path
    probe: Probe
    graph: Graph
    analysis: Analysis
    int8: frozenset[str]


def conclude(bench: Workbench, request: Request, study: Study, pursuit: Pursuit, winner: Winner | None) -> Result:
    """Measure, judge, write.

    Returns:
        The result; the artifact is written where the verdict is "met", or where `accept_nearest` was given.
    """
    clock = bench.clock
    if winner is not None and winner.outcome.kind == "mismatch":
        bench.notes.append(f"the best plan was not used: {winner.outcome.detail}")
        winner = None
    with clock.stage("final measurement"):
        summary, outputs = _judged(bench, request, study, pursuit, winner)
        if winner is not None and _keeps_original(bench, request, summary):
            before = summary
            summary, outputs = _judged(bench, request, study, pursuit, None)
            if summary.verdict == "met":
                bench.notes.append(f"the original is kept: {_why_kept(before)}")
                winner = None
            else:
                summary, outputs = before, []
    if not outputs and winner is not None and winner.exported.path is not None:
        with Probe.open(_home(bench, winner).target, winner.exported.path, winner.final.signature) as probe:
            outputs = probe.outputs(bench.example)
    summary = _timed(bench, summary)
    artifact = None
    if summary.verdict == "met" or request.accept_nearest:
        with clock.stage("writing the artifact"):
            summary = msgspec.structs.replace(summary, artifact=str(request.out))
            artifact = _write(bench, request, study, summary, winner, outputs)
    if request.control and winner is not None:
        summary = _timed(bench, _with_control(bench, request, summary, winner))
        if artifact is not None:
            artifact = _write(bench, request, study, summary, winner, outputs, replaces=True)
    study.log("concluded", summary.verdict)
    (study.folder / RESULT).write_bytes(msgspec.json.encode(summary))
    module = as_module(winner.final if winner is not None else bench.graph)
    return Result(summary, module, artifact)


def _timed(bench: Workbench, summary: Summary) -> Summary:
    seconds = {**bench.clock.seconds, "total": bench.clock.elapsed_s}
    return msgspec.structs.replace(summary, notes=tuple(dict.fromkeys(bench.notes)), seconds=seconds)


def _keeps_original(bench: Workbench, request: Request, summary: Summary) -> bool:
    """Whether the original may be the better answer: the winner is no faster, loses too much, or misses what the original holds."""
    if summary.verdict == "infeasible":
        return not request.budget.limits or all(not limit.relative for limit in request.budget.limits)
    return not request.budget.limits and summary.ratios["latency"].median >= 1.0


def _why_kept(summary: Summary) -> str:
    if summary.verdict == "infeasible":
        return summary.reason.removeprefix("nothing found holds the budget; nearest: ")
    return f"the best plan takes {summary.ratios['latency'].median:.2f} times as long in this target"


def _home(bench: Workbench, winner: Winner) -> Baseline:
    return bench.baselines[winner.plan.target.partition(":")[0]]


def _judged(bench: Workbench, request: Request, study: Study, pursuit: Pursuit, winner: Winner | None) -> tuple[Summary, list[Array]]:
    """The summary of a winner (or of the original alone), everything measured side by side, and its outputs on the example."""
    best = bench.best
    best.living_probe(bench.graph.signature)
    original = _Side(best, best.path, best.probe, bench.graph, bench.analysis, frozenset())
    if bench.data.judged[0] == "test":
        study.log(LOOKED)
    if winner is None or winner.exported.path is None:
        return _compare(bench, request, pursuit, original, None, None)
    home = _home(bench, winner)
    with Probe.open(home.target, winner.exported.path, winner.final.signature) as probe:
        int8 = frozenset(n for n, s in winner.plan.precisions.items() if s == "int8" and n not in winner.skipped)
        side = _Side(home, winner.exported.path, probe, winner.final, winner.analysis, int8)
        return _compare(bench, request, pursuit, original, side, winner)


def _settled(bench: Workbench, probes: dict[str, Probe]) -> dict[str, Timing]:
    """The final timing: where the machine was too noisy to trust the ratio it is taken again, a few times, with a pause between.

    What counts is the first that can be trusted, else the last: never the one that looks best.
    """
    for attempt in range(_ATTEMPTS):
        timings = interleaved(probes, bench.example, seconds=_SECONDS)
        if len(probes) < 2 or ratio(timings["optimized"], timings["original"]).trustworthy:
            break
        if attempt + 1 < _ATTEMPTS:
            bench.events.say("the machine is noisy; measuring again")
            time.sleep(_PAUSE_S)
    return timings


def _compare(
    bench: Workbench, request: Request, pursuit: Pursuit, original: _Side, optimized: _Side | None, winner: Winner | None
) -> tuple[Summary, list[Array]]:
    probes = {"original": original.probe} | ({"optimized": optimized.probe} if optimized else {})
    timings = _settled(bench, probes)
    name, split = bench.data.judged
    before = _measurement(bench, original, timings["original"], name)
    after = _measurement(bench, optimized, timings["optimized"], name) if optimized else before
    latency = ratio(timings["optimized"], timings["original"]) if optimized else Estimate(1.0, 1.0, 1.0, before.latency_s.n)
    lost: float | None = None
    lost_interval: tuple[float, float] | None = None
    if bench.job.evaluate is not None:
        assert before.quality is not None and after.quality is not None
        lost = before.quality - after.quality if bench.metric.higher_is_better else after.quality - before.quality
        lost = lost if math.isfinite(lost) else math.inf
    elif split is not None:
        first = bench.predict(original.baseline, name, split)
        second = outputs_of(optimized.probe, split) if optimized else first
        found_interval = paired_interval(
            bench.metric, first, second, split.targets, confidence=request.budget.confidence or 0.95, seed=request.seed
        )
        lost, lost_interval = float(found_interval[0]), (float(found_interval[1]), float(found_interval[2]))
        if name == "validation" and winner is not None:
            bench.notes.append(
                "selection-biased: there is no test split, so the drop is judged on the validation split that guided the search"
            )
    verdict, reason = _verdict(bench, request, before, after, latency, lost, lost_interval, winner)
    summary = Summary(
        name=bench.job.name,
        verdict=verdict,
        reason=reason,
        target=(optimized or original).baseline.target.name,
        budget=request.budget,
        metric=bench.metric.name,
        higher_is_better=bench.metric.higher_is_better,
        original=before,
        optimized=after,
        baselines=_baselines(bench),
        ratios={
            "latency": latency,
            "size": _exact(after.size_bytes, before.size_bytes),
            "memory": _exact(after.peak_memory_bytes, before.peak_memory_bytes),
            "macs": _exact(after.macs, before.macs),
        },
        drop=lost,
        drop_interval=lost_interval,
        split=name,
        plan=winner.plan if winner else None,
        trials=tuple(pursuit.trials),
        nearest=_nearest(pursuit) if verdict != "met" else (),
        operators=_rows(bench, pursuit, winner),
        groups=_groups(bench, winner),
        search=_search(pursuit),
        machine=machine(),
        seed=request.seed,
        threads=request.threads,
    )
    side = optimized or original
    return summary, side.probe.outputs(bench.example)


def _exact(after: float | None, before: float | None) -> Estimate:
    share = after / before if before and after is not None else 1.0
    return Estimate(share, share, share, _EXACT)


def _measurement(bench: Workbench, side: _Side, timing: Timing, name: str) -> Measurement:
    target, graph = side.baseline.target, side.graph
    quality, quality_interval = _quality(bench, side, name)
    total = macs(side.analysis)
    int8 = sum(operator_macs(operator) for key, operator in side.analysis.operators.items() if key in side.int8)
    size = size_bytes(side.path)
    moved = size + sum(array.nbytes for array in bench.example)
    return Measurement(
        runtime=target.name,
        machine=machine(),
        threads=target.threads,
        batch=bench.batch,
        latency_s=timing.latency_s,
        cpu_s=timing.cpu_s,
        size_bytes=size,
        peak_memory_bytes=peak_memory_bytes(target, side.path, graph.signature, bench.example),
        macs=total,
        quality=quality,
        quality_interval=quality_interval,
        split=name,
        sqnr_db=_finite(sqnr_db(module_outputs_of_example(graph), side.probe.outputs(bench.example))),
        proof=side.probe.proof(),
        roofline_s=roofline_s(target, total - int8, moved, int8),
        versions=side.baseline.runtime.versions(),
        warm_up=timing.warm_up,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quality(bench: Workbench, side: _Side, name: str) -> tuple[float | None, tuple[float, float] | None]:
    _, split = bench.data.judged
    if bench.job.evaluate is not None:
        return float(bench.job.evaluate(predictor(side.probe))), None
    if split is None:
        return None, None
    outputs = bench.predict(side.baseline, name, split) if side.probe is side.baseline.probe else outputs_of(side.probe, split)
    reference = split.targets if bench.metric.needs_labels else bench.predict(bench.best, name, split)
    score, low, high = interval(bench.metric, outputs, reference)[:3]
    return float(score), (float(low), float(high))


def _baselines(bench: Workbench) -> dict[str, Measurement]:
    """The original everywhere else, from the first comparison of all runtimes; quality and memory are not measured again there."""
    out = {}
    for baseline in (*bench.baselines.values(), *bench.eager.values()):
        if baseline is bench.best or baseline.timing is None:
            continue
        out[baseline.target.name] = Measurement(
            runtime=baseline.target.name,
            machine=machine(),
            threads=baseline.target.threads,
            batch=bench.batch,
            latency_s=baseline.timing.latency_s,
            cpu_s=baseline.timing.cpu_s,
            size_bytes=size_bytes(baseline.path),
            peak_memory_bytes=None,
            macs=macs(bench.analysis),
            sqnr_db=_finite(baseline.sqnr_db),
            versions=baseline.runtime.versions(),
            warm_up=baseline.timing.warm_up,
        )
    return out


def _verdict(
    bench: Workbench,
    request: Request,
    before: Measurement,
    after: Measurement,
    latency: Estimate,
    lost: float | None,
    lost_interval: tuple[float, float] | None,
    winner: Winner | None,
) -> tuple[Verdict, str]:
    budget = request.budget
    missed: list[str] = []
    doubtful: list[str] = []
    for limit in budget.limits:
        value, low, high, text = _against(limit, before, after, latency)
        bound = limit.value if limit.relative else limit.bound(1.0)
        holds = value >= bound if limit.quantity == "throughput" else value <= bound
        is_sure = latency.trustworthy if limit.relative else after.latency_s.trustworthy
        if not is_sure and limit.quantity in ("latency", "throughput") and low <= bound <= high:
            doubtful.append(f"{limit.quantity} {text}, between {low:.3g} and {high:.3g}: the machine is too noisy to tell")
        elif not holds:
            missed.append(f"{limit.quantity} {text}, the limit is {_shown(limit)}")
    allowed = budget.allowed_drop.allowed(before.quality) if before.quality is not None else budget.allowed_drop.value
    if lost is not None:
        judged = lost_interval[1] if budget.confidence is not None and lost_interval is not None else lost
        if not judged <= allowed + 1e-12:
            what = "the upper end of the drop's interval" if budget.confidence is not None else "the drop"
            missed.append(f"{what} is {judged:.4g}, {allowed:.4g} is allowed")
    if missed:
        return "infeasible", "nothing found holds the budget; nearest: " + "; ".join(missed)
    if doubtful:
        return "undecided", "; ".join(doubtful)
    if winner is None:
        return "met", "the original itself: " + ("it holds every limit" if budget.limits else "nothing faster was found in this target")
    if latency.median >= 1:
        return "met", f"every limit holds; it takes {latency.median:.2f} times as long as the original in its quickest runtime"
    return "met", f"{1 / latency.median:.2f} times as fast as the original in its quickest runtime" + (
        f", drop {lost:.4g} of {allowed:.4g} allowed" if lost is not None else ""
    )


def _shown(limit: Limit) -> str:
    return f"{limit.value:.3g}x" if limit.relative else f"{limit.value:.4g}"


def _against(limit: Limit, before: Measurement, after: Measurement, latency: Estimate) -> tuple[float, float, float, str]:
    """What a limit is held against: the figure, its interval, and how it reads; ratios for relative limits."""
    absolute = after.latency_s
    batch = after.batch
    if limit.quantity == "latency":
        e = latency if limit.relative else absolute
        return e.median, e.low, e.high, f"{e.median:.3g}x" if limit.relative else f"{e.median * 1e3:.4g} ms"
    if limit.quantity == "throughput":
        if limit.relative:
            return 1 / latency.median, 1 / latency.high, 1 / latency.low, f"{1 / latency.median:.3g}x"
        return batch / absolute.median, batch / absolute.high, batch / absolute.low, f"{batch / absolute.median:.4g}/s"
    pairs = {
        "size": (after.size_bytes, before.size_bytes),
        "memory": (after.peak_memory_bytes or 0, before.peak_memory_bytes or 0),
        "macs": (after.macs / batch, before.macs / batch),
    }
    if limit.quantity not in pairs:
        raise BudgetError("energy: this machine cannot tell what a call uses, so nothing can be promised; give a latency")
    now, then = pairs[limit.quantity]
    value = now / then if limit.relative and then else float(now)
    return value, value, value, f"{value:.3g}x" if limit.relative else f"{value:.4g}"


def _nearest(pursuit: Pursuit) -> tuple[int, ...]:
    """The fastest trial, the smallest, and the one that loses least, of those that were measured."""
    picks: list[int] = []
    trials = pursuit.trials
    keys: tuple[Any, ...] = (
        lambda t: t.latency_ratio.median if t.latency_ratio else math.inf,
        lambda t: t.size_bytes or math.inf,
        lambda t: t.drop if t.drop is not None and t.stage != "trial" else math.inf,
    )
    for key in keys:
        index = min(range(len(trials)), key=lambda i: key(trials[i]), default=None)
        if index is not None and key(trials[index]) < math.inf and index not in picks:
            picks.append(index)
    return tuple(picks)


def _rows(bench: Workbench, pursuit: Pursuit, winner: Winner | None) -> tuple[OperatorRow, ...]:
    """Every operator before and after, with the table's seconds where the target has a table."""
    costs = pursuit.costs
    seconds_before: Mapping[str, float] = {}
    seconds_after: Mapping[str, float] = {}
    if costs is not None and costs.effort == "latency":
        seconds_before = costs.shares(costs.space.identity)
        if winner is not None:
            seconds_after = costs.shares(costs.space.assignment(winner.plan.replace(recovery=costs.space.template.recovery)))
    rows = []
    for name, operator in bench.analysis.operators.items():
        after = winner.analysis.operators.get(name) if winner else operator
        width = _width(operator)
        precision = "fp32"
        if winner is not None and after is None:
            precision = "removed"
        elif winner is not None and name not in winner.skipped:
            precision = winner.plan.precisions.get(name, "fp32")
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
    elif precision == "fp32" and operator.kind in ("conv", "linear", "matmul", "attention"):
        if ("precision", name) not in offered:
            reasons.append("int8 is not offered here")
        else:
            reasons.append("int8 would lose more than its time is worth")
    if before is not None and after == before:
        why = bench.analysis.reasons.get(operator.weight or "", "")
        if why:
            reasons.append(f"width: {why}")
        elif not any(technique == "width" for technique, _ in offered):
            reasons.append("width: pruning was not asked for, or offers no multiple of what the target likes")
        else:
            reasons.append("width: narrower would lose more than its time is worth")
    return "; ".join(reasons)


def _groups(bench: Workbench, winner: Winner | None) -> dict[str, tuple[int, int]]:
    out = {}
    for name, group in bench.analysis.groups.items():
        width = group.units if winner is None else winner.plan.widths.get(name, group.units)
        out[name] = (group.units, 0 if winner is not None and name not in winner.analysis.groups and width == group.units else width)
    return out


def _search(pursuit: Pursuit) -> Search:
    method = pursuit.search
    if method is None:
        return Search(method="none")
    solution = getattr(method, "solution", None)
    ledger = getattr(method, "ledger", None)
    fit = ledger.correction("latency") if ledger is not None and "latency" in pursuit.original and pursuit.costs is not None else None
    counts = {stage: sum(t.stage == stage for t in pursuit.trials) for stage in ("candidate", "trial")}
    return Search(
        method=type(method).__name__.lower(),
        candidates=counts["candidate"],
        trials=counts["trial"],
        gap=_number(getattr(solution, "gap", None)),
        kkt_residual=_number(getattr(solution, "kkt", None)),
        affine=(fit.offset, fit.slope) if fit is not None else None,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _with_control(bench: Workbench, request: Request, summary: Summary, winner: Winner) -> Summary:
    """The original tuned on as many samples as the recovery saw, exported and judged like the winner."""
    from planish.distill.recover import recover
    from planish.distill.teacher import Teacher
    from planish.workbench import outputs_of

    name, split = bench.data.judged
    if bench.data.train is None or split is None or not winner.plan.recovery.samples or bench.job.evaluate is not None:
        bench.notes.append("control: there was no recovery to compare with")
        return summary
    with bench.clock.stage("dense control"):
        graph = bench.graph.copy()
        teacher = Teacher(bench.graph, bench.data.train, bench.data.folder)
        recover(
            graph,
            teacher,
            bench.job,
            bench.data,
            winner.plan.recovery,
            request.seed,
            progress=bench.events.progress,
            keep_best=False,
        )
        folder = bench.folder / "control"
        folder.mkdir(parents=True, exist_ok=True)
        path = bench.best.runtime.export(graph, folder)
        with Probe.open(bench.best.target, path, graph.signature) as probe:
            tuned = outputs_of(probe, split)
        original = bench.predict(bench.best, name, split)
        gained = -drop(bench.metric, original, tuned, split.targets)
    assert summary.drop is not None
    reference = split.targets if bench.metric.needs_labels else original
    return msgspec.structs.replace(summary, control_quality=float(bench.metric.score(tuned, reference)), control_drop=summary.drop + gained)


def _write(
    bench: Workbench,
    request: Request,
    study: Study,
    summary: Summary,
    winner: Winner | None,
    outputs: list[Array],
    *,
    replaces: bool = False,
) -> Artifact:
    graph = winner.final if winner is not None else bench.graph
    home = bench.baselines[summary.target.partition(":")[0]]
    path = winner.exported.path if winner is not None else bench.best.path
    assert path is not None and summary.optimized is not None
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in graph.module.state_dict().items()}
    return write(
        request.out,
        name=bench.job.name,
        model=path,
        plan=summary.plan or Plan(summary.target, seed=request.seed),
        signature=graph.signature,
        target=home.target,
        measurements={"original": summary.original, "optimized": summary.optimized},
        weights=weights,
        files=[file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path],
        result_json=msgspec.json.encode(summary),
        check=(bench.example, outputs),
        test_looks=sum(kind == LOOKED for _, _, kind, _ in study.events()),
        notes=bench.notes,
        overwrite=request.overwrite or replaces,
    )
