"""Geometric median: units whose weights are close to everybody else's can be made up for by the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material
from planish.prune.units import finite, relative, vectors


class GeometricMedian:
    """s_u = the mean over the group's weights that issue units of sum over v of ||w_u - w_v||, relative to the average unit.

    A unit near the geometric median of its group has the smallest sum: what it gives lies within what the others give, however large it is.
    A unit whose weights are all zero gives nothing, wherever the others lie: its score is 0.

    References:
        He et al. 2019, Filter pruning via geometric median, equation 5.
    Differs:
        coupled layers' distances are added, each relative to its mean; units of zeros go first.
    """

    needs: frozenset[str] = frozenset()
    others: Sequence[str] = ()

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit with a weight that is not finite gets NaN."""
        parameters = dict(graph.module.named_parameters())
        result: dict[str, NDArray[np.float64]] = {}
        for name, group in analysis.groups.items():
            held = [key for key in group.unit_of if key[0] in parameters]
            issuing = [key for key in held if group.roles[key] == "out" and parameters[key[0]].dim() > 1] or held
            shares = []
            for key in issuing:
                rows = vectors(parameters[key[0]], key[1], group.unit_of[key], group.units)
                usable = np.isfinite(rows).all(1)
                sums = np.full(group.units, np.nan)
                points = torch.from_numpy(rows[usable])
                sums[usable] = torch.cdist(points, points).sum(1).numpy()
                sums[~rows.any(1)] = 0.0
                shares.append(relative(sums))
            result[name] = finite(np.mean(shares, axis=0)) if shares else np.full(group.units, np.nan)
        return result
