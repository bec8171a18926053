"""The winners: the most promising plans, recovered, quantized, exported and judged on validation by what the runtime computes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planish.errors import RuntimeFailed
from planish.graph.graph import Analysis, Graph
from planish.measure.probe import Probe
from planish.measurement import Outcome
from planish.metrics import paired_interval
from planish.plan import ONE_SHOT, Plan
from planish.prune.shaping import Step
from planish.pursuit import Pursuit
from planish.recovery import LEAST_S, Recoverer, Trained, unrecovered
from planish.search.contract import Evidence, Kind
from planish.trial import Exported, drop, export_and_measure
from planish.workbench import Workbench, outputs_of, predictor

_SHARES = (0.45, 0.6, 1.0)
"""Of the time left, what each of the recoveries of an unlimited run may take: what one teaches, the next needs."""
_SECOND_SHARE, _SECOND_S = 0.1, 75.0
"""Of the time left, and seconds, what is kept for a milder plan, its trial and its export, should one that leaves room below the limits
lose too much."""
_PLANS = 2
_LEAST_FIRST = 2.5
"""Only where the first plan has this many times as long."""
_LOOKS = 3
_HEATS = 3
_CHOSEN = "chosen in heats"
_AT_STAKE = 0.5
"""Of the drop that is allowed, what recovery must be expected to leave for it to matter which plan it is."""
_OUTCLASSED = 1.5
"""A plan expected to lose this many times as much as the most promising one is no rival."""
_WORTH, _DOUBTS = 1.07, 2.0
"""A plan that measured up to this share of a limit may hold it when it is measured longer; or so many standard deviations of a trial
above it."""
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
        history: figures of the plan's schedule on its way.
        proposed: the plan as it was proposed; a schedule may have decided on other widths.
    """

    plan: Plan
    graph: Graph
    final: Graph
    analysis: Analysis
    exported: Exported
    drop: float | None
    outcome: Outcome
    skipped: Mapping[str, str]
    history: tuple[Step, ...] = ()
    proposed: str = ""

    @property
    def holds(self) -> bool:
        """Whether limits and drop hold on what was measured so far."""
        return self.outcome.kind == "measured"


def best_winner(pursuit: Pursuit) -> Winner | None:
    """Recover the most promising plans, and give the best.

    Under limits the plan that is expected to lose least, or a rival that does better in a short recovery, takes all the time that is left;
    one that leaves room below them takes most of it where the rest is enough for a milder one, should it lose too much. Without limits, up
    to three plans are recovered, each proposed after what the one before taught. Where none of them holds, int8 alone is tried as it is.

    Returns:
        None where no plan could be exported.
    """
    recoverer = Recoverer(pursuit)
    winners = _under_limits(recoverer) if pursuit.limits.costs else _as_fast_as_possible(recoverer)
    if not any(winner.holds for winner in winners):
        tried = {winner.proposed for winner in winners if not winner.plan.recovery.samples}
        for plan in pursuit.known_trials():
            is_worth = unrecovered(plan) not in tried and _is_within(pursuit, plan) and recoverer.left_s > -0.5 * pursuit.reserve_s
            winner = _made(recoverer, plan, 0.0) if is_worth or not winners else None
            winners += [winner] if winner is not None else []
    return min(winners, key=lambda winner: _rank(pursuit, winner), default=None)


def _under_limits(recoverer: Recoverer) -> list[Winner]:
    """The most promising plan recovered, and a milder one where it loses too much, or nearly, and the aim leaves room below the limits."""
    pursuit = recoverer.pursuit
    winners: list[Winner] = []
    for _ in range(_PLANS):
        if winners:
            last = winners[-1]
            is_milder_wanted = last.outcome.kind in ("measured", "quality lost") and (last.drop or 0.0) > pursuit.safe_drop
            if not is_milder_wanted or pursuit.is_relaxed or recoverer.left_s < LEAST_S:
                break
            pursuit.step_back()
        plan = _confirmed(pursuit, winners)
        if plan is None:
            break
        is_worth_it = recoverer.left_s >= LEAST_S and (_is_within(pursuit, plan) or pursuit.request.accept_nearest)
        if is_worth_it:
            plan = _best_of_heats(recoverer, plan, winners)
        winner = _made(recoverer, plan, (1.0 if winners else _first_share(recoverer)) if is_worth_it else 0.0)
        winners += [winner] if winner is not None else []
    return winners


