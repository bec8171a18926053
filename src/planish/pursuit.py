"""The pursuit of a budget: options → tables → search → candidates → trials. `winners.py` recovers what it found most promising."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from planish import registry
from planish.beliefs import SURPRISE, VISITS, Beliefs
from planish.clock import SEARCH_SHARE
from planish.errors import BudgetError, PlanError
from planish.graph.macs import macs
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.offers import Offers
from planish.plan import Option, Plan
from planish.search.contract import Evidence, Limits, Search
from planish.search.costs import Affine, Costs, ceilings
from planish.search.space import Space
from planish.study.store import Study
from planish.train.norms import has_batch_norm
from planish.trials import Trials
from planish.workbench import Baseline, Workbench

if TYPE_CHECKING:
    from planish.request import Request

_LEFT = {"block": 0.22, "width": 0.6, "precision": 0.22, "mask": 0.4}
"""What recovery is assumed to leave of the drop that a technique causes, until a winner tells. Narrowed widths were fitted to the data
before (least squares) and gain less from training than a block that was merely bypassed; figures in decision 011."""
_LEFT_WITHOUT_BATCH_NORM = 1.3
"""Times as much where Muon does not train."""
_RESERVE_S = 15.0
_VARYING = ("latency", "memory")
_AIMS = (0.72, 0.78, 0.85, 0.91, 0.97)
"""Of a limit on what varies from run to run: the final measurement must hold it too, perhaps in another state of the machine. Each is
aimed at where the one before is expected to cost more than `_COMFORT` of the drop that is allowed."""
_COMFORT, _BEYOND = 0.8, 1.5
"""Shares of the drop that is allowed: up to which an expected one leaves room for error, and from which on no other plan will come back."""
_CLEARLY = 0.9
_NEAR = 1.03
_DOUBTED = 2
"""Trials that are measured again with each candidate at most."""
_AIMED = "aimed at"
"""Event of the study: what the clock decided. A run that is carried on decides the same."""
_PATIENCE = 8
"""Candidates in a row after which the search ends where none of them became the most promising."""
_SELECTION_MARGIN = 0.8
"""Of what may be lost on validation: the search without limits goes to that edge, and of several winners the one beyond it comes second,
so that there is room for another split."""


class Pursuit:
    """The search of one run: what may be done, what was tried, and what came of it.

    Args:
        bench: the original on this machine.
        request: what was asked for.
        study: where trials are kept.
    """

    def __init__(self, bench: Workbench, request: Request, study: Study) -> None:
        self.bench, self.request, self.study = bench, request, study
        self.clock, self.events = bench.clock, bench.events
        self.original = self._original_costs()
        self.trials = Trials(bench, study, self.original)
        self.options: list[Option] = []
        self.baseline: Baseline = bench.best
        self.search: Search | None = None
        self.costs: Costs | None = None
        self.bounds: dict[str, float] = {}
        self.asked, self.is_cut = 0, False
        self._level = len(_AIMS) - 1
        self._looked: set[str] = set()

    def search_plans(self) -> bool:
        """Options, tables, then candidates and trials until time or plans are used up; False where there is nothing to decide."""
        bench, request = self.bench, self.request
        allowed = self.allowed_drop
        if self._original_holds():
            bench.notes.append("the original holds every limit as it is, and loses nothing")
            return False
        offers = Offers(bench, request, self.study, self.trials)
        self.baseline, self.options = offers.runtime(offers.pruning())
        self.options += offers.masking(self.baseline.runtime)
        self.template = offers.template(self.baseline.target.name)
        self.space = Space(bench.analysis, self.options, self.template)
        if not self.space.variables and self.template.is_identity:
            bench.notes.append("nothing can be pruned, masked or quantized in this model and target; see `planish inspect`")
            return False
        with self.clock.stage("latency tables"):
            self.costs = Costs(self.space, offers.lookup(self.baseline.target), offers.affordable_kernels)
        self.beliefs = Beliefs(self.trials, self.costs)
        if "latency" in self.costs.quantities:
            self.trials.predict = self.beliefs.predicted
        self.bounds = ceilings(request.budget.limits, self.original, bench.batch)
        if "latency" in self.bounds and allowed > 0 and bench.original_quality is not None:
            self._level = 0
        own = self.baseline.timing
        assert own is not None
        latency = offers.plain.get(self.template, math.nan) * self.original["latency"]
        latency = latency if math.isfinite(latency) else own.latency_s.median
        self.beliefs.note(self.template, Evidence("trial", 0.0, 0.0, {**self.original, "latency": latency}))
        self._aim()
        self._search()
        return True

    def _original_holds(self) -> bool:
        """Whether all limits are absolute and the original is clearly below them."""
        limits = self.request.budget.limits
        if not limits or any(limit.relative for limit in limits):
            return False
        bounds = ceilings(limits, self.original, self.bench.batch)
        return all(self.original[q] <= bound * (_CLEARLY if q in _VARYING else 1.0) for q, bound in bounds.items())

    def _aim(self) -> None:
        """A search under the limits as they are aimed at now, that knows all evidence."""
        assert self.costs is not None
        bounds = self._aimed()
        if self._is_by_macs:
            latency = bounds.pop("latency")
            measured = [(e.costs["macs"], e.costs["latency"]) for _, e in self.beliefs if "macs" in e.costs and "latency" in e.costs]
            fit = Affine.fit([m for m, _ in measured], [s for _, s in measured], near=latency)
            bounds["macs"] = min(max(fit.inverse(latency), 1.0), bounds.get("macs", math.inf))
        self.limits = Limits(
            bounds,
            self.allowed_drop if self.bounds else self.safe_drop,
            self._expected_to_be_left,
        )
        self.search = registry.get("search", self.request.search)(self.space, self.costs, self.limits, self.request.seed)
        self._retell()

    @property
    def _expected_to_be_left(self) -> dict[str, float]:
        if "distill" not in self.request.techniques:
            return {}
        factor = 1.0 if has_batch_norm(self.bench.graph) else _LEFT_WITHOUT_BATCH_NORM
        return {technique: factor * share for technique, share in _LEFT.items()}

    def _retell(self) -> None:
        """Tell the search all evidence, as it is believed now."""
        assert self.search is not None
        for plan, evidence in self.beliefs:
            self.search.tell(plan, self.beliefs.believed(plan, evidence))

    def _aimed(self) -> dict[str, float]:
        """The bounds of the budget, less what is left for a machine that changes its speed."""
        return {quantity: bound * (_AIMS[self._level] if quantity in _VARYING else 1.0) for quantity, bound in self.bounds.items()}

    @property
    def _is_by_macs(self) -> bool:
        """Whether a limit on latency is searched as one on MACs, by what trials say of both: the target has no tables."""
        return "latency" in self.bounds and self.costs is not None and self.costs.effort == "macs"

    def over(self, costs: Mapping[str, float], share: float = 1.0) -> list[str]:
        """Which measured costs are above `share` of what the budget allows."""
        return [quantity for quantity, bound in self.bounds.items() if costs.get(quantity, 0.0) > share * bound]

    @property
    def is_relaxed(self) -> bool:
        """Whether what is aimed at are the limits themselves."""
        return self._level == len(_AIMS) - 1

    def relax(self) -> bool:
        """Aim closer to the limits; False where they are aimed at already."""
        if self.is_relaxed:
            return False
        self._level += 1
        self._aim()
        return True

    def step_back(self) -> None:
        """After a winner that lost too much: aim closer to the limits, as far as it takes for a plan to be expected to lose little enough."""
        assert self.search is not None
        while self.relax():
            for plan in self.search.ask(1):
                self.tell(plan, self.trials.candidate(plan))
            lost = [self.search.expected_drop(plan) for plan in self.search.best(1)]
            if any(drop is not None and drop <= _COMFORT * self.allowed_drop for drop in lost):
                break
        for plan in self.search.best(1):
            if self.beliefs.known(plan, "trial") is None:
                self.try_plan(plan)

    def tell(self, plan: Plan, evidence: Evidence) -> None:
        """Tell the search, and whichever follows it."""
        assert self.search is not None
        self.beliefs.note(plan, evidence)
        if self._is_by_macs and "latency" in evidence.costs:
            self._aim()
        else:
            self.search.tell(plan, self.beliefs.believed(plan, evidence))

    def _is_comfortable(self) -> bool:
        """Whether the most promising plan that was tried holds what is aimed at, and leaves much of the allowed drop."""
        assert self.search is not None
        for plan in self.search.best(1, "trial"):
            lost, tried = self.search.expected_drop(plan), self.trials.known(plan, "trial")
            if lost is None or tried is None:
                return False
            return self._is_near_aim(self.beliefs.believed(plan, tried.evidence).costs) and lost <= _COMFORT * self.allowed_drop
        return False

    def _is_out_of_reach(self) -> bool:
        """Whether all that is known to hold what is aimed at, at least as far as tables and trials say, is expected to lose far too much."""
        assert self.search is not None
        lost = [self.search.expected_drop(plan) for plan in self.search.best(self.request.trials) if self.may_hold_aim(plan)]
        return bool(lost) and all(drop is not None and drop > _BEYOND * self.allowed_drop for drop in lost)

    def settle(self) -> bool:
        """Adapt torch's threads to how busy the machine is now; asked before every training step, and never a reason to stop."""
        self.bench.threads.settle()
        return False

    @property
    def safe_drop(self) -> float:
        """The drop on validation that leaves room for another split: what a choice among several is held against."""
        return _SELECTION_MARGIN * self.allowed_drop

    # What the original costs, and what may be lost

    def _original_costs(self) -> dict[str, float]:
        best = self.bench.best
        assert best.timing is not None
        costs = {
            "latency": best.timing.latency_s.median,
            "size": float(size_bytes(best.path)),
            "macs": float(macs(self.bench.analysis)),
        }
        if any(limit.quantity == "memory" for limit in self.request.budget.limits):
            costs["memory"] = float(peak_memory_bytes(best.target, best.path, self.bench.graph.signature, self.bench.example))
        return costs

    @property
    def allowed_drop(self) -> float:
        """The drop that the budget allows on validation, in the metric's own unit."""
        drop, quality = self.request.budget.allowed_drop, self.bench.original_quality
        if drop.unit == "points" and quality is not None and self.bench.metric.low is None and not 0 <= quality <= 1:
            raise BudgetError(
                f"drop: points are hundredths of a metric that lives in [0, 1], and {self.bench.metric.name!r} gives {quality:.4g} for the "
                "original; give the drop in the metric's own unit ('0.01') or as a share of the original ('1%')"
            )
        return drop.value if quality is None else drop.allowed(quality)

    # Candidates and trials

    def _search(self) -> None:
        request, clock = self.request, self.clock
        assert self.search is not None and self.costs is not None
        end = clock.elapsed_s + SEARCH_SHARE * (clock.left_s - self.reserve_s) if math.isfinite(clock.left_s) else math.inf
        with clock.stage("candidates"):
            self._look_first(end)
            began, longest, waited, best = clock.elapsed_s, 0.0, 0, ""
            levels = self.study.kept(_AIMED, int)
            while self.asked < request.trials:
                if self.asked and clock.elapsed_s + longest >= end:
                    self.is_cut = True
                    break
                is_stuck = waited >= _PATIENCE
                if self.asked < len(levels):
                    while self._level < levels[self.asked] and self.relax():
                        waited = 0
                else:
                    share = max(self.asked / request.trials, (clock.elapsed_s - began) / max(end - began, 1e-9))
                    was_aimed_at = self._level in self.study.kept(_AIMED, int)
                    is_hopeless = not self.search.standing.is_feasible or (was_aimed_at and self._is_out_of_reach())
                    is_time = share >= (self._level + 1) / (len(_AIMS) + 1)
                    if (is_hopeless or ((is_time or is_stuck) and not self._is_comfortable())) and self.relax():
                        waited = 0
                        continue
                    if is_stuck:
                        break
                    self.study.keep(_AIMED, self._level)
                started = clock.elapsed_s
                if not self.try_one():
                    if not self.relax():
                        break
                    continue
                self.asked += 1
                most_promising = next((plan.digest for plan in self.search.best(1)), "")
                waited, best = (waited + 1 if most_promising == best else 0), most_promising
                longest = max(longest, clock.elapsed_s - started)
                self.events.progress(self.asked, request.trials)
            while not self._is_comfortable() and self.relax():
                pass

    def _look_first(self, end: float) -> None:
        """What is known to be worth a trial before any search: one scheme everywhere, and plans that the study was given."""
        for plan in self.known_trials():  # however little time there is: one scheme everywhere is often the best that there is
            self.tell(plan, self.trials.candidate(plan))
            self.try_plan(plan)
        assert self.costs is not None
        quickest = self.costs.quickest_scheme()
        for plan in [*([self.space.plan(quickest)] if quickest is not None else []), *self._in_other_floats()]:
            if self.clock.elapsed_s < end and self.beliefs.known(plan, "trial") is None:
                self.tell(plan, self.trials.candidate(plan))
                self.try_plan(plan)
        for plan in self._left_over():
            if self.clock.elapsed_s < end:
                self.tell(plan, self.trials.candidate(plan))

    def is_promised(self) -> bool | None:
        """Whether the tables, corrected by all trials, say that some plan holds the limits; None where the method does not solve for one.

        To be asked when nothing is tried any more: the search proposes one plan for it.
        """
        if self.search is None:
            return None
        while self.relax():
            pass
        self.search.ask(1)
        standing = self.search.standing
        return None if standing.kkt is None and standing.is_feasible else standing.is_feasible

    def try_one(self) -> bool:
        """One more candidate, and a trial of whatever is now the most promising; False where there is none left to propose."""
        assert self.search is not None
        for plan in self.search.ask(1):
            self.tell(plan, self.trials.candidate(plan))
            doubted = [tried for tried in self.beliefs.tried if self.beliefs.is_worth_a_visit(tried)]
            for tried in sorted(doubted, key=self.trials.visits)[:_DOUBTED]:
                self._visit(tried)
            for best in self.search.best(1):
                if self.beliefs.known(best, "trial") is None:
                    self.try_plan(best)
            return True
        return False

    def _is_near_aim(self, costs: Mapping[str, float]) -> bool:
        return all(costs.get(quantity, 0.0) <= _NEAR * limit for quantity, limit in self._aimed().items())

    def may_hold_aim(self, plan: Plan) -> bool:
        """Whether tables and trials do not say that a plan costs clearly more than what is aimed at."""
        expected = self.beliefs.expected(plan)
        return expected is None or "latency" not in self.bounds or expected[0] <= SURPRISE * self._aimed()["latency"]

    def holds_aim(self, plan: Plan) -> bool:
        """Whether a plan costs no more than what is aimed at, by a trial and another visit."""
        if self.beliefs.known(plan, "trial") is None:
            self.try_plan(plan)
        found = self.beliefs.known(plan, "trial")
        assert found is not None
        costs = self.beliefs.believed(plan, found).costs
        return not found.failed and self._is_near_aim(costs) and ("latency" not in self.bounds or self.look_again(plan))

    def look_again(self, plan: Plan) -> bool:
        """Measure a tried plan once more; whether it still holds what is aimed at.

        The one that is chosen among many noisy figures is likely to be one that looked better than it is.
        """
        if plan.digest not in self._looked:
            self._looked.add(plan.digest)
            if self._visit(plan) is not None and self.beliefs.is_worth_a_visit(plan):
                self._visit(plan)
        found = self.trials.known(plan, "trial")
        if found is None or found.ratio is None:
            return True
        evidence = found.evidence if self.trials.visits(plan) >= VISITS else self.beliefs.believed(plan, found.evidence)
        return evidence.costs["latency"] <= _NEAR * self._aimed()["latency"]

    def try_plan(self, plan: Plan) -> None:
        """A trial, and the search told."""
        self.tell(plan, self.trials.trial(plan).evidence)

    def _visit(self, plan: Plan) -> Evidence | None:
        """Measure a tried plan once more, and tell the search what is believed of all trials now; None where it cannot be measured."""
        found = self.trials.visit(plan)
        if found is None:
            return None
        self.beliefs.note(plan, found.evidence)
        if self._is_by_macs:
            self._aim()
        else:
            self._retell()
        return found.evidence

    @property
    def reserve_s(self) -> float:
        """Seconds that the end of the run needs: the winner's export, perhaps another's, and judging and measuring both nets."""
        data, timing = self.bench.data, self.bench.best.timing
        assert timing is not None
        judged = sum(split.n for split in (data.validation, data.judged[1], data.judged[1]) if split is not None)
        return (
            timing.latency_s.median / self.bench.batch * judged
            + _RESERVE_S
            + 6 * max((trial.seconds for trial in self.trials.all if trial.stage == "trial"), default=5.0)
        )

    def known_trials(self) -> list[Plan]:
        """Plans of this space that were tried before the search began: one scheme everywhere, as far as it is offered."""
        out = []
        for trial in self.trials.all:
            if trial.plan.target == self.template.target and trial.stage == "trial" and trial.plan.is_dense:
                offered = self._offered(trial.plan)
                if (offered or not trial.plan.precisions) and trial.plan.floats == self.template.floats:
                    out.append(trial.plan.replace(precisions=offered))
        return list(dict.fromkeys(out))

    def _offered(self, plan: Plan) -> dict[str, str]:
        """The schemes of a plan that this space offers."""
        return {name: scheme for name, scheme in plan.precisions.items() if self.space.offers("precision", name, scheme)}

    def _in_other_floats(self) -> list[Plan]:
        """The quickest scheme that was tried everywhere with other floats than the search has, with those: fused operators are in no table."""
        tried = [
            (float(trial.latency_ratio), trial.plan)
            for trial in self.trials.all
            if trial.latency_ratio is not None and trial.plan.target == self.template.target and trial.plan.is_dense
        ]
        quickest = min(tried, key=lambda one: one[0])[1] if tried else self.template
        if quickest.floats == self.template.floats:
            return []
        offered = self._offered(quickest)
        return [self.template.replace(precisions=offered)] if offered else []

    def _left_over(self) -> list[Plan]:
        """Plans that the study was given to try (those of the study that it was forked from), as far as this space offers them."""
        out = []
        for plan in self.study.given():
            try:
                self.space.assignment(plan)
            except PlanError:
                continue
            out.append(plan)
        return out
