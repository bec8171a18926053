"""Index propagation: every value carries, per dimension, the ids of its indices; ties between ids say what must be removed together.

An id is one index of one dimension of one parameter (or of padding, or of a created constant). Id 0 stands for "fixed". A dimension
without ids is fixed, or neutral if its size is 1. *Weak* ids belong to dimensions that only repeat a value (`expand`, `zeros`): they
can be resized and yield to other ids. Where ids meet is said by rules (`program.py` and `rules/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish.graph.facts import Shape

Signature = tuple[Any, ...]


@dataclass(slots=True)
class Val:
    """The ids that one tensor carries.

    Args:
        shape: its shape in the analysed run.
        ids: dimension -> int64 vector of ids, as long as the dimension; a dimension that is missing is fixed (or neutral, of size 1).
        weak: dimensions whose ids are weak.
        origin: dimension -> (parameter, dimension) that it is, for parameters and movements of parameters.
        points: the ids of the dimension that its elements are positions in, where a router picked them.
        across: dimension -> ids of another reading of the program, where its units cross this one's (see `crossing.py`); set when all is solved.
    """

    shape: Shape
    ids: dict[int, Tensor] = field(default_factory=dict)
    weak: set[int] = field(default_factory=set)
    origin: dict[int, tuple[str, int]] = field(default_factory=dict)
    points: Tensor | None = None
    across: dict[int, Tensor] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that have ids, of either reading."""
        return tuple(dict.fromkeys((*self.ids, *self.across)))

    def labels(self, dim: int) -> tuple[Tensor, ...]:
        """The ids of a dimension: none, or those of one reading or two."""
        return tuple(ids[dim] for ids in (self.ids, self.across) if dim in ids)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def only(self, dims: Iterable[int], shape: Shape | None = None) -> Val:
        """The same value with the ids of `dims` alone; `shape` may replace its own where later dimensions change."""
        wanted = set(dims)
        ids = {d: v for d, v in self.ids.items() if d in wanted}
        return Val(self.shape if shape is None else shape, ids, self.weak & wanted)

    def leading(self, count: int) -> Val:
        """The first `count` dimensions."""
        return self.only(range(count), self.shape[:count])


