"""Random scores: the baseline that a criterion must beat to be worth its time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material


class Random:
    """Every unit gets a uniform random score; a group's depend on the seed and its name alone."""

    needs: frozenset[str] = frozenset()
    others: Sequence[str] = ()

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`."""
        return {name: np.random.default_rng([seed, *name.encode()]).random(group.units) for name, group in analysis.groups.items()}
