"""What a search method is: it is asked for plans, told what became of them, and says which deserve the next, dearer stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from planish.plan import Plan
from planish.search.costs import Affine, Costs
from planish.search.space import Space

Kind = Literal["candidate", "trial", "winner"]
NO_DROP = 0.01
"""What drops are counted in where none is allowed."""


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a plan at one stage.

    Args:
        kind: "candidate" (applied and evaluated), "trial" (also exported and measured) or "winner" (also recovered).
        loss: measured calibration loss, in the unit of the options' losses.
        quality_drop: how much worse than the original it is, in the metric's own unit.
        costs: measured "latency" (seconds), "size", "memory" (bytes), "macs" (of one call).
        failed: the plan came to nothing (unsupported, diverged, ...) and must not be chosen.
    """

    kind: Kind
    loss: float | None = None
    quality_drop: float | None = None
    costs: dict[str, float] = {}
    failed: bool = False


@dataclass(frozen=True)
class Limits:
    """What a plan may cost and lose.

    Args:
        costs: upper bounds by quantity, absolute, in SI units (see `planish.search.costs.ceilings`); empty: as fast as possible
            within the drop.
        drop: the quality that may be lost, in the metric's own unit.
        recovered: by technique, what share of the drop it causes is expected to remain after recovery, until winners tell; all of it
            for a technique that is not named.
    """

    costs: Mapping[str, float] = field(default_factory=dict)
    drop: float = 0.0
    recovered: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """What a method says of itself.

    Args:
        is_feasible: whether some plan is predicted to hold the limits; True where the method cannot tell.
        gap: what its last solution may lose to the best one, as a share of what it minimised; None where nothing was solved exactly.
        kkt: that solution's residual, relative; None where nothing was solved.
        correction: of predicted latencies, as trials taught it; None where none are predicted.
        tilt: precision -> how many times as slow against floating point as the tables say, as trials taught it.
    """

    is_feasible: bool = True
    gap: float | None = None
    kkt: float | None = None
    correction: Affine | None = None
    tilt: Mapping[str, float] = field(default_factory=dict)


class Search(Protocol):
    """A search method. Used by one thread; deterministic for a seed, given the same evidence.

    The flow constructs it, tells it the original (the plan that changes nothing, as a "trial"), on resuming tells it everything that
    the study holds, then asks and tells in turn. The plan that changes nothing is never proposed.
    """

    def __init__(self, space: Space, costs: Costs, limits: Limits, seed: int = 0) -> None: ...

    @property
    def standing(self) -> Standing:
        """What it says of itself, as of its last proposal."""
        ...

    def ask(self, n: int) -> list[Plan]:
        """Up to `n` plans worth a candidate, none proposed or told before; an empty list when nothing is left to propose.

        Asking twice for one plan is asking once for two. When no plan holds the limits, the nearest ones are proposed.
        """
        ...

    def remember(self, plan: Plan) -> None:
        """Count a plan as proposed (it is under way elsewhere, or was when the study was interrupted)."""
        ...

    def tell(self, plan: Plan, evidence: Evidence) -> None:
        """What became of a plan, whoever proposed it; a later report of the same kind replaces the earlier one.

        Raises:
            PlanError: the plan makes a choice that the space does not offer.
        """
        ...

    def expected_drop(self, plan: Plan) -> float | None:
        """The drop that a plan that was told of is expected to end with, recovery included; None where no report says what it lost."""
        ...

    def best(self, n: int = 1, kind: Kind = "candidate") -> list[Plan]:
        """Up to `n` plans with evidence of `kind`, the most promising first: those that hold limits and drop, by what is sought
        (the least drop under limits, the least latency without), then those nearest to holding them."""
        ...
