"""Verification: an artifact measured again, here, from its files alone, beside what it claims; and several of them in one table."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from planish.artifact import Artifact, open_artifact
from planish.artifact.deployed import LEAST_SQNR_DB, sqnr_db
from planish.artifact.manifest import SHRUNK
from planish.errors import DataError, RuntimeFailed, UsageError
from planish.events import Events, Silent
from planish.measure.latency import Timing, interleaved, ratio
from planish.measure.machine import machine, usable_cores
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.probe import Probe
from planish.measurement import Estimate, Measurement
from planish.runtimes.contract import Array
from planish.workload import EVALUATE

if TYPE_CHECKING:
    from planish.data import Split
    from planish.workload import Workload

_SECONDS = 2.0
_ATTEMPTS, _PAUSE_S = 3, 4.0
_SLOWER = 1.2
_OTHER_STATE = 1.5
"""How much slower than claimed it may be without being refuted: waking a second thread alone moves short calls by 1.45 on virtual machines."""
_SAME_QUALITY = 1e-3
"""Of the claimed quality: what rounding in another build of a runtime may change."""


class Verification(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an artifact does here, beside what its manifest claims.

    Args:
        artifact: its path.
        target: where it runs.
        holds: whether everything that must agree does.
        findings: sentences: what differs, and what does not hold.
        latency_s: measured now, in a fresh process; claimed_latency_s: when it was made.
        size_bytes, peak_memory_bytes: measured now; claimed_size_bytes, claimed_peak_memory_bytes: when it was made.
        sqnr_db: its outputs now against those of when it was made (None: infinite, they are equal).
        quality: on `split`, measured now; claimed_quality: when it was made; None without the job.
        split: "test" or "validation"; "" without the job.
        same_machine: whether it was made on a machine like this.
        threads: that it ran with.
    """

    artifact: str
    target: str
    holds: bool
    findings: tuple[str, ...]
    latency_s: Estimate
    claimed_latency_s: Estimate
    size_bytes: int
    peak_memory_bytes: int
    sqnr_db: float | None
    quality: float | None = None
    claimed_quality: float | None = None
    split: str = ""
    same_machine: bool = True
    threads: int = 0
    claimed_size_bytes: int | None = None
    claimed_peak_memory_bytes: int | None = None

    @property
    def exit_code(self) -> int:
        """0 where everything holds, 3 where it does not."""
        return 0 if self.holds else 3

    def to_json(self) -> dict[str, Any]:
        """The object that `verify --json` prints."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def verify(path: str | Path, job: Workload | None = None, *, threads: int | None = None, events: Events | None = None) -> Verification:
    """Measure an artifact again, in a fresh process, from its files alone.

    Every checksum is compared, the outputs of the kept batch are computed again, latency, size and memory are measured; with the job
    its quality is too, and judged where that is the job that the artifact was made from. Latency is only judged on the same machine
    and as many threads, and reported otherwise.

    Args:
        path: the artifact.
        job: for its quality on the judged split.
        threads: of one call; as it was made with by default.
        events: is told of the progress.

    Raises:
        ArtifactError, MissingFile: it is no artifact, or was changed. RuntimeFailed: the runtime refuses it.
    """
    events = events or Silent()
    events.stage("checking every file")
    artifact = open_artifact(path)
    claimed = artifact.measurements["optimized"]
    target = artifact.manifest.target_with(threads)
    kept = artifact.check_arrays()
    findings: list[str] = []
    holds = True
    is_same_machine = machine().fingerprint == claimed.machine.fingerprint
    same = is_same_machine and target.threads == claimed.threads
    if threads is not None and target.threads < threads:
        findings.append(f"run with {target.threads} of the {threads} threads asked for: it was not quicker with more when it was made")
    if not same:
        findings.append("made on another machine or with other threads, so its latency is reported and not judged")
    with Probe.open(target, artifact.model_path, artifact.signature) as probe:
        events.stage("measuring")
        flat = [np.ascontiguousarray(array) for array in kept[0]] if kept else _example(artifact, job)
        noise = None
        if kept is not None:
            noise = _sqnr(kept[1], probe.outputs(flat))
            if noise is not None and noise < LEAST_SQNR_DB:
                holds = False
                findings.append(f"its outputs agree to {noise:.0f} dB only with those of when it was made")
        timing = _timed(probe, flat, _SLOWER * claimed.latency_s.high if same else math.inf)
        if same and timing.latency_s.trustworthy and timing.latency_s.low > _SLOWER * claimed.latency_s.high:
            is_other_state = timing.latency_s.low <= _OTHER_STATE * claimed.latency_s.high
            holds = holds and is_other_state
            findings.append(
                f"it takes {timing.latency_s.median * 1e3:.4g} ms here and now, {claimed.latency_s.median * 1e3:.4g} ms are claimed"
                + ("; a busy or virtual machine may be that much slower for minutes" if is_other_state else "")
            )
        if not timing.latency_s.trustworthy:
            findings.append("the latency is not trustworthy: the machine is too noisy")
        judged = _quality(artifact, probe, job, events)
    agrees, said = judged.against(claimed, is_same_machine=is_same_machine)
    holds = holds and agrees
    findings += said
    return Verification(
        artifact=str(artifact.path),
        target=target.name,
        holds=holds,
        findings=tuple(findings),
        latency_s=timing.latency_s,
        claimed_latency_s=claimed.latency_s,
        size_bytes=size_bytes(artifact.model_path),
        peak_memory_bytes=peak_memory_bytes(target, artifact.model_path, artifact.signature, flat),
        sqnr_db=noise,
        quality=judged.value,
        claimed_quality=claimed.quality,
        split=judged.split,
        same_machine=same,
        threads=target.threads,
        claimed_size_bytes=claimed.size_bytes,
        claimed_peak_memory_bytes=claimed.peak_memory_bytes,
    )


def _timed(probe: Probe, flat: list[Array], limit_s: float) -> Timing:
    """The latency now: taken again, after a pause, while it is above `limit_s`, since a machine's speed changes for a while."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        timing = interleaved({"artifact": probe}, flat, seconds=_SECONDS)["artifact"]
        if timing.latency_s.low <= limit_s:
            break
    return timing


