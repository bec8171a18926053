"""What is believed of plans: what trials say, drawn towards what tables say, which all other trials correct."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from planish.plan import Plan
from planish.search.contract import Evidence, Kind
from planish.search.costs import Costs, calibrated
from planish.trials import Trials

SURPRISE = 1.1
"""A trial this far from what tables and other trials say, or not trustworthy, is measured again, twice at most, with other work between."""
VISITS = 3
_TABLE_ERROR = 0.05
"""Relative standard deviation of what tables, corrected by many trials, say of a plan on a quiet machine."""


class Beliefs:
    """The evidence of one run, and what follows from it for each plan.

    Args:
        trials: of the run: how often each plan was measured, and how much the machine changes its speed.
        costs: what the tables say.
    """

    def __init__(self, trials: Trials, costs: Costs) -> None:
        self.trials, self.costs = trials, costs
        self._evidence: dict[tuple[str, Kind], tuple[Plan, Evidence]] = {}

    def note(self, plan: Plan, evidence: Evidence) -> None:
        """Enter what became of a plan; a later report of the same kind replaces the earlier one."""
        self._evidence[plan.digest, evidence.kind] = plan, evidence

    def known(self, plan: Plan, kind: Kind) -> Evidence | None:
        """What was entered of a plan."""
        return self._evidence[plan.digest, kind][1] if (plan.digest, kind) in self._evidence else None

    def __iter__(self) -> Iterator[tuple[Plan, Evidence]]:
        """Every plan with its evidence, as it was entered, in that order."""
        return iter(self._evidence.values())

    @property
    def tried(self) -> list[Plan]:
        """Plans that were tried, but for the one that changes nothing."""
        return [plan for plan, evidence in self if evidence.kind == "trial" and plan != self.costs.space.template]

    def is_worth_a_visit(self, plan: Plan) -> bool:
        """Whether a trial that was not visited too often is not trustworthy, or far from what tables and all other trials say of it."""
        found = self.trials.known(plan, "trial")
        if found is None or found.ratio is None or self.trials.visits(plan) >= VISITS:
            return False
        if not found.ratio.trustworthy:
            return True
        expected = self.expected(plan)
        return expected is not None and not 1 / SURPRISE <= found.evidence.costs["latency"] / expected[0] <= SURPRISE

    def expected(self, plan: Plan) -> tuple[float, float] | None:
        """Seconds that the tables, corrected by all other trials, say of a plan, and their relative variance; None where they say nothing."""
        if "latency" not in self.costs.quantities:
            return None
        others = [
            (self.costs.parts(self.costs.space.assignment(known)), evidence.costs["latency"])
            for known, evidence in self
            if "latency" in evidence.costs and known.digest != plan.digest
        ]
        if len(others) < 2:
            return None
        parts, measured = np.stack([p for p, _ in others]), [m for _, m in others]
        factors, fit = calibrated(parts, measured)
        unsure = _TABLE_ERROR**2 * (1 + (1 + len(factors)) / len(others))  # an offset and a factor for each precision were fitted
        return fit(float(self.costs.parts(self.costs.space.assignment(plan)) @ factors)), unsure

    def believed(self, plan: Plan, evidence: Evidence) -> Evidence:
        """Evidence of a trial whose latency is drawn towards what the tables say, by as much as the machine changes its speed.

        The mean of both, in logarithms, weighted by their variances: where the same plan takes a fifth more or less from visit to
        visit, one visit says little, and the visits of all plans together correct the tables.
        """
        expected = (
            self.expected(plan) if evidence.kind == "trial" and "latency" in evidence.costs and plan != self.costs.space.template else None
        )
        if expected is None:
            return evidence
        seconds, unsure = expected
        share = unsure / (unsure + self.trials.noise**2 / self.trials.visits(plan))
        latency = evidence.costs["latency"] ** share * seconds ** (1 - share)
        return msgspec.structs.replace(evidence, costs={**evidence.costs, "latency": latency})

    def predicted(self, plan: Plan) -> float:
        """Seconds that the tables say, corrected by the trials so far."""
        expected = self.expected(plan)
        if expected is not None:
            return expected[0]
        return self.costs.predict(self.costs.space.assignment(plan))["latency"]
