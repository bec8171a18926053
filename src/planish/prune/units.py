"""The indices of a tensor that belong to each unit of a group: sums over them, and what they hold."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def by_unit(tensor: Tensor, dim: int, unit_of: NDArray[np.int64], units: int) -> NDArray[np.float64]:
    """The sum of `tensor` over everything that belongs to each unit.

    Args:
        tensor: any shape.
        dim: the dimension that the group spans.
        unit_of: [tensor.shape[dim]], the unit of each index, or -1.
        units: how many there are.

    Returns:
        [units]
    """
    sums = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).double().sum(1)
    mine = torch.from_numpy(np.asarray(unit_of))
    total = torch.zeros(units, dtype=torch.float64)
    total.index_add_(0, mine[mine >= 0], sums[mine >= 0])
    return total.numpy()


def members(unit_of: NDArray[np.int64], units: int) -> NDArray[np.int64]:
    """The indices that belong to each unit, [units, indices per unit], in their order along the dimension."""
    order = np.argsort(unit_of, kind="stable")
    return order[np.count_nonzero(unit_of < 0) :].reshape(units, -1)


def columns(unit_of: NDArray[np.int64], units: int, each: int) -> NDArray[np.int64]:
    """The columns of a flattened weight that read each unit, [units, columns per unit].

    Args:
        unit_of: the unit of each input channel, or -1.
        units: how many there are.
        each: columns of a channel: the positions of the kernel.
    """
    return (members(unit_of, units)[:, :, None] * each + np.arange(each)).reshape(units, -1)


def vectors(tensor: Tensor, dim: int, unit_of: NDArray[np.int64], units: int) -> NDArray[np.float64]:
    """Everything that belongs to each unit, [units, numbers per unit]; arguments as for `by_unit`."""
    rows = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1).double().numpy()
    return np.ascontiguousarray(rows[members(unit_of, units)].reshape(units, -1))


def unit_mean(values: NDArray[np.float64]) -> float:
    """The mean over the units whose value is finite; 0 where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0


def relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values as shares of their mean over units, so that what is measured in several places can be added."""
    average = unit_mean(values)
    return values / average if average > 0 else values


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values with NaN, which keeps a unit, wherever they are not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def indices_of(unit_of: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices along a dimension that belong to any of `units`."""
    return np.flatnonzero(np.isin(unit_of, units))


def lowest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` units that go first: lowest score first, ties by index, NaN never (fewer come back where too many are NaN)."""
    order = np.argsort(scores, kind="stable")
    return order[: min(count, int(np.count_nonzero(~np.isnan(scores))))].astype(np.int64)
