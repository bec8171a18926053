"""A discrete factor graph: variables with finite domains, tables over tuples of them, and the assignment of least sum.

Exact min-sum elimination (bucket elimination) while its largest table stays small, else local search from several starts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Assignment = tuple[int, ...]


@dataclass(frozen=True)
class Minimum:
    """An assignment of small sum.

    Args:
        assignment: the index of each variable's value.
        value: the sum of all tables there; infinite where every assignment is forbidden.
        exact: whether no assignment has a smaller sum; False where local search found it.
    """

    assignment: Assignment
    value: float
    exact: bool


@dataclass(frozen=True)
class _Step:
    """Elimination of one variable: the tables that hold it are broadcast to a common shape, summed and minimised along `axis`."""

    variable: int
    inputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    scope: tuple[int, ...]
    axis: int


def elimination_order(sizes: Sequence[int], scopes: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], int]:
    """An order in which to eliminate the variables, and the number of entries of the largest table that it makes.

    Greedy, once by fewest added edges (min-fill) and once by smallest table; the better of both is returned.

    Args:
        sizes: domain size of each variable.
        scopes: the variables of each factor.
    """
    logs = np.log(np.asarray(sizes, dtype=np.float64))
    edges = np.zeros((len(sizes), len(sizes)))
    for scope in scopes:
        edges[np.ix_(scope, scope)] = 1.0
    np.fill_diagonal(edges, 0.0)
    found = [_greedy_order(edges.copy(), logs, by_fill) for by_fill in (True, False)]
    return min(found, key=lambda pair: pair[1])


def _greedy_order(edges: Table, logs: Table, by_fill: bool) -> tuple[tuple[int, ...], int]:
    left = np.ones(len(logs), dtype=bool)
    order: list[int] = []
    largest = 0.0
    while left.any():
        weight = logs + edges @ logs
        degree = edges.sum(1)
        fill = degree * (degree - 1) / 2 - ((edges @ edges) * edges).sum(1) / 2
        primary, secondary = (fill, weight) if by_fill else (weight, fill)
        variable = min(np.flatnonzero(left).tolist(), key=lambda v: (round(float(primary[v]), 9), round(float(secondary[v]), 9), v))
        largest = max(largest, float(weight[variable]))
        neighbours = np.flatnonzero(edges[variable])
        edges[np.ix_(neighbours, neighbours)] = 1.0
        edges[neighbours, neighbours] = 0.0
        edges[variable, :] = edges[:, variable] = 0.0
        left[variable] = False
        order.append(variable)
    return tuple(order), round(float(np.exp(min(largest, 60.0))))


class FactorGraph:
    """The structure of a factor graph, compiled once so that many sets of tables can be minimised on it.

    Args:
        sizes: domain size of each variable, at least 1.
        scopes: for each factor its variables, strictly ascending.
        limit: the largest table, in entries, that elimination may make; beyond it `minimise` searches locally.
    """

    def __init__(self, sizes: Sequence[int], scopes: Sequence[tuple[int, ...]], limit: int = 2**21) -> None:
        self.sizes = tuple(int(size) for size in sizes)
        self.scopes = tuple(tuple(scope) for scope in scopes)
        for scope in self.scopes:
            if list(scope) != sorted(set(scope)) or (scope and not 0 <= scope[0] <= scope[-1] < len(self.sizes)):
                raise ValueError(f"scopes: variables must be ascending, distinct and below {len(self.sizes)}; got {scope}")
        self.limit = limit
        self.holding: tuple[tuple[int, ...], ...] = tuple(
            tuple(f for f, scope in enumerate(self.scopes) if v in scope) for v in range(len(self.sizes))
        )

    @functools.cached_property
    def _ordered(self) -> tuple[tuple[int, ...], int]:
        return elimination_order(self.sizes, self.scopes)

    @property
    def largest(self) -> int:
        """Entries of the largest table that elimination makes."""
        return self._ordered[1]

    @property
    def is_exact(self) -> bool:
        """Whether `minimise` is exact."""
        return self.largest <= self.limit

    @functools.cached_property
    def _steps(self) -> tuple[_Step, ...]:
        return self._compile(self._ordered[0])

    def _compile(self, order: Sequence[int]) -> tuple[_Step, ...]:
        alive: dict[int, tuple[int, ...]] = {f: scope for f, scope in enumerate(self.scopes) if scope}
        steps: list[_Step] = []
        for variable in order:
            inputs = tuple(f for f, scope in alive.items() if variable in scope)
            scope = tuple(sorted({variable, *(v for f in inputs for v in alive[f])}))
            shapes = tuple(tuple(self.sizes[v] if v in alive[f] else 1 for v in scope) for f in inputs)
            steps.append(_Step(variable, inputs, shapes, scope, scope.index(variable)))
            for f in inputs:
                del alive[f]
            rest = tuple(v for v in scope if v != variable)
            if rest:
                alive[len(self.scopes) + len(steps) - 1] = rest
        return tuple(steps)

    def value(self, tables: Sequence[Table], assignment: Sequence[int]) -> float:
        """The sum of all tables at an assignment."""
        return float(sum(table[tuple(assignment[v] for v in scope)] for table, scope in zip(tables, self.scopes, strict=True)))

    def minimise(self, tables: Sequence[Table], start: Sequence[int] | None = None, seed: int = 0, starts: int = 8) -> Minimum:
        """The assignment of least sum.

        Args:
            tables: one for each scope, its axes in the scope's order; `inf` forbids.
            start: where local search begins first; the first value of every variable by default.
            seed: of the further starts of local search.
            starts: how many starts local search has.
        """
        if self.is_exact:
            return self._eliminate(tables)
        rng = np.random.default_rng(seed)
        begins = [list(start) if start is not None else [0] * len(self.sizes), self._unary(tables)]
        begins += [[int(rng.integers(size)) for size in self.sizes] for _ in range(max(0, starts - len(begins)))]
        found = [self._descend(tables, begin) for begin in begins]
        best = min(found, key=lambda assignment: self.value(tables, assignment))
        return Minimum(tuple(best), self.value(tables, best), exact=False)

    def _eliminate(self, tables: Sequence[Table]) -> Minimum:
        known: dict[int, Table] = dict(enumerate(tables))
        choices: list[NDArray[np.intp]] = []
        for number, step in enumerate(self._steps):
            total: Table = np.zeros([self.sizes[v] for v in step.scope])
            for f, shape in zip(step.inputs, step.shapes, strict=True):
                total += known.pop(f).reshape(shape)
            choice = total.argmin(axis=step.axis)
            choices.append(choice)
            known[len(self.scopes) + number] = np.take_along_axis(total, np.expand_dims(choice, step.axis), step.axis).squeeze(step.axis)
        assignment = [0] * len(self.sizes)
        for step, choice in zip(reversed(self._steps), reversed(choices), strict=True):
            assignment[step.variable] = int(choice[tuple(assignment[v] for v in step.scope if v != step.variable)])
        return Minimum(tuple(assignment), self.value(tables, assignment), exact=True)

    def _unary(self, tables: Sequence[Table]) -> list[int]:
        """Each variable's best value when all others are averaged over."""
        scores = [np.zeros(size) for size in self.sizes]
        for table, scope in zip(tables, self.scopes, strict=True):
            for axis, v in enumerate(scope):
                scores[v] = scores[v] + table.mean(axis=tuple(a for a in range(len(scope)) if a != axis))
        return [int(np.argmin(score)) for score in scores]

    def conditional(self, tables: Sequence[Table], assignment: Sequence[int], free: tuple[int, ...]) -> Table:
        """The sum of all tables that hold a variable of `free`, over those variables, the others fixed.

        Args:
            tables: one for each scope; leading axes beyond the scope's are kept.
            assignment: values of all variables.
            free: ascending variables.

        Returns:
            `[*leading, *domains of free]`.
        """
        total: Table | None = None
        for f in sorted({f for v in free for f in self.holding[v]}):
            scope = self.scopes[f]
            picked = tables[f][(..., *(slice(None) if v in free else assignment[v] for v in scope))]
            leading = picked.shape[: picked.ndim - sum(v in free for v in scope)]
            picked = picked.reshape((*leading, *(self.sizes[v] if v in scope else 1 for v in free)))
            total = picked if total is None else total + picked
        shape = tuple(self.sizes[v] for v in free)
        if total is None:
            return np.zeros(shape)
        return np.broadcast_to(total, (*total.shape[: total.ndim - len(free)], *shape))

    @functools.cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of variables that share a factor, ascending."""
        return sorted({(a, b) for scope in self.scopes for i, a in enumerate(scope) for b in scope[i + 1 :]})

    def _descend(self, tables: Sequence[Table], begin: Sequence[int]) -> list[int]:
        """Iterated conditional modes, then moves of two neighbours at once, until neither lowers the sum."""
        here = list(begin)
        pairs = self.pairs
        moved = True
        while moved:
            moved = False
            for v in range(len(here)):
                costs = self.conditional(tables, here, (v,))
                if _is_lower(costs.min(), costs[here[v]]):
                    here[v], moved = int(costs.argmin()), True
            if moved:
                continue
            for a, b in pairs:
                costs = self.conditional(tables, here, (a, b))
                if _is_lower(costs.min(), costs[here[a], here[b]]):
                    here[a], here[b] = (int(i) for i in np.unravel_index(costs.argmin(), costs.shape))
                    moved = True
        return here


def _is_lower(value: float, than: float) -> bool:
    """Whether `value` is lower by more than rounding, so that a descent ends."""
    return bool(value < than and not value >= than - 1e-12 * abs(than))
