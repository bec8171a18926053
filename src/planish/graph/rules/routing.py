"""Routers: the best few of a dimension are picked, and something is looked up at their positions (a mixture's experts)."""

from __future__ import annotations

from planish.graph.edit import Edit, edit
from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule


@rule("topk")
def topk(step: Step) -> Result | None:
    """The values carry no ids along the dimension; the indices are positions in it, which surgery renumbers by what is left."""
    x = step.tensor("self")
    dim = int(step.value("dim")) % x.rank
    others = {d: ids for d, ids in x.ids.items() if d != dim}
    values = Val(step.shape, dict(others), x.weak - {dim})
    indices = Val(step.shape, dict(others), x.weak - {dim})
    if dim in x.ids:
        step.ids.route(x.ids[dim], int(step.value("k")))
        indices.points = x.ids[dim]
    return [values, indices]


@rule("argmax")
def argmax(step: Step) -> Result | None:
    """The position of the largest, which a router looks something up at; over everything, all of it is needed."""
    x, dim = step.tensor("self"), step.value("dim")
    if dim is None:
        step.ids.fix_all(x, f"{step.why} needs all of it")
        return Val(step.shape)
    dim = int(dim) % x.rank
    keeps = len(step.shape) == x.rank
    place = {d: d if keeps or d < dim else d - 1 for d in range(x.rank) if d != dim}
    out = Val(step.shape, {place[d]: ids for d, ids in x.ids.items() if d != dim}, {place[d] for d in x.weak if d != dim})
    if dim in x.ids:
        step.ids.route(x.ids[dim], 1)
        out.points = x.ids[dim]
    return out


@rule("one_hot")
def one_hot(step: Step) -> Result | None:
    """A new last dimension, which is the one that the indices are positions in."""
    x = step.tensor("self")
    out = Val(step.shape, dict(x.ids), set(x.weak))
    if x.points is not None and len(x.points) == step.shape[-1]:
        step.looked_up.append(x)
        out.ids[len(step.shape) - 1] = x.points
    return out


@edit("one_hot")
def edit_one_hot(edit: Edit) -> None:
    """The number of places."""
    if edit.survivors.changed(edit.out, edit.out.rank - 1):
        edit.set("num_classes", edit.survivors.count(edit.out, edit.out.rank - 1))
