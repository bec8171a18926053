"""The trials of one run: plans carried out, judged and measured, again where a figure is in doubt, and kept in the study."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from planish.errors import RuntimeFailed
from planish.measure.latency import middle
from planish.measure.machine import machine
from planish.measure.memory import peak_memory_bytes
from planish.measurement import Estimate, Outcome
from planish.plan import Plan
from planish.prune.order import Orders
from planish.result import Trial
from planish.search.contract import Evidence, Kind
from planish.study.store import Study
from planish.trial import Compressed, Exported, carry_out, export_and_measure, judge, measure_again
from planish.workbench import Workbench

_CARRIED = 3
_QUIET_NOISE = 0.03


class Kept(msgspec.Struct, frozen=True):
    """What a study keeps of a trial: its evidence, its ratio, where that was measured (machine and runtime's version), and at each visit."""

    evidence: Evidence
    ratio: Estimate | None = None
    place: str = ""
    visits: tuple[Estimate, ...] = ()


class Trials:
    """What was tried in this run, and what its study knew before: no plan is tried twice.

    Args:
        bench: the original on this machine.
        study: where trials are kept.
        original: what the original costs, by quantity.

    Attributes:
        all: in order, one for each plan and stage.
        orders: of the units of each group, by which plans are carried out.
        predict: seconds that the tables say of a plan; None where they say nothing.
    """

    def __init__(self, bench: Workbench, study: Study, original: Mapping[str, float]) -> None:
        self.bench, self.study, self.original = bench, study, original
        self.all: list[Trial] = []
        self.orders: Orders = {}
        self.predict: Callable[[Plan], float | None] = lambda plan: None
        self._carried: dict[str, Compressed] = {}
        self._visits: dict[str, tuple[Estimate, ...]] = {}
        self._later: dict[str, list[Estimate]] = {}
        self._attempts: Counter[str] = Counter()
        self._exports: dict[str, Exported] = {}

    @property
    def noise(self) -> float:
        """How much one measurement of a ratio differs from another of the same plan at another time: its relative standard deviation."""
        found = [np.log([visit.median for visit in visits]) for visits in self._visits.values() if len(visits) > 1]
        freedom = sum(len(logs) - 1 for logs in found)
        squares = sum(float(((logs - logs.mean()) ** 2).sum()) for logs in found)
        # as if four more had been seen with the spread of a quiet machine
        return math.sqrt((squares + 4 * _QUIET_NOISE**2) / (freedom + 4))

    def known(self, plan: Plan, stage: Kind) -> Kept | None:
        """What the study holds of a plan, which then is one of this run's trials; None where it must be measured, or measured again.

        Of a trial that was visited again before the run was interrupted, the first visit counts until this run comes back to it: what is
        proposed next depends on what was known when.
        """
        stored = self.study.lookup(plan.digest, stage)
        if stored is None or stored.state != "finished" or stored.evidence is None or stored.outcome is None:
            return None
        kept: Kept = self.study.decode(stored.evidence, Kept)
        is_of_this_machine = stage != "candidate" or bool(plan.precisions)  # int8 weights have another range without VNNI
        if is_of_this_machine and kept.place != self.place(plan):
            return None
        evidence, ratio = kept.evidence, kept.ratio
        if kept.visits:
            if plan.digest not in self._visits:
                self._visits[plan.digest], self._later[plan.digest] = kept.visits[:1], list(kept.visits[1:])
            ratio = middle(self._visits[plan.digest])
        if ratio is not None:
            latency = ratio.median * self.original["latency"]
            evidence = msgspec.structs.replace(evidence, costs={**evidence.costs, "latency": latency})
        if self._listed(plan, stage) is None:
            self._list(plan, stage, stored.outcome, evidence, stored.seconds, ratio)
        return msgspec.structs.replace(kept, evidence=evidence, ratio=ratio)

    def candidate(self, plan: Plan) -> Evidence:
        """A plan judged in PyTorch, without recovery."""
        known = self.known(plan, "candidate")
        if known is not None:
            return known.evidence
        began = time.monotonic()
        compressed = self.carry_out(plan)
        found = judge(self.bench, compressed.final)
        diverged = not math.isfinite(found.loss) or found.drop == math.inf
        loss, lost = (None, None) if diverged else (found.loss, found.drop)
        evidence = Evidence("candidate", loss, lost, {"macs": float(compressed.macs)}, failed=diverged)
        outcome = Outcome("diverged", "its outputs or its quality are not finite") if diverged else Outcome("measured")
        self.record(plan, "candidate", outcome, evidence, time.monotonic() - began)
        return evidence

    def trial(self, plan: Plan) -> Kept:
        """A plan exported and measured without recovery (latency does not depend on the weights)."""
        known = self.known(plan, "trial")
        if known is not None:
            return known
        began = time.monotonic()
        compressed, exported = self._exported(plan)
        try:
            evidence = self.costs_of(plan, compressed.macs, exported, "trial")
        except RuntimeFailed as err:
            exported = Exported(Outcome(err.kind, str(err)))  # type: ignore[arg-type]
            evidence = Evidence("trial", failed=True)
        self.record(plan, "trial", exported.outcome, evidence, time.monotonic() - began, exported.ratio)
        return Kept(evidence, exported.ratio)

    def visits(self, plan: Plan) -> int:
        """How often a plan's latency was measured at different times, or could not be."""
        return max(len(self._visits.get(plan.digest, ())), 1 + self._attempts[plan.digest])

    def visit(self, plan: Plan) -> Kept | None:
        """Measure a tried plan once more, or take the next visit that the study holds of it: the median of all its visits counts from now
        on. None where it cannot be measured.
        """
        before = self.known(plan, "trial")
        if before is None or before.ratio is None:
            return None
        began = time.monotonic()
        self._attempts[plan.digest] += 1
        later = self._later.get(plan.digest)
        is_known = bool(later)
        found = later.pop(0) if later else self._measured_again(plan)
        if found is None:
            return None
        visits = (*self._visits.get(plan.digest, (before.ratio,)), found)
        self._visits[plan.digest] = visits
        ratio = middle(visits)
        costs = {**before.evidence.costs, "latency": ratio.median * self.original["latency"]}
        evidence = msgspec.structs.replace(before.evidence, costs=costs)
        old = self._listed(plan, "trial")
        assert old is not None  # `known` lists what it finds
        self.all.remove(old)
        if is_known:
            self._list(plan, "trial", Outcome("measured"), evidence, old.seconds, ratio)
        else:
            self.record(plan, "trial", Outcome("measured"), evidence, max(time.monotonic() - began, old.seconds), ratio, again=True)
        return Kept(evidence, ratio)

    def sqnr_db(self, plan: Plan) -> float:
        """The outputs on the example of what a plan was exported to, against those of its net; minus infinity where it cannot be run."""
        exported = self._exports[plan.digest] if plan.digest in self._exports else self._exported(plan)[1]
        return -math.inf if exported.sqnr_db is None else exported.sqnr_db

    def _measured_again(self, plan: Plan) -> Estimate | None:
        """The ratio of what this run exported for a plan, else of a new export; None where it cannot be measured."""
        path = self._exports[plan.digest].path if plan.digest in self._exports else None
        if path is None:
            return self._exported(plan)[1].ratio
        try:
            return measure_again(self.bench, plan, path)
        except RuntimeFailed:
            return None

    def _exported(self, plan: Plan) -> tuple[Compressed, Exported]:
        compressed = self.carry_out(plan)
        exported = export_and_measure(self.bench, compressed.final, plan, self.bench.folder / "trials" / plan.digest)
        if exported.path is not None:
            self._exports[plan.digest] = exported
        return compressed, exported

    def costs_of(self, plan: Plan, total_macs: int, exported: Exported, kind: Kind, lost: float | None = None) -> Evidence:
        """What an exported net costs, relative to the original as it was measured beside it."""
        if exported.ratio is None or exported.size_bytes is None:
            return Evidence(kind, failed=True)
        costs = {"latency": exported.ratio.median * self.original["latency"], "size": float(exported.size_bytes), "macs": float(total_macs)}
        if "memory" in self.original and exported.path is not None:
            home = exported.target or self.bench.home(plan).target
            costs["memory"] = float(peak_memory_bytes(home, exported.path, self.bench.graph.signature, self.bench.example))
        return Evidence(kind, None, lost, costs)

    def carry_out(self, plan: Plan) -> Compressed:
        """A plan carried out; the last few are kept, since a candidate often becomes a trial and a winner."""
        self.bench.threads.settle()
        if plan.digest not in self._carried:
            while len(self._carried) >= _CARRIED:
                self._carried.pop(next(iter(self._carried)))
            self._carried[plan.digest] = carry_out(self.bench, plan, self.orders)
        return self._carried[plan.digest]

    def forget(self, plan: Plan) -> None:
        """Let go of a plan that was carried out: recovery is about to change its net."""
        self._carried.pop(plan.digest, None)

    def record(
        self,
        plan: Plan,
        stage: Kind,
        outcome: Outcome,
        evidence: Evidence,
        seconds: float,
        ratio: Estimate | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Keep how a plan ended, in the study and among this run's trials."""
        kept = Kept(evidence, ratio, self.place(plan), self._visits.get(plan.digest, ()) if stage == "trial" else ())
        self.study.record(plan, stage, outcome, kept, None, seconds, again=again)
        self._list(plan, stage, outcome, evidence, seconds, ratio)

    def place(self, plan: Plan) -> str:
        """Where a plan is measured: machine, and versions of its runtime and of the original's."""
        versions = {**self.bench.best.runtime.versions(), **self.bench.home(plan).runtime.versions()}
        return " ".join((machine().fingerprint, *(f"{name}={version}" for name, version in sorted(versions.items()))))

    def _listed(self, plan: Plan, stage: Kind) -> Trial | None:
        return next((trial for trial in self.all if trial.plan.digest == plan.digest and trial.stage == stage), None)

    def _list(self, plan: Plan, stage: Kind, outcome: Outcome, evidence: Evidence, seconds: float, ratio: Estimate | None) -> None:
        self.all.append(
            Trial(
                plan=plan,
                stage=stage,
                outcome=outcome,
                loss=evidence.loss,
                drop=evidence.quality_drop,
                predicted_latency_s=self.predict(plan),
                latency_ratio=ratio,
                macs=int(evidence.costs["macs"]) if "macs" in evidence.costs else None,
                size_bytes=int(evidence.costs["size"]) if "size" in evidence.costs else None,
                peak_memory_bytes=int(evidence.costs["memory"]) if "memory" in evidence.costs else None,
                seconds=seconds,
            )
        )
