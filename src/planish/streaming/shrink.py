"""A Transformer larger than memory made smaller: block after block, its weights read, pruned, rounded and written before the next are read."""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from planish import registry
from planish.data import Data, Split
from planish.errors import DataError, UsageError
from planish.events import Events, Silent
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.moments import Moments
from planish.graph.parts import Parts, is_parameter, parts_of
from planish.graph.replay import Replay
from planish.metrics import get_metric
from planish.quantize.arithmetic import Grid, GroupQuantizer
from planish.quantize.contract import Layer, Rounding, Scheme, group_size
from planish.quantize.local import group_quantizer
from planish.runtimes.onnx_schemes import packed_groups
from planish.streaming.hollow import built, stored_names
from planish.streaming.onnx_file import Grouped, write_onnx
from planish.streaming.pieces import Pieces
from planish.streaming.segments import Segment, segments
from planish.streaming.units import Hidden, hidden_units, refitted, survivors
from planish.streaming.values import Values
from planish.streaming.weights import Weights
from planish.workload import Workload

MODEL, TENSORS, ACCOUNT = "model.onnx", "model.onnx.data", "shrunk.json"
_BATCH = 8
_HELD_OUT = 8  # one of so many calibration samples is held out, to judge by
_MOST_ROWS = 65536


@dataclass(frozen=True)
class OperatorLoss:
    """What rounding (and pruning) left of one operator.

    Args:
        name: of its weight.
        inputs, outputs: sizes of the matrix that is written.
        error: E|(w - w') x|^2 over E|w x|^2, on the calibration samples as the operators before give them.
    """

    name: str
    inputs: int
    outputs: int
    error: float


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
        cosine: mean cosine similarity of the first output with the original's, along its last axis; None where nothing was held out.
        agreement: share of equal argmax there.
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
        rounding: "gptq" or "nearest".
        prune: share of the hidden units that leaves each feed-forward layer.
        observer: chooses the scales.
        seed: of the positions that are drawn where there are more than 65,536.
        overwrite: replace a folder that is there.
        events: what the progress is told to.

    Returns:
        The account, which `shrunk.json` holds too. The folder is there when all of it is, and not before.

    Raises:
        UsageError: an argument that is none of these, weights that do not fit the model, or a folder that is there.
        DataError: files that are no safetensors, tensors or samples that are not finite.
        CaptureError: the model cannot be traced.

    References: Frantar et al., GPTQ, 2023; Kurtic et al., ZipLM, 2023.
    """
    began, before = time.monotonic(), _resident()
    chosen, method = _settings(scheme, rounding, prune)
    out = Path(out) if out is not None else Path(f"{job.name}.shrunk")
    if out.exists() and not overwrite:
        raise UsageError(f"out: {out} is there already; remove it, choose another, or say overwrite")
    said = events or Silent()
    said.stage("capturing the model")
    source = Weights(weights)
    graph = capture(built(job.model, source), job.example_inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        stream = _Stream(graph, source, job.materialize(work / "data"), work, chosen, method, prune, observer, seed)
        with torch.no_grad():
            found = stream.run(said)
        folder = work / "out"
        account = Shrunk(
            path=out,
            bytes_before=source.nbytes,
            bytes_after=sum(file.stat().st_size for file in folder.iterdir()),
            peak_memory_bytes=_peak(),
            memory_before_bytes=before,
            seconds=time.monotonic() - began,
            **found,
        )
        (folder / ACCOUNT).write_text(json.dumps(account.to_json(), indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return account


def _settings(scheme: str, rounding: str, prune: float) -> tuple[Scheme, Rounding]:
    chosen = cast(Scheme, registry.get("scheme", scheme))
    if chosen.activations != "float" or not chosen.group or chosen.codebook:
        raise UsageError(f"scheme: must keep weights by group: int4-weights or int8-weights; got {scheme!r}")
    method: Rounding = registry.get("rounding", rounding)()
    if method.needs - {"moments"}:
        raise UsageError(f"rounding: must be gptq or nearest where weights stream past; {rounding!r} needs {', '.join(method.needs)}")
    if not 0.0 <= prune < 1.0:
        raise UsageError(f"prune: must be at least 0 and below 1; got {prune}")
    return chosen, method


def _resident() -> int:
    """Bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    """The most bytes that the process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class _Waiting:
    """What is written once it is known which of its rows stay."""

    matrix: Tensor
    quantizer: GroupQuantizer | None  # None: a bias
    node: Node | None


@dataclass
class _Run:
    """One batch: its values, and whether they are those of the original's weights."""

    values: Values
    is_original: bool


