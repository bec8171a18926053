"""One plan, carried out: apply → compensate → mask → quantize → evaluate (a candidate) → export → measure (a trial)."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from planish.errors import RuntimeFailed
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.measure.latency import Timing, interleaved, ratio
from planish.measure.memory import size_bytes
from planish.measure.probe import Probe
from planish.measurement import Estimate, Outcome
from planish.metrics import Metric
from planish.plan import Plan
from planish.prune.adaptors import narrow_adaptors_
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.masks.apply import mask_
from planish.prune.order import Orders
from planish.quantize.apply import quantize
from planish.target import Target
from planish.workbench import WORTH_ITS_THREADS, Array, Workbench, as_tensor, module_outputs, open_each, worst_sqnr_db

_JUDGING = 2000
"""Samples of validation that judge a candidate."""


@dataclass(frozen=True)
class Compressed:
    """A net that a plan made, before recovery.

    Args:
        plan: what was done.
        graph: in floating point, batch norm still separate: what recovery trains.
        analysis: of that graph.
        final: what is exported: `graph` itself, or its quantized form.
        skipped: operators that were to be int8 and stay in float -> why.
        macs: of one call.
    """

    plan: Plan
    graph: Graph
    analysis: Analysis
    final: Graph
    skipped: Mapping[str, str]
    macs: int


@dataclass(frozen=True)
class Judged:
    """What a candidate is worth before anything is exported: calibration loss, and quality lost on validation (None without)."""

    loss: float
    drop: float | None


@dataclass(frozen=True)
class Exported:
    """A net in its runtime, measured beside the original.

    Args:
        outcome: "measured", or how it failed; then the rest is None.
        path: the runtime model.
        ratio: latency, optimized ÷ original, paired.
        size_bytes: on disk.
        sqnr_db: the runtime's outputs on the example against the module's own.
        target: where, with as many threads as are worth having.
    """

    outcome: Outcome
    path: Path | None = None
    ratio: Estimate | None = None
    size_bytes: int | None = None
    sqnr_db: float | None = None
    target: Target | None = None


def compress(bench: Workbench, plan: Plan, orders: Orders) -> tuple[Graph, Analysis]:
    """The original with the plan's blocks and widths gone, the rest refitted and then masked, in floating point, and its analysis."""
    if not plan.widths and not plan.blocks:
        graph, analysis = bench.graph.copy(), bench.analysis
    else:
        applied = apply(bench.graph, bench.analysis, plan, orders)
        compensate(applied.graph, bench.graph, applied.kept, bench.data.calibration, seed=plan.seed)
        narrow_adaptors_(applied.graph, plan.adaptors, bench.data.calibration)
        graph, analysis = applied.graph, analyse(applied.graph)
    if plan.masks:
        mask_(graph, analysis, plan.masks, plan.masking, bench.data.calibration, seed=plan.seed)
    return graph, analysis


def quantized(bench: Workbench, graph: Graph, analysis: Analysis, plan: Plan) -> tuple[Graph, Mapping[str, str]]:
    """`graph` with the plan's precisions as fake quantization, and what had to stay in float; `graph` itself without any."""
    graph.floats = plan.floats
    wanted = {name: scheme for name, scheme in plan.precisions.items() if name in analysis.operators and scheme != "fp32"}
    if not wanted:
        return graph, {}
    baseline = bench.home(plan)
    done = quantize(
        graph,
        analysis,
        wanted,
        baseline.runtime,
        baseline.target,
        bench.data.calibration,
        observer=plan.observer,
        rounding=plan.rounding,
        seed=plan.seed,
    )
    return done.graph, done.skipped


def carry_out(bench: Workbench, plan: Plan, orders: Orders) -> Compressed:
    """A plan carried out up to what would be exported, without recovery."""
    graph, analysis = compress(bench, plan, orders)
    final, skipped = quantized(bench, graph, analysis, plan)
    return Compressed(plan, graph, analysis, final, skipped, macs(analysis))


def judge(bench: Workbench, graph: Graph) -> Judged:
    """The calibration loss of a graph and what it loses on (a part of) validation, both in PyTorch."""
    reference = bench.cached("calibration", lambda: module_outputs(bench.graph, bench.data.calibration))
    tensors = [as_tensor(array) for array in reference]
    outputs = module_outputs(graph, bench.data.calibration)
    loss = float(divergence(tensors, bench.output_kind).per_sample([as_tensor(array) for array in outputs], tensors).double().mean())
    return Judged(loss, lost_on_validation(bench, graph, _JUDGING))


