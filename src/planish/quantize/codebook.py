"""Codebooks: the few values that a weight's numbers are allowed to take, fitted to them by K-means or by a mixture of Gaussians."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from planish.graph.fake_quantize import fake_codebook

_WATCHED = 1 << 15


@dataclass(frozen=True)
class CodebookQuantizer:
    """Values that weights are rounded to.

    Args:
        values: float32, ascending, [count].
    """

    values: Tensor

    def rounded(self, weight: Tensor) -> Tensor:
        """Every number at the nearest value."""
        return fake_codebook(weight, self.values)


def fit_codebook(weight: Tensor, method: str, count: int, seed: int = 0) -> CodebookQuantizer:
    """The codebook of a weight.

    Args:
        weight: float, any shape; at most 32,768 of its numbers are looked at, evenly spread, the smallest and the largest among them.
        method: "kmeans" (least squared error) or "mixture" (means of Gaussians by EM: values where numbers are dense).
        count: how many values, of which the one nearest to zero is zero, so that what was masked stays so; fewer where fewer numbers differ.
        seed: of the starts.

    References:
        Han et al., Deep Compression, 2016, section 3 (K-means); Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing, 1992 (mixtures).
    """
    numbers = weight.detach().flatten().double().numpy()
    step = max(1, len(numbers) // _WATCHED)
    watched = np.concatenate([numbers[:: step + 1 - step % 2], [numbers.min(), numbers.max()]])[:, None]
    count = min(count, len(np.unique(watched)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where numbers coincide or EM ends early; both are fine here
        if method == "mixture":
            from sklearn.mixture import GaussianMixture

            spread = float(watched.var()) or 1.0
            # in units of their spread, so that the floor under variances means the same for every weight
            found = GaussianMixture(count, random_state=seed, reg_covar=1e-6, max_iter=200).fit(watched / np.sqrt(spread)).means_ * np.sqrt(
                spread
            )
        else:
            from sklearn.cluster import KMeans

            found = KMeans(count, n_init=6, random_state=seed).fit(watched).cluster_centers_
    values = np.unique(found.astype(np.float32))
    if len(values) == 1:  # all weights are alike
        values = np.unique(np.append(values, np.float32(0.0)))
    values[np.abs(values).argmin()] = 0.0
    return CodebookQuantizer(torch.from_numpy(values))
