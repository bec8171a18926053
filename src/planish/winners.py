"""The winners: the most promising plans, recovered, quantized, exported and judged on validation by what the runtime computes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.errors import RuntimeFailed
from planish.graph.graph import Analysis, Graph
from planish.measure.probe import Probe
from planish.measurement import Outcome
from planish.metrics import paired_interval
from planish.plan import Plan, Recovery
from planish.pursuit import Pursuit
from planish.search.contract import Evidence, Kind
from planish.train.checkpoint import Checkpoint
from planish.trial import Compressed, Exported, drop, export_and_measure, quantized
from planish.workbench import RECOVERY_S, Workbench, outputs_of, predictor

_EPOCHS = 5
_SHARES = (0.45, 0.6, 1.0)
"""Of the time left, what each of the recoveries of an unlimited run may take: what one teaches, the next needs."""
_FIRST_SHARE = 0.9
"""Of the time left, what a plan that leaves room below the limits may take: if it loses too much, one just within them gets the rest."""
_SECOND_S = 60.0
"""Seconds below which no second plan is worth its trial, its recovery and its export."""
_LOOKS = 3
_WORTH = 1.07
"""A plan that measured up to this share of a limit may hold it when it is measured longer."""
_LEAST_S = 5.0
_WORST_SQNR_DB = 20.0
"""A quantized export below this many decibels against its own module is wrong, not merely coarse."""


@dataclass
class Winner:
    """A recovered net.

    Args:
        plan: what was done, recovery included.
        graph: in floating point; final: as exported.
        analysis: of `graph`.
        exported: measured beside the original.
        drop: lost on validation (or by `evaluate`), by the exported model's own outputs; None where nothing can be judged.
        outcome: "measured" where limits and drop hold on what was measured so far.
        skipped: operators that were to be int8 and stay in float -> why.
    """

    plan: Plan
    graph: Graph
    final: Graph
    analysis: Analysis
    exported: Exported
    drop: float | None
    outcome: Outcome
    skipped: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """Whether limits and drop hold on what was measured so far."""
        return self.outcome.kind == "measured"


def best_winner(pursuit: Pursuit) -> Winner | None:
    """Recover the most promising plans, and give the best.

    Under limits the plan that loses least takes all the time that is left; one that leaves room below them takes most of it where the
    rest is enough for one just within them, should it lose too much. Without, up to three plans are recovered, each proposed
    after what the one before taught. Where none of them holds, int8 alone is tried as it is: it loses least.

    Returns:
        None where no plan could be exported.
    """
    winners: list[Winner] = []
    recovery = _Recovery(pursuit)
    has_second = not pursuit.is_relaxed and (1 - _FIRST_SHARE) * recovery.left_s >= _SECOND_S
    shares = _SHARES if not pursuit.limits.costs else (_FIRST_SHARE, 1.0) if has_second else (1.0,)
    for share in shares:
        if winners and pursuit.limits.costs:
            if winners[-1].outcome.kind != "quality lost":
                break
            pursuit.relax(wholly=True)
        if winners and recovery.left_s < _LEAST_S:
            break
        plan = _confirmed(pursuit, winners)
        if plan is None:
            break
        is_worth_it = recovery.left_s >= _LEAST_S and _is_within(pursuit, plan)
        winner = recovery.run(plan, share if is_worth_it else 0.0)
        if winner is not None:
            winners.append(winner)
    if not any(winner.holds for winner in winners):
        tried = {_unrecovered(winner.plan) for winner in winners if not winner.plan.recovery.samples}
        for plan in pursuit.known_trials():
            is_worth = _unrecovered(plan) not in tried and _is_within(pursuit, plan) and recovery.left_s > -0.5 * pursuit.reserve_s
            winner = recovery.run(plan, 0.0) if is_worth or not winners else None
            winners += [winner] if winner is not None else []
    return min(winners, key=lambda winner: _rank(pursuit, winner), default=None)


def _rank(pursuit: Pursuit, winner: Winner) -> tuple[bool, bool, float, float]:
    """What is compared: costs above a limit come before quality, since the judged split decides on the drop and not validation."""
    latency = winner.exported.ratio.median if winner.exported.ratio else math.inf
    lost = winner.drop or 0.0
    return (winner.outcome.kind == "mismatch", winner.outcome.kind == "over budget", max(0.0, lost - pursuit.allowed_drop), latency)


def _unrecovered(plan: Plan) -> str:
    return plan.replace(recovery=Recovery()).digest


def _is_within(pursuit: Pursuit, plan: Plan) -> bool:
    """Whether what a plan costs, where that was measured, is near enough to the limits for its recovery to be worth the time."""
    known = pursuit.trials.known(plan, "trial")
    costs = pursuit.believed(plan, known.evidence).costs if known is not None else {}
    return not pursuit.over(costs, _WORTH)


def _confirmed(pursuit: Pursuit, winners: Sequence[Winner]) -> Plan | None:
    """The plan to recover next: under a limit on latency one that held it when it was measured a second time, if there is one."""
    assert pursuit.search is not None
    if winners:
        for plan in pursuit.search.ask(1):
            pursuit.tell(plan, pursuit.trials.candidate(plan))
            pursuit.try_plan(plan)
    looked: set[str] = set()
    while True:
        chosen = _next(pursuit, winners)
        if (
            chosen is None
            or "latency" not in pursuit.bounds
            or pursuit.clock.left_s < pursuit.reserve_s
            or chosen.digest in looked
            or len(looked) == _LOOKS
        ):
            return chosen
        looked.add(chosen.digest)
        if not pursuit.look_again(chosen):
            pursuit.try_one()


def _next(pursuit: Pursuit, winners: Sequence[Winner]) -> Plan | None:
    """The most promising plan that was not recovered yet."""
    assert pursuit.search is not None
    done = {_unrecovered(winner.plan) for winner in winners}
    kinds: tuple[Kind, ...] = ("trial", "candidate")
    for kind in kinds:
        for plan in pursuit.search.best(8, kind):
            if _unrecovered(plan) not in done:
                return plan
    return None


class _Recovery:
    """Recovers one plan after another against the same clock and teacher."""

    def __init__(self, pursuit: Pursuit) -> None:
        self.pursuit, self.bench = pursuit, pursuit.bench
        self.end = time.monotonic() + RECOVERY_S
        self.teacher: Teacher | None = None

    @property
    def left_s(self) -> float:
        """Seconds that recovery may still take: until the limit less what the end of the run needs, or half an hour in all."""
        clock = self.bench.clock
        if not math.isfinite(clock.left_s):
            return self.end - time.monotonic()
        return clock.left_s - self.pursuit.reserve_s

    def run(self, plan: Plan, share: float) -> Winner | None:
        """A plan carried out, trained for a share of the time left, exported and judged; None, and told so, where that failed."""
        pursuit, bench = self.pursuit, self.bench
        began = time.monotonic()
        compressed = pursuit.trials.carry_out(plan)
        pursuit.trials.forget(plan)
        asked, final, skipped = plan, compressed.final, compressed.skipped
        if share > 0 and "distill" in pursuit.request.techniques and not plan.is_identity:
            plan, final, skipped = self._train(plan, compressed, share)
        with bench.clock.stage("exporting and measuring the winner"):
            try:
                exported = export_and_measure(bench, final, plan, bench.folder / "winners" / plan.digest, seconds=2.0)
                if exported.path is None:
                    raise RuntimeFailed(exported.outcome.kind, exported.outcome.detail)
                lost, worst = _validation_drop(bench, plan, exported, pursuit.request.budget.confidence)
                evidence = pursuit.trials.costs_of(plan, compressed.macs, exported, "winner", lost)
            except RuntimeFailed as err:
                failed = Evidence("winner", failed=True)
                pursuit.trials.record(plan, "winner", Outcome(err.kind, str(err)), failed, time.monotonic() - began)  # type: ignore[arg-type]
                pursuit.tell(asked, failed)
                return None
            outcome = self._outcome(exported, evidence, worst)
            pursuit.trials.record(plan, "winner", outcome, evidence, time.monotonic() - began, exported.ratio)
            pursuit.tell(plan, evidence)
        return Winner(plan, compressed.graph, final, compressed.analysis, exported, lost, outcome, skipped)

    def _outcome(self, exported: Exported, evidence: Evidence, lost: float | None) -> Outcome:
        allowed, over = self.pursuit.allowed_drop, self.pursuit.over(evidence.costs)
        if exported.sqnr_db is not None and exported.sqnr_db < _WORST_SQNR_DB:
            return Outcome("mismatch", f"the exported model agrees with its module to {exported.sqnr_db:.0f} dB only")
        if over:
            return Outcome("over budget", f"{', '.join(over)} above the limit")
        if lost is not None and not lost <= allowed:
            return Outcome("quality lost", f"{lost:.4g} lost on validation, {allowed:.4g} allowed")
        return Outcome("measured")

    def _train(self, plan: Plan, compressed: Compressed, share: float) -> tuple[Plan, Graph, Mapping[str, str]]:
        """Recovery in floating point, then with fake quantization in place; a net that is only quantized needs the second alone."""
        bench, data, pursuit = self.bench, self.bench.data, self.pursuit
        split = data.train if data.train is not None else data.calibration
        now = time.monotonic()
        end = now + max(_LEAST_S, self.left_s * share)
        epochs = 40 if math.isfinite(bench.clock.left_s) else _EPOCHS
        settings = Recovery(samples=epochs * split.n)
        if self.teacher is None:
            self.teacher = Teacher(bench.graph, split, data.folder)
        is_smaller = bool(plan.widths or plan.blocks)
        quantized_share = 0.0 if not plan.precisions else settings.quantized_share if is_smaller else 1.0
        seen = 0
        for name, deadline in (("recovery", now + (end - now) * (1 - quantized_share)), ("recovery in int8", end)):
            is_int8 = name != "recovery"
            if is_int8:
                graph, skipped = quantized(bench, compressed.graph, compressed.analysis, plan)
            else:
                graph, skipped = compressed.graph, {}
            if (is_int8 and not plan.precisions) or (not is_int8 and not is_smaller):
                continue
            with bench.clock.stage(name):
                report = recover(
                    graph,
                    self.teacher,
                    bench.job,
                    data,
                    msgspec.structs.replace(
                        settings, samples=math.ceil(settings.samples * (quantized_share if is_int8 else 1 - quantized_share))
                    ),
                    pursuit.request.seed + is_int8,
                    deadline=deadline,
                    progress=bench.events.progress,
                    should_stop=pursuit.settle,
                    checkpoint=Checkpoint(pursuit.study.checkpoint(f"{_unrecovered(plan)}-{name.replace(' ', '-')}")),
                )
            seen += report.samples
        return plan.replace(recovery=msgspec.structs.replace(settings, samples=seen)), graph, skipped


def _validation_drop(bench: Workbench, plan: Plan, exported: Exported, confidence: float | None) -> tuple[float | None, float | None]:
    """The drop by the exported model's own outputs, and the figure that is judged: the drop, or the upper end of its interval."""
    split = bench.data.validation
    if exported.path is None or (split is None and bench.job.evaluate is None):
        return None, None
    home = bench.home(plan).target
    with Probe.open(home, exported.path, bench.graph.signature) as probe:
        if bench.job.evaluate is not None:
            lost = bench.lost(float(bench.job.evaluate(predictor(probe))))
            return lost, lost
        assert split is not None
        outputs = outputs_of(probe, split)
    original = bench.predict(bench.best, "validation", split)
    lost = drop(bench.metric, original, outputs, split.targets)
    if confidence is None or not math.isfinite(lost):
        return lost, lost
    return lost, float(paired_interval(bench.metric, original, outputs, split.targets, confidence=confidence).high)
