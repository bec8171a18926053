"""Saliencies that read labels: first-order Taylor, and the empirical Fisher information of masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from planish.errors import DataError
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import spread, take
from planish.prune.contract import Material
from planish.prune.slopes import mask_slopes
from planish.prune.units import finite


def unlabelled(name: str) -> DataError:
    """What a saliency that needs labels says of a job without any."""
    return DataError(
        f"saliency: {name} needs samples with labels that fit the outputs; this job has none; "
        "give train with targets (and `loss`, where the metric says nothing of one), or choose one without labels, such as taylor"
    )


class FirstTaylor:
    """s_u = E|dL_i/dm_u| over samples i, how much the labelled loss L_i would change to first order if unit u were masked.

    Args:
        samples: labelled samples, one backward pass each.

    References:
        Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient inference, equation 7.
    Differs:
        the mask sits on the weights that read the unit, which gives the same derivative as one on its activation.
    """

    needs: frozenset[str] = frozenset({"data", "labels", "gradients"})
    others: Sequence[str] = ()

    def __init__(self, samples: int = 512) -> None:
        self.samples = samples

    def term(self, slope: NDArray[np.float64]) -> NDArray[np.float64]:
        """What one sample adds to the scores."""
        return np.abs(slope)

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit whose gradient is not finite gets NaN.

        Raises:
            DataError: there are no labels, or none that a loss fits.
        """
        labelled, loss = material.labelled, material.loss
        if labelled is None or labelled.targets is None or loss is None:
            raise unlabelled(type(self).__name__)
        flat = take(labelled, self.samples)
        targets = torch.from_numpy(np.array(labelled.targets[spread(labelled, self.samples)]))
        totals = {name: np.zeros(group.units) for name, group in analysis.groups.items()}
        count = 0
        for slopes in mask_slopes(graph, analysis, flat, 1, lambda outputs, rows: loss(outputs, targets[rows])):
            count += 1
            for name, slope in slopes.items():
                totals[name] += self.term(slope)
        return {name: finite(total / count) for name, total in totals.items()}


class Fisher(FirstTaylor):
    """s_u = 1/2 E[(dL_i/dm_u)^2] over samples i: the diagonal of the empirical Fisher information of masks, with true labels.

    References:
        Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning, equation 8.
        Kwon et al. 2022, A fast post-training pruning framework for Transformers, equation 8.
    """

    def term(self, slope: NDArray[np.float64]) -> NDArray[np.float64]:
        """What one sample adds to the scores."""
        return 0.5 * slope**2
