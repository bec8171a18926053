"""Batch-norm recalibration: running statistics measured anew on data, the cheapest recovery there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from planish.data import Split
from planish.graph.graph import Graph
from planish.graph.interpret import attribute
from planish.graph.modes import short_name


def has_batch_norm(graph: Graph) -> bool:
    """Whether the program has a batch norm that keeps running statistics."""
    return any(_keeps_statistics(node) for node in graph.module.graph.nodes)


def _keeps_statistics(node: fx.Node) -> bool:
    return short_name(node) == "batch_norm" and isinstance(node.args[3], fx.Node)


class _Moments:
    """Count, sum and squared deviations of the channels, merged batch by batch (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(1, dtype=torch.float64)
        self.squares = torch.zeros(1, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        dims = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, dims, correction=0)
        count = x.numel() // x.shape[1]
        delta = mean.double() - self.mean
        total = self.count + count
        self.squares = self.squares + variance.double() * count + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


class _Collector(fx.Interpreter):
    """Runs the program with every batch norm normalising by its batch and every dropout passing on, and collects the statistics."""

    def __init__(self, module: fx.GraphModule, moments: dict[str, _Moments]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.moments = moments

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if _keeps_statistics(n):
            x, weight, bias, _, _, _, momentum, eps, cudnn = args
            assert isinstance(n.args[3], fx.Node)
            self.moments.setdefault(str(n.args[3].target), _Moments()).add(x)
            if x.numel() == x.shape[1]:  # one value per channel has no spread to normalise by
                return torch.ops.aten.batch_norm(*args[:5], False, momentum, eps, cudnn)
            return torch.ops.aten.batch_norm(x, weight, bias, None, None, True, momentum, eps, cudnn)
        if "dropout" in short_name(n):
            return args[0]
        return getattr(self, n.op)(n.target, args, kwargs)


@torch.no_grad()
def recalibrate_batch_norm(graph: Graph, split: Split, samples: int = 2048, batch_size: int = 128, seed: int = 0) -> int:
    """Set every running mean and variance to those of `samples` samples, in place; how many norms were set.

    Each batch is normalised by its own statistics, as in training. The mean and the unbiased variance are pooled exactly over all batches,
    so that they do not depend on how the samples were divided (the first norm's do not at all). Nothing else is touched: neither the
    program, its mode, nor the random state. Statistics that come out as NaN or infinite are left as they were.

    Args:
        graph: its buffers are changed.
        split: where the samples come from; its targets are not used.
        samples: how many are drawn without replacement; all of them where the split has fewer.
        batch_size: at least 32, so that a batch's own statistics are not noise.
        seed: of the draw.
    """
    if not has_batch_norm(graph):
        return 0
    order = np.sort(np.random.default_rng(seed).permutation(split.n)[:samples])
    moments: dict[str, _Moments] = {}
    collector = _Collector(graph.module, moments)
    size = min(batch_size, len(order))
    usable = len(order) if len(order) % size == 0 or len(order) % size >= size // 2 else len(order) // size * size
    for inputs, _ in split.batches(size, order[:usable]):
        collector.run(*[torch.from_numpy(array) for array in inputs])
    count = 0
    for node in graph.module.graph.nodes:
        if not _keeps_statistics(node) or str(node.args[3].target) not in moments:
            continue
        found = moments.pop(str(node.args[3].target))
        variance = found.squares / max(1, found.count - 1)
        if found.count < 2 or not bool(torch.isfinite(found.mean).all() and torch.isfinite(variance).all()):
            continue
        attribute(graph.module, str(node.args[3].target)).copy_(found.mean)
        attribute(graph.module, str(node.args[4].target)).copy_(variance)
        count += 1
    return count
