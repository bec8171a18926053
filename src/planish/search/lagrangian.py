"""Least objective under ceilings, on a factor graph: the Lagrangian dual by cutting planes, then local search between hull points.

References:
    Everett, 1963: for a multiplier, the unconstrained minimiser solves the constrained problem at its own cost.
    Kelley, 1960: the concave dual is maximised over the cuts of all minimisers seen; with one ceiling this is the secant method on
    the lower convex hull of (cost, objective), which ends at the exact multiplier.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from planish.search.factor import Assignment, FactorGraph, Minimum, Table

ENUMERATED = 2**13


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Args:
        assignment: the index of each variable's value; where infeasible, the least relative violation that was found.
        objective: the objective there.
        values: every row there.
        bound: no feasible assignment has a smaller objective; None where minimisation was not exact.
        gap: `objective - bound`, at least 0; None without a bound or where infeasible.
        multipliers: objective per unit of each ceiling's row.
        kkt: the largest of relative violation, complementary slackness and distance from the Lagrangian's minimum, both relative
            to the objective; 0 at a point of the hull that lies exactly on its ceilings.
        feasible: whether all ceilings hold.
        nearest: where infeasible, for each ceiling the assignment that is cheapest in its row.
        method: "enumeration", "elimination" or "local search".
    """

    assignment: Assignment
    objective: float
    values: dict[str, float]
    bound: float | None
    gap: float | None
    multipliers: dict[str, float]
    kkt: float
    feasible: bool
    nearest: dict[str, Assignment]
    method: str


class Problem:
    """Several sums ("rows") over one factor graph: a loss, and costs.

    Args:
        sizes: domain size of each variable.
        rows: for each row its tables, as (ascending variables, table with one axis for each).
    """

    def __init__(
        self, sizes: Sequence[int], rows: Mapping[str, Sequence[tuple[tuple[int, ...], Table]]], largest_table: int = 2**21
    ) -> None:
        self.rows = tuple(rows)
        stacks: dict[tuple[int, ...], Table] = {}
        for number, tables in enumerate(rows.values()):
            for scope, table in tables:
                if scope not in stacks:
                    stacks[scope] = np.zeros((len(rows), *(sizes[v] for v in scope)))
                stacks[scope][number] += table
        self.graph = FactorGraph(sizes, tuple(stacks), limit=largest_table)
        self.stacks: tuple[Table, ...] = tuple(stacks.values())

    @functools.cached_property
    def adjacent(self) -> NDArray[np.bool_]:
        """Which variables share a table (each with itself), `[variables, variables]`."""
        out = np.eye(len(self.graph.sizes), dtype=bool)
        for a, b in self.graph.pairs:
            out[a, b] = out[b, a] = True
        return out

    def replaced(self, row: str, tables: Sequence[tuple[tuple[int, ...], Table]]) -> Problem:
        """The same problem with other tables in one row, over variables that the row had tables over before."""
        number = self.rows.index(row)
        new = object.__new__(Problem)
        new.rows, new.graph = self.rows, self.graph
        new.adjacent = self.adjacent
        stacks = dict(zip(self.graph.scopes, self.stacks, strict=True))
        for scope, table in tables:
            stacks[scope] = stacks[scope].copy()
            stacks[scope][number] = table
        new.stacks = tuple(stacks.values())
        return new

    def values(self, assignment: Sequence[int]) -> Table:
        """All rows at one assignment, `[rows]`."""
        return self.values_of(np.asarray([assignment], dtype=np.intp).reshape(1, len(self.graph.sizes)))[:, 0]

    def values_of(self, assignments: NDArray[np.intp]) -> Table:
        """All rows at many assignments: `[n, variables]` -> `[rows, n]`."""
        total = np.zeros((len(self.rows), len(assignments)))
        for stack, scope in zip(self.stacks, self.graph.scopes, strict=True):
            where: tuple[Any, ...] = (slice(None), *(assignments[:, v] for v in scope))
            total += stack[where] if scope else stack[:, None]
        return total

    def minimise(self, weights: Table, start: Sequence[int] | None = None, seed: int = 0) -> Minimum:
        """The least weighted sum of rows; `weights` is `[rows]`."""
        return self.graph.minimise([np.tensordot(weights, stack, 1) for stack in self.stacks], start, seed)


def solve(problem: Problem, objective: str, ceilings: Mapping[str, float], seed: int = 0) -> Solution:
    """The least `objective` with every row of `ceilings` at most its value.

    Small problems are enumerated. Otherwise the dual is maximised, and local search over single and pair moves starts from the hull
    points next to the ceilings.
    """
    run = _Solve(problem, objective, ceilings, seed)
    return run.enumerate() if np.prod(problem.graph.sizes, dtype=float) <= ENUMERATED else run.relax()


