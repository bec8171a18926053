"""What was measured, where, and how surely: estimates, measurements and the ways in which a trial can end."""

from __future__ import annotations

from typing import Literal

import msgspec

OutcomeKind = Literal[
    "measured", "over budget", "quality lost", "mismatch", "unsupported", "diverged", "out of memory", "timed out", "crashed", "lost"
]


class Estimate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure that varies: its median and the 95 % interval of that median, over `n` repeats.

    `trustworthy` is False where the machine was too noisy for the interval to decide anything.
    """

    median: float
    low: float
    high: float
    n: int
    trustworthy: bool = True

    def __float__(self) -> float:
        return self.median


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine that a figure belongs to; `fingerprint` says whether two figures may be compared."""

    processor: str
    isa: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    fingerprint: str


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime really executed, read back from it.

    Args:
        device: the device that ran ("CPU").
        kernels: kernel or operator type -> how many of the executed graph.
        precisions: executed precision ("f32", "i8", "bf16", ...) -> how many kernels.
        int8_kernels: how many compute kernels (convolution, matmul, recurrent) ran in int8.
        float_kernels: how many compute kernels ran in floating point.
    """

    device: str
    kernels: dict[str, int]
    precisions: dict[str, int]
    int8_kernels: int
    float_kernels: int


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One exported model, measured in its runtime in a child process.

    Args:
        runtime: "onnxruntime:cpu" with its version in `versions`.
        machine: where it was measured.
        threads: threads of one call.
        batch: samples in the call that `latency_s` times.
        latency_s: wall seconds of one call.
        cpu_s: process CPU seconds of one call.
        size_bytes: bytes of the runtime model on disk.
        peak_memory_bytes: peak resident bytes of a fresh process that ran it, less what the bare runtime takes; None: not measured.
        macs: multiply-accumulates of one call at `batch` samples, of the graph that was exported.
        quality: the metric on the split named in `split`, from the artifact's own outputs; None where there is no data.
        quality_interval: 95 % bootstrap interval of `quality`.
        split: "test", "validation", or "" without quality.
        sqnr_db: exported outputs against the module's own; None where it was not compared.
        proof: what the runtime executed.
        roofline_s: the least seconds that the machine's arithmetic and memory allow for this graph.
        versions: package -> version that the figure depends on.
        warm_up: calls that were made before counting.
    """

    runtime: str
    machine: Machine
    threads: int
    batch: int
    latency_s: Estimate
    cpu_s: Estimate
    size_bytes: int
    peak_memory_bytes: int | None
    macs: int
    quality: float | None = None
    quality_interval: tuple[float, float] | None = None
    split: str = ""
    sqnr_db: float | None = None
    proof: Proof | None = None
    roofline_s: float | None = None
    versions: dict[str, str] = {}
    warm_up: int = 0


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a trial ended, in one word, and why in one sentence. An expected failure is this value, never an exception."""

    kind: OutcomeKind
    detail: str = ""