def _as_fast_as_possible(recoverer: Recoverer) -> list[Winner]:
    """Up to three plans recovered, each proposed after what the one before taught."""
    pursuit = recoverer.pursuit
    assert pursuit.search is not None
    winners: list[Winner] = []
    for share in _SHARES:
        if winners and recoverer.left_s < LEAST_S:
            break
        for proposed in pursuit.search.ask(1) if winners else []:
            pursuit.tell(proposed, pursuit.trials.candidate(proposed))
            pursuit.try_plan(proposed)
        plan = _confirmed(pursuit, winners)
        if plan is None:
            break
        winner = _made(recoverer, plan, share if recoverer.left_s >= LEAST_S else 0.0)
        winners += [winner] if winner is not None else []
    return winners


def _first_share(recoverer: Recoverer) -> float:
    """Of the time left, what the first plan may take."""
    left, second = recoverer.left_s, max(_SECOND_S, _SECOND_SHARE * recoverer.left_s)
    return 1 - second / left if not recoverer.pursuit.is_relaxed and left >= (1 + _LEAST_FIRST) * second else 1.0


def _rank(pursuit: Pursuit, winner: Winner) -> tuple[bool, bool, float, float]:
    """What is compared: costs above a limit come before quality, since the judged split decides on the drop and not validation."""
    latency = winner.exported.ratio.median if winner.exported.ratio else math.inf
    lost = winner.drop or 0.0
    return (winner.outcome.kind == "mismatch", winner.outcome.kind == "over budget", max(0.0, lost - pursuit.safe_drop), latency)


def _is_within(pursuit: Pursuit, plan: Plan) -> bool:
    """Whether what a plan costs, where that was measured, is near enough to the limits for its recovery to be worth the time."""
    known = pursuit.trials.known(plan, "trial")
    costs = pursuit.beliefs.believed(plan, known.evidence).costs if known is not None else {}
    return not pursuit.over(costs, max(_WORTH, 1 + _DOUBTS * pursuit.trials.noise))


def _confirmed(pursuit: Pursuit, winners: Sequence[Winner]) -> Plan | None:
    """The plan to recover next: under a limit on latency one that held it when it was measured a second time, if there is one."""
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


def _best_of_heats(recoverer: Recoverer, plan: Plan, winners: Sequence[Winner]) -> Plan:
    """`plan`, or a rival that comes closer to the original when both are recovered a little.

    Rivals bypass other blocks than `plan` and each other (between widths a candidate's drop tells enough), hold what is aimed at as well,
    and did not lose much more. Only where recovery must bring back what decides on the budget. A run that is carried on goes on with the
    one that was chosen before.
    """
    pursuit = recoverer.pursuit
    assert pursuit.search is not None
    lost = pursuit.search.expected_drop(plan) or 0.0
    done = {winner.proposed for winner in winners}
    others = [other for other in pursuit.search.best(pursuit.request.trials) if unrecovered(other) not in done]
    chosen = {detail for *_, kind, detail in pursuit.study.events() if kind == _CHOSEN}
    for other in (plan, *others):
        if unrecovered(other) in chosen - done:
            return recoverer.heat([other])
    if winners or not plan.blocks or plan.schedule != ONE_SHOT or lost < _AT_STAKE * pursuit.allowed_drop:
        return plan
    rivals, looked = [plan], 0
    for other in others:
        if (
            len(rivals) == _HEATS
            or looked == _LOOKS
            or not recoverer.has_time_for_heats
            or (pursuit.search.expected_drop(other) or 0.0) > _OUTCLASSED * lost
        ):
            break
        if other.blocks and other.blocks not in [rival.blocks for rival in rivals] and pursuit.may_hold_aim(other):
            looked += 1
            if pursuit.holds_aim(other):
                rivals.append(other)
    if len(rivals) == 1 or not recoverer.has_time_for_heats:
        return plan
    best = recoverer.heat(rivals)
    pursuit.study.log(_CHOSEN, unrecovered(best))
    return best


