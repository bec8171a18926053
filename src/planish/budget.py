"""A budget: limits on latency, throughput, size, memory, MACs and energy, and how much quality may be lost."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from planish.errors import BudgetError

_UNITS: dict[str, dict[str, float]] = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "throughput": {"/s": 1.0, "k/s": 1e3},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "memory": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9},
    "energy": {"j": 1.0, "mj": 1e-3, "uj": 1e-6},
}
_EXAMPLES = {
    "latency": "'5ms', '800us' or '0.5x'",
    "throughput": "'200/s' or '2x'",
    "size": "'2MB', '512KiB' or '0.25x'",
    "memory": "'64MB' or '0.5x'",
    "macs": "'20M', '1.5G' or '0.5x'",
    "energy": "'3mJ' or '0.5x'",
}
QUANTITIES = tuple(_UNITS)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*", re.DOTALL)


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One limit: `value` in SI units (seconds, bytes, MACs, samples per second, joules), or a ratio to the original."""

    quantity: str
    value: float
    relative: bool

    def bound(self, original: float) -> float:
        """The limit as an absolute figure, given what the original measures in the same target."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.quantity} {self.value:g}{'x' if self.relative else ''}"


class Drop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much quality may be lost: `unit` is "absolute" (the metric's own), "points" (0.01 each) or "relative" (a share)."""

    value: float
    unit: str

    def allowed(self, original: float) -> float:
        """The allowed loss in the metric's own unit, given the original's quality."""
        return self.value * abs(original) if self.unit == "relative" else self.value

    def check(self, metric: str, low: float | None, high: float | None) -> None:
        """Refuse a drop that lies outside the metric's range [low, high] (None: unbounded)."""
        if low is None or high is None:
            if self.unit == "points":
                raise BudgetError(
                    f"drop: points are hundredths of a metric that lives in [0, 1], and {metric!r} has no such range; "
                    "give the drop in the metric's own unit ('0.01') or as a share of the original ('1%')"
                )
            return
        if self.unit != "relative" and self.value >= high - low:
            raise BudgetError(
                f"drop: {self.value:g} exceeds the range of {metric!r}, which is [{low:g}, {high:g}], or is all of it; "
                "give '1pt', '0.01' or '1%'"
            )

    def __str__(self) -> str:
        return {
            "absolute": f"{self.value:g}",
            "points": f"{self.value * 100:g}pt",
            "relative": f"{self.value * 100:g}%",
        }[self.unit]


def parse_limit(quantity: str, given: Any) -> Limit:
    """A `Limit` from what a user typed: `'5ms'`, `'0.5x'`, or a number in SI units.

    Raises:
        BudgetError: not a positive finite number with a unit of this quantity; the message shows accepted forms.
    """
    wanted = f"{quantity}: give {_EXAMPLES[quantity]}; got {str(given)[:60]!r}"
    if isinstance(given, Limit):
        return given
    if isinstance(given, bool) or given is None:
        raise BudgetError(wanted)
    if isinstance(given, (int, float)):
        value, relative = float(given), False
    else:
        match = _NUMBER.fullmatch(str(given))
        if match is None:
            raise BudgetError(wanted)
        unit = match[2].lower()
        relative = unit == "x"
        if not relative and unit not in _UNITS[quantity]:
            raise BudgetError(f"{wanted} (unknown unit {match[2]!r})" if unit else f"{wanted} (a unit is missing)")
        value = float(match[1]) * (1.0 if relative else _UNITS[quantity][unit])
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{wanted}; it must be a finite number above zero")
    if relative and value > 1 and quantity != "throughput":
        raise BudgetError(f"{quantity}: {value:g}x is more than the original has; a ratio is optimized ÷ original, so give one below 1")
    if relative and value < 1 and quantity == "throughput":
        raise BudgetError(f"throughput: {value:g}x is less than the original has; give one above 1")
    return Limit(quantity, value, relative)


def parse_drop(given: Any) -> Drop:
    """A `Drop` from `'1pt'`, `'1%'`, `'0.01'` or a number in the metric's own unit.

    Raises:
        BudgetError: not a finite number of at least zero in one of these forms.
    """
    wanted = f"drop: give '1pt' (hundredths), '1%' (of the original's quality) or '0.01' (the metric's own unit); got {str(given)[:60]!r}"
    if isinstance(given, Drop):
        return given
    if isinstance(given, bool) or given is None:
        raise BudgetError(wanted)
    match = _NUMBER.fullmatch(str(given))
    if match is None or match[2].lower() not in ("", "pt", "%"):
        raise BudgetError(wanted)
    value = float(match[1])
    if not math.isfinite(value) or value < 0:
        raise BudgetError(f"{wanted}; it must be a finite number of at least zero")
    unit = {"": "absolute", "pt": "points", "%": "relative"}[match[2].lower()]
    if unit == "relative" and value > 100:
        raise BudgetError(f"{wanted}; more than 100 % cannot be lost")
    return Drop(value if unit == "absolute" else value / 100, unit)


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the artifact may cost and what quality it may lose.

    Args:
        latency: seconds for one call at the example's batch: `"5ms"`, or `"0.5x"` of the original in the same target.
        throughput: samples per second, a floor: `"200/s"` or `"2x"`.
        size: bytes on disk of the runtime model: `"2MB"` or `"0.25x"`.
        memory: peak resident bytes of a fresh process that loads and runs the model: `"64MB"` or `"0.5x"`.
        macs: multiply-accumulates of one sample: `"20M"` or `"0.5x"`.
        energy: joules for one call, where the machine can tell: `"3mJ"` or `"0.5x"`.
        drop: the quality that may be lost; `1pt` is 0.01 of a metric that lives in [0, 1].
        confidence: None judges the drop by its point estimate; 0.95 makes the upper end of the paired interval count.

    Raises:
        BudgetError: a value that is no positive finite number in an accepted unit.
    """

    latency: Any = None
    throughput: Any = None
    size: Any = None
    memory: Any = None
    macs: Any = None
    energy: Any = None
    drop: Any = "1pt"
    confidence: float | None = None

    def __post_init__(self) -> None:
        for quantity in QUANTITIES:
            if getattr(self, quantity) is not None:
                parse_limit(quantity, getattr(self, quantity))
        parse_drop(self.drop)
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise BudgetError(f"confidence: give a share such as 0.95, at least 0.5 and below 1; got {self.confidence!r}")

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits that were given, in the order of `QUANTITIES`."""
        return tuple(parse_limit(q, getattr(self, q)) for q in QUANTITIES if getattr(self, q) is not None)

    @property
    def allowed_drop(self) -> Drop:
        """The drop, parsed."""
        return parse_drop(self.drop)

    def __str__(self) -> str:
        limits = ", ".join(str(limit) for limit in self.limits) or "as fast as possible"
        return f"{limits}, drop at most {self.allowed_drop}"
