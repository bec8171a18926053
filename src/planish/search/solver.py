"""The search method "solver": plans from the Lagrangian of predicted losses and costs, both corrected by what was measured."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from planish.plan import Plan
from planish.search.contract import Evidence, Kind, Limits, Standing
from planish.search.costs import Costs
from planish.search.factor import Assignment
from planish.search.lagrangian import Problem, Solution, solve
from planish.search.ledger import Ledger
from planish.search.random import draw
from planish.search.space import Space

Decisions = frozenset[tuple[int, int]]
"""Pairs of a variable and its value."""

_ENUMERATED = 4096
_SAMPLES = 3
_PARTITIONS = 6
_BRANCHES, _ADDED, _RIVAL = 24, 2, 2.0
"""Of the search for other blocks: solutions in all, blocks that each may add, and how many times the best plan's loss is still of interest."""


class Solver:
    """Solves for the best plan under the current tables, then for samples of what the tables may be wrong about.

    With limits: the least loss at the limits, less a margin that shrinks as trials come in. Without: the fastest plan whose loss
    stays below what the drop allows, found by bisection over a monotone map from loss to drop that candidates teach.

    Args:
        space: the decisions.
        costs: their predicted costs.
        limits: what is sought.
        seed: of everything random.
    """

    def __init__(self, space: Space, costs: Costs, limits: Limits, seed: int = 0) -> None:
        self.ledger = Ledger(space, costs, limits)
        self.seed = seed
        self.solution: Solution | None = None
        self._solved: dict[tuple[object, ...], Solution] = {}
        self._bits = [v for v, variable in enumerate(space.variables) if variable.technique == "block"]

    @property
    def standing(self) -> Standing:
        """See `Search.standing`."""
        solution = self.solution
        if solution is None:
            return self.ledger.standing
        return replace(self.ledger.standing, is_feasible=solution.feasible, gap=_share(solution.gap, solution.objective), kkt=solution.kkt)

    def ask(self, n: int) -> list[Plan]:
        """See `Search.ask`."""
        out = []
        for _ in range(n):
            found = next((a for a in self._candidates() if a not in self.ledger.seen), None)
            if found is None:
                break
            out.append(self.ledger.propose(found))
        return out

    def remember(self, plan: Plan) -> None:
        """See `Search.remember`."""
        self.ledger.remember(plan)

    def tell(self, plan: Plan, evidence: Evidence) -> None:
        """See `Search.tell`."""
        self.ledger.tell(plan, evidence)
        self._solved.clear()

    def expected_drop(self, plan: Plan) -> float | None:
        """See `Search.expected_drop`."""
        return self.ledger.drop(self.ledger.space.assignment(plan))

    def best(self, n: int = 1, kind: Kind = "candidate") -> list[Plan]:
        """See `Search.best`."""
        return self.ledger.best(n, kind)

    def _row(self, assignment: Assignment, row: str) -> float:
        problem = self.ledger.problem
        return float(problem.values(assignment)[problem.rows.index(row)])

    def _candidates(self) -> Iterator[Assignment]:
        """Assignments to propose, most wanted first; the caller takes the first that is new."""
        canonical = self.ledger.space.canonical
        number = len(self.ledger.seen)
        mean = self.ledger.coefficients()
        self.solution = self._solve(mean, 0)
        if self.solution.feasible and number % 2:
            yield from self._other_blocks(mean)
        yield canonical(self.solution.assignment)
        if not self.solution.feasible:
            yield from (canonical(assignment) for assignment in self.solution.nearest.values())
            return
        for attempt in range(1, _SAMPLES + 1):
            rng = np.random.default_rng([self.seed, number, attempt])
            found = self._solve(self.ledger.coefficients(rng), attempt)
            if found.feasible:
                yield canonical(found.assignment)
        order = np.random.default_rng([self.seed, number]).permutation(len(self.ledger.space.sizes))
        for variable in order[:_PARTITIONS].tolist():
            found = self._solve(mean, 0, frozenset({(variable, self.solution.assignment[variable])}))
            if found.feasible:
                yield canonical(found.assignment)
        yield from self._rest(number)

    def _other_blocks(self, coefficients: NDArray[np.float64]) -> Iterator[Assignment]:
        """Good plans that bypass other blocks than every plan so far, the best first: what recovery leaves of a block is what predictions
        know least, and the best plans may all bypass the same ones. The space is searched by keeping one of a plan's bypassed blocks, or
        bypassing one of the cheapest that it keeps; what is expected to lose twice as much as the best plan is no rival.

        References:
            Lawler, 1972: the next best solutions lie in the parts of the space that differ from the best in one decision.
        """
        assert self.solution is not None
        canonical = self.ledger.space.canonical
        known = {self._bypassed(assignment) for assignment in self.ledger.seen if assignment != self.ledger.space.identity}
        nothing: Decisions = frozenset()
        waiting, solved = [(self.solution.objective, 0, nothing, canonical(self.solution.assignment))], {nothing}
        while waiting:
            _, _, before, best = heapq.heappop(waiting)
            blocks = self._bypassed(best)
            if blocks not in known:
                known.add(blocks)
                yield best
            for decision in (*sorted(blocks), *self._next_bypassed(coefficients, best)):
                avoided = before | {decision}
                if avoided in solved or len(solved) == _BRANCHES:
                    continue
                found = self._solve(coefficients, 0, avoided)
                solved.add(avoided)
                is_rival = found.feasible and found.objective <= _RIVAL * self.solution.objective
                if is_rival and not avoided & set(enumerate(found.assignment)):
                    heapq.heappush(waiting, (found.objective, len(solved), avoided, canonical(found.assignment)))

    def _next_bypassed(self, coefficients: NDArray[np.float64], assignment: Assignment) -> list[tuple[int, int]]:
        """The decisions not to bypass the blocks that would cost least of those that a plan keeps."""
        kept = [v for v in self._bits if not assignment[v]]
        kept.sort(key=lambda v: float(coefficients[v]) * self.ledger.space.variables[v].losses[1])
        return [(v, 0) for v in kept[:_ADDED]]

    def _bypassed(self, assignment: Assignment) -> Decisions:
        return frozenset((v, assignment[v]) for v in self._bits if assignment[v])

    def _solve(self, coefficients: NDArray[np.float64], attempt: int, avoided: Decisions = frozenset()) -> Solution:
        """The best plan for loss coefficients, of those that make none of the decisions `avoided` if there are any."""
        pending = 0 if self.ledger.limits.costs else self.ledger.pending
        key = (coefficients.tobytes(), attempt, avoided, pending)
        if key not in self._solved:
            self._solved[key] = self._solve_anew(coefficients, attempt, avoided)
        return self._solved[key]

    def _solve_anew(self, coefficients: NDArray[np.float64], attempt: int, avoided: Decisions) -> Solution:
        losses = self.ledger.losses_left(coefficients)
        most = sum(float(np.ptp(table)) for _, table in losses) if avoided else 0.0
        for variable, value in avoided:
            scope, table = losses[variable]
            table[tuple(value if v == variable else slice(None) for v in scope)] += most
        problem = self.ledger.problem.replaced("loss", losses)
        limits = self.ledger.limits
        if limits.costs:
            return solve(problem, "loss", self.ledger.ceilings(tighter=0.01 * (attempt // 2)), self.seed)
        return self._fastest(problem, coefficients)

    def _fastest(self, problem: Problem, coefficients: NDArray[np.float64]) -> Solution:
        """A point of the front of effort against loss, nearer to where the drop reaches what is allowed with every candidate."""
        ledger = self.ledger
        effort = ledger.costs.effort
        held, over = ledger.bracket(coefficients)
        where = _halving(ledger.pending)
        lowest, highest = ledger.efforts
        if over is None:
            known = [self._row(a, effort) for a, reports in ledger.told.items() if not any(r.failed for r in reports.values())]
            reached = min([highest, *known])
            return solve(problem, "loss", {effort: lowest + (reached - lowest) * where}, self.seed)
        if held > 0:
            wanted = held * (over / held) ** (1.0 - where)
        else:
            wanted = over * (0.5 ** (2.0 * (where + 0.5)))
        return solve(problem, effort, {"loss": wanted}, self.seed)

    def _rest(self, number: int) -> Iterator[Assignment]:
        """When solving brings nothing new: everything in a small space, best first; random plans under the limits in a large one."""
        space, limited = self.ledger.space, bool(self.ledger.limits.costs)
        ceilings = self.ledger.ceilings() if limited else {}
        if space.count <= _ENUMERATED:
            every = list(space.all())
            problem = self.ledger.problem.replaced("loss", self.ledger.losses_left(self.ledger.coefficients()))
            values = problem.values_of(np.asarray(every, dtype=np.intp).reshape(len(every), len(space.sizes)))
            rows = problem.rows
            inside = np.ones(len(every), dtype=bool)
            for row, bound in ceilings.items():
                inside &= values[rows.index(row)] <= bound * (1 + 1e-12)
            sought = values[rows.index("loss" if limited else self.ledger.costs.effort)]
            yield from (every[i] for i in np.argsort(sought, kind="stable") if inside[i])
            return
        lowest, highest = self.ledger.efforts
        for attempt in range(64):
            rng = np.random.default_rng([self.seed, number, 1000 + attempt])
            if not limited:
                ceilings = {self.ledger.costs.effort: lowest + (highest - lowest) * float(rng.uniform(0.5, 1.0))}
            drawn = draw(self.ledger.problem, ceilings, rng)
            if drawn is not None:
                yield space.canonical(drawn)


def _share(gap: float | None, objective: float) -> float | None:
    return None if gap is None else gap / objective if objective > 0 else 0.0


def _halving(number: int) -> float:
    """The number-th point of 1/2, 1/4, 3/4, 1/8, 5/8, ... (van der Corput), so that plans under way at once spread out."""
    out, step, left = 0.0, 0.5, number + 1
    while left:
        out += step * (left % 2)
        left //= 2
        step /= 2
    return out
