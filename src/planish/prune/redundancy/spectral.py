"""Spectral clustering: k-means on the smoothest functions of a graph that joins units that are alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planish.prune.redundancy.kmeans import KMeans

_AXES = 64


class Spectral:
    """See `planish.prune.contract.Redundancy`. The affinity of two units is exp(-d^2 / 2 s^2), s the median distance of nearest neighbours.

    References:
        von Luxburg 2007, A tutorial on spectral clustering (the normalised one, by the random walk's Laplacian).
    Differs:
        at most 64 eigenvectors, however many clusters are wanted.
    """

    def clusters(self, features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
        """Fewer clusters come back where fewer features differ."""
        from sklearn.manifold import spectral_embedding

        squares = np.square(features).sum(1)
        distances = np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0.0)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(1)
        scale = float(np.median(nearest[np.isfinite(nearest)])) if len(nearest) > 1 else 0.0
        np.fill_diagonal(distances, 0.0)
        affinity = np.exp(-distances / (2 * scale)) if scale > 0 else (distances <= 0).astype(float)
        affinity += 1e-9  # a graph in one piece: otherwise the embedding is not unique
        embedded = spectral_embedding(affinity, n_components=min(count, _AXES, len(features) - 1), random_state=seed, drop_first=False)
        return KMeans().clusters(embedded, count, seed)
