"""Recovery against the clock: a few rivals are each trained for a little while (a heat), the one that comes closest to the end."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from torch import Tensor

from planish import registry
from planish.data import Split
from planish.distill.recover import RecoverReport, recover
from planish.distill.teacher import Teacher
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.plan import ONE_SHOT, Plan, Recovery
from planish.prune.apply import removals, translated
from planish.prune.compensate import compensate
from planish.prune.masks.apply import mask_
from planish.prune.masks.subjects import masked_weights
from planish.prune.order import Orders, orders
from planish.prune.shaping import Kept, Shaping, Step
from planish.pursuit import Pursuit
from planish.search.contract import NO_DROP
from planish.search.soft import soft_price
from planish.train.checkpoint import Checkpoint
from planish.trial import Compressed, compress, lost_on_validation, quantized
from planish.workbench import RECOVERY_S, Workbench

LEAST_S = 5.0
"""With less time than this there is no recovery."""
_STAGES = ("recovery", "recovery-in-int8", "heat")
"""Each sees its samples in another order, and so does each call of a schedule's, by its name."""
_SEEDS = 1000
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
_SHAPING = 0.5
"""Of recovery's time and samples in floating point, what a schedule takes that lets units leave while the net trains."""
_ALIKE = 0.9
"""A heat that time cut below this share of the first one's samples is not compared with it."""


@dataclass(frozen=True)
class Trained:
    """A plan's net after recovery.

    Args:
        plan: with what recovery did.
        compressed: the plan's net in floating point; another than was given where its schedule shaped it.
        final: what is exported.
        skipped: operators that were to be int8 and stay in float -> why.
        history: figures of the plan's schedule on its way.
    """

    plan: Plan
    compressed: Compressed
    final: Graph
    skipped: Mapping[str, str]
    history: tuple[Step, ...] = ()


@dataclass(frozen=True)
class _Heat:
    compressed: Compressed
    samples: int
    distance: float


def usual_samples(bench: Workbench) -> int:
    """The samples that recovery sees where no time limit is given."""
    return _EPOCHS * _split(bench).n


def _split(bench: Workbench) -> Split:
    return bench.data.train if bench.data.train is not None else bench.data.calibration


