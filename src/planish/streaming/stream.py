"""One pass over a program whose weights are read as they are needed, rounded, written and forgotten."""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish import registry
from planish.data import Split
from planish.errors import DataError, UsageError
from planish.events import Events
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.graph.moments import Moments
from planish.graph.parts import known_parts
from planish.graph.replay import Replay
from planish.quantize.arithmetic import Grid, GroupQuantizer, fake_quantize, int8_weights
from planish.quantize.contract import Layer, Rounding, Scheme, group_size
from planish.quantize.local import group_quantizer
from planish.quantize.schemes.int8_weights import INT8_WEIGHTS
from planish.runtimes.onnx_schemes import packed_groups
from planish.streaming.hollow import stored_names
from planish.streaming.onnx_file import Grouped, write_onnx
from planish.streaming.pieces import Pieces
from planish.streaming.segments import Segment, first_output, segments
from planish.streaming.subjects import check_first, is_reshaped, subjects, weight_of
from planish.streaming.units import Hidden, hidden_units, refitted, survivors, width_of
from planish.streaming.values import Values
from planish.streaming.weights import Weights

MODEL, TENSORS = "model.onnx", "model.onnx.data"
_BATCH = 8
HELD_OUT = 8  # one of so many calibration samples is held out, to judge by
_MOST_HELD_OUT = 32
_MOST_ROWS = 65536
_OUTPUT_BYTES = 2**25
"""Of an operator, at once."""
_ROWS = 1024
"""Of a matrix that are copied at a time: an embedding, or a head, has a hundred thousand and more."""


@dataclass(frozen=True)
class OperatorLoss:
    """What rounding (and pruning) left of one operator.

    Args:
        name: of the graph.
        inputs, outputs: sizes of the matrix that is written; of an embedding its rows and their width.
        error: E|(w - w') x|^2 over E|w x|^2, on the calibration samples as the operators before give them; of an embedding that of its rows.
    """

    name: str
    inputs: int
    outputs: int
    error: float


@dataclass(frozen=True)
class Streamed:
    """The first output for the samples that were held out, batch by batch, views of files: with the original's weights, and with the new."""

    original: list[NDArray[np.float32]]
    shrunk: list[NDArray[np.float32]]
    samples: slice
    """Which of the calibration samples."""

    @property
    def held_out(self) -> int:
        """How many those are."""
        return int(self.samples.stop - self.samples.start)


Role = Literal["calibration", "original", "shrunk"]
_JUDGED: tuple[Role, ...] = ("original", "shrunk")


@dataclass
class _Waiting:
    """What is written once it is known which of its rows stay."""

    matrix: Tensor
    quantizer: GroupQuantizer | None  # None: a bias
    node: Node | None


@dataclass
class _Run:
    """One batch: its values, and what it is for: to fit weights on, or to judge by, with the original's weights or with the new."""

    values: Values
    role: Role
    samples: int


