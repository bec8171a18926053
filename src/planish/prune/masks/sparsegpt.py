"""Masking by second order: column after column goes what costs least, and the columns behind make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.graph.moments import root_of_inverse
from planish.prune.masks.contract import highest, kept
from planish.prune.masks.pattern import Pattern

_BLOCK, _BLOCKS = 16, 32
"""Columns of a block at least, and blocks of a weight at most: with each, the zeros that are left are shared out anew."""
_DAMPING = 0.01


class SparseGpt:
    """Optimal brain surgery in the order of the columns: all rows share the inverse Hessian of the columns that are left.

    With H = E[x x^T] + lambda I and U^T U = H^-1 (U upper triangular), row i of U holds what the columns behind i are updated by when
    column i changes, and w^2 / U_ii^2 is what zeroing w costs. Masks are chosen in blocks of columns, once those before were dealt with.

    References: Frantar and Alistarh, SparseGPT, 2023, algorithm 1; lambda is 1 % of the mean diagonal as there.
    Differs: a block takes as many of the zeros as fall on it when all columns that are left compete, not its share: columns with much behind
        them are cheaper, and where inputs vary together that is a tenth of the error (decision 017). An input that is always zero goes first,
        and keeps its weight where it may stay. The damping is ten times as much where rounding leaves the Hessian indefinite.
    """

    needs: frozenset[str] = frozenset({"data"})

    def masked(self, weight: Tensor, gram: Tensor | None, pattern: Pattern) -> Tensor:
        assert gram is not None
        left, out = weight.clone(), torch.empty_like(weight)
        rows, columns = weight.shape
        is_dead = gram.diagonal() <= 0
        upper = root_of_inverse(gram, _DAMPING)
        goes = rows * pattern.gone(columns)
        step = max(_BLOCK, -(-columns // _BLOCKS))
        step += -step % pattern.of if pattern.of else 0
        for start in range(0, columns, step):
            block = slice(start, min(start + step, columns))
            own, now, errors = upper[block, block], left[:, block], torch.empty_like(left[:, block])
            cost, dead = own.diagonal(), is_dead[block]
            stays = torch.ones_like(now, dtype=torch.bool)
            if not pattern.of:
                scores = _scores(left[:, start:], upper.diagonal()[start:], is_dead[start:])
                stays = highest(scores.reshape(1, -1), goes).reshape(scores.shape)[:, : now.shape[1]]
                goes -= int((~stays).sum())
            for i in range(now.shape[1]):
                if pattern.of and i % pattern.of == 0:
                    group = slice(i, i + pattern.of)
                    stays[:, group] = kept(pattern, _scores(now[:, group], cost[group], dead[group]))
                out[:, start + i] = now[:, i].where(stays[:, i], 0.0)
                errors[:, i] = (now[:, i] / cost[i]).where(~stays[:, i], 0.0)
                now[:, i + 1 :] -= errors[:, i, None] * own[i, i + 1 :]
            left[:, block.stop :] -= errors @ upper[block, block.stop :]
        return out


def _scores(weight: Tensor, cost: Tensor, is_dead: Tensor) -> Tensor:
    return (weight / cost).square().where(~is_dead, 0.0)
