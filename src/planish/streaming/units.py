"""Which hidden units of feed-forward layers may leave while weights stream past, and which do, by optimal brain surgery."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish.graph.graph import Analysis, Group
from planish.graph.moments import Moments
from planish.prune.saliency.obs import in_turn, reader_of

_DAMPING = 1e-3
_MULTIPLE = 32
"""Widths stay a multiple of this, so that groups of weights are whole."""


@dataclass(frozen=True)
class Hidden:
    """A feed-forward layer's hidden units.

    Args:
        group: of the analysis.
        reader: the weight whose columns they are.
        makers: the weights and biases whose rows they are.
    """

    group: Group
    reader: str
    makers: tuple[str, ...]


def hidden_units(analysis: Analysis, rounded: Collection[str], shapes: Mapping[str, torch.Size]) -> list[Hidden]:
    """The layers whose hidden units linear maps with rounded weights make, and one reads.

    Args:
        analysis: of the program.
        rounded: weights that are rounded as they stream past, `[outputs, inputs]`.
        shapes: of all parameters.
    """
    found = []
    for group in analysis.groups.values():
        readers = [name for (name, axis), role in group.roles.items() if role == "in"]
        makers = [name for (name, axis), role in group.roles.items() if role == "out" and axis == 0]
        is_plain = len(readers) == 1 and len(readers) + len(makers) == len(group.unit_of)
        wide = all(len(shapes[name]) == 1 or name in rounded for name in (*readers, *makers))
        is_one_to_one = all(len(of) == group.units and (of >= 0).all() for of in group.unit_of.values())
        if is_plain and wide and is_one_to_one and group.exact and not (group.pinned or group.recurs or group.routed or group.idle):
            found.append(Hidden(group, readers[0], tuple(makers)))
    return found


def width_of(hidden: Hidden, share: float) -> int:
    """How many units stay where `share` of them leave, at most."""
    return max(-(-round((1 - share) * hidden.group.units) // _MULTIPLE) * _MULTIPLE, 1)


def survivors(hidden: Hidden, weight: Tensor, moments: Moments, share: float) -> NDArray[np.int64] | None:
    """The units that stay once about `share` of them left, each time the one that costs its reader least; None where nothing can be told.

    Args:
        hidden: the layer.
        weight: the reader's, `[outputs, units]`.
        moments: of what it reads.
        share: of the units that leave, at most.
    """
    units, width = hidden.group.units, width_of(hidden, share)
    reader = reader_of(weight, moments, hidden.group, hidden.group.unit_of[hidden.reader, 1])
    if reader is None or width >= units:
        return None
    scores = in_turn([reader], units)
    return np.sort(np.argsort(-scores, kind="stable")[:width])


def refitted(weight: Tensor, gram: Tensor, kept: NDArray[np.int64]) -> Tensor:
    """The columns that stay, with what the others gave fitted into them by least squares.

    Args:
        weight: `[outputs, columns]`.
        gram: E[x x^T], float64, `[columns, columns]`.
        kept: columns.
    """
    at = torch.from_numpy(kept)
    small = gram[at][:, at]
    small = small + torch.eye(len(at), dtype=small.dtype) * (_DAMPING * small.diagonal().mean() + torch.finfo(torch.float32).tiny)
    lost = torch.ones(len(gram), dtype=torch.bool)
    lost[at] = False
    away = lost.nonzero()[:, 0]
    moved = torch.linalg.solve(small, gram[at][:, away] @ weight[:, away].double().T)  # [kept, outputs]
    found: Tensor = weight[:, at] + moved.T.to(weight.dtype)
    return found
