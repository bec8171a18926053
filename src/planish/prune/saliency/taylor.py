"""Second-order Taylor saliency: how much the outputs would move if a unit were masked, by the Fisher information of its mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Replay, evaluating, take
from planish.prune.contract import Material
from planish.prune.slopes import mask_slopes
from planish.prune.units import finite


class Taylor:
    """s_u = 1/2 E[(dl/dm_u)^2], the second-order term of the divergence when the mask m_u of unit u goes from 1 to 0.

    The divergence from the original's own outputs has no first-order term, and its Hessian is the generalised Gauss-Newton matrix, of
    which the diagonal is E[(dl/dm_u)^2] for the random probe l of `Divergence.curvature_probe`: no label is read. The gradient is summed
    over `micro_batch` samples before it is squared: samples are independent with mean zero, so this stays unbiased, and costs one
    backward pass for several samples.

    Args:
        samples: calibration samples; the relative standard error of a score is about sqrt(2 micro_batch / samples) for a unit on
            which all samples depend, more where few do.
        micro_batch: samples whose gradients are summed before squaring.

    References:
        Kwon et al. 2022, A fast post-training pruning framework for Transformers, equation 8 (Fisher of masks).
        Molchanov et al. 2019, Importance estimation for neural network pruning, equation 8.
    Differs:
        the exact curvature of the KL divergence (or of the squared error) instead of the gradient of a labelled loss.
    """

    needs: frozenset[str] = frozenset({"data", "gradients"})
    others: Sequence[str] = ()

    def __init__(self, samples: int = 512, micro_batch: int = 4) -> None:
        self.samples, self.micro_batch = samples, micro_batch

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit whose gradient is not finite gets NaN."""
        generator = torch.Generator().manual_seed(seed)
        flat = take(material.split, self.samples)
        replay = Replay(graph.module)
        with evaluating(graph), torch.inference_mode():
            reference = replay.run(replay.start([value[:64] for value in flat]))
        measure = divergence([value.clone() for value in reference], material.kind)
        totals = {name: np.zeros(group.units) for name, group in analysis.groups.items()}
        for slopes in mask_slopes(
            graph, analysis, flat, self.micro_batch, lambda outputs, rows: measure.curvature_probe(outputs, generator)
        ):
            for name, slope in slopes.items():
                totals[name] += slope**2
        return {name: finite(0.5 * total / len(flat[0])) for name, total in totals.items()}
