"""The default: exact updates where they take seconds, the Fisher information of masks elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material
from planish.prune.saliency.obs import exact_scores
from planish.prune.saliency.taylor import Taylor

_MOST_WORK = 1.5e11
"""Multiply-accumulates in double precision: some ten seconds of two cores."""


class Automatic:
    """`SurgeonOrder`'s scores for the groups that a convolution or linear map reads, `Taylor`'s for the others and for those that are too wide.

    On ResNets the exact updates lose least of all criteria (docs/criteria.md), but they take a time that grows with the cube of the columns that
    are read, and say nothing of what only a product reads (the places in queries and keys). Scores rank units within a group only, so that two
    kinds of them may stand side by side.

    Args:
        samples: calibration samples of the updates.
    """

    needs: frozenset[str] = frozenset({"data", "gradients"})
    others: Sequence[str] = ()

    def __init__(self, samples: int = 256) -> None:
        self.samples = samples

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a group with activations or weights that are not finite gets NaN."""
        found = exact_scores(graph, analysis, material, self.samples, _MOST_WORK)
        if len(found) == len(analysis.groups):
            return found
        return {**Taylor().scores(graph, analysis, material, seed), **found}