def _next(pursuit: Pursuit, winners: Sequence[Winner]) -> Plan | None:
    """The most promising plan that was not recovered yet."""
    assert pursuit.search is not None
    done = {winner.proposed for winner in winners}
    kinds: tuple[Kind, ...] = ("trial", "candidate")
    for kind in kinds:
        for plan in pursuit.search.best(8, kind):
            if unrecovered(plan) not in done:
                return plan
    return None


def _made(recoverer: Recoverer, plan: Plan, share: float) -> Winner | None:
    """A plan carried out, trained for a share of the time left, exported and judged; None, and told so, where that failed."""
    pursuit, bench = recoverer.pursuit, recoverer.bench
    began = time.monotonic()
    compressed = recoverer.carry_out(plan)
    made = Trained(plan, compressed, compressed.final, compressed.skipped)
    if share > 0 and recoverer.is_wanted and not plan.is_identity:
        made = recoverer.train(plan, compressed, share)
    elif plan.schedule != ONE_SHOT and plan.widths:
        bench.notes.append(f"the schedule {plan.schedule} had no time: units left at once; a longer --time-limit gives it some")
    compressed = made.compressed
    with bench.clock.stage("exporting and measuring the winner"):
        try:
            exported = export_and_measure(bench, made.final, made.plan, bench.folder / "winners" / made.plan.digest, seconds=2.0)
            if exported.path is None:
                raise RuntimeFailed(exported.outcome.kind, exported.outcome.detail)
            lost, worst = _validation_drop(bench, made.plan, exported, pursuit.request.budget.confidence)
            evidence = pursuit.trials.costs_of(made.plan, compressed.macs, exported, "winner", lost)
        except RuntimeFailed as err:
            failed = Evidence("winner", failed=True)
            pursuit.trials.record(made.plan, "winner", Outcome(err.kind, str(err)), failed, time.monotonic() - began)  # type: ignore[arg-type]
            pursuit.tell(plan, failed)
            return None
        outcome = _outcome(pursuit, exported, evidence, worst)
        pursuit.trials.record(made.plan, "winner", outcome, evidence, time.monotonic() - began, exported.ratio)
        pursuit.tell(made.plan, evidence)
    return Winner(
        made.plan, compressed.graph, made.final, compressed.analysis, exported, lost, outcome, made.skipped, made.history, unrecovered(plan)
    )


def _outcome(pursuit: Pursuit, exported: Exported, evidence: Evidence, lost: float | None) -> Outcome:
    allowed, over = pursuit.allowed_drop, pursuit.over(evidence.costs)
    if exported.sqnr_db is not None and exported.sqnr_db < _WORST_SQNR_DB:
        return Outcome("mismatch", f"the exported model agrees with its module to {exported.sqnr_db:.0f} dB only")
    said = [f"{', '.join(over)} above the limit"] if over else []
    if lost is not None and not lost <= allowed:
        said.append(f"{lost:.4g} lost on validation, {allowed:.4g} allowed")
    if said:
        return Outcome("over budget" if over else "quality lost", "; ".join(said))
    return Outcome("measured")


def _validation_drop(bench: Workbench, plan: Plan, exported: Exported, confidence: float | None) -> tuple[float | None, float | None]:
    """The drop by the exported model's own outputs, and the figure that is judged: the drop, or the upper end of its interval."""
    split = bench.data.validation
    if exported.path is None or (split is None and bench.job.evaluate is None):
        return None, None
    home = exported.target or bench.home(plan).target
    with Probe.open(home, exported.path, bench.graph.signature) as probe:
        if bench.job.evaluate is not None:
            lost = bench.lost(bench.evaluated(predictor(probe)))
            return lost, lost
        assert split is not None
        outputs = outputs_of(probe, split)
    original = bench.predict(bench.best, "validation", split)
    lost = drop(bench.metric, original, outputs, split.targets)
    if confidence is None or not math.isfinite(lost):
        return lost, lost
    return lost, float(paired_interval(bench.metric, original, outputs, split.targets, confidence=confidence).high)