def _example(artifact: Artifact, job: Workload | None) -> list[Any]:
    if job is None:
        raise DataError(f"{artifact.path} keeps no batch to run; give the job as well: planish verify {artifact.path} JOB.PY")
    return [np.ascontiguousarray(value.numpy()) for value in job.flatten(job.example_inputs)]


def _sqnr(wanted: Sequence[Any], got: Sequence[Any]) -> float | None:
    """The lowest signal-to-noise ratio over outputs in decibels; None where they are equal."""
    worst = min(sqnr_db(a, b) for a, b in zip(wanted, got, strict=True))
    return worst if math.isfinite(worst) else (None if worst > 0 else -999.0)


@dataclass(frozen=True)
class _Quality:
    """The quality on a split here and now.

    Args:
        value: None where it could not be computed.
        split: that it was judged on.
        other: parts of the job that are not those of the job that the artifact was made from.
        why_not: why there is no value.
        again: what a second call of `evaluate` gave, where the first is not what is claimed.
        grain: what two samples are worth.
    """

    value: float | None
    split: str
    other: str = ""
    why_not: str = ""
    again: float | None = None
    grain: float = 0.0

    def against(self, claimed: Measurement, *, is_same_machine: bool) -> tuple[bool, list[str]]:
        """Whether it is what is claimed, as far as that can be told, and what there is to say.

        The samples are those that the claim was made on, so the interval of the claim is no excuse; but another processor's int8 may round,
        or saturate, otherwise.
        """
        another = [f"another job: {self.other} differ{'s' if self.other == 'version' else ''}"] if self.other else []
        why_not = self.why_not
        if not why_not and claimed.quality is None:
            why_not = "none is claimed"
        if not why_not and self.split != claimed.split:
            why_not = f"it is claimed on {claimed.split or 'no split'}, and the job is judged on {self.split or 'no split'}"
        if not why_not and self.other:
            why_not = "it is claimed for another job"
        if why_not:
            return True, [*another, f"quality was not compared: {why_not}"]
        assert self.value is not None and claimed.quality is not None
        if abs(self.value - claimed.quality) <= max(_SAME_QUALITY * abs(claimed.quality), self.grain + 1e-12):
            return True, []
        says = f"its quality{f' on {self.split}' if self.split else ''} is {self.value:.4f}, {claimed.quality:.4f} is claimed"
        if self.again is not None and self.again != self.value:
            return True, [f"{says}: reported and not judged, since a second call of `evaluate` gave {self.again:.4f}"]
        low, high = claimed.quality_interval or (claimed.quality, claimed.quality)
        if not is_same_machine and low <= self.value <= high:
            return True, [f"{says}: on another machine, and within the claimed interval, {low:.4f} to {high:.4f}"]
        return False, [says]


def _quality(artifact: Artifact, probe: Probe, job: Workload | None, events: Events) -> _Quality:
    """The quality on the job's judged split, by its metric or `evaluate`; without labels against the original's outputs in torch."""
    from planish.workbench import outputs_of, predictor

    if job is None:
        return _Quality(None, "", "", "no job was given")
    if artifact.measurements["optimized"].quality is None:  # the job's model may be larger than memory (`planish shrink`)
        return _Quality(None, "", "", "none is claimed")
    events.stage("computing quality")
    metric = job.metric_object(artifact.signature)
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        data = job.materialize(Path(folder))
        name, split = data.judged
        made_from, given = artifact.manifest.job, job.fingerprint(data)
        other = ", ".join(part for part in sorted(made_from) if made_from[part] != given.get(part))
        if job.evaluate is not None:
            found = job.evaluated(predictor(probe), artifact.plan.seed)
            is_claimed = found == artifact.measurements["optimized"].quality
            return _Quality(found, EVALUATE, other, again=None if is_claimed else job.evaluated(predictor(probe), artifact.plan.seed))
        if split is None:
            return _Quality(None, "", other, "the job has no data to judge it on")
        outputs = outputs_of(probe, split)
        grain = 0.0
        if metric.per_sample and metric.low is not None and metric.high is not None:
            grain = 2 * (metric.high - metric.low) / split.n
        found = float(metric.score(outputs, split.targets if metric.needs_labels else _original(job, split)))
        return _Quality(found, name, other, grain=grain)


