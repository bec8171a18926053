"""Quality: the named metrics, the user's own, and paired bootstrap intervals of a drop.

Every metric is one function from outputs and targets to "the score under sample weights": weights of one give the score itself, multinomial
counts give a bootstrap replicate, so that the interval can never be of another formula than the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from planish.data import IGNORED_LABEL
from planish.errors import DataError, UnknownName

Outputs = Sequence[NDArray[Any]]
Weighted = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # [replicates, n] sample weights -> [replicates] scores
Ratio = Callable[[Outputs, Any], tuple[NDArray[np.float64], NDArray[np.float64]]]  # -> numerators [n], denominators [n]

_CHUNK = 4_000_000  # weights in one piece of the bootstrap: 32 MB
_SLOW_REPLICATES, _SLOW_SECONDS = 300, 20.0


@dataclass(frozen=True)
class Metric:
    """A metric of a whole split.

    Args:
        name: as the user named it, or the function's name.
        higher_is_better: whether more is better.
        low, high: its range; None where it has no bound.
        needs_labels: False for "agreement" and "cosine": their `targets` are the original's flat outputs.
        per_sample: whether it is a mean over samples (then `samplewise` gives the terms).
        prepare: outputs and targets -> the score under sample weights.
        ratio: the terms, where there are any.
        is_fast: whether `prepare`'s function costs about as much as a product with its weights.
    """

    name: str
    higher_is_better: bool
    low: float | None
    high: float | None
    needs_labels: bool
    per_sample: bool
    prepare: Callable[[Outputs, Any], Weighted]
    ratio: Ratio | None = None
    is_fast: bool = True

    def score(self, outputs: Outputs, targets: Any) -> float:
        """The metric of flat outputs (each [n, ...]). Outputs that are NaN count as wrong, or as infinitely far: never NaN for a named metric."""
        return float(self.prepare(outputs, targets)(np.ones((1, len(outputs[0]))))[0])

    def samplewise(self, outputs: Outputs, targets: Any) -> NDArray[np.float64] | None:
        """The terms [n] of which the metric is the mean, or None where it is no mean over samples."""
        if self.ratio is None or not self.per_sample:
            return None
        numerators, denominators = self.ratio(outputs, targets)
        return np.divide(numerators, denominators, out=np.zeros_like(numerators), where=denominators > 0)


def class_axis(shape: Sequence[int]) -> int:
    """The axis that classes run along: 1 for [n, classes] and images [n, classes, h, w], the last for tokens [n, length, classes]."""
    return 1 if len(shape) in (2, 4, 5) else len(shape) - 1


def predictions(outputs: NDArray[Any]) -> NDArray[np.int64]:
    """The predicted class at every position, -1 where the outputs are NaN.

    One column is a probability where all of it lies in [0, 1], else a logit.
    """
    if outputs.ndim == 1:
        outputs = outputs[:, None]
    axis = class_axis(outputs.shape)
    if outputs.shape[axis] == 1:
        column = outputs.squeeze(axis)
        is_probability = bool(np.all((column >= 0) & (column <= 1)))
        predicted = np.asarray(column > (0.5 if is_probability else 0.0), np.int64)
    else:
        predicted = np.asarray(outputs.argmax(axis), np.int64)
    if outputs.dtype.kind == "f":
        predicted[np.isnan(outputs).any(axis)] = -1
    return np.asarray(predicted, np.int64)


def labels(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64]:
    """Integer labels from targets that may have a superfluous last axis, be floats, or be one-hot."""
    targets = np.asarray(targets)
    if targets.dtype.kind == "f" and targets.ndim > 1 and targets.shape == outputs.shape and targets.shape[-1] > 1:
        return np.asarray(targets.argmax(class_axis(targets.shape)), np.int64)
    if targets.ndim > 1 and targets.shape[-1] == 1:
        targets = targets[..., 0]
    return targets.astype(np.int64)


def check_targets(metric: Metric, outputs: Outputs, targets: NDArray[Any] | None, where: str) -> None:
    """Refuse targets that do not fit the outputs: missing, of another shape, or labels that the model has no class for.

    Args:
        metric: what will be computed.
        outputs: flat outputs of at least one sample; only the shapes behind the sample axis matter.
        targets: of the whole split.
        where: the split's name, for the message.

    Raises:
        DataError: says which sample, and what would fit.
    """
    if not metric.needs_labels or metric.name not in NAMES:
        return
    if targets is None:
        raise DataError(f"{where}: the metric {metric.name!r} needs labels and this split has no targets; give them, or metric='agreement'")
    out = outputs[0] if outputs[0].ndim > 1 else outputs[0][:, None]
    if metric.name not in ("accuracy", "f1", "perplexity"):
        if metric.name != "spearman" and _size(targets.shape[1:]) != _size(out.shape[1:]):
            raise DataError(
                f"{where}: targets must have the output's shape {list(out.shape[1:])} per sample; got {list(targets.shape[1:])}"
            )
        return
    axis = class_axis(out.shape)
    classes = max(2, out.shape[axis])
    positions = tuple(s for i, s in enumerate(out.shape) if i not in (0, axis))
    wanted = f"{where}: labels must be integers in [0, {classes - 1}] (the model has {classes} classes)"
    if targets.dtype.kind == "f" and (targets.shape[1:] != out.shape[1:] or out.shape[axis] == 1):
        off = np.argwhere(targets != np.round(targets))
        if len(off):
            raise DataError(f"{wanted}; sample {off[0][0]} has {targets[tuple(off[0])]:g}; for a continuous target use metric='rmse'")
    found = labels(out[:1].repeat(len(targets), 0) if targets.dtype.kind == "f" and targets.shape[1:] == out.shape[1:] else out, targets)
    if found.shape[1:] != positions:
        is_one_hot = targets.shape[1:] == out.shape[1:] and targets.dtype.kind in "iub"
        hint = f"; for one-hot labels give their argmax over axis {axis}" if is_one_hot else ""
        raise DataError(f"{where}: the target of a sample must have shape {list(positions)}; got {list(targets.shape[1:])}{hint}")
    bad = np.argwhere(((found < 0) | (found >= classes)) & (found != IGNORED_LABEL))
    if len(bad):
        raise DataError(f"{wanted}, or {IGNORED_LABEL} to be ignored; sample {bad[0][0]} has {found[tuple(bad[0])]}")


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _per_sample(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values.reshape(len(values), -1).sum(1, dtype=np.float64), np.float64)


def _correct(outputs: Outputs, targets: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found, wanted = predictions(outputs[0]), labels(outputs[0], targets)
    counts = wanted != IGNORED_LABEL
    return _per_sample((found == wanted) & counts), _per_sample(counts)


def _agreeing(outputs: Outputs, reference: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found, wanted = predictions(outputs[0]), predictions(reference[0])
    return _per_sample((found == wanted) & (found >= 0)), _per_sample(np.ones_like(found))


def _cosines(outputs: Outputs, reference: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = np.zeros(len(outputs[0]))
    for mine, theirs in zip(outputs, reference, strict=True):
        a = mine.reshape(len(mine), -1).astype(np.float64)
        b = theirs.reshape(len(theirs), -1).astype(np.float64)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = np.all(a == b, axis=1).astype(np.float64)
        total += np.nan_to_num(np.divide((a * b).sum(1), norms, out=same, where=norms > 0), nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(total / len(outputs), -1, 1), np.ones(len(total))


def _errors(power: int) -> Ratio:
    def terms(outputs: Outputs, targets: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        out = outputs[0].reshape(len(outputs[0]), -1).astype(np.float64)
        difference = np.abs(out - np.asarray(targets).reshape(out.shape))
        return np.nan_to_num((difference**power).sum(1), nan=np.inf, posinf=np.inf), np.full(len(out), float(out.shape[1]))

    return terms


def _surprise(outputs: Outputs, targets: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    logits, wanted = outputs[0], labels(outputs[0], targets)
    axis = class_axis(logits.shape)
    total, counts = np.zeros(len(logits)), np.zeros(len(logits))
    rows = max(1, _CHUNK // max(1, logits[:1].size))
    for start in range(0, len(logits), rows):
        part = np.moveaxis(np.asarray(logits[start : start + rows], np.float64), axis, -1)
        want = wanted[start : start + rows]
        valid = want != IGNORED_LABEL
        highest = part.max(-1, keepdims=True)
        normaliser = highest[..., 0] + np.log(np.exp(part - highest).sum(-1))
        nll = normaliser - np.take_along_axis(part, np.where(valid, want, 0)[..., None], -1)[..., 0]
        total[start : start + rows] = _per_sample(np.where(valid, np.nan_to_num(nll, nan=np.inf, posinf=np.inf), 0.0))
        counts[start : start + rows] = _per_sample(valid)
    return total, counts


def _from_ratio(ratio: Ratio, finish: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Callable[[Outputs, Any], Weighted]:
    def prepare(outputs: Outputs, targets: Any) -> Weighted:
        numerators, denominators = ratio(outputs, targets)
        endless = ~np.isfinite(numerators)
        finite = np.where(endless, 0.0, numerators)

        def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            sums, counts = weights @ finite, weights @ denominators
            means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
            if endless.any():
                means = np.where(weights @ endless > 0, np.inf, means)
            return finish(means)

        return score

    return prepare


def _prepare_f1(outputs: Outputs, targets: Any) -> Weighted:
    """F1 of class 1 for two classes, else the mean of F1 over the classes that occur."""
    found, wanted = predictions(outputs[0]), labels(outputs[0], targets)
    n = len(found)
    rows = np.repeat(np.arange(n), found.size // n)
    found, wanted = found.ravel(), wanted.ravel()
    out = outputs[0]
    classes = max(2, out.shape[class_axis(out.shape)] if out.ndim > 1 else 2, int(found.max()) + 1, int(wanted.max()) + 1)
    valid = wanted != IGNORED_LABEL

    def table(values: NDArray[np.int64], where: NDArray[np.bool_]) -> scipy.sparse.csr_array:
        where = where & (values >= 0)
        return scipy.sparse.csr_array((np.ones(int(where.sum())), (rows[where], values[where])), shape=(n, classes))

    both, predicted, true = table(found, valid & (found == wanted)), table(found, valid), table(wanted, valid)

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        hits, total = weights @ both, weights @ predicted + weights @ true
        f1 = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
        if classes == 2:
            return np.asarray(f1[:, 1], np.float64)
        return np.asarray(f1.sum(1) / np.maximum(1, (total > 0).sum(1)), np.float64)

    return score


def _weighted_ranks(values: NDArray[np.float64]) -> Weighted:
    """Average ranks [replicates, n] of a sample in which value i occurs weights[i] times."""
    _, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))

    def ranks(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        groups = np.add.reduceat(weights[:, order], starts, axis=1)
        mean_rank = np.cumsum(groups, axis=1) - (groups - 1) / 2
        return np.asarray(mean_rank[:, inverse], np.float64)

    return ranks


def _prepare_spearman(outputs: Outputs, targets: Any) -> Weighted:
    """Rank correlation of one score per sample; two outputs [n, d] are embeddings whose cosine similarity is the score."""
    if len(outputs) == 2 and outputs[0].ndim == 2 and outputs[0].shape == outputs[1].shape and outputs[0].shape[1] > 1:
        scores = _cosines(outputs[:1], outputs[1:])[0]
    else:
        scores = outputs[0].reshape(-1).astype(np.float64)
    wanted = np.asarray(targets).reshape(-1).astype(np.float64)
    if scores.shape != wanted.shape:
        shapes = [list(array.shape) for array in outputs]
        raise DataError(
            f"spearman: needs one output per target, or two outputs [n, d] to compare; got {shapes} for {len(wanted)} targets; "
            "for anything else give metric=f(outputs, targets)"
        )
    first, second = _weighted_ranks(np.nan_to_num(scores)), _weighted_ranks(wanted)
    is_lost = bool(np.isnan(scores).any())

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(1, keepdims=True)
        a, b = first(weights), second(weights)
        a -= (weights * a).sum(1, keepdims=True) / total
        b -= (weights * b).sum(1, keepdims=True) / total
        spread = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
        flat = (weights * a * b).sum(1)
        return np.zeros(len(weights)) if is_lost else np.divide(flat, spread, out=np.zeros_like(flat), where=spread > 0)

    return score


def _identity(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values


def _exp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(values, 700.0))


_METRICS = {
    "accuracy": Metric("accuracy", True, 0.0, 1.0, True, True, _from_ratio(_correct, _identity), _correct),
    "agreement": Metric("agreement", True, 0.0, 1.0, False, True, _from_ratio(_agreeing, _identity), _agreeing),
    "cosine": Metric("cosine", True, -1.0, 1.0, False, True, _from_ratio(_cosines, _identity), _cosines),
    "f1": Metric("f1", True, 0.0, 1.0, True, False, _prepare_f1),
    "mae": Metric("mae", False, 0.0, None, True, True, _from_ratio(_errors(1), _identity), _errors(1)),
    "rmse": Metric("rmse", False, 0.0, None, True, False, _from_ratio(_errors(2), np.sqrt)),
    "perplexity": Metric("perplexity", False, 1.0, None, True, False, _from_ratio(_surprise, _exp)),
    "spearman": Metric("spearman", True, -1.0, 1.0, True, False, _prepare_spearman),
}
NAMES = tuple(sorted(_METRICS))


def get_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        UnknownName: there is none; the message shows the nearest ones.
    """
    if name not in _METRICS:
        raise UnknownName("metric", name, NAMES)
    return _METRICS[name]


