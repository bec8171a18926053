"""The search method "random": random plans just under the limits, what every other method must beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planish.plan import Plan
from planish.search.contract import Evidence, Kind, Limits, Standing
from planish.search.costs import Costs
from planish.search.factor import Assignment
from planish.search.lagrangian import Problem, solve
from planish.search.ledger import Ledger
from planish.search.space import Space

_ENUMERATED = 4096
_ATTEMPTS = 64


class Random:
    """Draws every decision at random, lowers random ones until the limits hold, and raises random ones again as far as they allow.

    Without limits on costs each plan aims at a random share of what could be saved.

    Args:
        space: the decisions.
        costs: their predicted costs.
        limits: what is sought.
        seed: of everything random.
    """

    def __init__(self, space: Space, costs: Costs, limits: Limits, seed: int = 0) -> None:
        self.ledger = Ledger(space, costs, limits)
        self.seed = seed

    @property
    def standing(self) -> Standing:
        """See `Search.standing`."""
        return self.ledger.standing

    def ask(self, n: int) -> list[Plan]:
        """See `Search.ask`."""
        out = []
        for _ in range(n):
            found = self._new()
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

    def expected_drop(self, plan: Plan) -> float | None:
        """See `Search.expected_drop`."""
        return self.ledger.drop(self.ledger.space.assignment(plan))

    def best(self, n: int = 1, kind: Kind = "candidate") -> list[Plan]:
        """See `Search.best`."""
        return self.ledger.best(n, kind)

    def _new(self) -> Assignment | None:
        ledger, space = self.ledger, self.ledger.space
        rng = np.random.default_rng([self.seed, len(ledger.seen)])
        for _ in range(_ATTEMPTS):
            drawn = draw(ledger.problem, self._ceilings(rng), rng)
            if drawn is None:
                cheapest = solve(ledger.problem, "loss", ledger.ceilings(), self.seed)
                near = [cheapest.assignment, *cheapest.nearest.values()]
                return next((a for a in map(space.canonical, near) if a not in ledger.seen), None)
            if space.canonical(drawn) not in ledger.seen:
                return space.canonical(drawn)
        if space.count > _ENUMERATED:
            return None
        left = [a for a in space.all() if a not in ledger.seen and self._holds(a)]
        return left[int(rng.integers(len(left)))] if left else None

    def _ceilings(self, rng: np.random.Generator) -> dict[str, float]:
        if self.ledger.limits.costs:
            return self.ledger.ceilings()
        lowest, highest = self.ledger.efforts
        return {self.ledger.costs.effort: lowest + (highest - lowest) * float(rng.random())}

    def _holds(self, assignment: Assignment) -> bool:
        problem = self.ledger.problem
        values = dict(zip(problem.rows, problem.values(assignment).tolist(), strict=True))
        return all(values[row] <= bound * (1 + 1e-12) for row, bound in self.ledger.ceilings().items())


def draw(problem: Problem, ceilings: Mapping[str, float], rng: np.random.Generator) -> Assignment | None:
    """A random assignment under ceilings, close to them; None where even the cheapest that is found violates one.

    Values must be ordered from the dearest to the cheapest, as those of a `Space` are.
    """
    graph = problem.graph
    rows = [problem.rows.index(row) for row in ceilings]
    bounds = np.asarray(list(ceilings.values())) * (1 + 1e-12)

    def excess(here: list[int], v: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Summed relative violation at each value of one variable."""
        around = np.broadcast_to(graph.conditional(problem.stacks, here, (v,)), (len(problem.rows), graph.sizes[v]))
        values = problem.values(here)[:, None] + around - around[:, here[v]][:, None]
        over = (values[rows] - bounds[:, None]) / np.maximum(np.abs(bounds), 1e-300)[:, None]
        return np.asarray(np.where(over > 1e-12, over, 0.0).sum(axis=0))

    here = [int(rng.integers(size)) for size in graph.sizes]
    if not rows:
        return tuple(here)
    for _ in range(3):
        for v in rng.permutation(len(here)).tolist():
            violation = excess(here, v)
            if violation[here[v]] == 0:
                break
            here[v] = int(violation.argmin())
    if here and excess(here, 0)[here[0]] > 0:
        here = list(solve(problem, "loss", ceilings).assignment)
        if excess(here, 0)[here[0]] > 0:
            return None
    for v in rng.permutation(len(here)).tolist():
        inside = np.flatnonzero(excess(here, v) == 0)
        here[v] = int(min(here[v], inside[0]))
    return tuple(here)
