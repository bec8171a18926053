"""What a saliency is: scores per unit, by which the units of a group are ranked for removal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planish.data import Split
from planish.graph.graph import Analysis, Graph

Scores = Mapping[str, NDArray[np.float64]]


class Saliency(Protocol):
    """Ranks the units of every group.

    Called once per search by the flow, before any option is made, on the original graph; `apply` removes the lowest units first.
    It may not change the graph, its mode, or torch's global random state. Implementations are registered in `planish.registry`.
    """

    needs: frozenset[str]
    """What it must be given: any of "data", "labels", "gradients"."""
    kind: str | None
    """What the outputs are to a loss without labels, "logits" or "values", as the flow sets it; None: guessed from the outputs."""

    def scores(self, graph: Graph, analysis: Analysis, split: Split, seed: int) -> dict[str, NDArray[np.float64]]:
        """The saliency of every unit of every group.

        Args:
            graph: the original; left as it was found.
            analysis: of that graph.
            split: calibration data, inputs in [n, ...]; unread unless `needs` holds "data".
            seed: of whatever is random; the same seed gives the same scores.

        Returns:
            group name -> [units]; at least 0, higher is dearer to lose, NaN where the unit must be kept.
        """
        ...
