"""Whether calibration data can speak for the data that a net is judged on: how many samples, whether they differ, and their ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planish.data import Split
from planish.graph.replay import spread

_COMPARED = 2000
"""Samples of each split that are compared at most."""
_SHARE, _FAR = 1e-3, 0.5
"""Ranges of calibration data are always exceeded by a few values of other data. It is said where more than this share are outside, or one
is farther outside than half the range."""
_SAMPLES_AT_ONCE = 64


def calibration_warnings(calibration: Split, others: Mapping[str, Split], names: Sequence[str]) -> list[str]:
    """What is wrong with calibration data for static ranges, in sentences with figures.

    Args:
        calibration: inputs that ranges are chosen on.
        others: by name, the splits that a net is judged on.
        names: of the inputs.
    """
    found = []
    if calibration.n == 1:
        found.append("calibration: one sample only; its ranges are those of that sample, and whatever differs from it is clipped")
    for number, name in enumerate(names):
        array = calibration.inputs[number]
        if array.dtype.kind != "f":
            continue  # token ids and the like have no ranges
        if _is_constant(array):
            found.append(f"calibration: input {name!r} has the same value in all {calibration.n} samples: {float(array.flat[0]):.4g}")
        elif calibration.n > 1 and all(np.array_equal(array[0], row) for row in array[1:]):
            found.append(f"calibration: all {calibration.n} samples of input {name!r} are the same")
        found += [said for split, other in others.items() if (said := _outside(array, other, number, f"{split}: input {name!r}"))]
    return found


def _is_constant(array: NDArray[Any]) -> bool:
    return bool((array[:1] == array.flat[0]).all() and (array == array.flat[0]).all())


def _outside(array: NDArray[Any], other: Split, number: int, what: str) -> str:
    """How much of an input of another split lies outside the range of the calibration data, or "" where that is to be expected."""
    low, high = float(array.min()), float(array.max())
    outside = total = 0
    least, most = low, high
    rows = spread(other, _COMPARED)
    for start in range(0, len(rows), _SAMPLES_AT_ONCE):
        values = other.inputs[number][rows[start : start + _SAMPLES_AT_ONCE]]
        outside += int(np.count_nonzero((values < low) | (values > high)))
        total += values.size
        least, most = min(least, float(values.min())), max(most, float(values.max()))
    beyond = max(low - least, most - high)
    if outside == 0 or (outside <= _SHARE * total and beyond <= _FAR * (high - low)):
        return ""
    far = f"by up to {beyond / (high - low):.3g} times that range" if high > low else f"by up to {beyond:.3g}"
    return (
        f"{what} goes from {least:.4g} to {most:.4g}, and calibration saw {low:.4g} to {high:.4g}: "
        f"{100 * outside / total:.2g} % of the values are outside, {far}; give `calibration` that looks like it"
    )