def function_metric(function: Callable[[Any, Any], float], higher_is_better: bool, structure: Callable[[list[Any]], Any]) -> Metric:
    """The user's own f(outputs, targets) -> float as a `Metric`.

    Args:
        function: gets torch tensors, in the structure that `structure` makes of the flat outputs.
        higher_is_better: whether more is better.
        structure: `Signature.unflatten`, or the like.
    """
    name = getattr(function, "__name__", type(function).__name__)

    def called(outputs: Any, targets: Any) -> Any:
        try:
            return function(outputs, targets)
        except Exception as err:
            given = f"a dict of {', '.join(outputs)}" if isinstance(outputs, dict) else f"a {type(outputs).__name__}"
            raise DataError(
                f"metric: {name}(outputs, targets) raised {type(err).__name__}: {err}; the outputs that it gets are {given}"
            ) from err

    def prepare(outputs: Outputs, targets: Any) -> Weighted:
        import torch

        flat = [torch.from_numpy(np.array(array)) for array in outputs]
        wanted = None if targets is None else torch.from_numpy(np.array(targets))

        def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            out = np.empty(len(weights))
            for i, row in enumerate(weights):
                if np.all(row == 1):
                    value = called(structure(list(flat)), wanted)
                else:
                    index = torch.from_numpy(np.repeat(np.arange(len(row)), row.astype(np.int64)))
                    value = called(structure([tensor[index] for tensor in flat]), None if wanted is None else wanted[index])
                try:
                    out[i] = float(value)
                except (TypeError, ValueError) as err:
                    raise DataError(f"metric: {name}(outputs, targets) must return one number; got {type(value).__name__}") from err
            return out

        return score

    return Metric(name, higher_is_better, None, None, True, False, prepare, None, is_fast=False)


