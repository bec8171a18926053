"""One-shot compensation: every operator of a pruned net is refitted, in program order, to what the original computed in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from planish.data import Split
from planish.graph.graph import Graph
from planish.graph.replay import Replay, affordable, evaluating, in_batches, take
from planish.prune.repair import STRENGTHS, Repair, find_fits

_CHUNK = 64


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


@torch.no_grad()
def compensate(
    pruned: Graph,
    original: Graph,
    kept: Mapping[tuple[str, int], NDArray[np.int64]],
    split: Split,
    samples: int = 512,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Compensation:
    """Refits the convolutions and linear maps of a pruned net, in place, by ridge regression on the original's values; no gradients.

    Both nets run over the calibration samples side by side, once. Each operator in turn gets the weights W and intercept b that minimise

        E|t - W x - b|^2 + lambda |W - W_0|^2

    with x its input in the *pruned* net as refitted so far, W_0 its present weights, and t the original's output of the same node.
    Where the operator ends a residual branch (operator, batch norm, addition), t is what brings the *sum* to the original's sum: the
    branch so repairs what was lost on the residual stream before it, by a bypassed block say. The intercept goes into the bias, or into
    the batch norm that follows. Batch norms get the pruned net's own statistics; where the operator before one was fitted, its scale
    and shift are changed so that the fitted map stays what it is.

    Grouped and depthwise convolutions are fitted group by group. Left alone, by name in `Compensation.skipped`: operators that share
    a weight. Recurrent layers, attention and transposed convolutions are not fitted, but run.

    Args:
        pruned: changed in place: weights, biases, batch norms.
        original: what it was pruned from; its node names are those of `pruned` where both have the node.
        kept: (parameter, dimension) -> indices of the original's that survive.
        split: calibration inputs.
        samples: how many to use; fewer are, where the activations that are alive at once would exceed 1 GiB.
        strengths: lambda as a share of the mean diagonal of E[x x^T]; each operator takes the one that serves a held-out quarter of
            the samples best, or stays as it is.
        seed: of the positions that are sampled where a layer has more of them than are needed.
        progress: called with (nodes done, nodes).

    References:
        Frantar and Alistarh 2022, Optimal Brain Compression, section 4; Kurtic et al. 2023, ZipLM, section 3 (against the dense
        model's outputs).
    Differs:
        regression on all survivors at once instead of one update per removed structure, which has the same optimum; the target of a
        residual branch is the original's sum; the ridge pulls towards the present weights.
    """
    changed, teacher = Replay(pruned.module), Replay(original.module)
    flat = take(split, affordable(teacher, original, samples))
    count = len(flat[0])
    size = min(_CHUNK, -(-count // 4))  # four batches at least, of which one is held out
    chunks = in_batches(flat, size)
    fits, shared = find_fits(changed, teacher)
    named = (*pruned.module.named_parameters(remove_duplicate=False), *pruned.module.named_buffers(remove_duplicate=False))
    tensors = {name: value.detach() for name, value in named}
    with evaluating(pruned), evaluating(original):
        repair = Repair(
            changed,
            teacher,
            tensors,
            kept,
            [changed.start(chunk) for chunk in chunks],
            [teacher.start(chunk) for chunk in chunks],
            strengths,
            24,
            torch.Generator().manual_seed(seed),
            skipped=shared,
        )
        repair.run(fits, progress=progress)
    return Compensation(repair.fitted, repair.skipped, count)
