"""Second moments of a linear operator's inputs and outputs: enough for every regression, and the Hessian of its squared error."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums over rows of x x^T, x y^T and their means, per group: enough for every regression of y on a subset of x.

    Args:
        groups: independent systems g.
        columns: inputs c of each.
        outputs: outputs o of each; 0 where only the input's moments are wanted.
    """

    def __init__(self, groups: int, columns: int, outputs: int = 0) -> None:
        self.rows = 0
        self.sum_x = torch.zeros(groups, columns, dtype=torch.float64)
        self.sum_y = torch.zeros(groups, outputs, dtype=torch.float64)
        self.sum_yy = torch.zeros(groups, outputs, dtype=torch.float64)
        self.gram = torch.zeros(groups, columns, columns)
        self.cross = torch.zeros(groups, columns, outputs)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows: x is [groups, rows, columns], y is [rows, groups * outputs] in the order of the weight's output dimension."""
        x = x.float()
        self.rows += x.shape[1]
        self.sum_x += x.sum(1, dtype=torch.float64)
        self.gram += x.transpose(1, 2) @ x
        if y is not None:
            y = y.float().reshape(len(y), len(x), -1).movedim(1, 0)
            self.sum_y += y.sum(1, dtype=torch.float64)
            self.sum_yy += y.square().sum(1, dtype=torch.float64)
            self.cross += x.transpose(1, 2) @ y

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        total = Moments(*self.cross.shape)
        total.rows = self.rows + other.rows
        for name in ("sum_x", "sum_y", "sum_yy", "gram", "cross"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def second(self, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(x x^T [g, c, c], x y^T [g, c, o], y^2 [g, o]) per row, about the means where `centered`."""
        gram, cross = self.gram.double() / self.rows, self.cross.double() / self.rows
        power = self.sum_yy / self.rows
        if centered:
            x, y = self.sum_x / self.rows, self.sum_y / self.rows
            gram = gram - x[:, :, None] * x[:, None, :]
            cross = cross - x[:, :, None] * y[:, None, :]
            power = power - y.square()
        return gram, cross, power

    def offset(self, weight: Tensor) -> Tensor:
        """The intercept that goes with a weight [g, o, c]: E[y] - W E[x], [g * o]."""
        return ((self.sum_y - (weight @ self.sum_x[:, :, None])[:, :, 0]) / self.rows).reshape(-1)

    def error(self, weight: Tensor, offset: Tensor | None = None) -> float:
        """E|y - W x - b|^2 summed over outputs.

        Args:
            weight: [g, o, c].
            offset: b, [g * o]; None: no intercept.
        """
        gram, cross, power = self.second(centered=offset is not None)
        explained = 2 * (weight * cross.transpose(1, 2)).sum(2) - ((weight @ gram) * weight).sum(2)
        error = (power - explained).sum().clamp_min(0)
        return float(error if offset is None else error + (self.offset(weight) - offset).square().sum())


def root_of_inverse(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Hessian: row i holds what the columns behind i change by when i does.

    With the columns in reverse order H = L L^T, so that U is the inverse of L with its rows and columns reversed again.

    Args:
        gram: E[x x^T], [..., columns, columns], float64, finite. An input that is always zero counts as one that varies with no other.
        damping: what is added to the diagonal, as a share of its mean; ten times as much where round-off leaves the Hessian indefinite.
    """
    assert bool(torch.isfinite(gram).all())
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = gram.flip(-2, -1)
        damped.diagonal(dim1=-2, dim2=-1).add_((damping * scale + (diagonal <= 0) * scale).flip(-1))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            # each of these is as large as the Hessian of a model's widest layer, so that one is written over
            damped.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
            inverse = torch.linalg.solve_triangular(lower, damped, upper=False)
            del lower, damped
            root: Tensor = inverse.flip(-2, -1)
            return root
        damping *= 10
