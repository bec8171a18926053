"""A Transformer larger than memory made smaller: block after block, its weights read, pruned, rounded and written before the next are read."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch

from planish import registry
from planish.artifact import check_output, write
from planish.artifact.manifest import SHRUNK
from planish.data import Split
from planish.errors import PlanishError, RuntimeFailed, UsageError
from planish.events import Events, Silent
from planish.graph.capture import capture
from planish.measure.machine import facts, usable_cores
from planish.measure.memory import size_bytes
from planish.measure.resident import peak_resident_bytes, resident_bytes
from planish.measurement import Estimate
from planish.plan import DEFAULT_SALIENCY, Plan
from planish.quantize.contract import Rounding, Scheme
from planish.runtimes.contract import get_runtime
from planish.streaming.hollow import built
from planish.streaming.judge import judge
from planish.streaming.stream import HELD_OUT, MODEL, OperatorLoss, Stream
from planish.streaming.weights import Weights
from planish.target import Target
from planish.workload import Workload


@dataclass(frozen=True)
class Shrunk:
    """What was written, and how near it is.

    Args:
        path: of the artifact, which `planish.load` and `planish verify` take as any other; this account lies in it as `shrunk.json`.
        bytes_before: of the weights in the files that were read. bytes_after: of what was written.
        operators: in the order of the program.
        skipped: operators with a weight that stays in float -> why.
        units: hidden units that stayed in each feed-forward layer -> (before, after); empty without pruning.
        held_out: calibration samples that nothing was fitted on; the figures behind are theirs.
        cosine: mean cosine similarity of the artifact's first output, in ONNX Runtime, with the original's, along its last axis; None
            where nothing was held out. agreement: share of equal argmax there.
        streamed_cosine: the same of what PyTorch computed while the weights went past.
        latency_s: of one call of the artifact with the job's example, on `threads` threads. The original, which need not fit, is not run.
        peak_memory_bytes: most that the process held, with everything else that it holds; memory_before_bytes: when it began.
        seconds: the whole call.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    operators: tuple[OperatorLoss, ...]
    skipped: Mapping[str, str]
    units: Mapping[str, tuple[int, int]]
    held_out: int
    cosine: float | None
    agreement: float | None
    streamed_cosine: float | None
    latency_s: Estimate
    threads: int
    peak_memory_bytes: int
    memory_before_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = msgspec.to_builtins(self, enc_hook=str)
        return found


