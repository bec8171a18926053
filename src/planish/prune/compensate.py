"""One-shot compensation: every operator of a pruned net is refitted, in program order, to what the original computed in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish.data import Split
from planish.graph.graph import Graph
from planish.prune.least_squares import Contraction, Moments, contraction, ridge
from planish.prune.replay import Environment, Replay, evaluating, take

aten = torch.ops.aten

_NORMS = (aten.batch_norm.default,)
_ADDS = (aten.add.Tensor,)
_CHUNK = 64
_LIVE_BYTES = 2**30  # of activations that either net may keep alive at once
_UNTOUCHED = 1e-6  # relative squared error below which an operator already gives what the original gave


@dataclass(frozen=True)
class Compensation:
    """What was refitted and how much it helped.

    Args:
        fitted: operator (its weight's name) -> relative squared error of its target before and after, on the rows it was fitted to.
        skipped: operator -> why it was left alone.
        samples: calibration samples that were used.
    """

    fitted: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, str]
    samples: int


@dataclass
class _Fit:
    """One operator of the pruned net: what follows it, and which value of the original it is fitted to."""

    operator: Contraction
    norm: Node | None
    other: Node | None  # the addition's other operand, where the target is the sum
    wanted: str  # name of the original's node


@dataclass
class _State:
    student: Replay
    teacher: Replay
    students: list[Environment]
    teachers: list[Environment]
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    wanted: set[str]
    stash: dict[str, list[Tensor]] = field(default_factory=dict)
    reached: int = 0

    def advance(self, name: str) -> None:
        """Runs the original until it has computed the node of that name, keeping whatever somebody will be fitted to."""
        goal = self.teacher.position[self.teacher.by_name[name]]
        while self.reached <= goal:
            node = self.teacher.nodes[self.reached]
            if node.op != "output":
                if node.op != "placeholder":
                    for environment in self.teachers:
                        environment[node] = self.teacher.value(node, environment)
                if node.name in self.wanted:
                    self.stash[node.name] = [environment[node] for environment in self.teachers]
            for environment in self.teachers:
                self.teacher.release(node, environment)
            self.reached += 1


@torch.no_grad()
def compensate(
    pruned: Graph,
    original: Graph,
    kept: Mapping[tuple[str, int], NDArray[np.int64]],
    split: Split,
    samples: int = 512,
    strength: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Compensation:
    """Refits the convolutions and linear maps of a pruned net, in place, by ridge regression on the original's values; no gradients.

    Both nets run over the calibration samples side by side, once. Each operator in turn gets the weights W and intercept that minimise
    E|t - W x - b|^2 + lambda |W - W_0|^2, with x its input in the *pruned* net as refitted so far, W_0 its present weights, and t
    the original's output of the same node. Where the operator ends a residual branch (operator, batch norm, addition), t is what brings
    the *sum* to the original's sum: the branch so repairs what was lost on the residual stream before it, by a bypassed block say.
    The intercept goes into the bias, or into the batch norm that follows. Batch norms get the pruned net's own statistics; where the
    operator before one was fitted, its scale and shift are changed so that the fitted map stays what it is.

    Grouped and depthwise convolutions are fitted group by group. Left alone, by name in `Compensation.skipped`: operators that share
    a weight, and channels whose batch norm has a scale of nearly zero. Recurrent layers, attention and transposed convolutions are
    not fitted, but run.

    Args:
        pruned: changed in place: weights, biases, batch norms.
        original: what it was pruned from; its node names are those of `pruned` where both have the node.
        kept: (parameter, dimension) -> indices of the original's that survive.
        split: calibration inputs.
        samples: how many to use; fewer are, where the activations that are alive at once would exceed 1 GiB.
        strength: lambda as a share of the mean diagonal of E[x x^T].
        seed: of the positions that are sampled where a layer has more of them than are needed.
        progress: called with (nodes done, nodes).

    References:
        Frantar and Alistarh 2022, Optimal Brain Compression, section 4 (all weights that survive are updated at once, equation 3
        summed over a structure); Kurtic et al. 2023, ZipLM, section 3 (against the dense model's outputs).
    Differs:
        regression on all survivors at once instead of one update per removed structure, which is the same optimum; the target of a
        residual branch is the original's sum; ridge towards the present weights.
    """
    generator = torch.Generator().manual_seed(seed)
    student, teacher = Replay(pruned.module), Replay(original.module)
    samples = min(samples, max(8, int(_LIVE_BYTES // max(_live_bytes(teacher, original), 1))))
    flat = take(split, samples)
    count = len(flat[0])
    chunks = [[value[start : start + _CHUNK] for value in flat] for start in range(0, count, _CHUNK)]
    fits, skipped = _fits(student, teacher)
    fitted: dict[str, tuple[float, float]] = {}
    with evaluating(pruned), evaluating(original):
        state = _State(
            student,
            teacher,
            [student.start(chunk) for chunk in chunks],
            [teacher.start(chunk) for chunk in chunks],
            kept,
            {fit.wanted for fit in fits.values()},
        )
        fixed_norms: set[Node] = set()
        for index, node in enumerate(student.nodes):
            if progress is not None:
                progress(index, len(student.nodes))
            if node in fits:
                errors = _fit(state, fits[node], strength, generator, pruned)
                if isinstance(errors, str):
                    skipped[fits[node].operator.weight] = errors
                elif errors is not None:
                    fitted[fits[node].operator.weight] = errors
                    if (norm := fits[node].norm) is not None:
                        fixed_norms.add(norm)
            elif node.target in _NORMS and node not in fixed_norms and (fitted or skipped):
                _recalibrate(state, node, pruned)
            for environment in state.students:
                student.step(node, environment)
    return Compensation(fitted, skipped, count)


def _fits(student: Replay, teacher: Replay) -> tuple[dict[Node, _Fit], dict[str, str]]:
    """What is fitted to what, and what is left alone."""
    parameters = dict(student.module.named_parameters(remove_duplicate=False))
    found = {node: contraction(node, parameters) for node in student.nodes if node.name in teacher.by_name}
    operators = {node: operator for node, operator in found.items() if operator is not None}
    uses = Counter(str(node.target) for node in student.nodes if node.op == "get_attr" for _ in node.users)
    fits: dict[Node, _Fit] = {}
    skipped: dict[str, str] = {}
    for node, operator in operators.items():
        if uses[operator.weight] > 1 or (operator.bias is not None and uses[operator.bias] > 1):
            skipped[operator.weight] = "its parameters are shared"
            continue
        following, norm = _only_user(node), None
        if following is not None and following.target in _NORMS and following.args[0] is node and following.args[1] is not None:
            norm = following
            following = _only_user(norm)
        while following is not None and following.target is aten.dropout.default:
            following = _only_user(following)
        other = None
        if following is not None and following.target in _ADDS and not following.kwargs and following.name in teacher.by_name:
            operands = [operand for operand in following.args if isinstance(operand, Node)]
            others = [operand for operand in operands if not _comes_from(operand, node)]
            if len(operands) == 2 and len(others) == 1 and student.position[others[0]] < student.position[node]:
                other = others[0]
        wanted = following.name if other is not None and following is not None else node.name
        fits[node] = _Fit(operator, norm, other, wanted)
    return fits, skipped


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _comes_from(operand: Node, node: Node) -> bool:
    while operand is not node and len(operand.all_input_nodes) and operand.target in (*_NORMS, aten.dropout.default):
        operand = operand.all_input_nodes[0]
    return operand is node


def _fit(state: _State, fit: _Fit, strength: float, generator: torch.Generator, pruned: Graph) -> tuple[float, float] | str | None:
    """Refits one operator and its batch norm; (error before, error after), why not, or None where nothing is to be done."""
    operator, module = fit.operator, pruned.module
    state.advance(fit.wanted)
    targets = state.stash.pop(fit.wanted)
    weight = module.get_parameter(operator.weight)
    bias = module.get_parameter(operator.bias) if operator.bias is not None else None
    node, source = operator.node, operator.node.args[0]
    assert isinstance(source, Node)
    survivors = state.kept.get((operator.weight, 0))
    axis_index = torch.from_numpy(np.asarray(survivors)) if survivors is not None else None
    norm = _Norm.of(fit.norm, module) if fit.norm is not None else None
    columns = weight[0].numel()
    moments = Moments(operator.groups, columns, len(weight) // operator.groups)
    rows = math.ceil(min(max(24 * columns, 8192), 65536) / len(targets))
    for target, environment in zip(targets, state.students, strict=True):
        positions = operator.draw(target, rows, generator)
        y = operator.targets(target, positions)
        if axis_index is not None:
            y = y[:, axis_index]
        if fit.other is not None:
            y = y - operator.targets(environment[fit.other].expand_as(target) if axis_index is None else environment[fit.other], positions)
            if norm is not None:
                y = norm.inverse(y)
        moments.add(operator.inputs(environment[source], weight, positions), y)
    free = bias is not None or norm is not None  # whether there is a place for an intercept
    gram, cross, power = moments.second(centered=free)
    current = weight.detach().double().reshape(operator.groups, -1, columns)
    solved = ridge(gram, cross, current, strength)
    if norm is not None:
        solved = torch.where((norm.scale.abs() > 1e-4).reshape(operator.groups, -1, 1), solved, current)
    before, after = (_error(gram, cross, power, w) for w in (current, solved))
    total = float(power.sum())
    if not math.isfinite(after) or total <= 0:
        return "its target is constant or not finite"
    x_mean, y_mean = moments.sum_x / moments.rows, moments.sum_y / moments.rows
    intercept = (y_mean - (solved @ x_mean[:, :, None])[:, :, 0]).reshape(-1)
    shift_before = 0.0
    if free:
        old = (y_mean - (current @ x_mean[:, :, None])[:, :, 0]).reshape(-1)
        had = bias.detach().double() if bias is not None else torch.zeros_like(old)
        shift_before = float((old - had).square().sum())
    if before + shift_before <= _UNTOUCHED * total:
        return None
    weight.copy_(solved.reshape(weight.shape))
    if bias is not None:
        bias.copy_(intercept)
        intercept = torch.zeros_like(intercept)
    if norm is not None:
        mean, variance = _statistics([state.student.value(node, environment) for environment in state.students])
        norm.absorb(mean, variance, intercept.float())
    return (before + shift_before) / total, after / total


def _error(gram: Tensor, cross: Tensor, power: Tensor, weight: Tensor) -> float:
    """E|y - W x|^2 from second moments."""
    fit = (weight * cross.transpose(1, 2)).sum(2)
    return float((power - 2 * fit + ((weight @ gram) * weight).sum(2)).sum().clamp_min(0))


@dataclass
class _Norm:
    """A batch norm's tensors, as the per-channel map y = scale (x - mean) + shift."""

    gain: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    epsilon: float

    @staticmethod
    def of(node: Node, module: torch.nn.Module) -> _Norm:
        gain, shift, mean, variance = (_tensor(argument, module) for argument in node.args[1:5])
        return _Norm(gain, shift, mean, variance, float(node.args[7]))  # type: ignore[arg-type]

    @property
    def scale(self) -> Tensor:
        return self.gain.detach() / (self.variance + self.epsilon).sqrt()

    def inverse(self, y: Tensor) -> Tensor:
        """The input that gives `y` [rows, channels]; 0 where the scale is nearly zero."""
        scale = self.scale
        usable = scale.abs() > 1e-4
        return torch.where(usable, (y - self.shift) / torch.where(usable, scale, 1.0) + self.mean, 0.0)

    def absorb(self, mean: Tensor, variance: Tensor, intercept: Tensor) -> None:
        """Takes on new statistics; the map becomes x -> the old map of x + intercept."""
        scale = self.scale
        self.shift.copy_(self.shift + scale * (mean + intercept - self.mean))
        self.gain.copy_(scale * (variance + self.epsilon).sqrt())
        self.mean.copy_(mean)
        self.variance.copy_(variance)


def _tensor(argument: object, module: torch.nn.Module) -> Tensor:
    assert isinstance(argument, Node) and argument.op == "get_attr"
    owner, _, leaf = str(argument.target).rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _statistics(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, variance) of each channel (axis 1) over all chunks."""
    rows = [value.movedim(1, -1).reshape(-1, value.shape[1]) for value in values]
    weights = torch.tensor([float(len(value)) for value in rows])
    weights /= weights.sum()
    means = torch.stack([value.mean(0) for value in rows])
    squares = torch.stack([value.square().mean(0) for value in rows])
    mean = (weights[:, None] * means).sum(0)
    return mean, ((weights[:, None] * squares).sum(0) - mean.square()).clamp_min(0)


def _recalibrate(state: _State, node: Node, pruned: Graph) -> None:
    """Gives a batch norm the statistics of what now reaches it."""
    if node.args[3] is None:
        return
    source = node.args[0]
    assert isinstance(source, Node)
    mean, variance = _statistics([environment[source] for environment in state.students])
    _tensor(node.args[3], pruned.module).copy_(mean)
    _tensor(node.args[4], pruned.module).copy_(variance)


def _live_bytes(replay: Replay, graph: Graph) -> int:
    """The most bytes of activations that one sample keeps alive at once."""
    peak, environment = 0, replay.start(list(graph.example))
    with evaluating(graph), torch.no_grad():
        for node in replay.nodes:
            replay.step(node, environment)
            alive = {id(v): v.nbytes for n, v in environment.items() if n.op != "get_attr" and isinstance(v, Tensor)}
            peak = max(peak, sum(alive.values()))
    return peak // max(len(graph.example[0]), 1)