class Interval(NamedTuple):
    """A figure and its bootstrap interval."""

    value: float
    low: float
    high: float


def _replicates(n: int, seed: int, count: int, is_fast: bool) -> Iterator[NDArray[np.float64]]:
    """Multinomial sample weights [some, n], `count` in all; fewer where every replicate costs a call of the user's function."""
    generator = np.random.default_rng(seed)
    if not is_fast:
        count = min(count, _SLOW_REPLICATES)
    rows = max(1, min(count, _CHUNK // n)) if is_fast else 1
    began, done = time.monotonic(), 0
    while done < count:
        rows = min(rows, count - done)
        drawn = generator.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        done += rows
        if not is_fast and done >= 30 and time.monotonic() - began > _SLOW_SECONDS:
            return


def _quantiles(value: float, replicates: list[NDArray[np.float64]], confidence: float) -> Interval:
    drawn = np.concatenate(replicates)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Interval(value, value, value)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="nearest")  # interpolation would make NaN of two infinities
    return Interval(value, float(low), float(high))


def interval(metric: Metric, outputs: Outputs, targets: Any, confidence: float = 0.95, seed: int = 0, n: int = 1000) -> Interval:
    """The score and its percentile bootstrap interval over samples, from `n` replicates (300 for a function, and at most ~20 s)."""
    weighted = metric.prepare(outputs, targets)
    count = len(outputs[0])
    drawn = [weighted(weights) for weights in _replicates(count, seed, n, metric.is_fast)]
    return _quantiles(float(weighted(np.ones((1, count)))[0]), drawn, confidence)


def paired_interval(
    metric: Metric,
    original_outputs: Outputs,
    optimized_outputs: Outputs,
    targets: Any,
    confidence: float = 0.95,
    seed: int = 0,
    n: int = 1000,
) -> Interval:
    """The loss of quality from original to optimized (positive is worse) and its paired percentile bootstrap interval.

    Args:
        metric: for "agreement" and "cosine" `targets` is not used: both are compared with `original_outputs`.
        original_outputs, optimized_outputs: flat outputs of the same samples in the same order.
        targets: [n, ...].
        confidence: share of the replicates that the interval holds.
        seed: of the replicates.
        n: replicates; at most 300, and about 20 s, where the metric is a function.

    References:
        Efron and Tibshirani 1993, chapter 13: the same resampled samples serve both models, so that what both get wrong cancels.
        Hanley and Lippman-Hand 1983 (the rule of three): where no sample differs, which no replicate can show, how many others might.
    """
    if not metric.needs_labels:
        targets = original_outputs
    before, after = metric.prepare(original_outputs, targets), metric.prepare(optimized_outputs, targets)
    sign = 1.0 if metric.higher_is_better else -1.0

    def drop(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        first, second = before(weights), after(weights)
        both_endless = np.isinf(first) & np.isinf(second)
        return np.where(both_endless, 0.0, sign * np.subtract(first, second, out=np.zeros_like(first), where=~both_endless))

    count = len(original_outputs[0])
    drawn = [drop(weights) for weights in _replicates(count, seed, n, metric.is_fast)]
    found = _quantiles(float(drop(np.ones((1, count)))[0]), drawn, confidence)
    if found.low == found.high and metric.per_sample and metric.low is not None and metric.high is not None:
        most = (metric.high - metric.low) * (1 - ((1 - confidence) / 2) ** (1 / count))
        return Interval(found.value, found.value - most, found.value + most)
    return found