@dataclass
class Stream:
    """The state of a pass: the program, its values, and what was written."""

    graph: Graph
    weights: Weights
    calibration: Split
    work: Path
    scheme: Scheme
    method: Rounding
    share: float
    observer: str
    seed: int
    grouped: dict[Node, Grouped] = field(default_factory=dict)
    rows: dict[Node, str] = field(default_factory=dict)
    losses: dict[str, OperatorLoss] = field(default_factory=dict)
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    waiting: dict[str, _Waiting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.replay = Replay(self.graph.module)
        self.stored = stored_names(self.graph.module, self.weights)
        self.make = registry.get("observer", self.observer)
        self.generator = torch.Generator().manual_seed(self.seed)
        (self.work / "out").mkdir()
        self.pieces = Pieces(self.work / "out" / TENSORS)
        analysis = analyse(self.graph)
        self.operators = {operator.node: name for name, operator in analysis.operators.items()}
        largest = max((math.prod(size.at({}) for size in operator.output) for operator in analysis.operators.values()), default=1)
        self.sample_bytes = 4 * largest // len(self.graph.example[0])
        check_first(self.graph)
        self.first = first_output(self.graph.module)
        found = subjects(self.graph.module, self.stored)
        self.inputs, self.embeddings = found.inputs, found.embeddings
        self.skipped = {self._name(node): reason for node, reason in found.skipped.items()}
        self.output = next(node for node in self.replay.nodes if node.op == "output")
        hidden: list[Hidden] = []
        if self.share:
            shapes = {name: value.shape for name, value in self.graph.module.named_parameters(remove_duplicate=False)}
            plain = {str(weight_of(node).target) for node in self.inputs if known_parts(node).axis == 0}
            fixed = {str(weight_of(node).target) for node in self.inputs if is_reshaped(node, self.inputs)}
            hidden = [one for one in hidden_units(analysis, plain, shapes) if one.reader not in fixed]
            if not hidden:
                raise UsageError("prune: the model has no feed-forward layer whose units can leave while its weights stream past")
            if all(width_of(one, self.share) >= one.group.units for one in hidden):
                widest = max(one.group.units for one in hidden)
                raise UsageError(f"prune: must take 32 units or more, which leave together; {self.share} of {widest} are fewer")
        self.hidden = {one.reader: one for one in hidden}
        self.macs = {group: macs(analysis, widths) for group, widths in self._narrowed(hidden)}
        del analysis
        gc.collect()  # it is as large as a block's weights, and has circles
        self.made = {maker for one in hidden for maker in one.makers}

    @property
    def widths(self) -> dict[str, int]:
        """Units that stay, by group, of the layers that some left."""
        return {name: kept for name, (units, kept) in self.units.items() if kept < units}

    @property
    def precisions(self) -> dict[str, str]:
        """The scheme of each operator whose weights were written in it."""
        grouped = {self.operators[node.name]: self.scheme.name for node in self.grouped}
        return grouped | {self.operators[node.name]: INT8_WEIGHTS.name for node in self.rows}

    def _narrowed(self, hidden: Sequence[Hidden]) -> list[tuple[str, dict[str, int]]]:
        """No group, then each that units leave, and the widths of that net."""
        return [("", {}), *((one.group.name, {one.group.name: width_of(one, self.share)}) for one in hidden)]

    @property
    def macs_left(self) -> int:
        """Multiply-accumulates of the example with the units that stay: no operator belongs to two of these layers."""
        return self.macs[""] - sum(self.macs[""] - self.macs[group] for group in self.widths)

    def _name(self, node: Node) -> str:
        return self.operators.get(node.name, node.name)

    def run(self, events: Events) -> Streamed:
        """All segments, then the model file, beside its tensors; the outputs for what was held out."""
        parts = segments(self.graph.module, self.inputs)
        runs = self._runs()
        events.stage("blocks")
        for number, segment in enumerate(parts):
            self._segment(segment, runs)
            events.progress(number + 1, len(parts))
        original, shrunk = (self._outputs([run for run in runs if run.role == role]) for role in _JUDGED)
        first = self.calibration.n - self._held_out
        found = Streamed(original, shrunk, slice(first, first + sum(run.samples for run in runs if run.role == "original")))
        for node in self.output.all_input_nodes:
            if node.op == "get_attr":
                self._write_float(node, self._read(node))
        events.stage("writing the model")
        write_onnx(self.graph, self.grouped, self.rows, self.stored, self.pieces, self.work / "out" / MODEL)
        return found

    def _runs(self) -> list[_Run]:
        """The batches that weights are fitted on, then those that are held out, once with the original's weights and once with the new."""
        end = self.calibration.n - self._held_out
        calibration = self._batches(0, end, "calibration")
        if not calibration:
            raise DataError(
                f"calibration: a batch of the example's size is needed beside what is held out; {self.calibration.n} samples are there"
            )
        return calibration + [run for role in _JUDGED for run in self._batches(end, self.calibration.n, role)]

    @property
    def _held_out(self) -> int:
        return min(self.calibration.n // HELD_OUT, _MOST_HELD_OUT)

    def _batches(self, first: int, last: int, role: Role) -> list[_Run]:
        fixed = self.graph.signature.inputs[0].shape[0]
        size = fixed if isinstance(fixed, int) else self._batch()
        placeholders = [node for node in self.replay.nodes if node.op == "placeholder"]
        found = []
        for start in range(first, last - (last - first) % size if isinstance(fixed, int) else last, size):
            end = min(start + size, last)
            run = _Run(Values(self.work / f"{role}-{start}"), role, end - start)
            for node, array in zip(placeholders, self.calibration.inputs, strict=True):
                run.values.keep(node, torch.from_numpy(np.array(array[start:end])))
            found.append(run)
        return found

    def _batch(self) -> int:
        """Samples that are run at once: up to 8, fewer where what an operator gives for them is large."""
        return min(_BATCH, max(1, _OUTPUT_BYTES // max(1, self.sample_bytes)))

    def _segment(self, segment: Segment, runs: Sequence[_Run]) -> None:
        """Weights in, moments, rounded weights out, and every batch through."""
        original = {node: self._read(node) for node in segment.tensors}
        changed = dict(original)
        rows = {node: self._rounded_rows(node, original[weight_of(node)]) for node in segment.nodes if node in self.embeddings}
        moments: dict[Node, Moments] = {}
        for node in segment.rounded:
            source, weight = self.inputs[node], weight_of(node)
            if source not in moments:
                moments = {source: self._moments(source, runs)}  # those of the one before are no longer needed
            changed[weight] = self._rounded(node, original[weight], moments[source])
        moments.clear()
        for node, tensor in original.items():
            self._write_float(node, tensor)
        dying = _last_reads(segment)
        for run in runs:
            gives = set(segment.gives) | ({self.first}.intersection(segment.nodes) if run.role in _JUDGED else set())
            if gives:
                if run.role == "original":
                    self._run(segment, run, original, {}, gives, dying)
                else:
                    self._run(segment, run, changed, rows, gives, dying)
            for node in segment.ends:
                if node is not self.first:
                    run.values.drop(node)

    def _run(
        self,
        segment: Segment,
        run: _Run,
        tensors: Mapping[Node, Tensor],
        rows: Mapping[Node, Tensor],
        gives: Collection[Node],
        dying: Sequence[Sequence[Node]],
    ) -> None:
        """One batch through a segment: its values are dropped as soon as nobody in it reads them any more.

        Args:
            tensors: what its nodes read. rows: embedding -> what it reads instead, which another operator may read in another form.
        """
        environment: dict[Node, Any] = dict(tensors)
        environment.update({node: run.values.read(node) for node in segment.takes})
        for number, node in enumerate(segment.nodes):
            own = {**environment, weight_of(node): rows[node]} if node in rows else environment
            environment[node] = self.replay.value(node, own)
            if node in gives:
                run.values.keep(node, environment[node])
            for source in dying[number]:
                environment.pop(source, None)

    def _read(self, node: Node) -> Tensor:
        name = str(node.target)
        if name in self.stored:
            return self.weights.read(self.stored[name])
        return cast(Tensor, self.replay.value(node, {}))

    def _moments(self, source: Node, runs: Sequence[_Run]) -> Moments:
        found: Moments | None = None
        fitting = [run for run in runs if run.role == "calibration"]
        rows = -(-_MOST_ROWS // len(fitting))
        for run in fitting:
            value = run.values.read(source).flatten(0, -2)
            if len(value) > rows:
                value = value[torch.randint(len(value), (rows,), generator=self.generator)]
            found = found or Moments(1, value.shape[1])
            found.add(value[None])
        assert found is not None
        if not bool(found.gram.isfinite().all()):
            raise DataError(f"calibration: {source.name} must be finite for every sample; it is not, in float32")
        return found

    def _rounded_rows(self, node: Node, weight: Tensor) -> Tensor:
        """An embedding with each row in int8, and written so, once: a few thousand rows at a time, since its copies may be large."""
        prefix = self.stored[str(weight_of(node).target)]
        whole, integers, scale = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.int8), torch.empty(len(weight), 1)
        gone = power = 0.0
        for some in _slices(len(weight)):
            watcher = self.make(int8_weights(INT8_WEIGHTS.largest_weight(0)))
            watcher.update(weight[some])
            found = watcher.quantizer()
            scale[some] = found.scale[:, None]
            whole[some] = fake_quantize(weight[some], found)
            integers[some] = (whole[some] / scale[some]).round().to(torch.int8)
            gone += float((weight[some] - whole[some]).double().square().sum())
            power += float(weight[some].double().square().sum())
        error = gone / max(power, 1e-30)
        self.losses[self._name(node)] = OperatorLoss(self._name(node), weight.shape[0], weight.shape[1], error)
        self.rows[node] = prefix
        if f"{prefix}.rows" not in self.pieces:
            self.pieces.add(f"{prefix}.rows", integers)
            self.pieces.add(f"{prefix}.row_scales", scale)
        return whole

    def _rounded(self, node: Node, weight: Tensor, moments: Moments) -> Tensor:
        """What a weight becomes, in its own layout and size: columns of units that left are zeros there."""
        name, axis = str(weight_of(node).target), known_parts(node).axis
        called = self._name(node)
        matrix = weight.t().contiguous() if axis else weight
        gram = moments.second(centered=False)[0][0]
        energy = _power(matrix, gram)
        kept = None
        if (hidden := self.hidden.get(name)) is not None:
            kept = survivors(hidden, matrix, moments, self.share)
            self.units[hidden.group.name] = (hidden.group.units, hidden.group.units if kept is None else len(kept))
            self._let_go(hidden, kept)
        if kept is None:
            rounded, quantizer = self._on_grid(matrix, gram)
            whole = rounded
        else:
            at = torch.from_numpy(kept)
            rounded, quantizer = self._on_grid(refitted(matrix, gram, kept), gram[at][:, at])
            whole = torch.zeros_like(matrix)
            whole[:, at] = rounded
        error = _power(matrix, gram, whole) / max(energy, 1e-30)
        self.losses[called] = OperatorLoss(called, rounded.shape[1], len(rounded), error)
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
        each = [scales(matrix[some], group) for some in _slices(len(matrix))]
        quantizer = GroupQuantizer(grid, group, torch.cat([one.scale for one in each]), torch.cat([one.zero_point for one in each]))
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
            called = self._name(waiting.node)
            self.losses[called] = replace(self.losses[called], outputs=len(waiting.matrix[rows]))
            self._write(waiting.node, maker, waiting.matrix[rows], GroupQuantizer(of.grid, of.group, of.scale[rows], of.zero_point[rows]))

    def _write(self, node: Node, name: str, matrix: Tensor, quantizer: GroupQuantizer) -> None:
        grid = quantizer.grid
        packed = [
            packed_groups(matrix[some], quantizer.scale[some], quantizer.zero_point[some], quantizer.group, grid.low, grid.high)
            for some in _slices(len(matrix))
        ]
        for what in packed[0]:
            self.pieces.add(f"{name}.{what}", torch.cat([tensors[what] for tensors in packed]))
        self.grouped[node] = Grouped(name, len(matrix), matrix.shape[1], self.scheme.weight_bits, quantizer.group)

    def _write_float(self, node: Node, tensor: Tensor) -> None:
        """A parameter that stays in float, once."""
        name = str(node.target)
        if (
            name not in self.stored
            or self.stored[name] in self.pieces
            or all(user in self.embeddings or (user in self.inputs and weight_of(user) is node) for user in node.users)
        ):
            return
        if name in self.made:
            self.waiting[name] = _Waiting(tensor, None, None)
        else:
            self.pieces.add(self.stored[name], tensor)

    def _outputs(self, judging: Sequence[_Run]) -> list[NDArray[np.float32]]:
        """The first output of these runs."""
        return [run.values.read(self.first).numpy() for run in judging]


def _slices(rows: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]


def _power(matrix: Tensor, gram: Tensor, rounded: Tensor | None = None) -> float:
    """E|w x|^2, or E|(w - w') x|^2."""
    total = 0.0
    for some in _slices(len(matrix)):
        rows = (matrix[some] if rounded is None else matrix[some] - rounded[some]).double()
        total += float(((rows @ gram) * rows).sum())
    return total


def _last_reads(segment: Segment) -> list[list[Node]]:
    """Position in a segment -> the values that nobody in it reads any more behind that."""
    last = {node: number for number, node in enumerate(segment.nodes)}
    for number, node in enumerate(segment.nodes):
        last.update(dict.fromkeys(node.all_input_nodes, number))
    found: list[list[Node]] = [[] for _ in segment.nodes]
    for node, number in last.items():
        found[number].append(node)
    return found
