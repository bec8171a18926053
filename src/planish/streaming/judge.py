"""What streamed past, judged: its artifact run in a process of its own, timed, and compared with the original's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planish.artifact.deployed import LEAST_SQNR_DB, sqnr_db
from planish.data import Split
from planish.errors import RuntimeFailed
from planish.events import Events
from planish.measure.latency import Timing, interleaved
from planish.measure.machine import machine
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.probe import Probe
from planish.measurement import Measurement, Proof
from planish.metrics import get_metric
from planish.runtimes.contract import Array, get_runtime
from planish.signature import Signature
from planish.streaming.stream import Streamed
from planish.target import Target
from planish.workbench import outputs_of

_METRICS = ("cosine", "agreement")
_SECONDS = 2.0
"""Of counted time, for the latency."""


@dataclass(frozen=True)
class Judged:
    """What is known of the artifact.

    Args:
        scores: by metric, its first output against the original's for the samples that were held out; empty without any.
        streamed_scores: the same of what PyTorch computed with the new weights while they went past.
        noise_db: the artifact against that, the worst batch; None without any, or where they are equal.
        example: its outputs for the example.
        timing: of a call with the example.
        proof: what was executed. peak_memory_bytes: as in `Measurement`.
    """

    scores: dict[str, float]
    streamed_scores: dict[str, float]
    noise_db: float | None
    example: list[Array]
    timing: Timing
    proof: Proof
    peak_memory_bytes: int

    def measurement(self, target: Target, batch: int, macs: int, model: Path) -> Measurement:
        """For the manifest."""
        return Measurement(
            runtime=target.name,
            machine=machine(),
            threads=target.threads,
            batch=batch,
            latency_s=self.timing.latency_s,
            cpu_s=self.timing.cpu_s,
            size_bytes=size_bytes(model),
            peak_memory_bytes=self.peak_memory_bytes,
            macs=macs,
            sqnr_db=self.noise_db,
            proof=self.proof,
            versions=get_runtime(target.runtime).versions(),
            warm_up=self.timing.warm_up,
        )


def judge(
    target: Target, model: Path, signature: Signature, example: list[Array], held_out: Split, streamed: Streamed, events: Events
) -> Judged:
    """Run, time and compare an artifact.

    Args:
        target: where; model: the artifact's; signature: what goes in.
        example: that is timed.
        held_out: the samples of `streamed`.

    Raises:
        RuntimeFailed: the runtime refuses it or crashes; or ("mismatch") it computes something else than what streamed past.
    """
    events.stage("running the artifact")
    with Probe.open(target, model, signature) as probe:
        outputs = _split(outputs_of(probe, held_out)[0], streamed.original) if held_out.n else []
        noise = min((sqnr_db(wanted, got) for wanted, got in zip(streamed.shrunk, outputs, strict=True)), default=math.inf)
        if noise < LEAST_SQNR_DB:
            raise RuntimeFailed(
                "mismatch", f"its outputs agree to {noise:.0f} dB only with what PyTorch computed ({LEAST_SQNR_DB:.0f} are needed)"
            )
        events.stage("measuring")
        kept = [np.array(array) for array in probe.outputs(example)]
        timing = interleaved({"artifact": probe}, example, seconds=_SECONDS)["artifact"]
        proof = probe.proof()
    return Judged(
        scores=_scores(outputs, streamed.original),
        streamed_scores=_scores(streamed.shrunk, streamed.original),
        noise_db=noise if math.isfinite(noise) else None,
        example=kept,
        timing=timing,
        proof=proof,
        peak_memory_bytes=peak_memory_bytes(target, model, signature, example),
    )


def _split(outputs: NDArray[np.float32], like: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Outputs in batches as long as others."""
    return np.split(outputs, np.cumsum([len(batch) for batch in like])[:-1])


def _scores(found: list[NDArray[np.float32]], reference: list[NDArray[np.float32]]) -> dict[str, float]:
    """The metrics without labels, over all positions of all batches, one batch in memory at a time; nothing without any."""
    sums = dict.fromkeys(_METRICS, 0.0)
    count = 0
    for one, other in zip(found, reference, strict=True):
        masked = np.isinf(one) & (one == other)  # equal, and no direction
        rows = [np.where(masked, 0, values).reshape(-1, values.shape[-1]) for values in (one, other)]
        count += len(rows[0])
        for metric in _METRICS:
            sums[metric] += len(rows[0]) * float(get_metric(metric).score([rows[0]], [rows[1]]))
    return {metric: total / count for metric, total in sums.items()} if count else {}
