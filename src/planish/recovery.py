"""Recovery against the clock: a few rivals are each trained for a little while (a heat), the one that comes closest to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from planish.distill.recover import RecoverReport, recover
from planish.distill.teacher import Teacher
from planish.graph.graph import Graph
from planish.plan import Plan, Recovery
from planish.prune.masks.subjects import masked_weights
from planish.pursuit import Pursuit
from planish.search.contract import NO_DROP
from planish.train.checkpoint import Checkpoint
from planish.trial import Compressed, lost_on_validation, quantized
from planish.workbench import RECOVERY_S

LEAST_S = 5.0
"""With less time than this there is no recovery."""
_STAGES = ("recovery", "recovery-in-int8", "heat")
"""Each sees its samples in another order."""
_EPOCHS = 5
_EPOCHS_UNTIL_LIMIT = 40
_HEAT_SHARE = 0.15
"""Of the time left, what the first heat may take. The others see as many samples, mostly in less: the teacher's outputs are known by then."""
_LEAST_HEAT_S = 10.0
_FEWEST_SAMPLES = 2000
"""Fewer tell no more than what was lost before recovery does."""
_JUDGED = 5000
"""Samples of validation that judge a heat."""
_LEAST_LOST = 0.1
"""Of the drop that is allowed: below it, what a heat lost on validation says nothing."""
_ALIKE = 0.9
"""A heat that time cut below this share of the first one's samples is not compared with it."""


@dataclass(frozen=True)
class Trained:
    """A plan's net after recovery.

    Args:
        plan: with what recovery did.
        final: what is exported.
        skipped: operators that were to be int8 and stay in float -> why.
    """

    plan: Plan
    final: Graph
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class _Heat:
    compressed: Compressed
    samples: int
    distance: float


