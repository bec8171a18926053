"""Figures as people read them: SI inside, a unit and three digits at the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planish.measurement import Estimate

if TYPE_CHECKING:
    from planish.result import Summary

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))
NOTHING = "–"
_MOST_PLACES = 6


def digits(value: float) -> str:
    """Three significant digits without an exponent where that is readable: 0.0412, 1.43, 87.9, 1430."""
    if not math.isfinite(value):
        return NOTHING
    value = float(f"{value:.3g}") if abs(value) < 999.5 else value
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}" if places <= 6 else f"{value:.2e}"


def confidence(summary: Summary) -> str:
    """How sure the drop's interval is: `95 %`."""
    return f"{100 * (summary.budget.confidence or 0.95):.3g} %"


def drop_of(summary: Summary) -> str:
    """`drop of accuracy on test`."""
    return f"drop of {plain(summary.metric, 40)}" + (f" on {summary.split}" if summary.split != summary.metric else "")


def around_drop(summary: Summary) -> str:
    """`95 % interval −0.002 … +0.011, allowed 0.01`; without an interval where there is none (a job's `evaluate` is one number)."""
    parts = []
    if summary.drop_interval is not None:
        low, high = summary.drop_interval
        parts.append(f"{confidence(summary)} interval {signed(low)} … {signed(high)}")
    if summary.original.quality is not None:
        parts.append(f"allowed {summary.budget.allowed_drop.allowed(summary.original.quality):.4g}")
    return ", ".join(parts)


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], space: str = " ") -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    for factor, unit in units:
        if abs(value) >= 0.9995 * factor:
            return f"{digits(value / factor)}{space if unit else ''}{unit}"
    return f"{digits(value / units[-1][0])}{space if units[-1][1] else ''}{units[-1][1]}"


def seconds(value: float | None) -> str:
    """`1.43 ms`, `812 µs`, `2.10 s`."""
    return _scaled(value, _TIMES)


def duration(value: float) -> str:
    """`48 s`, `3 min 05 s`, `1 h 12 min`: how long a person waits."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """`3.53 MB`, `942 kB`."""
    return _scaled(value, _SIZES)


def count(value: float | None) -> str:
    """`40.6 M`, `1.21 G`."""
    return _scaled(value, _COUNTS, space="")


def ratio(value: float | None) -> str:
    """`0.43×`: optimized ÷ original."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{_ratio_places(value)}f}×"


def _ratio_places(value: float) -> int:
    return 3 if value < 0.1 else 2


def factor(value: float | None) -> str:
    """`2.26×`: how many times as fast, from a ratio of latencies."""
    return NOTHING if not value or not math.isfinite(value) else f"{1 / value:.2f}×"


def speed_up(value: float | None) -> str:
    """`2.26× as fast`, from a ratio of latencies."""
    text = factor(value)
    return text if text == NOTHING else f"{text} as fast"


def gained(summary: Summary, runtime: str) -> str:
    """How many times as fast the artifact is as the original in `runtime`: what it gains on the quickest of them, times how much slower
    than that this one was in the comparison of all."""
    found = summary.ratios.get("latency")
    if found is None:
        return NOTHING
    if runtime == summary.original.runtime:
        return speed_up(found.median)
    slower = summary.elsewhere.get(runtime)
    if slower is None or not slower.median or not math.isfinite(found.median):
        return NOTHING
    noisy = "" if found.trustworthy and slower.trustworthy else " (noisy)"
    times = slower.median / found.median
    shown = f"{times:.2g}" if times < 10 else f"{float(f'{times:.2g}'):.0f}"
    return f"about {shown}× as fast{noisy}"


def quality(value: float | None) -> str:
    """Four significant digits: a quality is compared in its last one."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"


def _quality_places(value: float) -> int:
    return 4 if abs(value) < 10 else max(0, 4 - math.floor(math.log10(abs(value))))


def signed(value: float | None) -> str:
    """`+0.0042` or `−0.0010`, with a true minus."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:+.4f}".replace("-", "−")


def spread(figure: float, low: float, high: float, places: int) -> tuple[str, str]:
    """A figure, and its interval as `0.386 – 0.388`: all with as many decimals, `places` or as many more as it takes to tell its ends apart.

    Rounding keeps an order, so that the figure lies within its interval as both are shown.
    """
    shown = _decimals((figure, low, high), places)
    while low != high and shown[1] == shown[2] and places < _MOST_PLACES:
        places += 1
        shown = _decimals((figure, low, high), places)
    return shown[0], f"{shown[1]} – {shown[2]}"


def _decimals(values: Sequence[float], places: int) -> list[str]:
    return [f"{value:.{places}f}" if math.isfinite(value) else NOTHING for value in values]


def interval(estimate: Estimate | None) -> tuple[str, str]:
    """`1.43 ms` and `1.40 – 1.47 ms` of an estimate in seconds, with a warning where it decides nothing."""
    if estimate is None:
        return NOTHING, NOTHING
    factor, unit = next(((f, u) for f, u in _TIMES if abs(estimate.median) >= 0.9995 * f), _TIMES[-1])
    median = estimate.median / factor
    places = max(0, 2 - math.floor(math.log10(float(f"{abs(median):.3g}")))) if median and math.isfinite(median) else 0
    shown, ends = spread(median, estimate.low / factor, estimate.high / factor, places)
    return f"{shown} {unit}", f"{ends} {unit}" + ("" if estimate.trustworthy else ", not trustworthy")


def around(estimate: Estimate | None) -> str:
    """`1.43 ms (1.40 – 1.47 ms)` of an estimate in seconds."""
    return NOTHING if estimate is None else "{} ({})".format(*interval(estimate))


def ratio_around(estimate: Estimate) -> tuple[str, str]:
    """`0.387×` and `0.386 – 0.388`: optimized ÷ original; no interval where it is exact."""
    if estimate.low == estimate.high:
        return ratio(estimate.median), ""
    shown, ends = spread(estimate.median, estimate.low, estimate.high, _ratio_places(estimate.median))
    return f"{shown}×", ends


def ratio_span(estimate: Estimate) -> str:
    """`0.387× (0.386 – 0.388)`; without an interval where it is exact."""
    shown, ends = ratio_around(estimate)
    return f"{shown} ({ends})" if ends else shown


def factor_around(estimate: Estimate) -> tuple[str, str]:
    """`2.26×` and `2.17 – 2.33×`: how many times as fast, from a ratio of latencies."""
    if not (estimate.median and estimate.low and estimate.high):
        return NOTHING, NOTHING
    shown, ends = spread(1 / estimate.median, 1 / estimate.high, 1 / estimate.low, 2)
    return f"{shown}×", f"{ends}×"


def quality_around(value: float | None, ends: tuple[float, float] | None) -> str:
    """`0.8958 (0.8871 – 0.9042)`, with the digits of `quality`."""
    if value is None or ends is None or not math.isfinite(value):
        return quality(value)
    shown, between = spread(value, *ends, _quality_places(value))
    return f"{shown} ({between})"


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def plain(text: object, longest: int = 160) -> str:
    """`text` on one line for a terminal: control characters shown as `?`, long names cut in the middle."""
    line = "".join(c if c.isprintable() else "?" for c in str(text))
    half = longest // 2
    return line if len(line) <= longest else f"{line[: half - 1]}…{line[-half:]}"
