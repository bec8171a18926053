"""A changed net and its original run side by side, node by node, while the changed net's operators are refitted to the original's values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish.graph.contraction import Contraction, contraction
from planish.graph.moments import Moments
from planish.graph.replay import Environment, Replay
from planish.prune.least_squares import fit as solve
from planish.prune.norms import Norm, statistics

aten = torch.ops.aten

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

_NORMS = (aten.batch_norm.default,)
_ADDS = (aten.add.Tensor,)
_UNTOUCHED = 1e-6  # relative squared error below which an operator already gives what the original gave, up to round-off


Redirection = Callable[[Environment], Tensor]


@dataclass(frozen=True)
class Fit:
    """One operator of the changed net that can be refitted.

    Args:
        operator: how to read its input.
        norm: the batch norm that alone follows it, or None.
        other: where a residual addition follows next: its other operand.
        wanted: name of the original's node that it is fitted to: the addition, else the operator itself.
    """

    operator: Contraction
    norm: Node | None
    other: Node | None
    wanted: str


def find_fits(changed: Replay, original: Replay) -> tuple[dict[Node, Fit], dict[str, str]]:
    """What can be refitted, by node, and the weights that are left alone with the reason."""
    parameters = dict(changed.module.named_parameters(remove_duplicate=False))
    uses = Counter(str(node.target) for node in changed.nodes if node.op == "get_attr" for _ in node.users)
    fits: dict[Node, Fit] = {}
    skipped: dict[str, str] = {}
    for node in changed.nodes:
        operator = contraction(node, parameters)
        if operator is None:
            continue
        if uses[operator.weight] > 1 or (operator.bias is not None and uses[operator.bias] > 1):
            skipped[operator.weight] = "its parameters are shared"
            continue
        following, norm = _only_user(node), None
        if following is not None and following.target in _NORMS and following.args[0] is node:
            own = all(isinstance(argument, Node) for argument in following.args[1:5])  # scale, shift and running statistics
            norm, following = (following, _only_user(following)) if own else (None, None)
        while following is not None and following.target is aten.dropout.default:
            following = _only_user(following)
        other = None
        if following is not None and following.target in _ADDS and not following.kwargs and following.name in original.by_name:
            operands = [operand for operand in following.args if isinstance(operand, Node)]
            others = [operand for operand in operands if not _comes_from(operand, node)]
            if len(operands) == 2 and len(others) == 1 and changed.position[others[0]] < changed.position[node]:
                other = others[0]
        if other is None and node.name not in original.by_name:
            continue  # nothing says what it should give
        fits[node] = Fit(operator, norm, other, following.name if other is not None and following is not None else node.name)
    return fits, skipped


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _comes_from(operand: Node, node: Node) -> bool:
    while operand is not node and operand.target in (*_NORMS, aten.dropout.default):
        operand = operand.all_input_nodes[0]
    return operand is node


@dataclass
class Repair:
    """Both nets, some batches of values at the same point of the program, and what has been refitted so far.

    Args:
        changed: runs the net that is refitted.
        original: runs the net that gives the targets; the same object where only stand-ins tell the two apart.
        tensors: parameters and buffers of the changed net by name, which are written in place where something is refitted; a batch norm
            that is not among them keeps its statistics.
        kept: (parameter, dimension) -> indices of the original's that survive in the changed net.
        values: one environment per batch, of the changed net.
        targets: likewise, of the original; where there are fewer, only the first batches are fitted to and the others are held out.
        strengths: of the ridge, of which each operator takes what serves the last quarter of the batches best.
        rows_per_column: rows of the regression for each column, before the bounds of 8,192 and 65,536.
        generator: of the rows.
        changed_at, original_at: position of the next node to run.
    """

    changed: Replay
    original: Replay
    tensors: Mapping[str, Tensor]
    kept: Mapping[tuple[str, int], NDArray[np.int64]]
    values: list[Environment]
    targets: list[Environment]
    strengths: Sequence[float]
    rows_per_column: int
    generator: torch.Generator
    changed_at: int = 0
    original_at: int = 0
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _stash: dict[str, list[Tensor]] = field(default_factory=dict)

    def run(
        self,
        fits: Mapping[Node, Fit],
        redirected: Mapping[Node, Redirection] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Tensor]]:
        """The flat outputs of the changed net for each batch, after refitting on the way.

        Args:
            fits: what may be refitted.
            redirected: node -> what gives its value in its place (a block that is bypassed without surgery).
            progress: called with (nodes done, nodes).
        """
        wanted = {fit.wanted for fit in fits.values()}
        done: set[Node] = set()
        altered = self._altered(redirected or {})
        for node in self.changed.nodes[self.changed_at :]:
            if progress is not None:
                progress(self.changed.position[node], len(self.changed.nodes))
            if node.op == "output":
                return [list(torch.fx.node.map_arg(node.args[0], environment.__getitem__)) for environment in self.values]
            if redirected is not None and node in redirected:
                for environment in self.values:
                    environment[node] = redirected[node](environment)
                    self.changed.release(node, environment)
                continue
            if node in altered and node in fits:
                self._advance(fits[node].wanted, wanted)
                if self._fit(fits[node]) and (norm := fits[node].norm) is not None:
                    done.add(norm)
            elif node in altered and node.target in _NORMS and node not in done:
                self._recalibrate(node)
            for environment in self.values:
                self.changed.step(node, environment, self.tensors)
        raise AssertionError("a module ends in an output node")

    def _altered(self, redirected: Mapping[Node, Redirection]) -> set[Node]:
        """The nodes whose value can differ from the original's: behind a parameter that shrank, or where the program changed."""
        shrunk = {name for name, _ in self.kept}
        altered: set[Node] = set()
        for node in self.changed.nodes:
            twin = self.original.by_name.get(node.name)
            same = twin is not None and [a.name for a in twin.all_input_nodes] == [a.name for a in node.all_input_nodes]
            if not same or node in redirected or str(node.target) in shrunk or any(a in altered for a in node.all_input_nodes):
                altered.add(node)
        return altered

    def _advance(self, name: str, wanted: set[str]) -> None:
        """Runs the original until it has computed the node of that name, keeping whatever something will be fitted to."""
        goal = self.original.position[self.original.by_name[name]]
        while self.original_at <= goal:
            node = self.original.nodes[self.original_at]
            for environment in self.targets:
                if node.op not in ("placeholder", "output"):
                    environment[node] = self.original.value(node, environment)
            if node.name in wanted:
                self._stash[node.name] = [environment[node] for environment in self.targets]
            for environment in self.targets:
                self.original.release(node, environment)
            self.original_at += 1

    def _recalibrate(self, node: Node) -> None:
        """Gives a batch norm the statistics of what now reaches it."""
        source, norm = node.args[0], Norm.of(node, self.tensors)
        if norm is not None and isinstance(source, Node):
            norm.recalibrate_(*statistics([environment[source] for environment in self.values]))
            self._refresh(node)

    def _moments(self, fit: Fit, norm: Norm | None) -> list[Moments]:
        """For each batch, the moments of the operator's input and of the output that it should give."""
        operator = fit.operator
        weight, source = self.tensors[operator.weight], operator.node.args[0]
        survivors = self.kept.get((operator.weight, 0))
        columns = weight[0].numel()
        targets = self._stash.pop(fit.wanted)
        rows = math.ceil(min(max(self.rows_per_column * columns, 8192), 65536) / len(targets))
        found = []
        assert isinstance(source, Node)
        for target, environment in zip(targets, self.values, strict=False):
            positions = operator.draw(target, rows, self.generator)
            y = operator.rows(target, positions)
            if survivors is not None:
                y = y[:, torch.from_numpy(survivors)]
            if fit.other is not None:
                y = y - operator.rows(environment[fit.other], positions)
                if norm is not None:
                    y = norm.inverse(y)
            found.append(Moments(operator.groups, columns, len(weight) // operator.groups))
            found[-1].add(operator.columns(environment[source], weight, positions), y)
        return found

    def _fit(self, fit: Fit) -> bool:
        """Refits one operator and the batch norm behind it, unless it already gives what it should; whether it did."""
        operator = fit.operator
        weight = self.tensors[operator.weight]
        bias = self.tensors[operator.bias] if operator.bias is not None else None
        norm = Norm.of(fit.norm, self.tensors) if fit.norm is not None else None
        parts = self._moments(fit, norm)
        cut = len(parts) - len(parts) // 4
        train, held_out = sum(parts[1:cut], parts[0]), sum(parts[cut + 1 :], parts[cut]) if cut < len(parts) else None
        everything = train if held_out is None else train + held_out
        free = bias is not None or norm is not None  # whether there is a place for an intercept
        current = weight.detach().double().reshape(operator.groups, -1, weight[0].numel())
        had = bias.detach().double() if bias is not None else torch.zeros_like(everything.offset(current)) if free else None
        total, before = float(everything.second(free)[2].sum()), everything.error(current, had)
        if not math.isfinite(before) or total <= 0:
            self.skipped[operator.weight] = "what it should give is constant or not finite"
            return False
        if before <= _UNTOUCHED * total:
            return False
        solved = solve(train, held_out, current, self.strengths, free)
        if norm is not None:
            solved = torch.where(norm.usable.reshape(operator.groups, -1, 1), solved, current)
        weight.copy_(solved.reshape(weight.shape))
        offset = everything.offset(solved) if free else None
        if bias is not None and offset is not None:
            bias.copy_(offset)
        self._refresh(operator.node)
        if norm is not None and fit.norm is not None and offset is not None:
            intercept = (offset if bias is None else torch.zeros_like(offset)).to(weight.dtype)
            norm.absorb_(*statistics([self.changed.value(operator.node, environment) for environment in self.values]), intercept)
            self._refresh(fit.norm)
        self.fitted[operator.weight] = (before / total, everything.error(solved, offset) / total)
        return True

    def _refresh(self, node: Node) -> None:
        """Lets the environments see the present tensors that a node reads."""
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) in self.tensors:
                for environment in self.values:
                    environment[source] = self.tensors[str(source.target)]