class Recoverer:
    """Recovers one plan after another against the same clock and teacher.

    Args:
        pursuit: whose plans these are.
    """

    def __init__(self, pursuit: Pursuit) -> None:
        self.pursuit, self.bench = pursuit, pursuit.bench
        data = self.bench.data
        self.split = data.train if data.train is not None else data.calibration
        self.settings = Recovery(samples=(_EPOCHS_UNTIL_LIMIT if math.isfinite(self.bench.clock.left_s) else _EPOCHS) * self.split.n)
        self._end = time.monotonic() + RECOVERY_S
        self._teacher: Teacher | None = None
        self._begun: _Heat | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the run may train at all."""
        return "distill" in self.pursuit.request.techniques

    @property
    def left_s(self) -> float:
        """Seconds that recovery may still take: until the limit less what the end of the run needs, or 25 minutes in all."""
        clock = self.bench.clock
        if not math.isfinite(clock.left_s):
            return self._end - time.monotonic()
        return clock.left_s - self.pursuit.reserve_s

    @property
    def has_time_for_heats(self) -> bool:
        """Whether a heat is long enough to tell anything."""
        return self.is_wanted and _HEAT_SHARE * self.left_s >= _LEAST_HEAT_S

    def heat(self, plans: Sequence[Plan]) -> Plan:
        """Train each of `plans` in floating point on as many samples, and give the one that comes closest to the original.

        What recovery leaves depends on what was removed (figures in decision 011), and a short one tells which. The one that is given goes on
        from where its heat ended. The first is given where nothing can be told: its heat was too short, or none was like it.
        """
        best: _Heat | None = None
        samples, seconds = math.ceil(_HEAT_SHARE * self.settings.samples), _HEAT_SHARE * self.left_s
        fewest = 1
        for plan in plans:
            compressed = self._anew(plan)
            with self.bench.clock.stage("recovery heats"):
                report = self._recover(compressed.graph, compressed, "heat", samples, time.monotonic() + seconds)
                heat = _Heat(compressed, report.samples, self._distance(compressed.graph, report))
            self.bench.events.say(
                f"heat: {_removed(plan)}: {report.loss_before:.3g} -> {report.loss_after:.3g} from the original, {heat.distance:.3g} with what it lost"
            )
            if best is None:
                # most of the teacher's outputs are known from now on, but the machine may become slower
                samples, seconds = max(1, heat.samples), 2 * seconds
                fewest = math.ceil(_ALIKE * samples)
            if best is None or (heat.distance < best.distance and heat.samples >= fewest):
                best = heat
            if heat.samples < _FEWEST_SAMPLES and len(plans) > 1:
                break
        assert best is not None
        self._begun = best
        return best.compressed.plan

    def _distance(self, graph: Graph, report: RecoverReport) -> float:
        """How far a net is from the original after its heat: the loss times what it lost on validation, where that is known.

        Each alone is too uncertain: the loss of two plans that ended half a point apart was the same to 0.1 % (decision 011).
        """
        if report.diverged or math.isnan(report.loss_after):
            return math.inf
        lost = lost_on_validation(self.bench, graph, _JUDGED)
        if lost is None:
            return report.loss_after
        return report.loss_after * max(lost, _LEAST_LOST * (self.pursuit.allowed_drop or NO_DROP))

    def carry_out(self, plan: Plan) -> Compressed:
        """A plan carried out, or as its heat left it; nobody else has its net."""
        return self._begun.compressed if self._begun is not None and self._begun.compressed.plan == plan else self._anew(plan)

    def _anew(self, plan: Plan) -> Compressed:
        compressed = self.pursuit.trials.carry_out(plan)
        self.pursuit.trials.forget(plan)
        return compressed

    def train(self, plan: Plan, compressed: Compressed, share: float) -> Trained:
        """Recovery for a share of the time left, in floating point and then with fake quantization in place; a net that is only quantized
        needs the second alone.
        """
        now = time.monotonic()
        end = now + max(LEAST_S, self.left_s * share)
        seen = self._begun.samples if self._begun is not None and self._begun.compressed is compressed else 0
        quantized_share = 0.0 if not plan.precisions else 1.0 if plan.is_dense else self.settings.quantized_share
        graph: Graph = compressed.graph
        skipped: Mapping[str, str] = {}
        if not plan.is_dense:
            samples = math.ceil(self.settings.samples * (1 - quantized_share))
            with self.bench.clock.stage("recovery"):
                seen += self._recover(graph, compressed, "recovery", samples, now + (end - now) * (1 - quantized_share)).samples
        if plan.precisions:
            graph, skipped = quantized(self.bench, compressed.graph, compressed.analysis, plan)
            samples = math.ceil(self.settings.samples * quantized_share)
            with self.bench.clock.stage("recovery in int8"):
                seen += self._recover(graph, compressed, "recovery-in-int8", samples, end).samples
        return Trained(plan.replace(recovery=msgspec.structs.replace(self.settings, samples=seen)), graph, skipped)

    def _recover(self, graph: Graph, compressed: Compressed, name: str, samples: int, deadline: float) -> RecoverReport:
        pursuit, plan = self.pursuit, compressed.plan
        if self._teacher is None:
            self._teacher = Teacher(self.bench.graph, self.split, self.bench.data.folder)
        return recover(
            graph,
            self._teacher,
            self.bench.job,
            self.bench.data,
            msgspec.structs.replace(self.settings, samples=samples),
            pursuit.request.seed + _STAGES.index(name),
            deadline=deadline,
            progress=self.bench.events.progress,
            should_stop=pursuit.settle,
            checkpoint=Checkpoint(pursuit.study.checkpoint(f"{unrecovered(plan)}-{name}")),
            masked=masked_weights(compressed.analysis, plan.masks),
        )


def unrecovered(plan: Plan) -> str:
    """The digest of a plan, whatever recovery did."""
    return plan.replace(recovery=Recovery()).digest


def _removed(plan: Plan) -> str:
    parts = [
        *(f"without {block}" for block in plan.blocks),
        *(f"{name} = {width}" for name, width in plan.widths.items()),
        *(f"{name} masked {pattern}" for name, pattern in plan.masks.items()),
    ]
    return ", ".join(parts)
