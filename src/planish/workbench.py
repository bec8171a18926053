"""The workbench: one job on one machine, captured, exported and measured as it came; what every trial is made from and compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from planish.artifact.deployed import sqnr_db
from planish.clock import Clock
from planish.data import IGNORED_LABEL, Data, Split
from planish.distill.losses import label_loss
from planish.errors import DataError, RuntimeFailed, UsageError
from planish.events import Events
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.idle import idle_channels
from planish.graph.modes import set_mode
from planish.measure.latency import Timing, interleaved
from planish.measure.machine import available_targets
from planish.measure.probe import Probe
from planish.metrics import Metric
from planish.plan import Plan
from planish.prune.contract import Material
from planish.prune.saliency.labelled import unlabelled
from planish.runtimes.contract import Runtime, get_runtime
from planish.signature import Signature
from planish.target import Target, parse_target
from planish.train.threads import Threads
from planish.workload import EVALUATE, Workload

Array = NDArray[Any]
LEAST_SQNR_DB = 50.0
"""An fp32 export below this many decibels against the module computes something else (the worst faithful one seen has 83)."""
RECOVERY_S = 1500.0
"""Seconds of recovery at most, where no time limit was given."""
_EAGER = ("torch", "torch-compile")
_VALUE_METRICS = ("rmse", "mae", "spearman", "cosine")
_BATCH, _FEW = 100, 16
WORTH_ITS_THREADS = 1.1
"""More threads that make a call less than this many times as quick are not worth having: waking them depends on the machine's state."""
_DRIFT = 0.1
"""A machine that has become this much quicker or slower is in another state. On virtual machines the waking of a second thread alone
takes 0 or 100 µs for minutes on end, which moves a short net's ratio by a fifth."""


@dataclass
class Baseline:
    """The original, exported to one runtime.

    Args:
        runtime: the runtime.
        target: where it runs.
        path: the exported model.
        probe: a measuring process that has it open.
        sqnr_db: its outputs on the example against the module's.
        timing: of the interleaved comparison of all runtimes, with the number of threads that was quickest.
        threads: that number.
        fewer: further measuring processes, with fewer threads.
    """

    runtime: Runtime
    target: Target
    path: Path
    probe: Probe
    sqnr_db: float
    timing: Timing | None = None
    threads: int = 1
    fewer: dict[Target, Probe] = field(default_factory=dict)

    def living_probe(self, signature: Signature) -> Probe:
        """The probe, in a new process if the old one has died: one crash must not be blamed on every trial after it."""
        if not self.probe.is_alive:
            self.probe = Probe.open(self.target, self.path, signature, timeout_s=300.0)
        return self.probe

    def living_probes(self, signature: Signature) -> dict[Target, Probe]:
        """A probe for each number of threads that may suit the original best, the fewest first."""
        counts = self.target.thread_counts[:-1]
        missing = [target for target in counts if target not in self.fewer or not self.fewer[target].is_alive]
        self.fewer.update(open_each(missing, self.path, signature) if missing else {})
        return {**{target: self.fewer[target] for target in counts if target in self.fewer}, self.target: self.living_probe(signature)}

    def close(self) -> None:
        """End its measuring processes."""
        for probe in (self.probe, *self.fewer.values()):
            probe.close()


def open_each(targets: Sequence[Target], path: Path, signature: Signature) -> dict[Target, Probe]:
    """An exported model in each of several targets; those that refuse it are left out.

    Raises:
        RuntimeFailed: all of them do.
    """
    probes: dict[Target, Probe] = {}
    failed: RuntimeFailed | None = None
    try:
        for target in targets:
            try:
                probes[target] = Probe.open(target, path, signature, timeout_s=300.0)
            except RuntimeFailed as err:
                failed = err
    except BaseException:
        for probe in probes.values():
            probe.close()
        raise
    if failed is not None and not probes:
        raise failed
    return probes


