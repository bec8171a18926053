"""What a saliency and a redundancy are: two ways to say which units of a group go first, and what they may look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from planish.data import Split
from planish.graph.graph import Analysis, Graph


@dataclass(frozen=True)
class Material:
    """What a saliency or a redundancy may look at.

    Args:
        split: calibration inputs, [n, ...] each.
        labelled: samples with targets, or None where the job has none.
        loss: (flat outputs, targets) -> the mean loss over samples, a scalar; None where nothing fits outputs and targets.
        kind: what the outputs are to a loss without labels, "logits" or "values"; None: guessed from the outputs.
    """

    split: Split
    labelled: Split | None = None
    loss: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None
    kind: str | None = None


class Saliency(Protocol):
    """Scores the units of every group.

    Called once per search by the flow, before any option is made, on the original graph; the lowest units are removed first.
    It may not change the graph, its mode, or torch's global random state. Implementations are registered in `planish.registry`.
    """

    needs: frozenset[str]
    """What it must be given: any of "data", "labels", "gradients"."""

    others: Sequence[str] = ()
    """Groups that it can say nothing of, after `scores`: these have the scores of `planish.prune.saliency.magnitude.Magnitude`."""

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """The saliency of every unit of every group.

        Args:
            graph: the original; left as it was found.
            analysis: of that graph.
            material: calibration data; its `split` is unread unless `needs` holds "data", its `labelled` unless it holds "labels".
            seed: of whatever is random; the same seed gives the same scores.

        Returns:
            group name -> [units]; at least 0, higher is dearer to lose, NaN where the unit must be kept.
        """
        ...


class Redundancy(Protocol):
    """Finds units of a group that do the same, by clustering: of each cluster one unit stays, and takes over what the others carried.

    Implementations are registered in `planish.registry`; `planish.prune.order` makes features of units and merges of clusters.
    """

    def clusters(self, features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
        """The cluster of each unit.

        Args:
            features: [units, dimensions], finite; alike units are close.
            count: how many clusters are wanted, in [1, units). Fewer may be given, where the method finds fewer, but not more.
            seed: of whatever is random; the same seed gives the same clusters.

        Returns:
            [units], a number for each cluster.
        """
        ...
