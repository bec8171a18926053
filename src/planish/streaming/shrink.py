"""A Transformer larger than memory made smaller: block after block, its weights read, pruned, rounded and written before the next are read."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from planish import registry
from planish.data import Split
from planish.errors import RuntimeFailed, UsageError
from planish.events import Events, Silent
from planish.graph.capture import capture
from planish.measure.machine import facts
from planish.measure.probe import Probe
from planish.measure.resident import peak_resident_bytes, resident_bytes
from planish.metrics import get_metric
from planish.quantize.contract import Rounding, Scheme
from planish.signature import Signature
from planish.streaming.hollow import built
from planish.streaming.stream import MODEL, OperatorLoss, Stream
from planish.streaming.weights import Weights
from planish.target import Target
from planish.workbench import outputs_of
from planish.workload import Workload

ACCOUNT = "shrunk.json"


@dataclass(frozen=True)
class Shrunk:
    """What was written, and how near it is.

    Args:
        path: of the folder: `model.onnx`, its tensors in `model.onnx.data`, and this account in `shrunk.json`.
        bytes_before: of the weights in the files that were read. bytes_after: of what was written.
        operators: in the order of the program.
        skipped: operators with a weight that stays in float -> why.
        units: hidden units that stayed in each feed-forward layer -> (before, after); empty without pruning.
        held_out: calibration samples that nothing was fitted on; the figures behind are theirs.
        cosine: mean cosine similarity of the artifact's first output, in ONNX Runtime, with the original's, along its last axis; None
            where nothing was held out, or where it could not run. agreement: share of equal argmax there.
        streamed_cosine: the same of what PyTorch computed while the weights went past.
        note: why the artifact could not run here, or "".
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
    note: str
    peak_memory_bytes: int
    memory_before_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "path": str(self.path)}


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
        out: the folder to write; `NAME.shrunk` by default.
        scheme: "int4-weights" or "int8-weights".
        rounding: "gptq", "adaround" or "nearest".
        prune: share of the hidden units that leaves each feed-forward layer.
        observer: chooses the scales.
        seed: of the positions that are drawn where there are more than 65,536.
        overwrite: replace a folder that is there, if an earlier call wrote it.
        events: what the progress is told to.

    Returns:
        The account, which `shrunk.json` holds too. The folder is there when all of it is, and not before.

    Raises:
        UsageError: an argument that is none of these, weights that do not fit the model, or a folder that is there.
        DataError: files that are no safetensors, tensors or samples that are not finite.
        CaptureError: the model cannot be traced.

    References: Frantar et al., GPTQ, 2023; Kurtic et al., ZipLM, 2023.
    """
    began, before = time.monotonic(), resident_bytes()
    chosen, method = _settings(scheme, rounding, prune)
    out = Path(out) if out is not None else Path(f"{job.name}.shrunk")
    _check_out(out, Path(weights), overwrite)
    said = events or Silent()
    said.stage("capturing the model")
    source = Weights(weights)
    graph = capture(built(job.model, source), job.example_inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        calibration = job.materialize(work / "data").calibration
        stream = Stream(graph, source, calibration, work, chosen, method, prune, observer, seed)
        signature = graph.signature
        with torch.no_grad():
            streamed = stream.run(said)
        folder = work / "out"
        held = 0 if streamed.original is None else len(streamed.original)
        cosine, agreement, note = None, None, ""
        if streamed.original is not None:
            said.stage("running the artifact")
            try:
                outputs = _outputs(folder / MODEL, signature, calibration, streamed.samples)
                cosine, agreement = (_score(name, outputs, streamed.original) for name in ("cosine", "agreement"))
            except (RuntimeFailed, OSError) as error:
                note = f"the artifact could not run here, so that nothing is known of its outputs: {error}"
        account = Shrunk(
            path=out,
            bytes_before=source.nbytes,
            bytes_after=sum(file.stat().st_size for file in folder.iterdir()),
            operators=tuple(stream.losses.values()),
            skipped=stream.skipped,
            units=stream.units,
            held_out=held,
            cosine=cosine,
            agreement=agreement,
            streamed_cosine=None if streamed.original is None else _score("cosine", streamed.shrunk, streamed.original),
            note=note,
            peak_memory_bytes=peak_resident_bytes(),
            memory_before_bytes=before,
            seconds=time.monotonic() - began,
        )
        (folder / ACCOUNT).write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
        if out.exists():
            _check_out(out, Path(weights), overwrite)
            out.rename(work / "replaced")
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return account


def _check_out(out: Path, weights: Path, overwrite: bool) -> None:
    """Refuse a place that holds what was not written by an earlier call, or what must be read."""
    if weights.exists() and weights.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"out: {out} holds the weights; choose another")
    if out.is_symlink() or (out.exists() and not (out / ACCOUNT).is_file()):
        raise UsageError(f"out: {out} is there and is no folder with {ACCOUNT}, so that it is not replaced; choose another")
    if out.exists() and not overwrite:
        raise UsageError(f"out: {out} is there already; remove it, choose another, or give --overwrite (overwrite=True)")


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


def _outputs(model: Path, signature: Signature, split: Split, samples: slice) -> NDArray[np.float32]:
    """The artifact's first output for some samples, from a process of its own."""
    probe = Probe.open(Target("onnxruntime", threads=1, facts=facts()), model, signature)
    try:
        return outputs_of(probe, Split([array[samples] for array in split.inputs], None, samples.stop - samples.start))[0]
    finally:
        probe.close()


def _score(metric: str, outputs: Any, reference: Any) -> float:
    """A metric without labels, over all positions."""
    one, other = (np.asarray(values).reshape(-1, values.shape[-1]) for values in (outputs, reference))
    return float(get_metric(metric).score([one], [other]))
