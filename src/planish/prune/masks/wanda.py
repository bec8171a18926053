"""Masking by magnitude times the norm of what the weight multiplies."""

from __future__ import annotations

from torch import Tensor

from planish.prune.masks.contract import kept
from planish.prune.masks.pattern import Pattern


class Wanda:
    """The weights with the least |w| |x| of each row go, the others stay as they are.

    References: Sun et al., A simple and effective pruning approach for large language models, 2023, eq. 1 and algorithm 1.
    """

    needs: frozenset[str] = frozenset({"data"})

    def masked(self, weight: Tensor, gram: Tensor | None, pattern: Pattern) -> Tensor:
        assert gram is not None
        scores = weight.abs() * gram.diagonal().sqrt()
        return weight.where(kept(pattern, scores, by_row=True), 0.0)
