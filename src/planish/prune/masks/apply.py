"""A plan's masks, carried out on a graph in place, one operator after the other on what the masked net computes so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from planish import registry
from planish.data import Split
from planish.errors import PlanError, UnknownName
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Replay, affordable, evaluating, in_batches, take
from planish.prune.masks.contract import Masking
from planish.prune.masks.pattern import parse_pattern
from planish.prune.masks.subjects import subjects
from planish.prune.norms import Norm, statistics

_CHUNK = 64
_NORMS = (torch.ops.aten.batch_norm.default,)


@torch.no_grad()
def mask_(
    graph: Graph, analysis: Analysis, masks: Mapping[str, str], method: str, split: Split, samples: int = 256, seed: int = 0
) -> tuple[str, ...]:
    """Masks operators of a graph in place; batch norms behind them get the statistics of what now reaches them, biases the mean that was lost.

    Args:
        graph: changed in place: weights, biases, batch norms.
        analysis: of that graph.
        masks: operator -> pattern. An operator that is gone (its block was bypassed) is no error.
        method: a registered masking.
        split: calibration inputs.
        samples: at most; fewer, where activations would exceed 1 GiB.
        seed: of the positions that are sampled.

    Returns:
        The operators that were masked.

    Raises:
        PlanError: an operator that has no weight to mask.
    """
    replay = Replay(graph.module)
    known = subjects(replay, analysis)
    for name in masks:
        if name in analysis.operators and name not in known:
            raise PlanError(f"plan: {UnknownName('operator that can be masked', name, known)}")
    wanted = {known[name].operator.node: known[name] for name in masks if name in known}
    make: Masking = registry.get("masking", method)()
    generator = torch.Generator().manual_seed(seed)
    named = (*graph.module.named_parameters(remove_duplicate=False), *graph.module.named_buffers(remove_duplicate=False))
    tensors = {name: value.detach() for name, value in named}
    flat = take(split, affordable(replay, graph, samples))
    altered: set[Node] = set()
    with evaluating(graph):
        values = [replay.start(chunk) for chunk in in_batches(flat, _CHUNK)]
        for node in replay.nodes:
            if node in wanted:
                subject = wanted[node]
                weight, shift = subject.masked(make, parse_pattern(masks[subject.name]), subject.moments(replay, values, generator))
                subject.weight.copy_(weight)
                if subject.operator.bias is not None:
                    tensors[subject.operator.bias].add_(shift)
            elif node.target in _NORMS and not altered.isdisjoint(node.all_input_nodes):
                norm, source = Norm.of(node, tensors), node.args[0]
                if norm is not None and isinstance(source, Node):
                    norm.recalibrate_(*statistics([environment[source] for environment in values]))
            if node in wanted or not altered.isdisjoint(node.all_input_nodes):
                altered.add(node)
            for environment in values:
                replay.step(node, environment)
    return tuple(name for name in masks if name in known)
