"""Ridge regression of a linear operator's output on its input, from moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.graph.moments import Moments


def fit(train: Moments, held_out: Moments | None, current: Tensor, strengths: Sequence[float], centered: bool) -> Tensor:
    """The ridge solution at the strength that predicts held-out rows best, from all rows; `current` where none is better.

    Args:
        train: moments that each strength is tried on.
        held_out: moments that it is judged on; None where there are too few samples: then the first strength is taken.
        current: [g, o, c], what the weights are pulled towards.
        strengths: see `ridge`.
        centered: whether the intercept is free.

    Returns:
        [g, o, c], in double precision.
    """
    if held_out is None:
        return ridge(*train.second(centered)[:2], current, strengths[0])
    gram, cross, _ = train.second(centered)
    best, least = None, held_out.error(current, train.offset(current) if centered else None)
    for strength in strengths:
        solved = ridge(gram, cross, current, strength)
        error = held_out.error(solved, train.offset(solved) if centered else None)
        if error < least:
            best, least = strength, error
    return current if best is None else ridge(*(train + held_out).second(centered)[:2], current, best)


def ridge(gram: Tensor, cross: Tensor, current: Tensor, strength: float) -> Tensor:
    """argmin over W of E|y - W x|^2 + lambda |W - current|^2, lambda = strength times the mean diagonal of the Gram matrix.

    Args:
        gram: E[x x^T], [g, c, c].
        cross: E[x y^T], [g, c, o].
        current: [g, o, c], what the weights are pulled towards.
        strength: above 0; the smaller, the closer to plain least squares.

    Returns:
        [g, o, c], in double precision; `current` for a group whose inputs are all zero.
    """
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    penalty = strength * scale.clamp_min(torch.finfo(torch.float32).tiny)
    system = gram + torch.diag_embed(penalty[:, None].expand(-1, gram.shape[1]))
    right = cross + penalty[:, None, None] * current.double().transpose(1, 2)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):  # round-off in a float32 Gram matrix of collinear inputs: a stronger pull makes it definite
        return ridge(gram, cross, current, strength * 10) if strength < 1 else current.double()
    solution = torch.cholesky_solve(right, factor).transpose(1, 2)
    return torch.where((scale > 0)[:, None, None], solution, current.double())