class _Solve:
    """One call of `solve`: the points seen so far and what is known about the dual."""

    def __init__(self, problem: Problem, objective: str, ceilings: Mapping[str, float], seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.row = problem.rows.index(objective)
        self.limited = np.asarray([problem.rows.index(row) for row in ceilings], dtype=np.intp)
        self.bounds = np.asarray(list(ceilings.values()), dtype=np.float64)
        self.unit = np.where(self.bounds == 0, 1.0, np.abs(self.bounds))
        self.points: dict[Assignment, Table] = {}
        self.exact = True

    def excess(self, values: Table) -> Table:
        """Relative violation of each ceiling (negative: slack); `[rows, ...] -> [ceilings, ...]`."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        return np.asarray((values[self.limited] - self.bounds.reshape(shape)) / self.unit.reshape(shape))

    def rank(self, assignment: Assignment) -> tuple[float, float]:
        """What a better point has less of: violation, then objective. Rounding in sums of tables is no violation."""
        values = self.points[assignment]
        violation = float(np.maximum(self.excess(values), 0.0).sum())
        return (violation if violation > 1e-12 else 0.0, float(values[self.row]))

    def see(self, assignment: Assignment) -> Table:
        if assignment not in self.points:
            self.points[assignment] = self.problem.values(assignment)
        return self.points[assignment]

    def descend(self, prices: Table, own: float = 1.0) -> tuple[Assignment, Table]:
        """The minimiser of `own * objective + prices * relative cost`."""
        weights = np.zeros(len(self.problem.rows))
        weights[self.row] = own
        np.add.at(weights, self.limited, prices / self.unit)
        start = min(self.points, key=lambda x: float(weights @ self.points[x])) if self.points else None
        found = self.problem.minimise(weights, start, self.seed)
        self.exact &= found.exact
        return found.assignment, self.see(found.assignment)

    def enumerate(self) -> Solution:
        sizes = self.problem.graph.sizes
        everything = np.stack([axis.ravel() for axis in np.indices(sizes)], axis=1) if sizes else np.zeros((1, 0), dtype=np.intp)
        values = self.problem.values_of(everything)
        violation = np.maximum(self.excess(values), 0.0).sum(axis=0)
        violation[violation <= 1e-12] = 0.0
        best = np.lexsort((values[self.row], violation))[0]
        chosen = tuple(int(i) for i in everything[best])
        self.points[chosen] = values[:, best]
        for row in self.limited:
            cheap = np.lexsort((values[self.row], values[row]))[0]
            self.points[tuple(int(i) for i in everything[cheap])] = values[:, cheap]
        prices, dual = self.dual()
        return self.report(chosen, prices, dual, float(values[self.row, best]), "enumeration")

    def relax(self) -> Solution:
        prices, dual = self.dual()
        ranked = sorted(self.points, key=self.rank)
        near = sorted(self.points, key=lambda x: (float(np.abs(self.excess(self.points[x])).sum()), x))
        for start in dict.fromkeys(ranked[:2] + near[:2]):
            self.polish(start)
        best = min(self.points, key=lambda x: (*self.rank(x), x))
        return self.report(best, prices, dual, dual, "elimination" if self.exact else "local search")

    def dual(self) -> tuple[Table, float]:
        """The best multipliers (per relative unit of each ceiling) and the dual's value there."""
        count = len(self.limited)
        zero = np.zeros(count)
        cuts = [self.descend(zero)[1]]
        best: tuple[Table, float] = (zero, float(cuts[0][self.row]))
        if np.all(self.excess(cuts[0]) <= 0):
            return best
        spread = sum(float(np.ptp(stack[self.row])) for stack in self.problem.stacks) or 1.0
        for number in range(count):
            cuts.append(self.descend(np.eye(count)[number], own=1e-9 / spread)[1])
        cuts.append(self.descend(np.ones(count), own=1e-9 / spread)[1])
        for _ in range(100):
            prices, promised = self.master(cuts, 1e4 * spread)
            values = self.descend(prices)[1]
            dual = float(values[self.row] + prices @ self.excess(values))
            if dual > best[1]:
                best = (prices, dual)
            if dual >= promised - 1e-9 * max(abs(promised), 1e-12) or any(np.array_equal(values, cut) for cut in cuts):
                break
            cuts.append(values)
        return best

    def master(self, cuts: Sequence[Table], highest: float) -> tuple[Table, float]:
        """The maximiser of the least of all cuts over multipliers in `[0, highest]`."""
        scale = max(*(abs(float(cut[self.row])) for cut in cuts), 1e-8 * highest)
        rows = np.stack([np.concatenate(([1.0], -self.excess(cut))) for cut in cuts])
        ends = np.asarray([cut[self.row] for cut in cuts]) / scale
        size = rows.shape[1]
        found = linprog(
            [-1.0] + [0.0] * (size - 1),
            A_ub=rows,
            b_ub=ends,
            bounds=[(None, None)] + [(0.0, highest / scale)] * (size - 1),
            method="highs",
        )
        assert found.x is not None, found.message
        return np.asarray(found.x[1:]) * scale, float(found.x[0]) * scale

    def polish(self, start: Assignment) -> None:
        """Single and pair moves from `start`, first towards the ceilings and then down the objective below them."""
        here = start
        for _ in range(400):
            step = self.single_or_distant(here) or self.neighbours(here)
            if step is None or self.rank_of(step) >= self.rank(here):
                return
            here = step

    def rank_of(self, assignment: Assignment) -> tuple[float, float]:
        self.see(assignment)
        return self.rank(assignment)

    def single_or_distant(self, here: Assignment) -> Assignment | None:
        """The best move of one variable, or of two that share no table (their changes add)."""
        graph, now = self.problem.graph, self.points[here]
        changes, owners, targets = [], [], []
        for v, size in enumerate(graph.sizes):
            around = graph.conditional(self.problem.stacks, here, (v,))
            if around.ndim > 1 and size > 1:
                changes.append(around - around[:, here[v]][:, None])
                owners += [v] * size
                targets += list(range(size))
        if not changes:
            return None
        change, owner, target = np.concatenate(changes, axis=1), np.asarray(owners), np.asarray(targets)
        single = self.best(now[:, None] + change)
        if single is not None and self.improves(now, now + change[:, single]):
            return _moved(here, [(owner[single], target[single])])
        gains = np.flatnonzero(change[self.row] < 0)
        if not len(gains):
            return None
        first = gains[np.argsort(change[self.row, gains], kind="stable")[:256]]
        joint = now[:, None, None] + change[:, first, None] + change[:, None, :]
        joint[self.row][self.problem.adjacent[owner[first]][:, owner]] = np.inf
        pair = self.best(joint.reshape(len(now), -1))
        if pair is None:
            return None
        a, b = divmod(pair, change.shape[1])
        if not self.improves(now, joint[:, a, b]):
            return None
        return _moved(here, [(owner[first[a]], target[first[a]]), (owner[b], target[b])])

    def neighbours(self, here: Assignment) -> Assignment | None:
        """The best joint move of two variables that share a table."""
        graph, now = self.problem.graph, self.points[here]
        best: tuple[tuple[float, float], Assignment] | None = None
        for a, b in graph.pairs:
            around = graph.conditional(self.problem.stacks, here, (a, b))
            values = now[:, None, None] + around - around[:, here[a], here[b]][:, None, None]
            flat = values.reshape(len(now), -1)
            move = self.best(flat)
            if move is None or not self.improves(now, flat[:, move]):
                continue
            i, j = divmod(move, graph.sizes[b])
            moved = _moved(here, [(a, i), (b, j)])
            rank = self.rank_of(moved)
            if best is None or rank < best[0]:
                best = (rank, moved)
        return best[1] if best else None

    def best(self, values: Table) -> int | None:
        """The column of `[rows, n]` with the least objective under the ceilings; without one, the least violation."""
        violation = np.maximum(self.excess(values), 0.0).sum(axis=0)
        inside = np.where(violation <= 1e-12, values[self.row], np.inf)
        if np.isfinite(inside).any():
            return int(inside.argmin())
        finite = np.where(np.isfinite(values[self.row]), violation, np.inf)
        return int(finite.argmin()) if np.isfinite(finite).any() else None

    def violated(self, values: Table) -> bool:
        return bool(np.maximum(self.excess(values), 0.0).sum() > 1e-12)

    def improves(self, now: Table, then: Table) -> bool:
        before, after = (float(np.maximum(self.excess(v), 0.0).sum()) for v in (now, then))
        if before > 1e-12:
            return after < before
        return after <= 1e-12 and bool(then[self.row] < now[self.row] - 1e-12 * abs(now[self.row]))

    def report(self, chosen: Assignment, prices: Table, dual: float, bound: float, method: str) -> Solution:
        values = self.points[chosen]
        excess = self.excess(values)
        feasible = not self.violated(values)
        objective = float(values[self.row])
        scale = max(abs(objective), abs(dual), 1e-300)
        stationarity = (objective + float(prices @ excess) - dual) / scale
        slackness = float(np.max(prices * np.abs(excess), initial=0.0)) / scale
        nearest = {}
        if not feasible:
            for number, row in zip(self.limited, self.bounds_by_row(), strict=True):
                nearest[row] = min(self.points, key=lambda x: (float(self.points[x][number]), float(self.points[x][self.row]), x))
        known = self.exact and feasible
        return Solution(
            assignment=chosen,
            objective=objective,
            values={row: float(value) for row, value in zip(self.problem.rows, values, strict=True)},
            bound=bound if self.exact and feasible else None,
            gap=max(0.0, objective - bound) if known else None,
            multipliers={row: float(price / unit) for row, price, unit in zip(self.bounds_by_row(), prices, self.unit, strict=True)},
            kkt=max(0.0, stationarity, slackness, float(np.max(excess, initial=0.0))),
            feasible=feasible,
            nearest=nearest,
            method=method,
        )

    def bounds_by_row(self) -> list[str]:
        return [self.problem.rows[number] for number in self.limited]


def _moved(here: Assignment, moves: Sequence[tuple[int, int]]) -> Assignment:
    out = list(here)
    for variable, value in moves:
        out[int(variable)] = int(value)
    return tuple(out)