@dataclass
class Workbench:
    """Everything that does not depend on a plan. A context manager: leaving it ends the measuring processes.

    Args:
        job: the workload.
        data: its materialised splits.
        graph: the captured original, in evaluation mode.
        analysis: its groups, blocks and operators.
        metric: what quality means.
        folder: where exported models go; emptied with the study.
        baselines: runtime name -> the original there; deployable runtimes only.
        eager: what the user has today: torch, and compiled torch where it was asked for.
        seed, events, clock: of the run.
        notes: sentences for the report.
        threads: how many torch computes with; put back when the workbench is left.
    """

    job: Workload
    data: Data
    graph: Graph
    analysis: Analysis
    metric: Metric
    folder: Path
    seed: int
    events: Events
    clock: Clock
    baselines: dict[str, Baseline] = field(default_factory=dict)
    eager: dict[str, Baseline] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    threads: Threads = field(default_factory=Threads)
    _outputs: dict[tuple[str, str], list[Array]] = field(default_factory=dict)
    _originals: list[float] = field(default_factory=list)
    _judging: dict[int, Split] = field(default_factory=dict)
    _quality: float | None = None

    @property
    def example(self) -> list[Array]:
        """The flat example inputs as arrays: the call that latency is measured on."""
        return self._example

    def __post_init__(self) -> None:
        self._example = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in self.graph.example]

    @property
    def output_kind(self) -> str | None:
        """What the outputs are to a label-free loss: "values" where the metric says so; None leaves it to their shapes."""
        return "values" if self.metric.name in _VALUE_METRICS and isinstance(self.job.metric, str) else None

    @property
    def material(self) -> Material:
        """What a saliency may look at."""
        labelled, loss = self.data.labelled, None
        if labelled is not None and labelled.targets is not None:
            counted = np.flatnonzero((labelled.targets != IGNORED_LABEL).reshape(labelled.n, -1).any(1))[:_FEW]
            few = labelled.take(counted) if len(counted) else labelled.rows(0, _FEW)
            with torch.inference_mode():
                outputs = [value.clone() for value in self.graph.module(*(torch.from_numpy(np.array(array)) for array in few.inputs))]
            assert few.targets is not None
            loss = self._own_loss if self.job.loss is not None else label_loss(self.metric.name, outputs, few.targets)
        return Material(self.data.calibration, labelled, loss, self.output_kind)

    def _own_loss(self, flat: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        assert self.job.loss is not None
        found: torch.Tensor = self.job.loss(self.graph.signature.unflatten(list(flat)), targets)
        return found

    @property
    def batch(self) -> int:
        """Samples in the call that latency is measured on."""
        return int(self._example[0].shape[0])

    @property
    def best(self) -> Baseline:
        """The original in the runtime where it is quickest: what every ratio is relative to."""
        measured = [b for b in self.baselines.values() if b.timing is not None]
        return min(measured, key=lambda b: b.timing.latency_s.median if b.timing else math.inf)

    def home(self, plan: Plan) -> Baseline:
        """The original in the runtime that a plan is for."""
        return self.baselines[plan.target.partition(":")[0]]

    @property
    def judged(self) -> tuple[str, Split | None]:
        """What quality is judged on: a split and its name; ("evaluate", None) where the job judges."""
        return (EVALUATE, None) if self.job.evaluate is not None else self.data.judged

    def judging(self, most: int) -> Split | None:
        """At most so many samples of validation, evenly spread; None without validation."""
        split = self.data.validation
        if split is None or split.n <= most:
            return split
        if most not in self._judging:
            self._judging[most] = split.take(np.linspace(0, split.n - 1, most).astype(np.int64))
        return self._judging[most]

    @property
    def original_quality(self) -> float | None:
        """The original's quality on validation (or by the job's `evaluate`), by its artifact; None where there is nothing to judge on.

        Raises:
            DataError: it is not finite.
        """
        if self._quality is None:
            found: float | None = None
            if self.job.evaluate is not None:
                found = self.evaluated(predictor(self.best.living_probe(self.graph.signature)))
            elif self.data.validation is not None:
                outputs = self.predict(self.best, "validation", self.data.validation)
                found = self.metric.score(outputs, self.data.validation.targets if self.metric.needs_labels else outputs)
            if found is not None and not math.isfinite(found):
                raise DataError(
                    f"metric: {self.metric.name!r} of the original must be finite; it is {found}; check the metric and its data"
                )
            self._quality = found
        return self._quality

    def evaluated(self, predict: Callable[[Any], Any]) -> float:
        """The job's `evaluate` of a net, from the same random numbers for each."""
        return self.job.evaluated(predict, self.seed)

    def lost(self, quality: float) -> float:
        """What `quality`, by the job's `evaluate`, is worse than the original's; infinite where it is not finite."""
        before = self.original_quality
        assert before is not None
        if not math.isfinite(quality):
            return math.inf
        return before - quality if self.metric.higher_is_better else quality - before

    def cached(self, name: str, compute: Callable[[], list[Array]]) -> list[Array]:
        """Outputs of the original's module, computed once for each name."""
        key = ("module", name)
        if key not in self._outputs:
            self._outputs[key] = compute()
        return self._outputs[key]

    def noticed(self, original: Timing) -> None:
        """Keep how quick the original was when a plan was measured beside it."""
        self._originals.append(original.latency_s.median)

    def is_as_usual(self, original: Timing) -> bool:
        """Whether the original is as quick now as it mostly was in this run: if not, the machine is in another state."""
        first = self.best.timing
        seen = [*self._originals, *([first.latency_s.median] if first else [])]
        return not seen or abs(original.latency_s.median / float(np.median(seen)) - 1) <= _DRIFT

    def predict(self, baseline: Baseline, name: str, split: Split) -> list[Array]:
        """The original's own outputs on a split, computed by its artifact once."""
        key = (baseline.target.name, name)
        if key not in self._outputs:
            self._outputs[key] = outputs_of(baseline.living_probe(self.graph.signature), split)
        return self._outputs[key]

    def close(self) -> None:
        """End every measuring process, and give torch its threads back."""
        self.threads.restore()
        for baseline in (*self.baselines.values(), *self.eager.values()):
            baseline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def predictor(probe: Probe) -> Callable[[Any], Any]:
    """`predict` for a job's `evaluate`: inputs and outputs in the model's structure, computed by an exported model."""
    signature = probe.signature

    def predict(inputs: Any) -> Any:
        flat = [
            np.ascontiguousarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value)
            for value in signature.flatten(inputs)
        ]
        return signature.unflatten([torch.from_numpy(np.array(value)) for value in probe.outputs(flat)])

    return predict