class Ids:
    """The ids issued so far, and what was said about them.

    Args:
        decisions: signature -> choice, where a rule has more than one way to keep a tensor rectangular; 0 is the default.
    """

    def __init__(self, decisions: Mapping[Signature, int] | None = None) -> None:
        self.size = 1
        self.decisions = dict(decisions or {})
        self.options: dict[Signature, int] = {}
        self.rectangles: dict[Signature, list[Tensor]] = {}  # what was kept in places where there was a choice
        self.left: list[NDArray[np.int64]] = []
        self.right: list[NDArray[np.int64]] = []
        self.fixes: list[tuple[NDArray[np.int64], str]] = []
        self.inexact: list[NDArray[np.int64]] = []
        self.routed: list[tuple[NDArray[np.int64], int]] = []
        self.roles: dict[tuple[str, int], str] = {}

    def fresh(self, count: int) -> Tensor:
        """New ids, one per index."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def tie(self, a: Tensor, b: Tensor, why: str = "") -> None:
        """Say that ids must be removed together, elementwise after broadcasting; whatever meets id 0 is fixed."""
        shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
        x, y = a.expand(shape).reshape(-1).numpy(), b.expand(shape).reshape(-1).numpy()
        fixed = (x == 0) | (y == 0)
        if fixed.any():
            self.fix(torch.from_numpy(np.maximum(x[fixed], y[fixed])), why or "it meets a dimension that is fixed")
            x, y = x[~fixed], y[~fixed]
        self.left.append(x)
        self.right.append(y)

    def fix(self, ids: Tensor, why: str) -> None:
        """Say that ids can never be removed."""
        self.fixes.append((ids.reshape(-1).numpy(), why))

    def fix_all(self, val: Val | None, why: str, dims: Iterable[int] | None = None) -> None:
        """Fix all ids of a value, or those of some dimensions."""
        if val is None:
            return
        wanted = val.ids.keys() if dims is None else dims
        for d in wanted:
            if d in val.ids:
                self.fix(val.ids[d], why)

    def mark_inexact(self, ids: Tensor) -> None:
        """Say that a statistic runs over these ids, so that removing one changes what the others give."""
        self.inexact.append(ids.reshape(-1).numpy())

    def route(self, ids: Tensor, picked: int) -> None:
        """Say that a router picks so many of these ids at a time: as many must stay, and what it gives changes when one goes."""
        self.mark_inexact(ids)
        self.routed.append((ids.reshape(-1).numpy(), picked))

    def choose(self, signature: Signature, options: int) -> int:
        """Which of `options` ways to take for this kind of place."""
        self.options[signature] = options
        return self.decisions.get(signature, 0)

    def put(self, val: Val, dim: int, ids: Tensor, weak: bool, why: str) -> None:
        """Label a dimension. Where two families meet in it only one can be told apart: a weak one yields, else the newcomer is fixed."""
        if dim in val.ids:
            if weak or dim not in val.weak:
                self.fix(ids, why)
                return
            self.fix(val.ids[dim], why)
            val.weak.discard(dim)
        val.ids[dim] = ids
        if weak:
            val.weak.add(dim)

    def join(self, shape: Shape, vals: Sequence[Val], why: str) -> Val:
        """The elementwise combination of values under broadcasting: equal positions are tied."""
        out = Val(shape)
        for d in range(len(shape)):
            found: list[tuple[bool, Tensor]] = []
            fixed = False
            for val in vals:
                e = d - (len(shape) - val.rank)
                if e < 0 or val.shape[e] == 1:
                    continue
                if e in val.ids:
                    found.append((e in val.weak, val.ids[e]))
                else:
                    fixed = True
            if not found:
                continue
            found.sort(key=lambda pair: pair[0])
            weak, first = found[0]
            for _, other in found[1:]:
                if other is not first:
                    self.tie(other, first, why)
            if fixed:
                self.fix(first, why)
            else:
                self.put(out, d, first, weak, why)
        return out

    def contract(self, a: Val, i: int, b: Val, j: int, why: str) -> None:
        """Sum over dimension `i` of `a` and `j` of `b` together: their ids are tied, or fixed by a side that has none."""
        x, y = a.ids.get(i), b.ids.get(j)
        if x is not None and y is not None:
            self.tie(x, y, why)
        elif x is not None:
            self.fix(x, why)
        elif y is not None:
            self.fix(y, why)

    def role(self, val: Val | None, dim: int, role: str) -> None:
        """Note what an operator does with a parameter's dimension; the first operator in the program decides."""
        if val is not None and dim in val.origin:
            self.roles.setdefault(val.origin[dim], role)

    def rectangle(self, ids: Tensor, kind: str, why: str) -> tuple[int, Tensor] | None:
        """The one dimension along which a tensor of ids varies, and its ids.

        Where it varies along several (a view of channels as heads by head size), survivors must still fill a rectangle: one dimension
        keeps its ids and the others are tied along it. Which one is a decision per kind of place.
        """
        u = ids
        for d in range(u.dim()):
            if u.shape[d] > 1 and u.stride(d) == 0:
                u = u.narrow(d, 0, 1)
        varying = []
        for d in range(u.dim()):
            if u.shape[d] > 1:
                if bool((u == u.narrow(d, 0, 1)).all()):
                    u = u.narrow(d, 0, 1)
                else:
                    varying.append(d)
        if not varying:
            if u.numel():
                self.fix(u.reshape(-1)[:1], why)
            return None
        keep = varying[0]
        if len(varying) > 1:
            signature = (kind, tuple(ids.shape[1:]), tuple(varying))
            keep = varying[self.choose(signature, len(varying))]
            for d in varying:
                if d != keep:
                    self.tie(u, u.narrow(d, 0, 1), why)
                    u = u.narrow(d, 0, 1)
            self.rectangles.setdefault(signature, []).append(u.reshape(-1))
        return keep, u.reshape(-1).contiguous()

    def move(self, val: Val, run: Callable[[Tensor], Any], shapes: Sequence[Shape | None], kind: str, why: str) -> list[Val | None]:
        """Carry ids through an operator that only moves elements, by running it on the ids themselves, one dimension at a time."""
        outs: list[Val | None] = [None if shape is None else Val(shape) for shape in shapes]
        for d in sorted(val.ids, key=lambda d: (d in val.weak, d)):
            view = [1] * val.rank
            view[d] = -1
            moved = run(val.ids[d].view(view).expand(val.shape))
            for out, ids in zip(outs, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
                if out is None:
                    continue
                found = self.rectangle(ids, kind, why)
                if found is not None:
                    self.put(out, found[0], found[1], d in val.weak, why)
                    if d in val.origin:
                        out.origin.setdefault(found[0], val.origin[d])
        return outs
