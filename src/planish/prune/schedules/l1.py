"""Sparse training by L1 on the scales of norms."""

from __future__ import annotations

from planish.prune.schedules.lasso import GroupLasso
from planish.prune.shaping import Shaped, Shaping


class L1:
    """See `planish.prune.shaping.Schedule`: group lasso on what norms hold of a unit alone, its scale and shift, where a group has any.

    References:
        Liu et al. 2017 (network slimming).
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained towards zeros; then the lowest norms are cut."""
        return GroupLasso(("affine",)).shape(shaping)