def outputs_of(probe: Probe, split: Split, limit: int | None = None) -> list[Array]:
    """The flat outputs of an exported model on the first `limit` samples of a split, `[n, ...]` each."""
    first = probe.signature.inputs[0].shape[0]
    batch = first if isinstance(first, int) else _BATCH
    inputs = split.inputs if limit is None or limit >= split.n else [array[:limit] for array in split.inputs]
    return probe.outputs(list(inputs), batch, timeout_s=3600.0)


def module_outputs(graph: Graph, split: Split, limit: int | None = None) -> list[Array]:
    """The flat outputs of a graph's own module in evaluation mode, `[n, ...]` each."""
    first = graph.signature.inputs[0].shape[0]
    batch = first if isinstance(first, int) else _BATCH
    parts: list[Sequence[torch.Tensor]] = []
    with torch.inference_mode():
        for inputs, _ in split.rows(0, min(split.n, limit or split.n)).batches(batch):
            parts.append(graph.module(*(as_tensor(array) for array in inputs)))
    return [torch.cat(list(values)).numpy() for values in zip(*parts, strict=True)]


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor over the array's memory; images in channels-last order, which torch's convolutions prefer on processors."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def worst_sqnr_db(wanted: Sequence[Array], got: Sequence[Array]) -> float:
    """The lowest signal-to-noise ratio over outputs, in decibels; infinite where they are equal."""
    return min(sqnr_db(a, b) for a, b in zip(wanted, got, strict=True))


def width_step(target: Target) -> int:
    """The channels by which widths step: at most 8, since the latency tables say what a width between two of the target's multiples is worth."""
    return min(8, target.facts.width_multiple)


def targets_for(text: str, threads: int | None) -> list[Target]:
    """The deployable targets that a user's `--target` stands for.

    Raises:
        UnknownName, UsageError, MissingPackage: as `parse_target` and `get_runtime` say.
    """
    from planish import registry

    runtime, device = parse_target(text, registry.names("runtime"))
    found = available_targets(device, threads)
    if runtime is not None:
        get_runtime(runtime)
        found = [target for target in found if target.runtime == runtime]
    else:
        found = [target for target in found if target.runtime not in _EAGER]
    if not found:
        raise UsageError(f"target: no runtime for {text!r} is installed; pip install 'planish[openvino]', or see `planish doctor`")
    return found


