"""The verdict: a budget held against what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planish.budget import Budget, Limit
from planish.errors import BudgetError
from planish.measurement import Estimate, Measurement
from planish.result import Verdict


@dataclass(frozen=True)
class Held:
    """One limit, or the drop, held against what was measured.

    Args:
        quantity: a limit's, or "drop".
        state: "doubtful" where the machine is too noisy to tell.
        said: what is wrong; "" where it holds.
    """

    quantity: str
    state: Literal["holds", "missed", "doubtful"] = "holds"
    said: str = ""


@dataclass(frozen=True)
class Course:
    """How a run went, as far as it says whether a budget that was missed could be met.

    Args:
        limit_s: seconds that the run had; None: as many as it wanted.
        asked, most: plans that the search proposed, and that it may propose.
        is_cut: whether it ended because its time was up.
        is_promised: whether tables, corrected by all trials, say that some plan holds the limits; None where nothing says so or denies it.
        recovered, usual: samples that recovery saw, and those that it sees where no time limit is given; 0 where it is not wanted.
    """

    limit_s: float | None = None
    asked: int = 0
    most: int = 0
    is_cut: bool = False
    is_promised: bool | None = None
    recovered: int = 0
    usual: int = 0


def held(
    budget: Budget,
    before: Measurement,
    after: Measurement,
    latency: Estimate,
    lost: float | None,
    lost_interval: tuple[float, float] | None,
) -> list[Held]:
    """Every limit, then the drop where it was judged (see `judge_budget`)."""
    found = []
    for limit in budget.limits:
        value, low, high = _against(limit, before, after, latency)
        bound = limit.value if limit.relative else limit.bound(1.0)
        holds = value >= bound if limit.quantity == "throughput" else value <= bound
        is_sure = latency.trustworthy if limit.relative else after.latency_s.trustworthy
        if not is_sure and limit.quantity in ("latency", "throughput") and low <= bound <= high:
            figure, _, least, most = _texts(limit, value, bound, low, high)
            said = f"{limit.quantity} {figure}, between {least} and {most}: the machine is too noisy to tell"
            found.append(Held(limit.quantity, "doubtful", said))
        elif not holds:
            figure, most = _texts(limit, value, bound)
            found.append(Held(limit.quantity, "missed", f"{limit.quantity} {figure}, the limit is {most}"))
        else:
            found.append(Held(limit.quantity))
    if lost is not None:
        allowed = _allowed(budget, before)
        judged = lost_interval[1] if budget.confidence is not None and lost_interval is not None else lost
        what = "the upper end of the drop's interval" if budget.confidence is not None else "the drop"
        holds = judged <= allowed + 1e-12
        found.append(Held("drop") if holds else Held("drop", "missed", f"{what} is {judged:.4g}, {allowed:.4g} is allowed"))
    return found


def _allowed(budget: Budget, before: Measurement) -> float:
    return budget.allowed_drop.allowed(before.quality) if before.quality is not None else budget.allowed_drop.value


def _said(found: Sequence[Held], state: str) -> str:
    return "; ".join(one.said for one in found if one.state == state)


NEAREST = "nearest: "


def unmet(found: Sequence[Held], course: Course) -> tuple[str, bool]:
    """Why a budget was missed, in one sentence, and whether the time limit is to blame: with more time something else would have been tried.

    Args:
        found: limits and drop, at least one of them missed.
        course: how the run went.
    """
    missed = [one.quantity for one in found if one.state == "missed"]
    over = [quantity for quantity in missed if quantity != "drop"]
    nearest = NEAREST + _said(found, "missed")
    promised = f"the tables say that a plan should hold the limit on {' and '.join(over)}"
    tried = f"{course.asked} of at most {course.most} plans {'was' if course.asked == 1 else 'were'} tried"
    seen = f"recovery saw {course.recovered} of the {course.usual} samples that it sees without one" if course.recovered else ""
    why = []
    if course.limit_s is not None:
        is_search_short = course.is_cut and not (over and course.is_promised is False)
        why += [tried] if is_search_short else []
        why += [promised] if is_search_short and over and course.is_promised else []
        is_recovery_short = not over and course.recovered < course.usual
        why += [seen or "no time was left for recovery"] if is_recovery_short else []
    if why:
        return f"not met within the time limit of {course.limit_s:g} s; a longer one may: {', and '.join(why)}; {nearest}", True
    if over and course.is_promised:
        return f"nothing that was tried holds the budget, though {promised}; {nearest}", False
    return f"nothing found holds the budget; {nearest}", False


def judge_budget(
    budget: Budget,
    before: Measurement,
    after: Measurement,
    latency: Estimate,
    lost: float | None,
    lost_interval: tuple[float, float] | None,
    *,
    is_original: bool,
) -> tuple[Verdict, str]:
    """The verdict on what was measured, and one sentence that says why.

    Args:
        budget: limits and drop.
        before, after: the original and the artifact, measured side by side.
        latency: after ÷ before, paired.
        lost: quality lost, positive is worse; None where nothing was judged.
        lost_interval: its paired interval.
        is_original: whether the artifact is the original itself.
    """
    found = held(budget, before, after, latency, lost, lost_interval)
    allowed = _allowed(budget, before)
    if _said(found, "missed"):
        return "infeasible", unmet(found, Course())[0]
    if doubtful := _said(found, "doubtful"):
        return "undecided", doubtful
    if is_original:
        return "met", "the original itself: " + ("it holds every limit" if budget.limits else "nothing faster was found in this target")
    if latency.median >= 1:
        return "met", f"every limit holds; it takes {latency.median:.2f} times as long as the original in its quickest runtime"
    noisy = "" if latency.trustworthy else f" ({1 / latency.high:.2f} to {1 / latency.low:.2f}: the machine is noisy)"
    return "met", f"{1 / latency.median:.2f} times as fast{noisy} as the original in its quickest runtime" + (
        "" if lost is None else f", drop {lost:.4g} of {allowed:.4g} allowed" if lost > 0 else ", no drop"
    )


_UNITS = {"latency": (1e3, " ms"), "throughput": (1.0, "/s"), "size": (1e-6, " MB"), "memory": (1e-6, " MB"), "macs": (1e-6, " million")}


def _texts(limit: Limit, *values: float) -> list[str]:
    """Figures in their unit, all rounded to the same digits: as many as it takes to tell those apart that differ."""
    factor, unit = (1.0, "x") if limit.relative else _UNITS[limit.quantity]
    texts = ([_digits(factor * value, d) for value in values] for d in range(3, 16))
    shown = next((found for found in texts if len(set(found)) == len(set(values))), [_digits(factor * value, 3) for value in values])
    return [text + unit for text in shown]


def _digits(figure: float, digits: int) -> str:
    return np.format_float_positional(figure, digits, fractional=False, trim="-") if np.isfinite(figure) else str(figure)


def _against(limit: Limit, before: Measurement, after: Measurement, latency: Estimate) -> tuple[float, float, float]:
    """What a limit is held against: the figure and its interval; ratios for relative limits."""
    absolute = after.latency_s
    batch = after.batch
    if limit.quantity == "latency":
        e = latency if limit.relative else absolute
        return e.median, e.low, e.high
    if limit.quantity == "throughput":
        if limit.relative:
            return 1 / latency.median, 1 / latency.high, 1 / latency.low
        return batch / absolute.median, batch / absolute.high, batch / absolute.low
    pairs = {
        "size": (after.size_bytes, before.size_bytes),
        "memory": (after.peak_memory_bytes or 0, before.peak_memory_bytes or 0),
        "macs": (after.macs / batch, before.macs / batch),
    }
    if limit.quantity not in pairs:
        raise BudgetError("energy: this machine cannot tell what a call uses, so nothing can be promised; give a latency")
    now, then = pairs[limit.quantity]
    value = now / then if limit.relative and then else float(now)
    return value, value, value
