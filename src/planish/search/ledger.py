"""What a search knows: the plans it proposed, what became of them, and what that says about losses, costs and quality.

Everything here is a function of the evidence and not of the order in which it came, so that a resumed search goes on as it would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from planish.errors import BudgetError
from planish.plan import Plan
from planish.search.contract import NO_DROP, Evidence, Kind, Limits, Standing
from planish.search.costs import Affine, Costs, tilt
from planish.search.factor import Assignment, Table
from planish.search.lagrangian import Problem, solve
from planish.search.space import Space

_MARGIN = 0.04
_LOSS_NOISE = 0.15
_LOSS_DOUBT = 0.7
_COST_DOUBT, _DROP_DOUBT = 0.1, 0.7
"""Standard deviations, relative and of the logarithm, of what a plan costs and of what recovery leaves: a tenth above a limit is as bad as
twice the drop."""
_MOST_OFF = 4.0
"""However much better or worse than assumed a plan recovered (the drops of small ones are noise), others are expected to at most so much."""


@dataclass
class _Derived:
    """What follows from all evidence, until more comes."""

    factors: NDArray[np.float64]
    problem: Problem
    efforts: tuple[float, float] | None = None
    predicted: dict[Assignment, dict[str, float]] = field(default_factory=dict)
    corrections: dict[tuple[str, float | None], Affine] = field(default_factory=dict)
    coefficients: NDArray[np.float64] | None = None
    recovery: float | None = None


class Ledger:
    """The evidence of one search, by assignment (plans that differ in recovery alone are one).

    Args:
        space: the decisions.
        costs: their predicted costs.
        limits: what is sought.

    Raises:
        BudgetError: a limit on a quantity that `costs` cannot predict.
    """

    def __init__(self, space: Space, costs: Costs, limits: Limits) -> None:
        unknown = sorted(set(limits.costs) - set(costs.quantities))
        if unknown:
            raise BudgetError(f"limits: nothing predicts {', '.join(unknown)} in this target; known are {', '.join(costs.quantities)}")
        self.space, self.costs, self.limits = space, costs, limits
        self.seen: dict[Assignment, None] = {space.identity: None}
        self.told: dict[Assignment, dict[Kind, Evidence]] = {}
        self.plans: dict[Assignment, Plan] = {}
        rows = [costs.effort, *(row for quantity in limits.costs for row in costs.rows(quantity))]
        self._plain = Problem(space.sizes, {"loss": space.losses(), **{row: costs.factors[row] for row in dict.fromkeys(rows)}})
        self._left = np.asarray([limits.recovered.get(variable.technique, 1.0) for variable in space.variables])
        self._derived: _Derived | None = None

    def remember(self, plan: Plan) -> Assignment:
        """Count a plan as proposed."""
        assignment = self.space.assignment(plan)
        self.seen.setdefault(assignment)
        self.plans.setdefault(assignment, plan)
        return assignment

    def tell(self, plan: Plan, evidence: Evidence) -> None:
        """Enter what became of a plan."""
        assignment = self.remember(plan)
        self.told.setdefault(assignment, {})[evidence.kind] = evidence
        self._derived = None

    def propose(self, assignment: Assignment) -> Plan:
        """The plan of an assignment, counted as proposed."""
        plan = self.space.plan(assignment)
        self.remember(plan)
        return plan

    @property
    def pending(self) -> int:
        """How many proposed plans nothing is known of yet."""
        return sum(assignment not in self.told for assignment in self.seen if assignment != self.space.identity)

    def _reports(self, *kinds: Kind) -> list[tuple[Assignment, Evidence]]:
        """Reports that did not fail, the dearest of `kinds` (the last named) for each plan, in an order that evidence alone decides."""
        out = []
        for assignment in sorted(self.told):
            found = [self.told[assignment][kind] for kind in kinds if kind in self.told[assignment]]
            if found and not found[-1].failed:
                out.append((assignment, found[-1]))
        return out

    @property
    def _now(self) -> _Derived:
        if self._derived is None:
            tried = self._measured("latency")
            factors = np.ones(len(self.costs.precisions))
            problem = self._plain
            if tried:
                factors = tilt(np.stack([self.costs.parts(a) for a, _ in tried]), [seconds for _, seconds in tried])
            if "latency" in problem.rows:
                problem = problem.replaced("latency", self.costs.tilted(factors))
            self._derived = _Derived(factors, problem)
        return self._derived

    @property
    def tilt(self) -> NDArray[np.float64]:
        """What each precision's predicted seconds are multiplied with, by all trials, `[precisions]`, the first 1 (see `costs.tilt`)."""
        return self._now.factors

    @property
    def problem(self) -> Problem:
        """Predicted loss, effort and limited costs of all plans; latency tilted."""
        return self._now.problem

    @property
    def efforts(self) -> tuple[float, float]:
        """The least effort of any plan, and that of the plan that changes nothing."""
        now, effort = self._now, self.costs.effort
        if now.efforts is None:
            highest = float(now.problem.values(self.space.identity)[now.problem.rows.index(effort)])
            now.efforts = solve(now.problem, effort, {}).objective, highest
        return now.efforts

    def _measured(self, quantity: str) -> list[tuple[Assignment, float]]:
        reports = self._reports("trial", "winner")
        return [(a, e.costs[quantity]) for a, e in reports if quantity in e.costs and quantity in self.costs.quantities]

    def predicted(self, assignment: Assignment) -> dict[str, float]:
        """Costs that the tables say, each precision's seconds tilted by what trials say of it."""
        known = self._now.predicted
        if assignment not in known:
            known[assignment] = self.costs.predict(assignment)
            if "latency" in known[assignment]:
                known[assignment]["latency"] = float(self.costs.parts(assignment) @ self.tilt)
        return known[assignment]

    def correction(self, quantity: str, near: float | None = None) -> Affine:
        """Measured against predicted costs, fitted over all trials, those whose figure is close to `near` weighing most."""
        known = self._now.corrections
        if (quantity, near) not in known:
            pairs = [(self.predicted(assignment)[quantity], measured) for assignment, measured in self._measured(quantity)]
            fit = Affine.fit([p for p, _ in pairs], [m for _, m in pairs], near, is_by_tables=quantity == "latency")
            known[quantity, near] = fit
        return known[quantity, near]

    @property
    def standing(self) -> Standing:
        """What is known without a solution."""
        if "latency" not in self.costs.quantities:
            return Standing()
        return Standing(
            correction=self.correction("latency"), tilt=dict(zip(self.costs.precisions[1:], self.tilt[1:].tolist(), strict=True))
        )

    def margin(self, quantity: str, fit: Affine) -> float:
        """How far below a limit to aim, as a share of it: less with every measurement, more where they scatter."""
        return 0.0 if quantity == "macs" else _MARGIN / (1 + max(0, fit.n - 1)) + min(fit.spread, _MARGIN) / 2

    def ceilings(self, tighter: float = 0.0) -> dict[str, float]:
        """Upper bounds of the problem's rows (latency tilted, else uncorrected) that stand for the limits, less margin and a further share `tighter`."""
        out: dict[str, float] = {}
        for quantity, limit in self.limits.costs.items():
            fit = self.correction(quantity, limit)
            bound = fit.inverse(limit * (1.0 - self.margin(quantity, fit) - tighter))
            out.update(dict.fromkeys(self.costs.rows(quantity), bound))
        return out

    def expected(self, assignment: Assignment) -> dict[str, float]:
        """Costs of a plan: measured where a trial told, else predicted and corrected."""
        predicted = self.predicted(assignment)
        out = {}
        for quantity in self.costs.quantities:
            first = self.correction(quantity)(predicted[quantity])
            out[quantity] = self.correction(quantity, first)(predicted[quantity])
        reports = self.told.get(assignment, {})
        for report in (reports.get("trial"), reports.get("winner")):
            out.update(report.costs if report else {})
        return out

    def contributions(self, assignment: Assignment) -> NDArray[np.float64]:
        """Predicted loss of each variable, `[variables]`."""
        chosen = self.space.canonical(assignment)
        return np.asarray([variable.losses[i] for variable, i in zip(self.space.variables, chosen, strict=True)], dtype=np.float64)

    def coefficients(self, rng: np.random.Generator | None = None) -> NDArray[np.float64]:
        """A factor for each variable's loss, so that the sums explain the measured losses.

        Ridge regression towards the common ratio of measured to predicted; with `rng`, a sample of its posterior instead of the mean
        (Matheron's rule), which is how proposals differ.

        References:
            Frantar and Alistarh, 2022 (SPDY): per-layer coefficients, there found by local search on the stitched model's loss.
        """
        pairs = [(a, e.loss) for a, e in self._reports("candidate") if e.loss is not None and e.loss > 0 and a != self.space.identity]
        count = len(self.space.variables)
        if count == 0:
            return np.ones(0)
        design = np.stack([self.contributions(a) for a, _ in pairs]) if pairs else np.zeros((0, count))
        measured = np.asarray([loss for _, loss in pairs])
        useful = design.sum(axis=1) > 0
        design, measured = design[useful], measured[useful]
        common = float(np.median(measured / design.sum(axis=1))) if len(measured) else 1.0
        common = max(common, 1e-12)
        prior = np.full(count, common)
        noise = _LOSS_NOISE * measured
        if rng is not None:
            prior = prior * np.exp(_LOSS_DOUBT * rng.standard_normal(count))
            measured = measured + noise * rng.standard_normal(len(measured))
        if len(measured):
            doubt = (_LOSS_DOUBT * common) ** 2
            gram = doubt * design @ design.T + np.diag(noise**2)
            prior = prior + doubt * design.T @ np.linalg.solve(gram, measured - design @ prior)
        clipped: NDArray[np.float64] = np.clip(prior, 0.05 * common, 20.0 * common)
        return clipped

    def losses_left(self, coefficients: NDArray[np.float64]) -> list[tuple[tuple[int, ...], Table]]:
        """The space's loss tables, each times its variable's coefficient and what recovery is expected to leave of it."""
        factors = (coefficients * self._left).tolist()
        return [(scope, table * factor) for (scope, table), factor in zip(self.space.losses(), factors, strict=True)]

    def _share_left(self, assignment: Assignment) -> float:
        """What recovery was assumed to leave of a plan's drop, by what its techniques are predicted to contribute to it."""
        now = self._now
        if now.coefficients is None:
            now.coefficients = self.coefficients()
        losses = now.coefficients * self.contributions(assignment)
        return float(losses @ self._left / losses.sum()) if losses.sum() > 0 else 1.0

    def remaining(self, assignment: Assignment) -> float:
        """The share of a candidate's drop that is left after recovery: as was assumed, times the median of how far winners were off."""
        now = self._now
        if now.recovery is None:
            off = []
            for known, winner in self._reports("winner"):
                candidate = self.told[known].get("candidate")
                if candidate and candidate.quality_drop and winner.quality_drop is not None and candidate.quality_drop > 0:
                    off.append(winner.quality_drop / candidate.quality_drop / self._share_left(known))
            now.recovery = float(np.clip(np.median(off), 1 / _MOST_OFF, _MOST_OFF)) if off else 1.0
        return min(now.recovery * self._share_left(assignment), 1.0)

    def drop(self, assignment: Assignment) -> float | None:
        """The drop that a plan is expected to end with."""
        reports = self.told.get(assignment, {})
        winner = reports.get("winner")
        if winner is not None and winner.quality_drop is not None:
            return winner.quality_drop
        for report in (reports.get("trial"), reports.get("candidate")):
            if report is not None and report.quality_drop is not None:
                return report.quality_drop * (self.remaining(assignment) if report.quality_drop > 0 else 1.0)
        return None

    def bracket(self, coefficients: NDArray[np.float64]) -> tuple[float, float | None]:
        """The largest loss, of what recovery was assumed to leave, whose drop is allowed and the least above it whose drop is not (None: none is known).

        The drop as a function of the loss is isotonic regression over all evaluated plans, with no drop at no loss.
        """
        points = [(0.0, 0.0)]
        for assignment in sorted(self.told):
            if assignment == self.space.identity:
                continue
            reports = self.told[assignment]
            loss = reports["candidate"].loss if "candidate" in reports else None
            predicted = float((coefficients * self._left) @ self.contributions(assignment))
            if any(report.failed for report in reports.values()):
                continue
            drop = self.drop(assignment)
            if drop is not None:
                points.append((predicted if loss is None else loss * self._share_left(assignment), drop))
        losses, drops = np.asarray(points).T
        fitted = IsotonicRegression().fit_transform(losses, drops)
        within = fitted <= self.limits.drop + 1e-12
        held = float(losses[within].max(initial=0.0))
        over = losses[~within & (losses > held)]
        return held, (float(over.min()) if len(over) else None)

    def best(self, n: int, kind: Kind) -> list[Plan]:
        """See `Search.best`."""
        found = [
            assignment
            for assignment, reports in self.told.items()
            if kind in reports and assignment != self.space.identity and not any(report.failed for report in reports.values())
        ]
        ranked = sorted(found, key=lambda assignment: (*self._rank(assignment), self.plans[assignment].digest))
        return [self.plans[assignment] for assignment in ranked[:n]]

    def _rank(self, assignment: Assignment) -> tuple[float, float, float]:
        costs = self.expected(assignment)
        over = sum(max(0.0, costs[quantity] / limit - 1.0) for quantity, limit in self.limits.costs.items() if quantity in costs)
        drop = self.drop(assignment)
        losses = (e.loss for e in self.told[assignment].values() if e.loss is not None)
        loss = next(losses, float(self.contributions(assignment).sum())) * self._share_left(assignment)
        lost = max(0.0, drop - self.limits.drop) / (self.limits.drop or NO_DROP) if drop is not None else 0.0
        if over + lost > 1e-9:
            return (over / _COST_DOUBT + math.log1p(lost) / _DROP_DOUBT, loss, costs[self.costs.effort])
        return (0.0, drop if drop is not None else loss, loss) if self.limits.costs else (0.0, costs[self.costs.effort], loss)