def prepare(
    job: Workload,
    targets: Sequence[Target],
    keep: Sequence[str],
    folder: Path,
    seed: int,
    events: Events,
    clock: Clock,
    *,
    compiled: bool,
    labels_for: str = "",
) -> Workbench:
    """Capture, export and measure the original: the workbench on which plans are tried.

    Args:
        job: the workload.
        targets: where it may run; those that refuse the original are noted and left out.
        keep: globs of parameters that must be left alone.
        folder: for data and exported models.
        seed, events, clock: of the run.
        compiled: whether compiled torch is measured too (it takes about a minute to compile).
        labels_for: the saliency that needs samples with labels, if there is one.

    Raises:
        DataError, CaptureError, UnknownName: as the steps say; labels that are needed and missing are told before anything is captured, those
            that no loss fits before anything is measured. RuntimeFailed: no target runs the original.
    """
    with clock.stage("reading the data"):
        data = job.materialize(folder / "data")
    if labels_for and data.labelled is None:
        raise unlabelled(labels_for)
    with clock.stage("capturing the model"):
        graph = capture(job.model_module(), job.example_inputs, job.state or None)
        set_mode(graph, False)
        seen = [split.inputs for split in (data.train, data.validation, data.calibration) if split is not None]
        graph.idle = idle_channels(graph, seen)
        for name, (_, channels) in graph.idle.items():
            data.notes.append(
                f"input {name}: channels that have one value in all data, and that a plan may stop reading: {_listed(channels)}"
            )
        analysis = analyse(graph, keep)
        check_batches(graph)
        data.check(graph.signature)
    bench = Workbench(
        job, data, graph, analysis, job.metric_object(graph.signature), folder, seed, events, clock, notes=[*data.notes, *graph.notes]
    )
    try:
        with torch.inference_mode():
            wanted = [value.numpy() for value in graph.module(*graph.example)]
        job.check_targets(data, wanted)
        if labels_for and bench.material.loss is None:
            raise unlabelled(labels_for)
        with clock.stage("measuring the original"):
            _measure_original(bench, targets, compiled, wanted)
        return bench
    except BaseException:
        bench.close()
        raise


def check_batches(graph: Graph) -> None:
    """Refuse a graph that works for one batch size only.

    Raises:
        UsageError: says why it does.
    """
    if isinstance(graph.signature.inputs[0].shape[0], int):
        why = next((note for note in graph.notes if "batch" in note), "its program works for one batch size only")
        raise UsageError(f"model: it must take batches of any size, to be calibrated and trained; {why}; use -1 or x.shape[0] in views")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _measure_original(bench: Workbench, targets: Sequence[Target], compiled: bool, wanted: list[Array]) -> None:
    failures: list[RuntimeFailed] = []
    for target in targets:
        try:
            found = _baseline(bench, target, wanted)
        except RuntimeFailed as err:
            failures.append(err)
            bench.notes.append(f"{target.name} cannot run the original: {err}")
            continue
        bench.baselines[target.runtime] = found
    if not bench.baselines:
        raise failures[0]
    for name in _EAGER[: 2 if compiled else 1]:
        if name not in bench.baselines and get_runtime(name, require=False).missing() is None:
            try:
                bench.eager[name] = _baseline(bench, msgspec.structs.replace(targets[0], runtime=name), wanted)
            except RuntimeFailed as err:
                bench.notes.append(f"{name} cannot run the original: {err}")
    for name, baseline in list(bench.eager.items()):
        try:
            baseline.probe.time(bench.example, 0.0)
        except RuntimeFailed as err:
            bench.notes.append(f"{name} cannot run the original: {err}")
            del bench.eager[name]
    probes = {
        target: probe for baseline in bench.baselines.values() for target, probe in baseline.living_probes(bench.graph.signature).items()
    }
    probes.update({baseline.target: baseline.probe for baseline in bench.eager.values()})
    timings = interleaved(probes, bench.example, seconds=1.0)
    everyone = {**bench.baselines, **bench.eager}
    for target, timing in timings.items():
        baseline = everyone[target.runtime]
        if baseline.timing is None or timing.latency_s.median < baseline.timing.latency_s.median:
            baseline.timing, baseline.threads = timing, target.threads
    for baseline in bench.eager.values():
        baseline.close()
    for baseline in bench.baselines.values():
        if baseline is not bench.best:
            for probe in baseline.fewer.values():
                probe.close()


def _baseline(bench: Workbench, target: Target, wanted: list[Array]) -> Baseline:
    runtime = get_runtime(target.runtime)
    folder = bench.folder / "original" / target.runtime
    folder.mkdir(parents=True, exist_ok=True)
    path = runtime.export(bench.graph, folder)
    probe = Probe.open(target, path, bench.graph.signature, timeout_s=300.0)
    try:
        found = worst_sqnr_db(wanted, probe.outputs(bench.example))
    except BaseException:
        probe.close()
        raise
    if found < LEAST_SQNR_DB:
        probe.close()
        raise RuntimeFailed(
            "mismatch", f"its outputs agree with the model's to {found:.0f} dB only (at least {LEAST_SQNR_DB:.0f} are needed)"
        )
    return Baseline(runtime, target, path, probe, found)
