"""What a run may do: options with the losses that they cost alone, the runtime that they are for, and what its kernels take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from planish import registry
from planish.clock import SENSITIVITY_SHARE, TABLES_SHARE
from planish.graph.graph import Operator
from planish.graph.macs import operator_macs
from planish.measure.machine import machine
from planish.measure.tables import Table
from planish.measurement import Estimate
from planish.plan import DEFAULT_SCHEMES, FULL_PRECISION, Option, Plan
from planish.prune.masks.options import mask_options
from planish.prune.masks.pattern import parse_masking
from planish.prune.options import sensitivities
from planish.prune.order import orders, remarks
from planish.quantize.options import precision_options
from planish.quantize.ranges import calibration_warnings
from planish.quantize.schemes.bf16 import BF16
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import Runtime
from planish.search.costs import Lookup
from planish.study.store import Study
from planish.target import Target
from planish.trials import Trials
from planish.workbench import Baseline, Workbench, width_step

if TYPE_CHECKING:
    from planish.request import Request

_SENSITIVITY_S = 180.0
_CLEAR_GAIN = 1.1
_WORTH_BF16 = 0.95
"""Floats of a net are in bf16 where it takes less than this of its time in fp32."""
_FAITHFUL_DB = 25.0
"""Below so many decibels bf16 is no rounding of the same outputs any more (int8 has 30 to 40, bf16 40 to 50)."""
_FAIR_SHARE = 0.2
"""A scheme that is about less than this share of the multiply-accumulates (of the weights, under a limit on size or memory) is not tried."""
_FOR_SIZE = ("int4-weights", "codebook")
"""Schemes that lose too much to be tried where no limit on size or memory asks for them."""
_KERNELS, _OPTIONS = "kernels", "options for"
"""Events of the study: what the clock, or the machine as it was then, decided. A run that is carried on decides the same."""
_KERNEL_S, _FEWEST_KERNELS, _MOST_KERNELS = 0.3, 60, 600
"""Seconds that the visits of a small kernel take, and between what bounds about so many kernels are measured as time allows."""


def _weights(operator: Operator) -> int:
    return sum(math.prod(size.full for size in shape) for shape in operator.weights if len(shape) > 1)


class Offers:
    """What the search may choose from.

    Args:
        bench: the original on this machine.
        request: what was asked for.
        study: keeps what was measured, so that a run that is carried on chooses from the same.
        trials: of this run; they learn in which order the units of each group go.
    """

    def __init__(self, bench: Workbench, request: Request, study: Study, trials: Trials) -> None:
        self.bench, self.request, self.study, self.trials = bench, request, study, trials
        self.clock, self.events = bench.clock, bench.events
        self.floats = FULL_PRECISION
        self.plain: dict[Plan, float] = {}

    def template(self, target: str) -> Plan:
        """What all plans of this run have in common."""
        request = self.request
        masking, _ = parse_masking(request.masking)
        return Plan(
            target,
            saliency=request.saliency,
            schedule=request.schedule,
            masking=masking,
            observer=request.observer,
            floats=self.floats,
            rounding=request.rounding,
            seed=request.seed,
        )

    def pruning(self) -> list[Option]:
        """Widths of every group, and blocks that may go."""
        if "prune" not in self.request.techniques or not (self.bench.analysis.groups or self.bench.analysis.blocks):
            return []
        bench = self.bench
        with self.clock.stage("sensitivity of groups and blocks"):
            self.bench.threads.settle()
            self.trials.orders = orders(self.request.saliency, bench.graph, bench.analysis, bench.material, self.request.seed)
            bench.notes.extend(remarks(self.trials.orders))
            multiple = width_step(bench.best.target)
            return self._kept_options(
                f"pruning by {multiple}" + (" with adaptors" if "adapt" in self.request.techniques else ""),
                lambda: sensitivities(
                    bench.graph,
                    bench.analysis,
                    self.trials.orders,
                    bench.data.calibration,
                    multiple,
                    self.events.progress,
                    kind=bench.output_kind,
                    seconds=self._sensitivity_s,
                    is_adapted="adapt" in self.request.techniques,
                ),
            )

    def masking(self, runtime: Runtime) -> list[Option]:
        """Patterns of zeros for each operator: under a limit on the size alone, where the runtime's file is smaller for them."""
        request = self.request
        if "mask" not in request.techniques:
            return []
        if not runtime.stores_sparse or not any(limit.quantity == "size" for limit in request.budget.limits):
            why = "its file keeps zeros as it keeps other weights" if not runtime.stores_sparse else "no limit on the size asks for them"
            self.bench.notes.append(f"masks: none, since {runtime.name} computes with zeros as with other weights, and {why}")
            return []
        method, patterns = parse_masking(request.masking)
        with self.clock.stage("sensitivity of masks"):
            self.bench.threads.settle()
            return self._kept_options(
                f"masks by {request.masking}",
                lambda: mask_options(
                    self.bench.graph,
                    self.bench.analysis,
                    method,
                    patterns,
                    self.bench.data.calibration,
                    request.keep,
                    kind=self.bench.output_kind,
                    progress=self.events.progress,
                    seconds=self._sensitivity_s,
                ),
            )

    def _kept_options(self, what: str, measure: Callable[[], list[Option]]) -> list[Option]:
        """Options with their losses as the study has them, else as they are measured now: on as many samples as there is time for, so
        that a run that is carried on would measure others, and choose other plans.
        """
        for known in self.study.kept(f"{_OPTIONS} {what}", list[Option]):
            return list(known)
        found = [option for option in measure() if math.isfinite(option.loss)]
        self.study.keep(f"{_OPTIONS} {what}", found)
        return found

    @property
    def _sensitivity_s(self) -> float:
        """Seconds that measuring one technique's sensitivities may take."""
        return SENSITIVITY_SHARE * self.clock.left_s if math.isfinite(self.clock.left_s) else _SENSITIVITY_S

    def runtime(self, options: list[Option]) -> tuple[Baseline, list[Option]]:
        """The runtime in which the original, or the original in one scheme, is quickest; and the options with that runtime's precisions.

        The one in which the original is quickest is left only for a clear gain: there both nets feel the machine's slow states alike,
        while a ratio of two runtimes changes with them.
        """
        bench = self.bench
        if "quantize" not in self.request.techniques:
            return bench.best, options
        judged = {name: split for name, split in bench.data.splits().items() if name in ("validation", "test")}
        bench.notes.extend(calibration_warnings(bench.data.calibration, judged, [spec.name for spec in bench.graph.signature.inputs]))
        ratios = {(bench.best.target.runtime, FULL_PRECISION): 1.0}
        floats: dict[str, str] = {}
        wants_small = any(limit.quantity in ("size", "memory") for limit in self.request.budget.limits)
        tried = [(name, scheme) for name, baseline in bench.baselines.items() for scheme in self._schemes(baseline, wants_small)]
        with self.clock.stage("schemes in each runtime"):
            for done, (name, scheme) in enumerate(tried):
                self.events.progress(done, len(tried))
                plan = self.template(bench.baselines[name].target.name).replace(floats=floats.get(name, FULL_PRECISION))
                if scheme == BF16.name:
                    plan = plan.replace(floats=scheme)
                ratio = self._ratio(plan.replace(precisions=self._whole(scheme)))
                if ratio is not None:
                    ratios[name, scheme] = ratio.median
                if ratio is not None and scheme == BF16.name and ratio.median < _WORTH_BF16 * self._own(name) and self._is_faithful(plan):
                    floats[name] = scheme
                    self.plain[plan] = ratio.median
                if ratio is not None and ratio.median >= 1.0 and not wants_small:
                    bench.notes.append(
                        f"{scheme} is not faster in {name}:cpu here ({ratio.median:.2f}x of the quickest fp32), so it is not used there"
                    )
        chosen = min(ratios, key=ratios.__getitem__)[0]
        if self._best_of(bench.best.target.runtime, ratios) <= _CLEAR_GAIN * self._best_of(chosen, ratios):
            chosen = bench.best.target.runtime
        baseline = bench.baselines[chosen]
        self.floats = floats.get(chosen, FULL_PRECISION)
        worth = [scheme for name, scheme in tried if name == chosen and (wants_small or ratios.get((name, scheme), math.inf) < 1.0)]
        worth = [scheme for scheme in worth if scheme != BF16.name]
        if not worth:
            return baseline, options
        with self.clock.stage("sensitivity of schemes"):
            self.bench.threads.settle()
            found = self._kept_options(
                f"{baseline.target.name} in {'+'.join(worth)} by {self.request.observer} with {machine().isa}",
                lambda: precision_options(
                    bench.graph,
                    bench.analysis,
                    baseline.runtime,
                    baseline.target,
                    bench.data.calibration,
                    worth,
                    self.request.observer,
                    progress=self.events.progress,
                    kind=bench.output_kind,
                    seconds=self._sensitivity_s,
                ),
            )
        return baseline, [*options, *found]

    @staticmethod
    def _best_of(runtime: str, ratios: Mapping[tuple[str, str], float]) -> float:
        return min((ratio for (name, _), ratio in ratios.items() if name == runtime), default=math.inf)

    def _own(self, runtime: str) -> float:
        """What the original takes in a runtime, against the quickest."""
        own, best = self.bench.baselines[runtime].timing, self.bench.best.timing
        return own.latency_s.median / best.latency_s.median if own is not None and best is not None else 1.0

    def _is_faithful(self, plan: Plan) -> bool:
        """Whether a net in bf16 gives on the example what the original gives, to less than quantization would change."""
        return self.trials.sqnr_db(plan) >= _FAITHFUL_DB

    def _schemes(self, baseline: Baseline, wants_small: bool) -> list[str]:
        """The schemes that a runtime is tried with: those that it executes and that are about a fair share of the net's work, or of its weights."""
        found = []
        operators = self.bench.analysis.operators
        schemes = [name for name in self.request.schemes if name in baseline.runtime.schemes]
        if BF16.name in schemes and baseline.target.facts.has_bf16:
            found.append(BF16.name)
        for name in schemes:
            if whole := self._whole(name):
                of = operator_macs if not wants_small else _weights
                share = sum(of(operators[o]) for o in whole) / max(sum(of(o) for o in operators.values()), 1)
                is_asked = wants_small or self.request.schemes != DEFAULT_SCHEMES
                if share >= _FAIR_SHARE and (is_asked or name not in _FOR_SIZE):
                    found.append(name)
        return found

    def _whole(self, scheme: str) -> dict[str, str]:
        """The precisions that put every operator that has such a form into a scheme."""
        return everywhere(self.bench.graph, self.bench.analysis, registry.get("scheme", scheme))

    def _ratio(self, plan: Plan) -> Estimate | None:
        """The latency of a plan against the quickest original; visited once more where one noisy figure would rule a runtime out."""
        ratio = self.trials.trial(plan).ratio
        is_sure = ratio is not None and ratio.trustworthy and ratio.median < 1.0
        if ratio is not None and not is_sure and self.trials.visits(plan) == 1:
            again = self.trials.visit(plan)
            ratio = again.ratio if again is not None else ratio
        return ratio

    @property
    def affordable_kernels(self) -> int:
        """How many kernels can be visited in the time that the tables may take; widths between them are interpolated.

        A study keeps the number: a run that is carried on, with whatever time, must predict what it predicted before.
        """
        for known in self.study.kept(_KERNELS, int):
            return int(known)
        number = max(_FEWEST_KERNELS, round(min(TABLES_SHARE * self.clock.left_s / _KERNEL_S, _MOST_KERNELS)))
        self.study.keep(_KERNELS, number)
        return number

    def lookup(self, target: Target) -> Lookup | None:
        """What a target's kernels take, measured where it is not known; None where the target has no tables."""
        if target.runtime.startswith("torch"):
            return None
        table = Table(target, is_sized=self.bench.graph.signature.is_sized, floats=self.floats)
        deadline = time.monotonic() + TABLES_SHARE * self.clock.left_s if math.isfinite(self.clock.left_s) else None

        def seconds(kernels: Any) -> Any:
            found = table.seconds(kernels, lambda share: self.events.progress(round(share * 1000), 1000), deadline)
            if deadline is not None and time.monotonic() > deadline and np.isnan(found).sum() > len(table.failures()):
                self.bench.notes.append("the time limit left some latency tables unmeasured; they are guessed from kernels of their kind")
            return found

        return seconds