class Recoverer:
    """Recovers one plan after another against the same clock and teacher.

    Args:
        pursuit: whose plans these are.
    """

    def __init__(self, pursuit: Pursuit) -> None:
        self.pursuit, self.bench = pursuit, pursuit.bench
        self.split = _split(self.bench)
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
        skipped: Mapping[str, str] = {}
        history: tuple[Step, ...] = ()
        if not plan.is_dense:
            samples, until = math.ceil(self.settings.samples * (1 - quantized_share)), now + (end - now) * (1 - quantized_share)
            if plan.widths and plan.schedule != ONE_SHOT:
                with self.bench.clock.stage(f"units leave ({plan.schedule})"):
                    compressed, history, shaped = self._shaped(plan, math.ceil(_SHAPING * samples), now + _SHAPING * (until - now))
                seen, samples, plan = shaped, samples - shaped, compressed.plan
            with self.bench.clock.stage("recovery"):
                seen += self._recover(compressed.graph, compressed, "recovery", max(1, samples), until).samples
        graph: Graph = compressed.graph
        if plan.precisions:
            graph, skipped = quantized(self.bench, compressed.graph, compressed.analysis, plan)
            samples = math.ceil(self.settings.samples * quantized_share)
            with self.bench.clock.stage("recovery in int8"):
                seen += self._recover(graph, compressed, "recovery-in-int8", samples, end).samples
        return Trained(plan.replace(recovery=msgspec.structs.replace(self.settings, samples=seen)), compressed, graph, skipped, history)

    def _shaped(self, plan: Plan, samples: int, deadline: float) -> tuple[Compressed, tuple[Step, ...], int]:
        """A plan's net as its schedule makes it, from the original with the plan's blocks bypassed; its figures; and the samples seen."""
        pursuit, bench = self.pursuit, self.bench
        known = pursuit.trials.orders
        graph, analysis = compress(bench, plan.replace(widths={}, masks={}), known)
        going = {name: going.units for name, going in removals(bench.analysis, plan, known)[0].items()}
        leaving = translated(analysis, bench.analysis, going)
        space, costs = pursuit.space, pursuit.costs
        assert costs is not None
        began, seen = time.monotonic(), 0

        def fit(
            trained: Graph,
            /,
            share: float,
            name: str,
            penalty: Callable[[], Tensor] | None = None,
            after_step: Callable[[float, float], None] | None = None,
        ) -> None:
            nonlocal seen
            until = min(deadline, time.monotonic() + share * (deadline - began))
            unmasked = Compressed(plan.replace(masks={}), trained, analysis, trained, {}, 0)
            report = self._recover(trained, unmasked, name, max(1, math.ceil(share * samples)), until, penalty, after_step, keep_last=True)
            seen += report.samples

        def refit(pruned: Graph, kept: Kept) -> None:
            compensate(pruned, bench.graph, kept, bench.data.calibration, seed=plan.seed)

        def reorder(graph: Graph, analysis: Analysis) -> Orders:
            return orders(plan.saliency, graph, analysis, bench.material, plan.seed)

        shaping = Shaping(
            graph,
            analysis,
            {name: analysis.groups[name].units - len(units) for name, units in leaving.items()},
            known if not plan.blocks else reorder(graph, analysis),
            {
                v.subject: [int(value) for value in v.values]
                for v in space.variables
                if v.technique == "width" and v.subject in analysis.groups
            },
            soft_price(costs, plan, next((q for q in ("latency", "macs", "size") if q in pursuit.bounds and q in costs.factors), None)),
            reorder,
            refit,
            fit,
            bench.events.say,
        )
        shaped = registry.get("schedule", plan.schedule)().shape(shaping)
        chosen = plan.replace(widths=_widths(bench.analysis, shaped.kept))
        now = analyse(shaped.graph)
        if plan.masks:
            mask_(shaped.graph, now, plan.masks, plan.masking, bench.data.calibration, seed=plan.seed)
        return Compressed(chosen, shaped.graph, now, shaped.graph, {}, macs(now)), shaped.history, seen

    def _recover(
        self,
        graph: Graph,
        compressed: Compressed,
        name: str,
        samples: int,
        deadline: float,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[float, float], None] | None = None,
        keep_last: bool = False,
    ) -> RecoverReport:
        pursuit, plan = self.pursuit, compressed.plan
        if self._teacher is None:
            self._teacher = Teacher(self.bench.graph, self.split, self.bench.data.folder)
        return recover(
            graph,
            self._teacher,
            self.bench.job,
            self.bench.data,
            msgspec.structs.replace(self.settings, samples=samples),
            pursuit.request.seed + (_STAGES.index(name) if name in _STAGES else len(_STAGES) + zlib.crc32(name.encode()) % _SEEDS),
            deadline=deadline,
            progress=self.bench.events.progress,
            should_stop=pursuit.settle,
            checkpoint=Checkpoint(pursuit.study.checkpoint(f"{unrecovered(plan)}-{name}")),
            penalty=penalty,
            after_step=after_step,
            keep_last=keep_last,
            masked=masked_weights(compressed.analysis, plan.masks),
        )


def _widths(analysis: Analysis, kept: Kept) -> dict[str, int]:
    """Units that stayed in each group that narrowed, by the indices that surgery kept: a bypass may have renamed or parted groups."""
    found = {}
    for name, group in analysis.groups.items():
        left = [len(np.unique(units[units >= 0])) for key in group.unit_of if key in kept for units in [group.unit_of[key][kept[key]]]]
        if left and min(left) < group.units:
            found[name] = min(left)
    return found


def unrecovered(plan: Plan) -> str:
    """The digest of a plan, whatever recovery did."""
    return plan.replace(recovery=Recovery()).digest


def _removed(plan: Plan) -> str:
    parts = [
        *(f"{plan.adaptors[block]} for {block}" if block in plan.adaptors else f"without {block}" for block in plan.blocks),
        *(f"{name} = {width}" for name, width in plan.widths.items()),
        *(f"{name} masked {pattern}" for name, pattern in plan.masks.items()),
    ]
    return ", ".join(parts)
