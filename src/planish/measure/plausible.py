"""Whether a kernel's figure fits those of its kind: time is a sum of what its work, its reading and its writing take, and nearly smooth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from planish.measure.kernels import Kernel

SMOOTH = frozenset({"base", "empty", "quantize", "dequantize"})
"""Kinds of models that only move numbers: what they take follows from how many, in each layout."""
_FEWEST, _FEWEST_SMOOTH = 10, 6
_ROUNDS = 20
_UPWARD = 0.4  # a disturbed figure is never too low, so one above the rest pulls less
_SHARP = 0.05


def excess(kernels: Sequence[Kernel], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each figure ÷ what all figures of its kind, precision and layout suggest for it, [kernels]; 1 where those are fewer than ten (six of
    a smooth kind).

    The suggestion is a sum with weights of at least 0, fitted to relative errors, robustly: a constant, multiplications, what is read,
    what is written, positions, and parameters. On seven tables of ResNet-20, 52 of 336 convolutions were more than 12 % above the lowest figure ever
    seen of them; all of these exceed their suggestion by more than 12 %, and a fifth of the others do (a step of the vector width, say).

    Args:
        kernels: any; models of `kernel_models.recipe` too.
        seconds: above 0, or NaN where one has no figure (NaN then).
    """
    out = np.where(np.isnan(seconds), np.nan, 1.0)
    alike: dict[object, list[int]] = defaultdict(list)
    for i, kernel in enumerate(kernels):
        if seconds[i] > 0:
            known = dict(kernel.attributes)
            special = known.get("op"), known.get("transposed", 0), known.get("groups", 1) != 1, known.get("layout"), known.get("barrier", 0)
            alike[kernel.kind, kernel.precision, len(kernel.output), special].append(i)
    for rows in alike.values():
        if len(rows) >= (_FEWEST_SMOOTH if kernels[rows[0]].kind in SMOOTH else _FEWEST):
            out[rows] = _excess(np.array([_work(kernels[i]) for i in rows]), seconds[rows])
    return out


def _excess(work: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    work = work / np.maximum(work.max(0), 1e-12)
    measured = seconds / np.median(seconds)
    weights = np.ones(len(seconds))
    found = np.ones(len(seconds))
    for _ in range(_ROUNDS):
        parts, _ = nnls(work * (weights / measured)[:, None], weights)
        found = measured / (work @ parts)
        weights = np.where(found > 1, _UPWARD, 1.0) / np.sqrt(np.maximum(np.abs(np.log(found)), _SHARP))
    return found


def _work(kernel: Kernel) -> list[float]:
    """A constant, multiplications, numbers read, numbers written, positions (what surrounds a model has few channels), and parameters."""
    written, parameters = math.prod(kernel.output), sum(math.prod(shape) for shape in kernel.weights)
    products = 0.0
    if kernel.weights and kernel.kind == "conv":
        at = kernel.inputs[0] if dict(kernel.attributes).get("transposed") else kernel.output
        products = math.prod(kernel.weights[0]) * at[0] * math.prod(at[2:])
    elif kernel.weights:
        products = math.prod(kernel.weights[0]) * math.prod(kernel.output[:-1])
    elif kernel.kind in ("matmul", "attention"):
        products = written * kernel.inputs[0][-1]
    positions, read = math.prod(kernel.output[2:]), sum(math.prod(shape) for shape in kernel.inputs)
    return [1.0, float(products), float(read), float(written), float(positions), float(parameters)]
