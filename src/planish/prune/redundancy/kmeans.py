"""K-means: as many centres as units may stay."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray


class KMeans:
    """See `planish.prune.contract.Redundancy`; Lloyd's algorithm from four k-means++ starts."""

    def clusters(self, features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
        """Fewer clusters come back where fewer features differ."""
        from sklearn.cluster import KMeans as Clustering
        from sklearn.exceptions import ConvergenceWarning

        distinct = len(np.unique(features, axis=0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it warns where features that differ by round-off are one cluster
            return np.asarray(Clustering(min(count, distinct), n_init=4, random_state=seed).fit_predict(features), np.int64)