def _original(job: Workload, split: Split) -> list[Any]:
    """The flat outputs of the job's own model on a split."""
    from planish.graph.capture import capture
    from planish.workbench import module_outputs

    return module_outputs(capture(job.model_module(), job.example_inputs, job.state or None), split)


class BenchRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model of a comparison.

    Args:
        name: "original" or the artifact's path; target: where it ran; threads: of one call, those that suit the original best there, and
            the artifact's own.
        latency_s, cpu_s: of one call; ratio: its latency ÷ that of the original's quickest runtime, paired.
        size_bytes: on disk.
        quality: on the judged split, where there is one and a metric with labels.
        outcome: "measured", or why it was not.
    """

    name: str
    target: str
    threads: int | None = None
    latency_s: Estimate | None = None
    cpu_s: Estimate | None = None
    ratio: Estimate | None = None
    size_bytes: int | None = None
    quality: float | None = None
    outcome: str = "measured"

    def to_json(self) -> dict[str, Any]:
        """A row of `bench --json`."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def bench(
    job: Workload,
    paths: Sequence[str | Path] = (),
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    events: Events | None = None,
) -> list[BenchRow]:
    """The original in every installed runtime, and in eager torch, and any number of artifacts, interleaved in one run.

    Args:
        job: the original and its data.
        paths: artifacts made from it.
        threads: of one call, at most: the original in each runtime has one, half or all of them, whichever is quickest (in eager torch
            all), and an artifact what `planish.load` gives it. All usable cores by default, and an artifact's own number.
        seconds: of counted time for each row.
        events: is told of the progress.

    Returns:
        A row each, the original's runtimes first; ratios are to the quickest of those.
    """
    from planish.clock import Clock
    from planish.workbench import outputs_of, prepare, targets_for

    events = events or Silent()
    count = threads or usable_cores()
    artifacts = [open_artifact(path) for path in paths]
    if shrunk := [artifact for artifact in artifacts if SHRUNK in artifact.manifest.files]:
        raise UsageError(
            f"artifacts: {shrunk[0].path} is of `planish shrink`, whose original need not fit into memory and is not in the job; "
            "`planish verify` measures it alone"
        )
    rows: list[BenchRow] = []
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        clock = Clock(None, events)
        with prepare(job, targets_for("cpu", count), (), Path(folder), 0, events, clock, compiled=False) as stand:
            name, split = stand.judged
            signature = stand.graph.signature
            probes: dict[str, Probe] = {}
            sizes: dict[str, int] = {}
            for baseline in (*stand.baselines.values(), *stand.eager.values()):
                is_eager = baseline.target.runtime in stand.eager
                found = {baseline.target: baseline.living_probe(signature)} if is_eager else baseline.living_probes(signature)
                for target, probe in found.items():
                    probes[f"original {target.name} {target.threads}"] = probe
                    sizes[f"original {target.name} {target.threads}"] = size_bytes(baseline.path)
            opened: list[Probe] = []
            try:
                for artifact in artifacts:
                    try:
                        probe = Probe.open(artifact.manifest.target_with(threads), artifact.model_path, artifact.signature)
                    except RuntimeFailed as err:
                        rows.append(BenchRow(name=str(artifact.path), target=artifact.manifest.target.name, outcome=str(err)))
                        continue
                    opened.append(probe)
                    probes[str(artifact.path)] = probe
                    sizes[str(artifact.path)] = size_bytes(artifact.model_path)
                events.stage("measuring in turn")
                timings = interleaved(
                    probes, stand.example, seconds=seconds, progress=lambda share: events.progress(round(share * 100), 100)
                )
                originals = sorted((key for key in probes if key.startswith("original ")), key=lambda key: timings[key].latency_s.median)
                best, metric = originals[0], stand.metric
                slower = {
                    key for i, key in enumerate(originals) if probes[key].target.name in {probes[k].target.name for k in originals[:i]}
                }
                measured = []
                for key, probe in probes.items():
                    if key in slower:
                        continue
                    quality = None
                    if split is not None and metric.needs_labels:
                        events.stage(f"quality on {name}")
                        quality = float(metric.score(outputs_of(probe, split), split.targets))
                    measured.append(_row(key, probe, timings, best, sizes[key], quality))
                return measured + rows
            finally:
                for probe in opened:
                    probe.close()


def _row(key: str, probe: Probe, timings: dict[str, Timing], best: str, size: int, quality: float | None) -> BenchRow:
    timing = timings[key]
    name = "original" if key.startswith("original ") else key
    return BenchRow(
        name=name,
        target=probe.target.name,
        threads=probe.target.threads,
        latency_s=timing.latency_s,
        cpu_s=timing.cpu_s,
        ratio=ratio(timing, timings[best]),
        size_bytes=size,
        quality=quality,
    )
