"""Which operators can be masked, and their weights as matrices whose columns a pattern speaks of."""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.graph.contraction import Contraction, contraction
from planish.graph.graph import Analysis
from planish.graph.moments import Moments
from planish.graph.replay import Environment, Replay
from planish.prune.masks.contract import Masking
from planish.prune.masks.pattern import Pattern

_MOST_COLUMNS = 8192
"""Of a weight: its inputs' moments take a gigabyte in double precision beyond."""
_FEWEST_ROWS, _MOST_ROWS = 8192, 65536


@dataclass(frozen=True)
class Subject:
    """An operator that can be masked.

    Args:
        name: of the operator.
        operator: how to read its inputs.
        weight: the parameter itself, [out, in, *kernel].
    """

    name: str
    operator: Contraction
    weight: Tensor

    def columns(self, pattern: Pattern) -> Tensor:
        """The columns of the flattened weight that a pattern speaks of, in its order.

        Groups of M are consecutive input channels at one position of the kernel, as Tensor Cores want them; channels that fill no group
        are left out.
        """
        if not pattern.of:
            return torch.arange(self.weight[0].numel())
        channels, each = self.weight.shape[1], math.prod(self.weight.shape[2:])
        whole = channels - channels % pattern.of
        return torch.arange(channels * each).reshape(channels, each)[:whole].T.reshape(-1)

    def moments(self, replay: Replay, values: Sequence[Environment], generator: torch.Generator) -> Moments:
        """Of the operator's inputs as they are in the environments, at random positions."""
        count = self.weight[0].numel()
        rows = math.ceil(min(max(16 * count, _FEWEST_ROWS), _MOST_ROWS) / len(values))
        found = Moments(1, count)
        source = self.operator.node.args[0]
        assert isinstance(source, Node)
        for environment in values:
            positions = self.operator.draw(replay.value(self.operator.node, environment), rows, generator)
            found.add(self.operator.columns(environment[source], self.weight, positions))
        return found

    def masked(self, method: Masking, pattern: Pattern, moments: Moments) -> tuple[Tensor, Tensor]:
        """The weight with zeros as the pattern has them, in its own shape, and the shift of the output that keeps its mean, [out]."""
        columns = self.columns(pattern)
        before = self.weight.detach().reshape(len(self.weight), -1).double()
        gram = moments.second(centered=False)[0][0][columns][:, columns] if "data" in method.needs else None
        after = before.clone()
        after[:, columns] = method.masked(before[:, columns], gram, pattern)
        shift = (before - after) @ (moments.sum_x[0] / moments.rows)
        return after.to(self.weight.dtype).reshape(self.weight.shape), shift.to(self.weight.dtype)


def subjects(replay: Replay, analysis: Analysis, keep: Sequence[str] = ()) -> dict[str, Subject]:
    """The operators that can be masked, by name, in the order of the program: convolutions and linear maps with a finite weight of their own.

    Args:
        replay: of the graph.
        analysis: of that graph.
        keep: globs of parameters that must be left alone.
    """
    parameters: Mapping[str, Tensor] = dict(replay.module.named_parameters(remove_duplicate=False))
    uses = Counter(str(node.target) for node in replay.nodes if node.op == "get_attr" for _ in node.users)
    found = {}
    for name, its in analysis.operators.items():
        operator = contraction(replay.by_name[its.node], parameters)
        if operator is None or operator.groups != 1 or uses[operator.weight] != 1:
            continue
        weight = parameters[operator.weight]
        is_kept = any(fnmatch.fnmatch(operator.weight, glob) for glob in keep)
        if not is_kept and weight[0].numel() <= _MOST_COLUMNS and bool(torch.isfinite(weight).all()):
            found[name] = Subject(name, operator, weight)
    return dict(sorted(found.items(), key=lambda item: replay.position[item[1].operator.node]))


def masked_weights(analysis: Analysis, masks: Mapping[str, str]) -> list[str]:
    """Names of the parameters that a plan masks, of those that a graph still has.

    Args:
        analysis: of that graph.
        masks: operator -> pattern.
    """
    held = [analysis.operators[name].weight for name in masks if name in analysis.operators]
    return [name for name in held if name is not None]
