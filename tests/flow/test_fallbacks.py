"""What a run falls back to, and what it must never call met: quality that is not finite, slow-downs, limits that the original holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import planish
import replaying
import small_jobs
from planish.events import Silent
from planish.graph.capture import capture
from planish.trial import module_predictor


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)


def run(job: planish.Workload, out: Path, budget: planish.Budget, **changes: Any) -> planish.Result:
    arguments: dict[str, Any] = {"trials": 1, "threads": 1, "techniques": ("quantize",)}
    return planish.optimize(job, "onnxruntime:cpu", budget, out, **arguments | changes)


def test_a_quality_that_is_no_number_is_never_met(tmp_path: Path) -> None:
    reference = small_jobs.trained()

    def finite_for_the_original_only(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        x, _ = small_jobs.images(320, seed=2)
        rows = slice(192, 256) if torch.equal(targets, small_jobs.images(320, seed=2)[1][192:256]) else slice(256, 320)
        with torch.no_grad():
            same = torch.allclose(outputs, reference(x[rows])[: len(outputs)], atol=1e-4)
        return 0.9 if same else float("nan")

    job = small_jobs.stripes_job(metric=finite_for_the_original_only)
    result = run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x", drop=0.05))
    assert result.verdict == "infeasible"
    assert not (tmp_path / "net.planish").exists()


def test_an_original_whose_quality_is_no_number_is_refused(tmp_path: Path) -> None:
    job = small_jobs.stripes_job(metric=lambda outputs, targets: float("nan"))
    with pytest.raises(planish.PlanishError, match="of the original must be finite"):
        run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x", drop=0.05))


def test_absolute_limits_that_the_original_holds_are_met_by_it(tmp_path: Path) -> None:
    result = run(small_jobs.stripes_job(), tmp_path / "net.planish", planish.Budget(latency="10s", drop=0.5))
    assert result.verdict == "met" and result.drop == 0
    assert result.plan is None
    assert any("the original holds every limit" in note for note in result.notes)
    assert {trial.stage for trial in result.summary.trials} == set(), "nothing else is looked for"


def test_the_original_is_kept_where_nothing_that_holds_a_limit_it_just_holds_keeps_the_quality(tmp_path: Path) -> None:
    """No drop at all is allowed, and the metric falls with any change; the original's latency is within a tenth of the limit."""
    reference = small_jobs.trained()

    def exact(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        x, _ = small_jobs.images(320, seed=2)
        with torch.no_grad():
            wanted = torch.cat([reference(x[192:256]), reference(x[256:])])
        return 1.0 if min((outputs[0] - row).abs().max().item() for row in wanted) < 1e-5 else 0.0

    (tmp_path / "first").mkdir()
    first = run(small_jobs.stripes_job(), tmp_path / "first" / "net.planish", planish.Budget(latency="10s", drop=0.5))
    taken = first.original.latency_s.median
    job = small_jobs.stripes_job(metric=exact)
    result = run(job, tmp_path / "net.planish", planish.Budget(latency=f"{1.05e6 * taken:.3f}us", drop=0))
    assert result.verdict == "met"
    assert result.plan is None
    assert any("the original is kept" in note for note in result.notes)


@pytest.mark.parametrize("unseen", [0, 40])
def test_validation_that_the_original_was_trained_on_is_named(tmp_path: Path, unseen: int) -> None:
    x, y = small_jobs.images(320, seed=2)
    y[256 : 256 + unseen] = (y[256 : 256 + unseen] + 1) % small_jobs.CLASSES
    job = small_jobs.stripes_job(test=[(x[256:], y[256:])])
    result = run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x", drop=0.5))
    assert result.plan is not None
    assert any("trained on the validation samples" in note for note in result.notes) == (unseen > 0)


def test_without_a_limit_and_without_data_there_is_nothing_to_stop_at(tmp_path: Path) -> None:
    job = small_jobs.stripes_job(train=None, validation=None, test=None, metric="cosine")
    with pytest.raises(planish.PlanishError, match="without a limit the quality that is lost is what ends the search"):
        run(job, tmp_path / "net.planish", planish.Budget())


def test_points_of_a_metric_without_a_range_are_refused(tmp_path: Path) -> None:
    job = small_jobs.stripes_job(metric=lambda outputs, targets: 500.0)
    with pytest.raises(planish.PlanishError, match=r"points are hundredths of a metric that lives in \[0, 1\]"):
        run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x"))


def test_confidence_needs_an_interval(tmp_path: Path) -> None:
    job = small_jobs.stripes_job(evaluate=lambda predict: 1.0)
    with pytest.raises(planish.PlanishError, match="evaluate gives one figure and no interval"):
        run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x", confidence=0.95))


def test_evaluate_guides_a_run_without_limits(tmp_path: Path) -> None:
    """Agreement with the labels through `predict`; nothing that loses too much of it may be chosen."""
    x, y = small_jobs.images(320, seed=2)

    def accuracy(predict: Any) -> float:
        return float((torch.as_tensor(predict(x[256:])).argmax(1) == y[256:]).float().mean())

    job = small_jobs.stripes_job(evaluate=accuracy, validation=None, test=None)
    result = run(job, tmp_path / "net.planish", planish.Budget(drop=0.02), techniques=("prune", "quantize"), trials=2)
    assert result.verdict == "met"
    assert result.drop <= 0.02


def test_evaluate_may_give_arrays_or_tensors() -> None:
    """To a candidate, which runs in torch, as to an exported model, which may be given either."""
    x, _ = small_jobs.images(5, seed=2)
    net = small_jobs.trained(steps=2)
    predict = module_predictor(capture(net, (x[:1],)))
    for given in (x, x.numpy()):
        torch.testing.assert_close(predict(given), net(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_model_of_one_batch_size_is_refused_in_a_sentence(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(144, small_jobs.CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.view(2, 144))

    x, _ = small_jobs.images(320, seed=2)
    job = small_jobs.stripes_job(Fixed(), example_inputs=(x[:2],))
    with pytest.raises(planish.PlanishError, match="must take batches of any size"):
        run(job, tmp_path / "net.planish", planish.Budget(latency="0.5x"))


class Heard(Silent):
    """Events that keep what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_what_a_run_without_limits_seeks_is_said_and_a_time_limit_that_is_too_short(tmp_path: Path) -> None:
    heard = Heard()
    run(small_jobs.stripes_job(), tmp_path / "net.planish", planish.Budget(drop=0.3), events=heard, time_limit=600)
    assert any(text.startswith("no limits: the fastest net") for text in heard.said)
    assert not any("may be exceeded" in text for text in heard.said)
    heard = Heard()
    run(small_jobs.stripes_job(), tmp_path / "enough.planish", planish.Budget(latency="0.5x", drop=0.3), events=heard, time_limit=62)
    assert not any("recovery" in text for text in heard.said), "what cannot be left out takes half a minute"
    heard = Heard()
    run(small_jobs.stripes_job(), tmp_path / "other.planish", planish.Budget(latency="0.5x", drop=0.3), events=heard, time_limit=30)
    assert any("the time limit of 30 s leaves no time for recovery, and may be exceeded" in text for text in heard.said)
    assert not any(text.startswith("no limits") for text in heard.said)
