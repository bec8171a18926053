"""What was measured, where, and how surely: estimates, measurements, diagnoses and the ways in which a trial can end."""

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
        bit_operations: those, each times the bits of both of its factors; None: not counted.
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
    bit_operations: int | None = None
    quality: float | None = None
    quality_interval: tuple[float, float] | None = None
    split: str = ""
    sqnr_db: float | None = None
    proof: Proof | None = None
    roofline_s: float | None = None
    versions: dict[str, str] = {}
    warm_up: int = 0


class Sensitivity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one operator costs the outputs when it leaves fp32.

    Signal to quantization noise ratios are of the net's outputs against those in float, in dB within ±200 (more is better; 200: equal).

    Args:
        name, kind: as in the graph.
        scheme: what the plan has it compute in, or "fp32".
        tried: the scheme of the figures `with`: `scheme`, or what it would have where it stays in fp32.
        sqnr_alone_db: scheme -> with this operator alone in it.
        quality_alone: likewise, by the metric of the diagnosis.
        sqnr_with_db, quality_with: with the plan's others and this one in `tried`; None where there was no time.
        sqnr_without_db, quality_without: with the plan's others, and this one in fp32.
        clipped: the share of its activations outside the ranges that calibration gave them; None in schemes without such ranges.
    """

    name: str
    kind: str
    scheme: str
    tried: str
    sqnr_alone_db: dict[str, float] = {}
    quality_alone: dict[str, float] = {}
    sqnr_with_db: float | None = None
    sqnr_without_db: float | None = None
    quality_with: float | None = None
    quality_without: float | None = None
    clipped: float | None = None


class Diagnosis(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which operators lose what quantization loses: weights and activations rounded after training, without any recovery.

    Args:
        metric: of every quality here; "agreement" or "cosine" with the outputs in float where there are no labels.
        split: that it was measured on.
        samples: how many of it.
        quality: of the net in float.
        sqnr_db, quality_all: with all operators as planned.
        operators: the one that loses most in static int8 first.
        findings: sentences on what stands out.
    """

    metric: str
    split: str
    samples: int
    quality: float | None
    sqnr_db: float
    quality_all: float | None
    operators: tuple[Sensitivity, ...]
    findings: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a trial ended, in one word, and why in one sentence. An expected failure is this value, never an exception."""

    kind: OutcomeKind
    detail: str = ""
