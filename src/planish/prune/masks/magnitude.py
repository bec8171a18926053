"""Masking by magnitude: the weights closest to zero go."""

from __future__ import annotations

from torch import Tensor

from planish.prune.masks.contract import kept
from planish.prune.masks.pattern import Pattern


class MagnitudeMask:
    """The smallest weights of the whole operator go, the others stay as they are.

    References: Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """

    needs: frozenset[str] = frozenset()

    def masked(self, weight: Tensor, gram: Tensor | None, pattern: Pattern) -> Tensor:
        return weight.where(kept(pattern, weight.abs()), 0.0)
