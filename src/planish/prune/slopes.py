"""Slopes of an objective along the masks of units: how it would change if a unit were scaled down a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish.graph.graph import Analysis, Graph, Group
from planish.graph.replay import Replay, evaluating
from planish.prune.units import by_unit


def mask_slopes(
    graph: Graph,
    analysis: Analysis,
    flat: list[Tensor],
    micro_batch: int,
    objective: Callable[[list[Tensor], slice], Tensor],
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """For one micro-batch after another, group -> [units] derivatives of an objective by the masks of units, at mask 1.

    The mask sits where the unit is read: the derivative is the sum of gradient times weight over the columns that contract the unit (over
    the rows that issue it, or the norm parameters that scale it, where no weight reads it). NaN where no parameter holds the unit.

    Args:
        graph: left as it is; it is run in evaluation mode.
        analysis: of that graph.
        flat: flat inputs of all samples.
        micro_batch: samples of one backward pass.
        objective: (flat outputs, which samples they are of) -> a scalar.
    """
    replay = Replay(graph.module)
    keys = {name: _mask_keys(group, graph) for name, group in analysis.groups.items()}
    wanted = sorted({key[0] for mine in keys.values() for key in mine})
    parameters = {n: p.detach() for n, p in graph.module.named_parameters(remove_duplicate=False) if n in wanted}
    with evaluating(graph):
        for start in range(0, len(flat[0]), micro_batch):
            rows = slice(start, start + micro_batch)
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
            outputs = replay.run(replay.start([value[rows] for value in flat]), parameters=leaves)
            gradients = torch.autograd.grad(objective(outputs, rows), [leaves[name] for name in wanted], allow_unused=True)
            products = {name: gradient * parameters[name] for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
            found = {}
            for name, group in analysis.groups.items():
                slopes = [by_unit(products[p], d, group.unit_of[p, d], group.units) for p, d in keys[name] if p in products]
                found[name] = np.sum(slopes, axis=0) if slopes else np.full(group.units, np.nan)
            yield found


def _mask_keys(group: Group, graph: Graph) -> list[tuple[str, int]]:
    trainable = {name for name, p in graph.module.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    for role in ("in", "out", "affine"):
        keys = [key for key, its in group.roles.items() if its == role and key[0] in trainable]
        if keys:
            return keys
    return []
