"""The conclusion: winner and original measured side by side one last time, the verdict, and the artifact with its proof."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from planish.account import group_widths, masks_note, nearest, operator_rows, search_account
from planish.artifact import Artifact, write
from planish.artifact.manifest import RESULT
from planish.clock import DIAGNOSIS_S
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.graph import Analysis, Graph
from planish.graph.macs import macs, operator_macs
from planish.graph.modules import as_module
from planish.measure.latency import Timing, interleaved, pooled, ratio
from planish.measure.machine import machine
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.probe import Probe
from planish.measure.roofline import roofline_s
from planish.measurement import Diagnosis, Estimate, Measurement
from planish.metrics import interval, paired_interval
from planish.plan import FULL_PRECISION, Plan
from planish.pursuit import Pursuit
from planish.quantize.bits import bit_operations
from planish.quantize.diagnosis import diagnose
from planish.quantize.subjects import computes_in_int8
from planish.recovery import usual_samples
from planish.report import figures
from planish.result import Result, Summary
from planish.study.store import CONCLUDED, LOOKED, Study
from planish.trial import drop, module_outputs_of_example, opened
from planish.verdict import NEAREST, Course, held, judge_budget, unmet
from planish.winners import Winner
from planish.workbench import WORTH_ITS_THREADS, Array, Baseline, Workbench, outputs_of, predictor, worst_sqnr_db
from planish.workload import EVALUATE

if TYPE_CHECKING:
    from pathlib import Path

    from planish.request import Request

_SECONDS = 3.0
_ATTEMPTS = 5
_PAUSE_S = 8.0
_WORTH_BELOW_A_LIMIT, _ROOM = 1.3, 0.9
"""Below this share of a limit on latency, more threads must make a call that many times as quick to be worth having: what is gained
beyond the limit depends on how busy the other cores are."""
_EXACT = 1
_FEW = 4
"""With fewer plans than this that there was time for, it is said."""
_NAMED_STAGES = 3
_LEAST_DIAGNOSIS_S, _DIAGNOSIS_SHARE = 2.0, 0.5
"""With fewer seconds left than this there is no diagnosis of quantization; else it may take this share of them."""
_GROWN, _SMALL_BYTES = 2.0, 2**26


@dataclass(frozen=True)
class _Side:
    """One of the two nets of the final comparison."""

    baseline: Baseline
    path: Path
    probe: Probe
    graph: Graph
    analysis: Analysis
    precisions: Mapping[str, str]
    """Of the operators that left full precision in this net."""


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
        with Probe.open(bench.home(winner.plan).target, winner.exported.path, winner.final.signature) as probe:
            outputs = probe.outputs(bench.example)
    if winner is not None:
        bench.notes += [*_said(summary), *_seen_before(bench, summary), *filter(None, [masks_note(bench, winner)])]
        summary = msgspec.structs.replace(summary, diagnosis=_diagnosis(bench, winner))
    if not summary.time_limited:  # else the verdict says so
        bench.notes += _short_of_time(bench, request, pursuit, winner, summary)
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
    if clock.limit_s is not None and clock.elapsed_s > 1.05 * clock.limit_s:
        longest = sorted(clock.seconds.items(), key=lambda stage: -stage[1])[:_NAMED_STAGES]
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest)
        bench.events.say(f"it took {clock.elapsed_s:.0f} s, longer than the time limit of {clock.limit_s:.0f} s; most of it: {stages}")
    study.log(CONCLUDED, summary.verdict)
    study.forget_checkpoints()
    (study.folder / RESULT).write_bytes(msgspec.json.encode(summary))
    module = as_module(winner.final if winner is not None else bench.graph)
    return Result(summary, module, artifact)


_BF16_SPEED = 2.0
"""How many multiply-accumulates in bf16 stand for one in fp32: a register holds twice as many."""


def _said(summary: Summary) -> list[str]:
    """What must be known of an optimized net beside its figures."""
    out = []
    if summary.plan is not None and summary.plan.adaptors:
        maps = ", ".join(f"{block} ({kind})" for block, kind in summary.plan.adaptors.items())
        out.append(f"adaptors: a linear map stands in the place of {maps}")
    if summary.split == "validation" and summary.drop_interval is not None:
        out.append("selection-biased: there is no test split, so the drop is judged on the validation split that guided the search")
    if summary.split == EVALUATE:
        out.append("selection-biased: `evaluate` judges the result, and guided the search too")
    planned = sum(computes_in_int8(row.precision) for row in summary.operators)
    proof = summary.optimized.proof if summary.optimized else None
    if proof is not None and proof.int8_kernels < planned:
        out.append(f"{planned} operators were to run in int8, and the runtime says that {proof.int8_kernels} kernels do")
    needs = (summary.optimized.peak_memory_bytes if summary.optimized else None) or 0
    needed = summary.original.peak_memory_bytes or 0
    if needed and needs > max(_GROWN * needed, _SMALL_BYTES):
        out.append(f"it needs {needs / needed:.1f} times the memory of the original while it runs; `--memory 1x` forbids that")
    return out


def _diagnosis(bench: Workbench, winner: Winner) -> Diagnosis | None:
    """What each operator of the winner loses when it leaves fp32; None where the plan quantizes none, or no time is left."""
    wanted = {
        name: scheme
        for name, scheme in winner.plan.precisions.items()
        if name in winner.analysis.operators and scheme != FULL_PRECISION and name not in winner.skipped
    }
    if not wanted:
        return None
    if bench.clock.left_s < _LEAST_DIAGNOSIS_S:
        bench.notes.append(
            "no time was left for the diagnosis of quantization; `planish inspect JOB.PY --sensitivity` has one of the original"
        )
        return None
    home, validation = bench.home(winner.plan), bench.data.validation
    with bench.clock.stage("diagnosis of quantization"):
        bench.threads.settle()
        return diagnose(
            winner.graph,
            winner.analysis,
            wanted,
            home.runtime,
            home.target,
            bench.data.calibration,
            ("validation", validation) if validation is not None else None,
            bench.metric,
            observer=winner.plan.observer,
            seconds=min(DIAGNOSIS_S, _DIAGNOSIS_SHARE * bench.clock.left_s),
            progress=bench.events.progress,
        )


def _course(bench: Workbench, request: Request, pursuit: Pursuit) -> Course:
    """How the run went, for a budget that was missed."""
    is_recovered = "distill" in request.techniques
    return Course(
        bench.clock.limit_s,
        pursuit.asked,
        request.trials,
        pursuit.is_cut,
        pursuit.is_promised(),
        max((trial.plan.recovery.samples for trial in pursuit.trials.all), default=0),
        usual_samples(bench) if is_recovered else 0,
    )


def _short_of_time(bench: Workbench, request: Request, pursuit: Pursuit, winner: Winner | None, summary: Summary) -> list[str]:
    """What a longer time limit would have changed, where it would have."""
    out, clock = [], bench.clock
    if pursuit.is_cut and pursuit.asked < min(_FEW, request.trials):
        said = "one plan" if pursuit.asked == 1 else f"{pursuit.asked} plans"
        out.append(f"the time limit left time to try {said} only; a longer --time-limit may find better ones")
    is_recovered = any(trial.plan.recovery.samples for trial in pursuit.trials.all)
    if (
        winner is not None
        and clock.limit_s is not None
        and "distill" in request.techniques
        and not is_recovered
        and (summary.drop or 0.0) > 0
    ):
        out.append(
            f"no time was left for recovery: everything else took {clock.elapsed_s:.0f} s, and the time limit is {clock.limit_s:.0f} s; "
            f"a longer --time-limit may win back some of the {summary.drop:.4g} that is lost"
        )
    return out


def _seen_before(bench: Workbench, summary: Summary) -> list[str]:
    """A sentence where the original does so much better on validation than on test that it was trained on the one (decision 008)."""
    before, first = summary.original, bench.original_quality
    if summary.split != "test" or before.quality is None or before.quality_interval is None or first is None:
        return []
    low, high = before.quality_interval
    better = first - high if bench.metric.higher_is_better else low - first
    if better <= high - low:
        return []
    said = (
        f"the original has {bench.metric.name} {first:.4g} on validation and {before.quality:.4g} on test: it was probably trained on the "
        "validation samples, where a compressed net seems to lose more than it does; others would have guided the search to a better net"
    )
    return [said]


def _timed(bench: Workbench, summary: Summary) -> Summary:
    seconds = {**bench.clock.seconds, "total": bench.clock.elapsed_s}
    return msgspec.structs.replace(summary, notes=tuple(dict.fromkeys(bench.notes)), seconds=seconds)


def _keeps_original(bench: Workbench, request: Request, summary: Summary) -> bool:
    """Whether the original may be the better answer: the winner is no faster, loses too much, or misses what the original holds."""
    if summary.verdict == "infeasible":
        return not request.budget.limits or all(not limit.relative for limit in request.budget.limits)
    return not request.budget.limits and summary.ratios["latency"].high >= 1.0


def _why_kept(summary: Summary) -> str:
    if summary.verdict == "infeasible":
        return summary.reason.partition(NEAREST)[2]
    ratio = summary.ratios["latency"]
    if ratio.median < 1.0:
        return f"that the best plan is faster cannot be told ({figures.ratio_span(ratio)} of the original's latency)"
    return f"the best plan takes {ratio.median:.2f} times as long in this target"


def _judged(bench: Workbench, request: Request, study: Study, pursuit: Pursuit, winner: Winner | None) -> tuple[Summary, list[Array]]:
    """The summary of a winner (or of the original alone), everything measured side by side, and its outputs on the example."""
    best = bench.best
    originals = [
        _Side(replace(best, target=target), best.path, probe, bench.graph, bench.analysis, {})
        for target, probe in best.living_probes(bench.graph.signature).items()
    ]
    if bench.judged[0] == "test":
        study.log(LOOKED)
    if winner is None or winner.exported.path is None:
        return _compare(bench, request, pursuit, originals, [], None)
    home = bench.home(winner.plan)
    precisions = {n: s for n, s in winner.plan.precisions.items() if n not in winner.skipped}
    with opened(bench, home.target.thread_counts, winner.exported.path) as probes:
        sides = [
            _Side(replace(home, target=target), winner.exported.path, probe, winner.final, winner.analysis, precisions)
            for target, probe in probes.items()
        ]
        return _compare(bench, request, pursuit, originals, sides, winner)


@dataclass(frozen=True)
class _Timed:
    """One of the two nets with the number of threads that it has, and its final timing."""

    side: _Side
    timing: Timing


def _settled(
    bench: Workbench, pursuit: Pursuit, originals: Sequence[_Side], optimized: Sequence[_Side], threads: int | None
) -> tuple[_Timed, _Timed | None]:
    """The final timing: the original with the number of threads that suits it now, the optimized net with as many as it needs.

    It is taken again, a few times with a pause, where the ratio cannot be trusted or the original has changed its speed. It stays within the
    run's time limit. What counts is the first that is sound in both, else all together: never the one that looks best. Where none is
    sound, the optimized net keeps the number of `threads` that it was exported with: a core that is taken for a while speaks against a
    second thread, and is free again tomorrow.
    """
    sides = (*originals, *optimized)
    taken: list[dict[int, Timing]] = []
    while True:
        began = bench.clock.elapsed_s
        taken.append(interleaved(dict(enumerate(side.probe for side in sides)), bench.example, seconds=_SECONDS))
        original, found = _chosen(pursuit, originals, optimized, taken[-1:])
        is_sure = found is None or ratio(found.timing, original.timing).trustworthy
        if is_sure and bench.is_as_usual(original.timing):
            return original, found
        if len(taken) == _ATTEMPTS or bench.clock.left_s <= 2 * (bench.clock.elapsed_s - began) + _PAUSE_S:
            return _chosen(pursuit, originals, optimized, taken, threads)
        bench.events.say("the machine is noisy; measuring again")
        time.sleep(_PAUSE_S)


def _chosen(
    pursuit: Pursuit,
    originals: Sequence[_Side],
    optimized: Sequence[_Side],
    taken: Sequence[dict[int, Timing]],
    threads: int | None = None,
) -> tuple[_Timed, _Timed | None]:
    """Both nets by everything that was taken, each with its number of threads: the optimized one with `threads`, if that holds the limits."""
    timed = [_Timed(side, pooled([one[number] for one in taken])) for number, side in enumerate((*originals, *optimized))]
    original = min(timed[: len(originals)], key=lambda one: one.timing.latency_s.median)
    others = timed[len(originals) :]
    kept = next((one for one in others if one.side.baseline.target.threads == threads), None)
    if kept is not None and not pursuit.over({"latency": _as_at_first(pursuit, original, kept)}):
        return original, kept
    return original, _with_enough_threads(pursuit, original, others)


def _as_at_first(pursuit: Pursuit, original: _Timed, one: _Timed) -> float:
    """Seconds that a net took, or would have taken when the original was first measured, where the machine was slower then."""
    return one.timing.latency_s.median * max(1.0, pursuit.original["latency"] / original.timing.latency_s.median)


def _with_enough_threads(pursuit: Pursuit, original: _Timed, optimized: Sequence[_Timed]) -> _Timed | None:
    """The optimized net with the fewest threads that are nearly as quick as any; or that hold a limit on latency with room to spare,
    where more would not make it much quicker. Where fewer threads miss the limit, with the quickest.
    """
    quickest = min((one.timing.latency_s.median for one in optimized), default=0.0)
    for one in optimized:
        seconds, as_at_first = one.timing.latency_s.median, _as_at_first(pursuit, original, one)
        worth = WORTH_ITS_THREADS
        if pursuit.over({"latency": as_at_first}):
            worth = 1.0
        elif "latency" in pursuit.bounds and not pursuit.over({"latency": as_at_first}, _ROOM):
            worth = _WORTH_BELOW_A_LIMIT
        if seconds <= worth * quickest:
            return one
    return None


def _compare(
    bench: Workbench, request: Request, pursuit: Pursuit, originals: Sequence[_Side], sides: Sequence[_Side], winner: Winner | None
) -> tuple[Summary, list[Array]]:
    exported = winner.exported.target if winner is not None else None
    first_timed, second_timed = _settled(bench, pursuit, originals, sides, exported.threads if exported is not None else None)
    original, first_timing = first_timed.side, first_timed.timing
    optimized, second_timing = (second_timed.side, second_timed.timing) if second_timed else (None, None)
    name, split = bench.judged
    first = bench.predict(original.baseline, name, split) if split is not None else None
    second = outputs_of(optimized.probe, split) if first is not None and split is not None and optimized else first
    before = _measurement(bench, original, first_timing, name, first)
    after = _measurement(bench, optimized, second_timing, name, second) if optimized and second_timing else before
    latency = ratio(second_timing, first_timing) if second_timing else Estimate(1.0, 1.0, 1.0, before.latency_s.n)
    lost: float | None = None
    lost_interval: tuple[float, float] | None = None
    if bench.job.evaluate is not None:
        assert before.quality is not None and after.quality is not None
        lost = before.quality - after.quality if bench.metric.higher_is_better else after.quality - before.quality
        lost = lost if math.isfinite(lost) else math.inf
    elif winner is None and first is not None:
        lost, lost_interval = 0.0, (0.0, 0.0)
    elif first is not None and second is not None and split is not None:
        found_interval = paired_interval(
            bench.metric, first, second, split.targets, confidence=request.budget.confidence or 0.95, seed=request.seed
        )
        lost, lost_interval = float(found_interval[0]), (float(found_interval[1]), float(found_interval[2]))
    verdict, reason = judge_budget(request.budget, before, after, latency, lost, lost_interval, is_original=winner is None)
    is_out_of_time = False
    if verdict == "infeasible":
        found = held(request.budget, before, after, latency, lost, lost_interval)
        reason, is_out_of_time = unmet(found, _course(bench, request, pursuit))
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
        elsewhere=_elsewhere(bench),
        ratios={
            "latency": latency,
            "size": _exact(after.size_bytes, before.size_bytes),
            "memory": _exact(after.peak_memory_bytes, before.peak_memory_bytes),
            "macs": _exact(after.macs, before.macs),
            "bit_operations": _exact(after.bit_operations, before.bit_operations),
        },
        drop=lost,
        drop_interval=lost_interval,
        split=name,
        plan=winner.plan if winner else None,
        trials=tuple(pursuit.trials.all),
        time_limited=is_out_of_time,
        nearest=nearest(pursuit) if verdict != "met" else (),
        operators=operator_rows(bench, pursuit, winner, first_timing.latency_s.median, (second_timing or first_timing).latency_s.median),
        groups=group_widths(bench, winner),
        search=search_account(pursuit),
        history=winner.history if winner else (),
        machine=machine(),
        seed=request.seed,
        threads=request.threads,
    )
    side = optimized or original
    return summary, side.probe.outputs(bench.example)


def _exact(after: float | None, before: float | None) -> Estimate:
    share = after / before if before and after is not None else 1.0
    return Estimate(share, share, share, _EXACT)


def _measurement(bench: Workbench, side: _Side, timing: Timing, name: str, outputs: list[Array] | None) -> Measurement:
    target, graph = side.baseline.target, side.graph
    quality, quality_interval = _quality(bench, side, outputs)
    total = macs(side.analysis)
    int8 = sum(
        operator_macs(operator)
        for key, operator in side.analysis.operators.items()
        if computes_in_int8(side.precisions.get(key, FULL_PRECISION))
    )
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
        bit_operations=bit_operations(side.analysis, side.precisions, graph.floats),
        quality=quality,
        quality_interval=quality_interval,
        split=name,
        sqnr_db=_finite(worst_sqnr_db(module_outputs_of_example(graph), side.probe.outputs(bench.example))),
        proof=side.probe.proof(),
        roofline_s=roofline_s(target, (total - int8) / (_BF16_SPEED if graph.floats == "bf16" else 1.0), moved, int8),
        versions=side.baseline.runtime.versions(),
        warm_up=timing.warm_up,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _quality(bench: Workbench, side: _Side, outputs: list[Array] | None) -> tuple[float | None, tuple[float, float] | None]:
    name, split = bench.judged
    if bench.job.evaluate is not None:
        return bench.evaluated(predictor(side.probe)), None
    if split is None or outputs is None:
        return None, None
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
            threads=baseline.threads,
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


def _elsewhere(bench: Workbench) -> dict[str, Estimate]:
    """Latency of the original everywhere else ÷ where it is quickest, paired, from the first comparison."""
    quickest = bench.best.timing
    assert quickest is not None
    everyone = {baseline.target.name: baseline.timing for baseline in (*bench.baselines.values(), *bench.eager.values())}
    return {name: ratio(timing, quickest) for name, timing in everyone.items() if timing is not None and timing is not quickest}


def _with_control(bench: Workbench, request: Request, summary: Summary, winner: Winner) -> Summary:
    """The original tuned as the winner was, on as many samples, exported and judged like it."""
    name, split = bench.judged
    if bench.data.train is None or split is None or not winner.plan.recovery.samples:
        bench.notes.append("control: there was no recovery to compare with")
        return summary
    if bench.data.train.targets is None:
        bench.notes.append("control: without labels there is nothing that the original could still learn, so there is none")
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
            is_control=True,
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
    home = bench.home(winner.plan) if winner is not None else bench.best
    path = winner.exported.path if winner is not None else bench.best.path
    assert path is not None and summary.optimized is not None
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in graph.module.state_dict().items()}
    return write(
        request.out,
        name=bench.job.name,
        model=path,
        plan=summary.plan or Plan(summary.target, seed=request.seed),
        signature=graph.signature,
        target=msgspec.structs.replace(home.target, threads=summary.optimized.threads),
        threads_tried=request.threads,
        measurements={"original": summary.original, "optimized": summary.optimized},
        weights=weights,
        files=[file for file in sorted(path.parent.iterdir()) if file.is_file() and file != path],
        result_json=msgspec.json.encode(summary),
        check=(bench.example, outputs),
        test_looks=study.count(LOOKED),
        job=study.meta.fingerprint,
        notes=bench.notes,
        overwrite=request.overwrite or replaces,
    )
