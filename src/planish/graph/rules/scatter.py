"""Gathering and scattering along one dimension, by indices that are data: that dimension is fixed, the others are element-wise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("scatter", "scatter_add", "scatter_reduce", "gather")
def by_elements(step: Step) -> Result | None:
    """An index for every element: along the other dimensions, element `j` of the index speaks of element `j` of what it is used on.

    An index (or what is scattered) that is shorter than the tensor along such a dimension speaks of its first elements alone: not covered
    where that dimension has ids.
    """
    x, index, source = step.tensor("self"), step.tensor("index"), step.val("src")
    dim = int(step.value("dim")) % max(1, x.rank)
    used = [val for val in (x, index, source) if val is not None]
    for d in range(x.rank):
        if d != dim and any(d in val.ids for val in used) and len({val.shape[d] for val in used}) > 1:
            return None
    if index.points is not None and dim in x.ids and len(index.points) == x.shape[dim]:
        step.looked_up.append(index)
        return _at_positions(step, x, dim, index.points, [val for val in used if val is not x])
    return _along(step, x, dim, [val for val in used if val is not x])


def _at_positions(step: Step, x: Val, dim: int, points: Tensor, others: list[Val]) -> Val:
    """Along the dimension that a router picked its positions in, what is looked up or written goes where the router's own scores go."""
    step.ids.tie(x.ids[dim], points, step.why)
    kept = Val(x.shape, {d: ids for d, ids in x.ids.items() if d != dim}, x.weak - {dim})
    out = _along(step, kept, dim, others)
    if step.name != "gather":
        step.ids.put(out, dim, x.ids[dim], dim in x.weak, step.why)
    return out


@rule("index_add", "index_reduce", "index_copy", "index_fill")
def by_slices(step: Step) -> Result | None:
    """An index for every slice along a dimension, which has the other dimensions of the tensor."""
    x, source = step.tensor("self"), step.val("source")
    dim = int(step.value("dim")) % max(1, x.rank)
    step.ids.fix_all(step.tensor("index"), f"it is an index of {step.why}")
    return _along(step, x, dim, [] if source is None else [source])


def _along(step: Step, x: Val, dim: int, others: list[Val]) -> Val:
    """Fix one dimension of all operands, and tie the others element-wise."""
    rest = []
    for val in (x, *others):
        step.ids.fix_all(val, f"{step.why} runs along it", [dim])
        rest.append(val.only((d for d in val.ids if d != dim), tuple(1 if d == dim else k for d, k in enumerate(val.shape))))
    out = step.ids.join(tuple(1 if d == dim else k for d, k in enumerate(step.shape)), rest, step.why)
    out.shape = step.shape
    return out


@rule("index_put", "_unsafe_index_put")
def index_put(step: Step) -> Result | None:
    """What indexing would pick is written: indexed dimensions are fixed, the others are tied to the values'.

    Boolean masks, and indexed dimensions with others between them, are not covered.
    """
    x, values = step.tensor("self"), step.tensor("values")
    indices = [None if node is None else step.program.facts.values.get(node.name) for node in step.arguments["indices"]]
    indexed = [d for d, index in enumerate(indices) if index is not None]
    if not indexed or indexed != list(range(indexed[0], indexed[-1] + 1)):
        return None
    picked: list[Tensor] = [index for index in indices if isinstance(index, Tensor) and not index.dtype.is_floating_point]
    if len(picked) != len(indexed) or any(index.dtype in (torch.bool, torch.uint8) for index in picked):
        return None
    for val in step.vals("indices"):
        step.ids.fix_all(val, f"it is an index of {step.why}")
    step.ids.fix_all(x, f"it is indexed by {step.why}", indexed)
    many = np.broadcast_shapes(*(tuple(index.shape) for index in picked))
    first, behind = indexed[0], x.rank - 1 - indexed[-1]
    places = [*range(first), *range(x.rank - behind, x.rank)]  # of the dimensions that are not indexed, in the tensor
    moved = [*range(first), *range(first + len(many), first + len(many) + behind)]  # and in what indexing would pick
    shape = (*x.shape[:first], *many, *x.shape[x.rank - behind :])
    picks = Val(
        shape,
        {m: x.ids[p] for p, m in zip(places, moved, strict=True) if p in x.ids},
        {m for p, m in zip(places, moved, strict=True) if p in x.weak},
    )
    written = step.ids.join(shape, [picks, values], step.why)
    step.ids.fix_all(written, f"it is indexed by {step.why}", range(first, first + len(many)))
    out = Val(step.shape)
    for place, m in zip(places, moved, strict=True):
        if m in written.ids:
            step.ids.put(out, place, written.ids[m], m in written.weak, step.why)
    return out
