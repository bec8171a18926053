"""A mixture of Gaussians, fitted by expectation and maximisation: clusters of any spread along each axis."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

_AXES = 16


class Mixture:
    """See `planish.prune.contract.Redundancy`. Diagonal covariances on the first sixteen principal axes, since units are few and features many.

    References:
        Dempster, Laird and Rubin 1977, Maximum likelihood from incomplete data via the EM algorithm.
    """

    def clusters(self, features: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
        """Fewer clusters come back where a component is nobody's most likely one."""
        from sklearn.decomposition import PCA
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        distinct = len(np.unique(features, axis=0))
        if distinct == 1:
            return np.zeros(len(features), np.int64)
        reduced = PCA(min(_AXES, *features.shape), svd_solver="full").fit_transform(features)
        spread = float(reduced.var(0).mean()) or 1.0
        model = GaussianMixture(min(count, distinct), covariance_type="diag", reg_covar=1e-3 * spread, max_iter=50, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # units are few: 50 rounds are enough, or it does not matter
            return np.asarray(model.fit(reduced).predict(reduced), np.int64)
