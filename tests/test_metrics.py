"""Metrics against scikit-learn, scipy and closed forms; bootstrap intervals against the binomial and direct resampling."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.errors import DataError, UnknownName
from planish.metrics import NAMES, check_targets, function_metric, get_metric, interval, paired_interval

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 5)).astype(np.float32)
LABELS = np.where(RNG.random(200) < 0.7, LOGITS.argmax(1), RNG.integers(0, 5, 200))
BETTER = LOGITS + 2 * np.eye(5, dtype=np.float32)[LABELS]
VALUES = RNG.normal(size=(200,)).astype(np.float32)
WANTED = (VALUES + RNG.normal(size=200)).astype(np.float32).round(1)


def test_named_metrics_equal_independent_implementations() -> None:
    predicted = LOGITS.argmax(1)
    assert get_metric("accuracy").score([LOGITS], LABELS) == pytest.approx(sklearn.metrics.accuracy_score(LABELS, predicted))
    assert get_metric("f1").score([LOGITS], LABELS) == pytest.approx(sklearn.metrics.f1_score(LABELS, predicted, average="macro"))
    two = LOGITS[:, :2]
    assert get_metric("f1").score([two], LABELS % 2) == pytest.approx(sklearn.metrics.f1_score(LABELS % 2, two.argmax(1)))
    assert get_metric("rmse").score([VALUES[:, None]], WANTED) == pytest.approx(math.sqrt(np.mean((VALUES - WANTED) ** 2)), rel=1e-6)
    assert get_metric("mae").score([VALUES], WANTED) == pytest.approx(np.abs(VALUES - WANTED).mean(), rel=1e-6)
    assert get_metric("spearman").score([VALUES], WANTED) == pytest.approx(scipy.stats.spearmanr(VALUES, WANTED).statistic)
    tokens, wanted = RNG.normal(size=(7, 11, 5)).astype(np.float32), RNG.integers(0, 5, (7, 11))
    wanted[0, :4] = -100
    nll = torch.nn.functional.cross_entropy(torch.from_numpy(tokens).movedim(-1, 1), torch.from_numpy(wanted))
    assert get_metric("perplexity").score([tokens], wanted) == pytest.approx(math.exp(float(nll)), rel=1e-5)
    hits = (tokens.argmax(-1) == wanted)[wanted >= 0]
    assert get_metric("accuracy").score([tokens], wanted) == pytest.approx(hits.mean())
    maps, pixels = RNG.normal(size=(3, 4, 6, 6)).astype(np.float32), RNG.integers(0, 4, (3, 6, 6))
    assert get_metric("accuracy").score([maps], pixels) == pytest.approx((maps.argmax(1) == pixels).mean())


def test_spearman_of_two_embeddings_is_that_of_their_cosines() -> None:
    a, b = RNG.normal(size=(50, 8)), RNG.normal(size=(50, 8))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = scipy.stats.spearmanr(cosines, WANTED[:50]).statistic
    assert get_metric("spearman").score([a, b], WANTED[:50]) == pytest.approx(expected)


def test_agreement_and_cosine_compare_with_the_original() -> None:
    assert get_metric("agreement").score([LOGITS], [LOGITS]) == 1.0
    assert get_metric("agreement").score([LOGITS], [BETTER]) == pytest.approx((LOGITS.argmax(1) == BETTER.argmax(1)).mean())
    assert get_metric("cosine").score([LOGITS], [LOGITS * 3]) == pytest.approx(1.0)
    assert get_metric("cosine").score([LOGITS], [-LOGITS]) == pytest.approx(-1.0)
    assert get_metric("cosine").score([LOGITS * 0], [LOGITS * 0]) == 1.0


def test_one_column_is_a_logit_or_a_probability() -> None:
    wanted = np.array([1, 0, 1, 1])
    assert get_metric("accuracy").score([np.array([[2.0], [-1.0], [0.3], [-2.0]])], wanted) == 0.75
    assert get_metric("accuracy").score([np.array([[0.9], [0.3], [0.6], [0.2]])], wanted) == 0.75


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_not_numbers_are_bad_but_never_nan(name: str) -> None:
    metric = get_metric(name)
    out = [np.full((4, 3), np.nan)] if name not in ("rmse", "mae", "spearman") else [np.array([1.0, np.nan, 2.0, 3.0])]
    targets: Any = np.array([0, 1, 2, 0]) if metric.needs_labels else [np.ones((4, 3))]
    score = metric.score(out, targets)
    assert score in (0.0, math.inf) or score > 1e300
    assert not any(map(math.isnan, interval(metric, out, targets, n=20)))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'rmse'"):
        get_metric("rsme")


CASES = {
    "accuracy": ([LOGITS], [BETTER], LABELS),
    "f1": ([LOGITS], [BETTER], LABELS),
    "perplexity": ([LOGITS], [BETTER], LABELS),
    "rmse": ([VALUES], [VALUES * 0.5], WANTED),
    "mae": ([VALUES], [VALUES * 0.5], WANTED),
    "spearman": ([VALUES], [VALUES.round(0)], WANTED),
    "agreement": ([LOGITS], [BETTER], None),
    "cosine": ([LOGITS], [BETTER], None),
}


@pytest.mark.parametrize("name", CASES)
def test_weighted_score_equals_the_score_of_the_resampled_samples(name: str) -> None:
    original, optimized, targets = CASES[name]
    metric = get_metric(name)
    reference: Any = targets if metric.needs_labels else original
    index = np.random.default_rng(1).integers(0, 200, 200)
    weights = np.bincount(index, minlength=200)[None].astype(float)
    direct = metric.score([optimized[0][index]], reference[index] if metric.needs_labels else [reference[0][index]])
    assert metric.prepare(optimized, reference)(weights)[0] == pytest.approx(direct)


@pytest.mark.parametrize("name", CASES)
def test_paired_interval_holds_the_drop_and_is_signed_as_loss(name: str) -> None:
    original, optimized, targets = CASES[name]
    metric = get_metric(name)
    drop, low, high = paired_interval(metric, original, optimized, targets, seed=3)
    assert low <= drop <= high
    reference = targets if metric.needs_labels else original
    difference = metric.score(original, reference) - metric.score(optimized, reference)
    assert drop == pytest.approx(difference if metric.higher_is_better else -difference)
    assert paired_interval(metric, original, optimized, targets, seed=3) == (drop, low, high)
    same = paired_interval(metric, original, original, targets)
    assert same.value == 0.0 and same.low == -same.high
    if name in ("accuracy", "agreement"):
        assert same.high == pytest.approx(3.69 / 200, rel=0.02), "of 200 samples none differs: up to 3.69 of 200 others might"


def test_paired_accuracy_interval_has_the_width_of_theory() -> None:
    # the drop is a mean of terms in {-1, 0, 1}: its standard error is std / sqrt(n), and a 95 % interval is 3.92 of them wide
    n = 4000
    right = np.eye(2, dtype=np.float32)[np.ones(n, int)]
    worse = right.copy()
    worse[:400] = worse[:400, ::-1]
    drop, low, high = paired_interval(get_metric("accuracy"), [right], [worse], np.ones(n, int))
    assert drop == pytest.approx(0.1)
    assert high - low == pytest.approx(3.92 * math.sqrt(0.1 * 0.9 / n), rel=0.1)


def test_a_pair_is_surer_than_two_intervals() -> None:
    metric = get_metric("accuracy")
    other = LOGITS.copy()
    other[:3] = other[:3, ::-1]
    _, low, high = paired_interval(metric, [LOGITS], [other], LABELS)
    _, alone_low, alone_high = interval(metric, [LOGITS], LABELS)
    assert high - low < 0.5 * (alone_high - alone_low)


def test_intervals_of_a_large_split_take_bounded_time() -> None:
    logits = RNG.normal(size=(50_000, 10)).astype(np.float32)
    targets = RNG.integers(0, 10, 50_000)
    began = time.process_time()
    paired_interval(get_metric("accuracy"), [logits], [logits + 0.1], targets)
    assert time.process_time() - began < 20


def test_a_function_gets_torch_tensors_in_the_models_structure() -> None:
    seen: list[Any] = []

    def share(outputs: Any, targets: Any) -> Any:
        seen.append((outputs, targets))
        return (outputs["logits"].argmax(1) == targets).float().mean()

    metric = function_metric(share, True, lambda flat: {"logits": flat[0]})
    assert metric.score([LOGITS], LABELS) == pytest.approx(get_metric("accuracy").score([LOGITS], LABELS))
    assert isinstance(seen[0][0]["logits"], torch.Tensor) and isinstance(seen[0][1], torch.Tensor)
    mine = paired_interval(metric, [LOGITS], [BETTER], LABELS, n=200, seed=5)
    named = paired_interval(get_metric("accuracy"), [LOGITS], [BETTER], LABELS, n=200, seed=5)
    assert mine == pytest.approx(named, abs=0.02)
    with pytest.raises(DataError, match="must return one number"):
        function_metric(lambda o, t: None, True, lambda flat: flat[0]).score([LOGITS], LABELS)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("name", "out", "targets", "message"),
    [
        ("accuracy", LOGITS, np.array([0, 7]), r"labels must be integers in \[0, 4\].*sample 1 has 7"),
        ("accuracy", LOGITS, np.array([0.5, 1.0]), "for a continuous target use metric='rmse'"),
        ("accuracy", LOGITS, np.zeros((2, 3), int), r"must have shape \[\]; got \[3\]"),
        ("accuracy", LOGITS, None, "needs labels"),
        ("f1", LOGITS[:, :1], np.array([0, 2]), r"in \[0, 1\]"),
        ("rmse", LOGITS, np.zeros(2), r"must have the output's shape \[5\]"),
    ],
)
def test_targets_that_do_not_fit_are_named(name: str, out: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_targets(get_metric(name), [out], targets, "test")


def test_targets_that_fit_pass() -> None:
    check_targets(get_metric("accuracy"), [LOGITS], np.array([[4], [0]]), "test")
    check_targets(get_metric("accuracy"), [LOGITS], np.array([1.0, 4.0]), "test")
    check_targets(get_metric("accuracy"), [LOGITS], np.eye(5)[[1, 2, 3]], "test")
    check_targets(get_metric("perplexity"), [np.zeros((1, 3, 5))], np.array([[1, -100, 4]]), "test")
    check_targets(get_metric("rmse"), [np.zeros((2, 1))], np.zeros(9), "test")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 99))
def test_weighted_ranks_are_those_of_scipy(values: list[int], seed: int) -> None:
    scores = np.array(values, float)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 4, len(values)).astype(float)
    index = rng.integers(0, len(values), len(values))
    weights = np.bincount(index, minlength=len(values))[None].astype(float)
    found = get_metric("spearman").prepare([scores], targets)(weights)[0]
    if len(set(scores[index])) == 1 or len(set(targets[index])) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(scores[index], targets[index]).statistic)


def test_one_hot_labels_are_named() -> None:
    with pytest.raises(DataError, match=r"shape \[\]; got \[5\]; for one-hot labels give their argmax over axis 1"):
        check_targets(get_metric("accuracy"), [LOGITS], np.eye(5, dtype=np.int64)[LABELS], "test")


def test_a_function_that_raises_is_named_with_what_it_was_given() -> None:
    metric = function_metric(lambda outputs, _: outputs.logits, True, lambda flat: {"logits": flat[0]})
    with pytest.raises(DataError, match=r"raised AttributeError.*outputs that it gets are a dict of logits"):
        metric.score([LOGITS], LABELS)
