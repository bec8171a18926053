"""DBSCAN: units closer than a distance are one, and the distance is what leaves as many as may stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-6


class Dbscan:
    """See `planish.prune.contract.Redundancy`. Where others ask for a number of clusters, DBSCAN asks for a radius: the smallest is taken
    that leaves no more clusters than wanted, units that are alone counted.

    Every unit with a neighbour is a core (`min_samples` = 2), which makes clusters chains of neighbours: a cluster may be long, and fewer
    clusters than wanted may come back where several join at one radius. At which radius how many are left is what single linkage says.

    References:
        Ester et al. 1996, A density-based algorithm for discovering clusters.
    """

    def clusters(self, features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
        """No random choice is made."""
        from scipy.cluster.hierarchy import linkage
        from sklearn.cluster import DBSCAN

        joins = linkage(features, "single")[:, 2]  # the radius of each join, ascending; so many are needed
        radius = float(joins[len(features) - count - 1])
        found = DBSCAN(eps=max(radius + _ROUNDING * float(joins[-1]), np.finfo(float).tiny), min_samples=2).fit_predict(features)
        labels = np.asarray(found, np.int64)
        alone = labels < 0
        labels[alone] = labels.max(initial=-1) + 1 + np.arange(np.count_nonzero(alone))
        return labels
