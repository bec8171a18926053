"""Second-order Taylor saliency: how much the outputs would move if a unit were masked, by the Fisher information of its mask."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.replay import Replay, evaluating, take
from planish.prune.units import by_unit


class Taylor:
    """s_u = 1/2 E[(dl/dm_u)^2], the second-order term of the divergence when the mask m_u of unit u goes from 1 to 0.

    The divergence from the original's own outputs has no first-order term, and its Hessian is the generalised Gauss-Newton matrix, of
    which the diagonal is E[(dl/dm_u)^2] for the random probe l of `Divergence.curvature_probe`: no label is read. The mask sits where
    the unit is read: dl/dm_u is the sum of gradient times weight over the columns that contract u (over the rows that issue it,
    where no weight reads it). The gradient is summed over `micro_batch` samples before it is squared: samples are independent with mean
    zero, so this stays unbiased, and costs one backward pass for several samples.

    Args:
        samples: calibration samples; the relative standard error of a score is about sqrt(2 micro_batch / samples) for a unit on
            which all samples depend, more where few do.
        micro_batch: samples whose gradients are summed before squaring.
        kind: "logits" or "values"; None guesses from the outputs.

    References:
        Kwon et al. 2022, A fast post-training pruning framework for Transformers, equation 8 (Fisher of masks).
        Molchanov et al. 2019, Importance estimation for neural network pruning, equation 8.
    Differs:
        the exact curvature of the KL divergence (or of the squared error) instead of the gradient of a labelled loss.
    """

    needs: frozenset[str] = frozenset({"data", "gradients"})

    def __init__(self, samples: int = 512, micro_batch: int = 4, kind: str | None = None) -> None:
        self.samples, self.micro_batch, self.kind = samples, micro_batch, kind

    def scores(self, graph: Graph, analysis: Analysis, split: Split, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit whose gradient is not finite gets NaN."""
        generator = torch.Generator().manual_seed(seed)
        replay, flat = Replay(graph.module), take(split, self.samples)
        keys = {name: _mask_keys(group, graph) for name, group in analysis.groups.items()}
        wanted = sorted({key[0] for mine in keys.values() for key in mine})
        parameters = {n: p.detach() for n, p in graph.module.named_parameters(remove_duplicate=False) if n in wanted}
        totals = {name: np.zeros(group.units) for name, group in analysis.groups.items()}
        with evaluating(graph):
            with torch.inference_mode():
                reference = replay.run(replay.start([value[:64] for value in flat]))
            measure = divergence([value.clone() for value in reference], self.kind)
            for start in range(0, len(flat[0]), self.micro_batch):
                leaves = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
                chunk = [value[start : start + self.micro_batch] for value in flat]
                probe = measure.curvature_probe(replay.run(replay.start(chunk), parameters=leaves), generator)
                gradients = torch.autograd.grad(probe, [leaves[name] for name in wanted], allow_unused=True)
                products = {
                    name: gradient * parameters[name] for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None
                }
                for name, group in analysis.groups.items():
                    slopes = [by_unit(products[p], d, group.unit_of[p, d], group.units) for p, d in keys[name] if p in products]
                    totals[name] += np.sum(slopes, axis=0) ** 2 if slopes else np.nan
        result = {name: 0.5 * total / len(flat[0]) for name, total in totals.items()}
        return {name: np.where(np.isfinite(score), score, np.nan) for name, score in result.items()}


def _mask_keys(group: Group, graph: Graph) -> list[tuple[str, int]]:
    trainable = {name for name, p in graph.module.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    for role in ("in", "out", "affine"):
        keys = [key for key, its in group.roles.items() if its == role and key[0] in trainable]
        if keys:
            return keys
    return []