def lost_on_validation(bench: Workbench, graph: Graph, most: int) -> float | None:
    """The quality that a graph loses on at most so many samples of validation, in PyTorch; None where there is nothing to judge on."""
    if bench.job.evaluate is not None:
        return bench.lost(bench.evaluated(module_predictor(graph)))
    split = bench.judging(most)
    if split is None:
        return None
    original = bench.cached(f"{split.n} of validation", lambda: module_outputs(bench.graph, split))
    return drop(bench.metric, original, module_outputs(graph, split), split.targets)


def module_predictor(graph: Graph) -> Callable[[Any], Any]:
    """`predict` for a job's `evaluate`: inputs and outputs in the model's structure, computed by the graph's own module."""

    def predict(inputs: Any) -> Any:
        flat = [value if isinstance(value, torch.Tensor) else as_tensor(value) for value in graph.signature.flatten(inputs)]
        with torch.inference_mode():
            return graph.signature.unflatten(list(graph.module(*flat)))

    return predict


def drop(metric: Metric, original: list[Array], optimized: list[Array], targets: NDArray[np.generic] | None) -> float:
    """The quality that was lost, in the metric's unit: positive is worse, infinite where the optimized net has no finite quality."""
    reference = targets if metric.needs_labels else original
    before, after = metric.score(original, reference), metric.score(optimized, reference)
    if not math.isfinite(after):
        return math.inf
    return before - after if metric.higher_is_better else after - before


def export_and_measure(bench: Workbench, graph: Graph, plan: Plan, folder: Path, seconds: float = 0.8) -> Exported:
    """Export a graph to the plan's target and time it against the original there; an expected failure is an `Outcome`.

    Args:
        seconds: of counted time for each of the models.
    """
    baseline = bench.home(plan)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        path = baseline.runtime.export(graph, folder)
        with opened(bench, baseline.target.thread_counts, path) as probes:
            target, timing, original = _timed(bench, probes, seconds)
            return Exported(
                Outcome("measured"),
                path,
                ratio(timing, original),
                size_bytes(path),
                worst_sqnr_db(module_outputs_of_example(graph), probes[target].outputs(bench.example)),
                target,
            )
    except RuntimeFailed as err:
        return Exported(Outcome(err.kind, str(err)))  # type: ignore[arg-type]


def measure_again(bench: Workbench, plan: Plan, path: Path, seconds: float = 0.8) -> Estimate:
    """The latency of what was exported before, against the original's.

    Raises:
        RuntimeFailed: it cannot be measured.
    """
    with opened(bench, bench.home(plan).target.thread_counts, path) as probes:
        _, timing, original = _timed(bench, probes, seconds)
    return ratio(timing, original)


def measure_beside(bench: Workbench, target: Target, path: Path, other: Path, seconds: float = 0.8) -> Estimate:
    """The latency of one exported model against that of another, in the same target.

    Raises:
        RuntimeFailed: one of them cannot be measured.
    """
    with opened(bench, [target], path) as first, opened(bench, [target], other) as second:
        found = interleaved({"one": first[target], "other": second[target]}, bench.example, seconds=seconds)
    return ratio(found["one"], found["other"])


@contextlib.contextmanager
def opened(bench: Workbench, targets: Sequence[Target], path: Path) -> Iterator[dict[Target, Probe]]:
    """An exported model in each of several targets (see `open_each`): one with each number of threads that may be the best, say."""
    probes = open_each(targets, path, bench.graph.signature)
    try:
        yield probes
    finally:
        for probe in probes.values():
            probe.close()


def _timed(bench: Workbench, probes: Mapping[Target, Probe], seconds: float) -> tuple[Target, Timing, Timing]:
    """The target whose threads are worth having, the timing there, and the original's with the number of threads that suits it now."""
    for attempt in range(2):
        originals = bench.best.living_probes(bench.graph.signature)
        everyone = {("original", target): probe for target, probe in originals.items()}
        everyone.update({("optimized", target): probe for target, probe in probes.items()})
        try:
            timings = interleaved(everyone, bench.example, seconds=seconds)
            break
        except RuntimeFailed:
            if attempt or all(probe.is_alive for probe in originals.values()):
                raise  # else it was the original's process that died, which says nothing of the plan
    original = min((timings[key] for key in everyone if key[0] == "original"), key=lambda timing: timing.latency_s.median)
    bench.noticed(original)
    quickest = min(timings["optimized", target].latency_s.median for target in probes)
    worth = next(t for t in probes if timings["optimized", t].latency_s.median <= WORTH_ITS_THREADS * quickest)
    return worth, timings["optimized", worth], original


def module_outputs_of_example(graph: Graph) -> list[Array]:
    """The module's own flat outputs on the example inputs."""
    with torch.inference_mode():
        return [value.numpy() for value in graph.module(*graph.example)]
