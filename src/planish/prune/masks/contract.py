"""What a method for masks is: who chooses the zeros of a weight matrix, and changes the weights that stay."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from planish.prune.masks.pattern import Pattern


class Masking(Protocol):
    """Masks one weight matrix. Called for one operator after the other, in the order of the program, on what the masked net computes so far.

    Implementations are registered in `planish.registry` and keep `planish.testing.masking`.
    """

    needs: frozenset[str]
    """Holds "data" where it looks at the inputs' second moments."""

    def masked(self, weight: Tensor, gram: Tensor | None, pattern: Pattern) -> Tensor:
        """A copy of the weights with zeros as the pattern has it; those that stay may have changed.

        Args:
            weight: [rows, columns], float64; the groups of a pattern N:M are consecutive columns, and there is no column beyond them.
                Left as it is.
            gram: E[x x^T] of the inputs, [columns, columns], float64, not centered; None unless `needs` holds "data".
            pattern: what is to be zero: `rows * pattern.gone(columns)` weights.

        Returns:
            [rows, columns], float64. A weight that is no number stays.
        """
        ...


def kept(pattern: Pattern, scores: Tensor, *, by_row: bool = False) -> Tensor:
    """The mask that keeps the highest scores.

    Args:
        pattern: how many go, and whether groups bind them.
        scores: [rows, columns], at least 0; NaN is kept. Of equal scores the later ones stay.
        by_row: whether each row has equally many zeros; else they fall where the scores are lowest. Without groups only.

    Returns:
        [rows, columns], True where a weight stays.
    """
    rows, columns = scores.shape
    if pattern.of:
        return highest(scores.reshape(-1, pattern.of), pattern.of - pattern.kept).reshape(rows, columns)
    goes = pattern.gone(columns)
    return highest(scores, goes) if by_row else highest(scores.reshape(1, -1), goes * rows).reshape(rows, columns)


def highest(scores: Tensor, goes: int) -> Tensor:
    """True for all but the `goes` lowest scores of each row, as `kept` counts NaN and equal ones."""
    order = torch.where(scores.isnan(), torch.inf, scores).argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :goes], False)
