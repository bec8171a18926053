"""The pursuit of a budget: options → search → candidates → trials → the recovered winner."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from planish import registry
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.graph import Analysis, Graph
from planish.graph.macs import macs
from planish.measure.machine import machine
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.tables import Table
from planish.measurement import Estimate, Outcome
from planish.plan import Option, Plan, Recovery
from planish.prune.options import sensitivities
from planish.quantize.options import precision_options
from planish.result import Trial
from planish.search.contract import Evidence, Limits, Search
from planish.search.costs import Costs, ceilings
from planish.search.space import Space
from planish.study.store import Study
from planish.trial import Compressed, Exported, Judged, carry_out, drop, export_and_measure, judge, quantized
from planish.workbench import RECOVERY_S, Baseline, Workbench, outputs_of

if TYPE_CHECKING:
    from planish.flow import Request

_EPOCHS = 5
_RESERVE_S = 15.0
"""Seconds kept for the final measurement, on top of four times what the dearest trial took."""
_SEARCH_SHARE = 0.25
_RECOVERED_SHARE = 0.25
"""What recovery is assumed to leave of a candidate's drop, until a winner tells."""
_MEASURED_MARGIN = 0.97
"""Plans aim this far below a limit on what varies from run to run: the final measurement must hold it too."""
_FINEST_MULTIPLE = 8
"""Widths step by at most this many channels: the latency tables say what a width between two of the target's multiples is worth."""
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
        drop: lost on validation, by the exported model's own outputs; None without validation.
        holds: whether limits and drop hold on what was measured so far.
        skipped: operators that were to be int8 and stay in float -> why.
    """

    plan: Plan
    graph: Graph
    final: Graph
    analysis: Analysis
    exported: Exported
    drop: float | None
    holds: bool
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Found:
    """What a pursuit came to.

    Args:
        winner: the best recovered net; None where the original is the answer.
        trials: everything that was tried, in order.
        search: the method, for what it says of itself; None where there was nothing to decide.
        costs, options: of the space.
        original_costs: "latency", "size", "macs" (and "memory") of the original.
        runtime: the runtime that plans were made for.
    """

    winner: Winner | None
    trials: list[Trial]
    search: Search | None
    costs: Costs | None
    options: list[Option]
    original_costs: dict[str, float]
    runtime: str


class _Kept(msgspec.Struct, frozen=True):
    """What a study keeps of a trial: its evidence, its ratio, and where that was measured (machine and runtime's version)."""

    evidence: Evidence
    ratio: Estimate | None = None
    place: str = ""


def pursue(bench: Workbench, request: Request, study: Study) -> Found:
    """Find, recover and measure the net that meets the budget best."""
    return _Pursuit(bench, request, study).run()


class _Pursuit:
    def __init__(self, bench: Workbench, request: Request, study: Study) -> None:
        self.bench, self.request, self.study = bench, request, study
        self.clock, self.events = bench.clock, bench.events
        self.trials: list[Trial] = []
        self.carried: dict[str, Compressed] = {}
        self.told: set[str] = set()
        self.original = self._original_costs()

    def run(self) -> Found:
        bench, request = self.bench, self.request
        self.scores: dict[str, Any] = {}
        options = self._pruning_options()
        self.baseline, options = self._choose_runtime(options)
        self.template = Plan(self.baseline.target.name, saliency=request.saliency, seed=request.seed)
        space = Space(bench.analysis, options, self.template)
        if not space.variables:
            bench.notes.append("nothing can be pruned or quantized in this model and target; see `planish inspect`")
            return Found(None, self.trials, None, None, options, self.original, self.baseline.target.runtime)
        with self.clock.stage("latency tables"):
            costs = Costs(space, self._lookup())
        bounds = ceilings(request.budget.limits, self.original, bench.batch, costs)
        limits = Limits(
            {quantity: bound * (_MEASURED_MARGIN if quantity in ("latency", "memory") else 1.0) for quantity, bound in bounds.items()},
            self.allowed_drop,
            _RECOVERED_SHARE if "distill" in request.techniques else 1.0,
        )
        search: Search = registry.get("search", request.search)(space, costs, limits, request.seed)
        self.search, self.limits, self.space, self.costs = search, limits, space, costs
        search.tell(self.template, Evidence("trial", 0.0, 0.0, dict(self.original)))
        self._search()
        winner = self._recover_best()
        return Found(winner, self.trials, search, costs, options, self.original, self.baseline.target.runtime)

    def _settle(self) -> bool:
        """Adapt torch's threads to how busy the machine is now; asked before every training step, and never a reason to stop."""
        self.bench.threads.settle()
        return False

    @property
    def reserve_s(self) -> float:
        """Seconds that the end of the run will take: export, measurement, quality, artifact."""
        return _RESERVE_S + 4 * max((trial.seconds for trial in self.trials if trial.stage == "trial"), default=5.0)

    # What the original costs, and what may be lost

    def _original_costs(self) -> dict[str, float]:
        best = self.bench.best
        assert best.timing is not None
        costs = {
            "latency": best.timing.latency_s.median,
            "size": float(size_bytes(best.path)),
            "macs": float(macs(self.bench.analysis)),
        }
        if any(limit.quantity == "memory" for limit in self.request.budget.limits):
            costs["memory"] = float(peak_memory_bytes(best.target, best.path, self.bench.graph.signature, self.bench.example))
        return costs

    @property
    def allowed_drop(self) -> float:
        """The drop that the budget allows on validation, in the metric's own unit."""
        split = self.bench.data.validation
        metric = self.bench.metric
        if split is None or self.bench.job.evaluate is not None:
            return self.request.budget.allowed_drop.value
        outputs = self.bench.predict(self.bench.best, "validation", split)
        return self.request.budget.allowed_drop.allowed(metric.score(outputs, split.targets if metric.needs_labels else outputs))

    # Options

    def _pruning_options(self) -> list[Option]:
        if "prune" not in self.request.techniques or not (self.bench.analysis.groups or self.bench.analysis.blocks):
            return []
        bench = self.bench
        with self.clock.stage("sensitivity of groups and blocks"):
            self._settle()
            saliency = registry.get("saliency", self.request.saliency)()
            self.scores = saliency.scores(bench.graph, bench.analysis, bench.data.calibration, self.request.seed)
            multiple = min(_FINEST_MULTIPLE, bench.best.target.facts.width_multiple)
            return sensitivities(bench.graph, bench.analysis, self.scores, bench.data.calibration, multiple, self.events.progress)

    def _choose_runtime(self, options: list[Option]) -> tuple[Baseline, list[Option]]:
        """The runtime in which the original, or its int8 form, is quickest; and the options with that runtime's precisions."""
        bench = self.bench
        if "quantize" not in self.request.techniques:
            return bench.best, options
        best: tuple[float, Baseline, bool] = (1.0, bench.best, False)
        whole = {
            name: "int8"
            for name, operator in bench.analysis.operators.items()
            if operator.kind in ("conv", "linear", "matmul", "attention")
        }
        with self.clock.stage("int8 in each runtime"):
            for name, baseline in bench.baselines.items():
                if "int8" not in baseline.runtime.schemes or not whole:
                    continue
                plan = Plan(baseline.target.name, precisions=whole, saliency=self.request.saliency, seed=self.request.seed)
                ratio, _ = self._trial(plan)
                if ratio is not None and ratio.median < best[0]:
                    best = (ratio.median, baseline, True)
                if ratio is not None and ratio.median >= 1.0:
                    bench.notes.append(
                        f"int8 is not faster in {name}:cpu here ({ratio.median:.2f}x of the quickest fp32), so it is not used there"
                    )
        _, baseline, is_faster = best
        wants_small = any(limit.quantity in ("size", "memory") for limit in self.request.budget.limits)
        if not (is_faster or wants_small) or "int8" not in baseline.runtime.schemes:
            return baseline, options
        with self.clock.stage("sensitivity of int8"):
            self._settle()
            found = precision_options(
                bench.graph, bench.analysis, baseline.runtime, baseline.target, bench.data.calibration, progress=self.events.progress
            )
        return baseline, [*options, *found]

    def _lookup(self) -> Any:
        if self.baseline.target.runtime.startswith("torch"):
            return None
        table = Table(self.baseline.target)
        return lambda kernels: table.seconds(kernels, progress=lambda share: self.events.progress(round(share * 1000), 1000))

    # Candidates and trials

    def _search(self) -> None:
        request, clock = self.request, self.clock
        end = clock.elapsed_s + _SEARCH_SHARE * (clock.left_s - self.reserve_s) if math.isfinite(clock.left_s) else math.inf
        longest, told = 0.0, 0
        for plan in self._known_trials():
            self.search.tell(plan, self._candidate_evidence(plan))
        with clock.stage("candidates"):
            while told < request.trials and clock.elapsed_s + longest < end:
                asked = self.search.ask(1)
                if not asked:
                    break
                began = time.monotonic()
                self.search.tell(asked[0], self._candidate_evidence(asked[0]))
                for plan in self.search.best(1):
                    if plan.digest not in self.told:
                        self.search.tell(plan, self._trial_evidence(plan))
                told += 1
                longest = max(longest, time.monotonic() - began)
                self.events.progress(told, request.trials)

    def _known_trials(self) -> list[Plan]:
        """Plans of this space that were tried before the search began: int8 everywhere."""
        out = []
        for trial in self.trials:
            plan = trial.plan
            if plan.target == self.template.target and trial.stage == "trial" and not plan.is_identity:
                offered = {n: s for n, s in plan.precisions.items() if ("precision", n) in self.space.index}
                if offered == plan.precisions:
                    out.append(plan)
        return out

    def _known(self, plan: Plan, stage: Any) -> _Kept | None:
        """What the study holds of a plan, which then is one of this run's trials; None where it must be measured, or measured again."""
        stored = self.study.lookup(plan.digest, stage)
        if stored is None or stored.state != "finished" or stored.evidence is None or stored.outcome is None:
            return None
        kept = msgspec.convert(stored.evidence, _Kept)
        if stage != "candidate" and kept.place != self._place(plan):
            return None
        evidence = kept.evidence
        if kept.ratio is not None:
            latency = kept.ratio.median * self.original["latency"]
            evidence = msgspec.structs.replace(evidence, costs={**evidence.costs, "latency": latency})
        if not any(trial.plan.digest == plan.digest and trial.stage == stage for trial in self.trials):
            self._list(plan, stage, stored.outcome, evidence, stored.seconds, kept.ratio)
        return msgspec.structs.replace(kept, evidence=evidence)

    def _place(self, plan: Plan) -> str:
        versions = self.bench.baselines[plan.target.partition(":")[0]].runtime.versions()
        return " ".join((machine().fingerprint, *(f"{name}={version}" for name, version in sorted(versions.items()))))

    def _candidate_evidence(self, plan: Plan) -> Evidence:
        known = self._known(plan, "candidate")
        if known is not None:
            return known.evidence
        began = time.monotonic()
        compressed = self._carried(plan)
        found: Judged = judge(self.bench, compressed.final)
        diverged = not math.isfinite(found.loss)
        evidence = Evidence("candidate", None if diverged else found.loss, found.drop, {"macs": float(compressed.macs)}, failed=diverged)
        outcome = Outcome("diverged", "its outputs are not finite") if diverged else Outcome("measured")
        self._record(plan, "candidate", outcome, evidence, time.monotonic() - began)
        return evidence

    def _trial_evidence(self, plan: Plan) -> Evidence:
        self.told.add(plan.digest)
        return self._trial(plan)[1]

    def _trial(self, plan: Plan) -> tuple[Estimate | None, Evidence]:
        """A plan exported and measured without recovery (latency does not depend on the weights)."""
        known = self._known(plan, "trial")
        if known is not None:
            return known.ratio, known.evidence
        began = time.monotonic()
        compressed = self._carried(plan)
        exported = export_and_measure(self.bench, compressed.final, plan, self.bench.folder / "trials" / plan.digest)
        evidence = self._costs_of(compressed.macs, exported, "trial")
        self._record(plan, "trial", exported.outcome, evidence, time.monotonic() - began, exported)
        return exported.ratio, evidence

    def _costs_of(self, total_macs: int, exported: Exported, kind: Any, lost: float | None = None) -> Evidence:
        if exported.ratio is None or exported.size_bytes is None:
            return Evidence(kind, failed=True)
        costs = {"latency": exported.ratio.median * self.original["latency"], "size": float(exported.size_bytes), "macs": float(total_macs)}
        if "memory" in self.original and exported.path is not None:
            target = self.bench.baselines[self.baseline.target.runtime].target if hasattr(self, "baseline") else self.bench.best.target
            costs["memory"] = float(peak_memory_bytes(target, exported.path, self.bench.graph.signature, self.bench.example))
        return Evidence(kind, None, lost, costs)

    def _carried(self, plan: Plan) -> Compressed:
        """A plan carried out; the last few are kept, since a candidate often becomes a trial and a winner."""
        self._settle()
        if plan.digest not in self.carried:
            while len(self.carried) >= 3:
                self.carried.pop(next(iter(self.carried)))
            self.carried[plan.digest] = carry_out(self.bench, plan, self.scores)
        return self.carried[plan.digest]

    def _record(
        self, plan: Plan, stage: Any, outcome: Outcome, evidence: Evidence, seconds: float, exported: Exported | None = None
    ) -> None:
        ratio = exported.ratio if exported else None
        self.study.record(plan, stage, outcome, _Kept(evidence, ratio, self._place(plan)), None, seconds)
        self._list(plan, stage, outcome, evidence, seconds, ratio)

    def _list(self, plan: Plan, stage: Any, outcome: Outcome, evidence: Evidence, seconds: float, ratio: Estimate | None) -> None:
        predicted = None
        if hasattr(self, "costs") and "latency" in self.costs.quantities:
            predicted = self.costs.predict(self.space.assignment(plan)).get("latency")
        self.trials.append(
            Trial(
                plan=plan,
                stage=stage,
                outcome=outcome,
                loss=evidence.loss,
                drop=evidence.quality_drop,
                predicted_latency_s=predicted,
                latency_ratio=ratio,
                macs=int(evidence.costs["macs"]) if "macs" in evidence.costs else None,
                size_bytes=int(evidence.costs["size"]) if "size" in evidence.costs else None,
                seconds=seconds,
            )
        )

    # The winner

    def _recover_best(self) -> Winner | None:
        """Recover the most promising plans until one holds the budget, or time is up; the best of them.

        Where none holds it, int8 alone is tried as it is: it loses least.
        """
        shares = (1.0,) if self.limits.costs else (0.45, 0.5, 1.0)
        winners: list[Winner] = []
        for share in shares:
            plan = self._next_winner(winners)
            if plan is None:
                break
            winner = self._recover(plan, share if self._is_within(plan) else 0.0)
            if winner is None:
                continue
            winners.append(winner)
        if not any(winner.holds for winner in winners):
            winners += [winner for plan in self._known_trials() if (winner := self._recover(plan, 0.0)) is not None]
        return min(winners, key=self._rank) if winners else None

    def _is_within(self, plan: Plan) -> bool:
        """Whether what a plan costs, where that was measured, is near enough to the limits for its recovery to be worth the time."""
        known = self._known(plan, "trial")
        measured = known.evidence.costs if known is not None else {}
        return all(measured.get(quantity, 0.0) <= 1.1 * limit for quantity, limit in self.limits.costs.items())

    def _rank(self, winner: Winner) -> tuple[bool, float, float]:
        latency = winner.exported.ratio.median if winner.exported.ratio else math.inf
        over = max(0.0, (winner.drop or 0.0) - self.allowed_drop)
        return (not winner.holds, over, latency)

    def _next_winner(self, winners: Sequence[Winner]) -> Plan | None:
        done = {winner.plan.replace(recovery=Recovery()).digest for winner in winners}
        if winners and not self.limits.costs:
            for plan in self.search.ask(1):
                self.search.tell(plan, self._candidate_evidence(plan))
                self.search.tell(plan, self._trial_evidence(plan))
        for kind in ("trial", "candidate"):
            for plan in self.search.best(8, kind):
                if plan.replace(recovery=Recovery()).digest not in done:
                    return plan
        return None

    def _recover(self, plan: Plan, share: float) -> Winner | None:
        bench, request = self.bench, self.request
        began = time.monotonic()
        compressed = self._carried(plan)
        self.carried.pop(plan.digest)
        graph, final, skipped = compressed.graph, compressed.final, compressed.skipped
        if share > 0 and "distill" in request.techniques and bench.data.train is not None and not plan.is_identity:
            plan, final, skipped = self._train(plan, compressed, share)
        elif final is not graph:
            final, skipped = quantized(bench, graph, compressed.analysis, plan)
        with self.clock.stage("exporting and measuring the winner"):
            folder = bench.folder / "winners" / plan.digest
            exported = export_and_measure(bench, final, plan, folder, seconds=2.0)
            if exported.path is None:
                self._record(plan, "winner", exported.outcome, Evidence("winner", failed=True), time.monotonic() - began)
                return None
            lost = self._validation_drop(plan, exported)
            evidence = self._costs_of(compressed.macs, exported, "winner", lost)
            over = [q for q, limit in self.limits.costs.items() if q in evidence.costs and evidence.costs[q] > limit]
            is_lost = lost is not None and lost > self.allowed_drop
            outcome = exported.outcome
            if exported.sqnr_db is not None and exported.sqnr_db < _WORST_SQNR_DB:
                outcome = Outcome("mismatch", f"the exported model agrees with its module to {exported.sqnr_db:.0f} dB only")
            elif over:
                outcome = Outcome("over budget", f"{', '.join(over)} above the limit")
            elif is_lost:
                outcome = Outcome("quality lost", f"{lost:.4g} lost on validation, {self.allowed_drop:.4g} allowed")
            self._record(plan, "winner", outcome, evidence, time.monotonic() - began, exported)
            self.search.tell(plan, evidence)
        return Winner(plan, graph, final, compressed.analysis, exported, lost, outcome.kind == "measured", dict(skipped))

    def _train(self, plan: Plan, compressed: Compressed, share: float) -> tuple[Plan, Graph, Any]:
        bench, data = self.bench, self.bench.data
        assert data.train is not None
        left = self.clock.left_s - self.reserve_s if math.isfinite(self.clock.left_s) else RECOVERY_S
        end = time.monotonic() + max(5.0, left * share)
        settings = Recovery(samples=_EPOCHS * data.train.n) if not math.isfinite(self.clock.left_s) else Recovery(samples=40 * data.train.n)
        with self.clock.stage("teacher outputs"):
            teacher = Teacher(bench.graph, data.train, data.folder)
        is_int8 = bool(plan.precisions)
        quantized_share = settings.quantized_share if is_int8 else 0.0
        with self.clock.stage("recovery"):
            first = time.monotonic() + (end - time.monotonic()) * (1 - quantized_share)
            report = recover(
                compressed.graph,
                teacher,
                bench.job,
                data,
                settings,
                self.request.seed,
                deadline=first,
                progress=self.events.progress,
                should_stop=self._settle,
            )
        seen = report.samples
        final, skipped = quantized(bench, compressed.graph, compressed.analysis, plan)
        if is_int8:
            with self.clock.stage("recovery in int8"):
                fine = msgspec.structs.replace(settings, learning_rate=settings.learning_rate / 10)
                report = recover(
                    final,
                    teacher,
                    bench.job,
                    data,
                    fine,
                    self.request.seed + 1,
                    deadline=end,
                    progress=self.events.progress,
                    should_stop=self._settle,
                )
                seen += report.samples
        return plan.replace(recovery=msgspec.structs.replace(settings, samples=seen)), final, skipped

    def _validation_drop(self, plan: Plan, exported: Exported) -> float | None:
        split, bench = self.bench.data.validation, self.bench
        if split is None or bench.job.evaluate is not None or exported.path is None:
            return None
        from planish.measure.probe import Probe

        with Probe.open(self.baseline.target, exported.path, bench.graph.signature) as probe:
            outputs = outputs_of(probe, split)
        return drop(bench.metric, bench.predict(bench.best, "validation", split), outputs, split.targets)