@dataclass
class _Stream:
    """The state of a pass: the program, its values, and what was written."""

    graph: Graph
    weights: Weights
    data: Data
    work: Path
    scheme: Scheme
    method: Rounding
    share: float
    observer: str
    seed: int
    grouped: dict[Node, Grouped] = field(default_factory=dict)
    losses: list[OperatorLoss] = field(default_factory=list)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    waiting: dict[str, _Waiting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replay = Replay(self.graph.module)
        self.stored = stored_names(self.graph.module, self.weights)
        self.make = registry.get("observer", self.observer)
        self.generator = torch.Generator().manual_seed(self.seed)
        (self.work / "out").mkdir()
        self.pieces = Pieces(self.work / "out" / TENSORS)
        self.inputs, self.skipped = self._subjects()
        hidden: list[Hidden] = []
        if self.share:
            shapes = {name: value.shape for name, value in self.graph.module.named_parameters(remove_duplicate=False)}
            plain = {self._weight(node) for node in self.inputs if _parts(node).axis == 0}
            hidden = hidden_units(analyse(self.graph), plain, shapes)
            if not hidden:
                raise UsageError("prune: the model has no feed-forward layer whose units can leave while its weights stream past")
        self.hidden = {one.reader: one for one in hidden}
        self.made = {maker for one in hidden for maker in one.makers}

    def _weight(self, node: Node) -> str:
        weight = node.args[_parts(node).weight or 0]
        assert isinstance(weight, Node)
        return str(weight.target)

    def _subjects(self) -> tuple[dict[Node, Node], dict[str, str]]:
        """Operators whose weights are rounded -> what they multiply; and those that have a weight and stay in float -> why."""
        found: dict[Node, Node] = {}
        skipped: dict[str, str] = {}
        readers: dict[str, int] = {}
        for node in self.graph.module.graph.nodes:
            if node.op == "get_attr" and node.target in self.stored:
                readers[self.stored[str(node.target)]] = readers.get(self.stored[str(node.target)], 0) + len(node.users)
        for node in self.graph.module.graph.nodes:
            parts = parts_of(node) if node.op == "call_function" else ""
            if not isinstance(parts, Parts) or parts.weight is None:
                continue
            weight = node.args[parts.weight]
            if not (isinstance(weight, Node) and weight.op == "get_attr" and is_parameter(weight)):
                continue
            name = str(weight.target)
            if parts.kind != "linear" and not (parts.kind == "matmul" and parts.axis == 1):
                skipped[name] = f"{parts.kind} stays in float where weights stream past"
            elif readers[self.stored[name]] > 1:
                skipped[name] = "its weight is shared with another operator"
            else:
                source = node.args[parts.activations[0]]
                assert isinstance(source, Node)
                found[node] = source
        if not found:
            raise UsageError("model: it must have linear maps with weights of their own; it has none")
        return found, skipped

    def run(self, events: Events) -> dict[str, Any]:
        """All segments, then the model file; the fields of the account."""
        parts = segments(self.graph.module, self.inputs)
        calibration, judging = self._runs()
        events.stage("blocks")
        for number, segment in enumerate(parts):
            self._segment(segment, calibration, judging)
            events.progress(number + 1, len(parts))
        judged = self._judged(judging)
        events.stage("writing the model")
        written = {name: stored for name, stored in self.stored.items() if stored in self.pieces}
        write_onnx(self.graph, self.grouped, written, self.pieces, self.work / "out" / MODEL)
        return {"operators": tuple(self.losses), "skipped": self.skipped, "units": self.units, **judged}

    def _runs(self) -> tuple[list[_Run], list[_Run]]:
        """The batches that weights are fitted on, and those that are held out: of these one with the original's weights and one with the new."""
        split = self.data.calibration
        held = split.n // _HELD_OUT
        calibration = self._batches(split, 0, split.n - held, "calibration", False)
        return calibration, [
            *self._batches(split, split.n - held, split.n, "original", True),
            *self._batches(split, split.n - held, split.n, "shrunk", False),
        ]

    def _batches(self, split: Split, first: int, last: int, name: str, is_original: bool) -> list[_Run]:
        fixed = self.graph.signature.inputs[0].shape[0]
        size = fixed if isinstance(fixed, int) else _BATCH
        found = []
        for start in range(first, last - (last - first) % size if isinstance(fixed, int) else last, size):
            run = _Run(Values(self.work / f"{name}-{start}"), is_original)
            placeholders = [node for node in self.replay.nodes if node.op == "placeholder"]
            for node, array in zip(placeholders, split.inputs, strict=True):
                run.values.keep(node, torch.from_numpy(np.array(array[start : min(start + size, last)])))
            found.append(run)
        return found

    def _segment(self, segment: Segment, calibration: Sequence[_Run], judging: Sequence[_Run]) -> None:
        """Weights in, moments, rounded weights out, and every batch through."""
        original = {node: self._read(node) for node in segment.tensors}
        changed = dict(original)
        moments: dict[Node, Moments] = {}
        for node in segment.rounded:
            source = self.inputs[node]
            if source not in moments:
                moments = {source: self._moments(source, calibration)}  # those of the one before are no longer needed
            weight = node.args[_parts(node).weight or 0]
            assert isinstance(weight, Node)
            changed[weight] = self._rounded(node, original[weight], moments[source])
        moments.clear()
        for node, tensor in original.items():
            self._write_float(node, tensor)
        for run in (*calibration, *judging):
            environment: dict[Node, Any] = dict(original if run.is_original else changed)
            environment.update({node: run.values.read(node) for node in segment.takes})
            for node in segment.nodes:
                environment[node] = self.replay.value(node, environment)
            for node in segment.gives:
                run.values.keep(node, environment[node])
            for node in segment.ends:
                run.values.drop(node)

    def _read(self, node: Node) -> Tensor:
        name = str(node.target)
        if name in self.stored:
            return self.weights.read(self.stored[name])
        return cast(Tensor, self.replay.value(node, {}))

    def _moments(self, source: Node, runs: Sequence[_Run]) -> Moments:
        found: Moments | None = None
        rows = -(-_MOST_ROWS // len(runs))
        for run in runs:
            value = run.values.read(source).flatten(0, -2)
            if len(value) > rows:
                value = value[torch.randint(len(value), (rows,), generator=self.generator)]
            found = found or Moments(1, value.shape[1])
            found.add(value[None])
        assert found is not None
        if not bool(found.gram.isfinite().all()):
            raise DataError(f"calibration: {source.name} must be finite for every sample; it is not, in float32")
        return found

    def _rounded(self, node: Node, weight: Tensor, moments: Moments) -> Tensor:
        """What a weight becomes, in its own layout and size: columns of units that left are zeros there."""
        name, axis = self._weight(node), _parts(node).axis
        matrix = weight.t().contiguous() if axis else weight
        gram = moments.second(centered=False)[0][0]
        energy = float(((matrix.double() @ gram) * matrix).sum())
        kept = None
        if (hidden := self.hidden.get(name)) is not None:
            kept = survivors(hidden, matrix, moments, self.share)
            self.units[hidden.group.name] = (hidden.group.units, hidden.group.units if kept is None else len(kept))
            self._let_go(hidden, kept)
        dense = matrix
        if kept is not None:
            dense = refitted(matrix, gram, kept)
            at = torch.from_numpy(kept)
            inner = gram[at][:, at]
        else:
            inner = gram
        rounded, quantizer = self._on_grid(dense, inner)
        whole = torch.zeros_like(matrix) if kept is not None else rounded
        if kept is not None:
            whole[:, torch.from_numpy(kept)] = rounded
        gone = (matrix - whole).double()
        self.losses.append(OperatorLoss(name, dense.shape[1], dense.shape[0], float(((gone @ gram) * gone).sum()) / max(energy, 1e-30)))
        if name in self.made:
            self.waiting[name] = _Waiting(rounded, quantizer, node)
        else:
            self._write(node, name, rounded, quantizer)
        return whole.t() if axis else whole

    def _on_grid(self, matrix: Tensor, gram: Tensor) -> tuple[Tensor, GroupQuantizer]:
        grid = Grid(0, 2**self.scheme.weight_bits - 1)

        def scales(values: Tensor, group: int) -> GroupQuantizer:
            return group_quantizer(values, grid, group, self.make)

        group = group_size(self.scheme.group, matrix.shape[1])
        quantizer = scales(matrix, group)
        if "moments" not in self.method.needs:
            return quantizer.rounded(matrix), quantizer
        layer = Layer(matrix, quantizer, gram[None], lambda values: scales(values, group))
        (found,) = self.method.rounded([layer], None, self.generator)
        return found.weight, found.quantizer

    def _let_go(self, hidden: Hidden, kept: Any) -> None:
        """Writes what made the units of a layer, without the rows of those that left."""
        for maker in hidden.makers:
            waiting = self.waiting.pop(maker)
            rows = slice(None) if kept is None else torch.from_numpy(kept)
            if waiting.quantizer is None or waiting.node is None:
                self.pieces.add(self.stored[maker], waiting.matrix[rows])
                continue
            of = waiting.quantizer
            self._write(waiting.node, maker, waiting.matrix[rows], GroupQuantizer(of.grid, of.group, of.scale[rows], of.zero_point[rows]))

    def _write(self, node: Node, name: str, matrix: Tensor, quantizer: GroupQuantizer) -> None:
        grid = quantizer.grid
        for what, tensor in packed_groups(matrix, quantizer.scale, quantizer.zero_point, quantizer.group, grid.low, grid.high).items():
            self.pieces.add(f"{name}.{what}", tensor)
        self.grouped[node] = Grouped(name, len(matrix), matrix.shape[1], self.scheme.weight_bits, quantizer.group)

    def _write_float(self, node: Node, tensor: Tensor) -> None:
        """A parameter that stays in float, once."""
        name = str(node.target)
        if name not in self.stored or self.stored[name] in self.pieces or any(user in self.inputs and self._weight(user) == name for user in node.users):
            return
        if name in self.made:
            self.waiting[name] = _Waiting(tensor, None, None)
        else:
            self.pieces.add(self.stored[name], tensor)

    def _judged(self, judging: Sequence[_Run]) -> dict[str, Any]:
        (output,) = (node for node in self.replay.nodes if node.op == "output")
        first = output.args[0][0]  # type: ignore[index]
        half = len(judging) // 2
        before, after = ([run.values.read(first).numpy() for run in runs] for runs in (judging[:half], judging[half:]))
        held = sum(len(values) for values in before)
        if not held:
            return {"held_out": 0, "cosine": None, "agreement": None}
        sides = [np.concatenate(values) for values in (before, after)]
        flat = [side.reshape(-1, side.shape[-1]) for side in sides]
        score: Callable[[str], float] = lambda name: get_metric(name).score([flat[1]], [flat[0]])
        return {"held_out": held, "cosine": score("cosine"), "agreement": score("agreement")}


def _parts(node: Node) -> Parts:
    parts = parts_of(node)
    assert isinstance(parts, Parts), parts
    return parts