def shrink(
    job: Workload,
    weights: str | Path,
    out: str | Path | None = None,
    *,
    scheme: str = "int4-weights",
    rounding: str = "gptq",
    prune: float = 0.0,
    observer: str = "mse",
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    events: Events | None = None,
) -> Shrunk:
    """Round the weights of a model that does not fit into memory, and prune its feed-forward layers, one part after the other.

    The program is captured without weights, and cut where a weight is to be rounded. Each part then reads its weights, takes the second
    moments of what they multiply (as the parts before give it, which are rounded by then), lets hidden units leave and the rest make
    up for them, rounds, writes, and runs for all samples; their values wait in memory-mapped files for the next part. Memory holds
    the weights of one part, and the moments of its widest input in double precision.

    Args:
        job: `model` is a function that builds the net (with random weights, which are dropped as they are made), or the net on the meta
            device; `calibration` are the samples. Metric and labels are not used.
        weights: a safetensors file, or a folder of them, whose names are those of the model's parameters.
        out: the artifact to write; `NAME.shrunk` by default.
        scheme: "int4-weights" or "int8-weights".
        rounding: "gptq", "adaround" or "nearest".
        prune: share of the hidden units that leaves each feed-forward layer.
        observer: chooses the scales.
        seed: of the positions that are drawn where there are more than 65,536.
        threads: of one call of the artifact; all usable cores by default.
        overwrite: replace an artifact that is there.
        events: what the progress is told to.

    Returns:
        The account. The artifact is there when all of it is, and not before.

    Raises:
        UsageError: an argument that is none of these, weights that do not fit the model, or a folder that is there.
        DataError: files that are no safetensors, tensors or samples that are not finite.
        CaptureError: the model cannot be traced. MissingPackage: ONNX Runtime is not installed.
        RuntimeFailed: what was made could not run here; it is left beside `out`, under the name that the message gives.

    References: Frantar et al., GPTQ, 2023; Kurtic et al., ZipLM, 2023.
    """
    began, before = time.monotonic(), resident_bytes()
    chosen, method = _settings(scheme, rounding, prune)
    out = Path(out) if out is not None else Path(f"{job.name}.shrunk")
    _check_out(out, Path(weights), overwrite)
    target = Target("onnxruntime", threads=threads or usable_cores(), facts=facts())
    get_runtime(target.runtime)  # whether it is there, before the work
    said = events or Silent()
    said.stage("capturing the model")
    source = Weights(weights)
    graph = capture(built(job.model, source), job.example_inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        calibration = job.materialize(work / "data").calibration
        if calibration.n < HELD_OUT:
            said.say(
                f"calibration: {calibration.n} sample{'' if calibration.n == 1 else 's'} to fit weights on, and none held out to judge them by; "
                "give `calibration` a hundred or more"
            )
        stream = Stream(graph, source, calibration, work, chosen, method, prune, observer, seed)
        signature = graph.signature
        with torch.no_grad():
            streamed = stream.run(said)
        model = work / "out" / MODEL
        example = [np.ascontiguousarray(value.numpy()) for value in job.flatten(job.example_inputs)]
        held_out = Split([array[streamed.samples] for array in calibration.inputs], None, streamed.held_out)
        with _set_aside(model.parent, out, said):
            judged = judge(target, model, signature, example, held_out, streamed, said)
            account = Shrunk(
                path=out,
                bytes_before=source.nbytes,
                bytes_after=size_bytes(model),
                operators=tuple(stream.losses.values()),
                skipped=stream.skipped,
                units=stream.units,
                held_out=streamed.held_out,
                cosine=judged.scores.get("cosine"),
                agreement=judged.scores.get("agreement"),
                streamed_cosine=judged.streamed_scores.get("cosine"),
                latency_s=judged.timing.latency_s,
                threads=target.threads,
                peak_memory_bytes=peak_resident_bytes(),
                memory_before_bytes=before,
                seconds=time.monotonic() - began,
            )
            (model.parent / SHRUNK).write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
            plan = Plan(
                target.name,
                widths=stream.widths,
                precisions=stream.precisions,
                saliency="obs" if prune else DEFAULT_SALIENCY,
                observer=observer,
                rounding=rounding,
                seed=seed,
            )
            write(
                out,
                name=job.name,
                model=model,
                plan=plan,
                signature=signature,
                target=target,
                measurements={"optimized": judged.measurement(target, len(example[0]), stream.macs_left, model)},
                weights=None,
                files=[file for file in model.parent.iterdir() if file != model],
                moves=True,
                check=(example, judged.example),
                notes=(_note(account),),
                overwrite=overwrite,
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return account


def _note(account: Shrunk) -> str:
    """What a user of the artifact should know."""
    judged = (
        "nothing was held out to judge it by"
        if account.cosine is None
        else f"cosine {account.cosine:.4f} and agreement {account.agreement:.4f} with the original's outputs, on {account.held_out} samples"
    )
    return f"made by `planish shrink`, of weights that went past part by part: {judged}; the original was not timed; see {SHRUNK}"


@contextlib.contextmanager
def _set_aside(folder: Path, out: Path, events: Events) -> Iterator[None]:
    """What was made, moved beside the place where the artifact would be if anything fails within: hours of work are not thrown away.

    Raises:
        RuntimeFailed: what failed, and where it is now.
    """
    try:
        yield
    except BaseException as error:
        number = 1
        while (aside := out.with_name(f"{out.name}.unrun{number}")).exists():
            number += 1
        folder.rename(aside)
        if isinstance(error, (PlanishError, OSError)):
            kind = getattr(error, "kind", "crashed")
            raise RuntimeFailed(kind, f"what was made cannot be used here: {error}; it is in {aside}") from error
        events.say(f"what was made is in {aside}")
        raise


def _check_out(out: Path, weights: Path, overwrite: bool) -> None:
    """Refuse a place that holds what is no artifact, or what must be read."""
    if weights.exists() and weights.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"out: {out} holds the weights; choose another")
    check_output(out, overwrite)


def _settings(scheme: str, rounding: str, prune: float) -> tuple[Scheme, Rounding]:
    chosen = cast(Scheme, registry.get("scheme", scheme))
    if chosen.activations != "float" or not chosen.group or chosen.codebook:
        raise UsageError(f"scheme: must keep weights by group: int4-weights or int8-weights; got {scheme!r}")
    method: Rounding = registry.get("rounding", rounding)()
    if method.needs - {"moments"}:
        raise UsageError(
            f"rounding: must be gptq, adaround or nearest where weights stream past; {rounding!r} needs {', '.join(method.needs)}"
        )
    if not 0.0 <= prune < 1.0:
        raise UsageError(f"prune: must be at least 0 and below 1; got {prune}")
    return chosen, method
