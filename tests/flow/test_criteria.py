"""The flow with other criteria than the default one: what goes first, what is merged, what needs labels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import planish
import replaying
import small_jobs
from planish import workbench
from planish.errors import DataError, UnknownName


@pytest.mark.parametrize("name", ["fisher", "taylor+flap", "kmeans", "mixture:activations"])
def test_a_run_by_another_criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replaying.install(monkeypatch.setattr)
    out = tmp_path / "net.planish"
    budget = planish.Budget(macs="0.6x", drop=0.1)
    result = planish.optimize(
        small_jobs.stripes_job(), "onnxruntime:cpu", budget, out, techniques=("prune",), trials=2, threads=1, saliency=name
    )
    assert result.verdict == "met"
    assert result.plan is not None and result.plan.saliency == name and result.plan.widths
    assert result.ratios["macs"].median <= 0.6
    x, _ = small_jobs.images(5, seed=9)
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(out)(x.numpy()), result.module(x).numpy(), atol=1e-4)


@pytest.mark.parametrize("is_given", [True, False], ids=["splits without labels", "calibration alone"])
@pytest.mark.parametrize("name", ["fisher", "taylor-first", "taylor+fisher"])
def test_a_criterion_that_needs_labels_is_refused_before_anything_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_given: bool
) -> None:
    x, _ = small_jobs.images(64, seed=2)
    splits = {"train": [(x, None)], "validation": [(x, None)]} if is_given else {"train": None, "validation": None, "calibration": [x]}

    def build() -> None:
        pytest.fail("the model was built")

    monkeypatch.setattr(workbench, "capture", lambda *_: pytest.fail("the model was captured"))
    job = small_jobs.stripes_job(*([] if is_given else [build]), test=None, metric="agreement", **splits)
    wanted = rf"saliency: {re.escape(name)} needs samples with labels that fit the outputs; this job has none; .* such as taylor"
    with pytest.raises(DataError, match=wanted):
        planish.optimize(job, "onnxruntime:cpu", planish.Budget(macs="0.6x"), tmp_path / "net.planish", trials=1, threads=1, saliency=name)
    assert not (tmp_path / "net.study").exists()


def test_labels_that_no_loss_fits_are_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench, "_measure_original", lambda *_: pytest.fail("the original was measured"))
    x, _ = small_jobs.images(64, seed=2)
    split = [(x, torch.zeros(64, 3))]
    job = small_jobs.stripes_job(train=split, validation=split, test=split, metric=lambda outputs, targets: 0.5, higher_is_better=True)
    with pytest.raises(DataError, match=r"saliency: fisher needs samples with labels that fit the outputs; .* `loss`, where the metric"):
        planish.optimize(job, "onnxruntime:cpu", planish.Budget(macs="0.6x", drop=0.1), tmp_path / "net.planish", saliency="fisher")


def test_a_criterion_that_nobody_has_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no saliency named 'kmeens:activations'; did you mean 'kmeans:activations'"):
        planish.optimize(small_jobs.stripes_job(), out=tmp_path / "net.planish", saliency="kmeens:activations")


def test_units_whose_score_is_no_number_are_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planish.prune.saliency.magnitude import Magnitude

    replaying.install(monkeypatch.setattr)
    before = Magnitude.scores

    def scores(self: Magnitude, *arguments: object) -> dict[str, np.ndarray]:
        found = before(self, *arguments)
        found["first"][:3] = np.nan
        return found

    monkeypatch.setattr(Magnitude, "scores", scores)
    result = planish.optimize(
        small_jobs.stripes_job(),
        "onnxruntime:cpu",
        planish.Budget(macs="0.6x", drop=0.5),
        tmp_path / "net.planish",
        techniques=("prune",),
        trials=1,
        threads=1,
        saliency="magnitude",
    )
    assert any(note == "saliency: units whose score is not finite are kept: first (3 of 64)." for note in result.summary.notes)


def test_a_state_that_is_stepped_is_pruned_behind_the_same_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent cell whose caller keeps the state: fewer cells, the same shapes in and out, stepped as before."""
    from families import Stepped

    replaying.install(monkeypatch.setattr)
    torch.manual_seed(0)
    net = Stepped(64).eval()
    inputs = [torch.randn(96, *shape) * scale for shape, scale in (((6, 7), 1.0), ((64,), 0.3), ((64,), 0.3))]
    names = ("x", "h", "c")
    batch = dict(zip(names, inputs, strict=True))
    job = planish.Workload(
        model=net,
        example_inputs={name: value[:1] for name, value in batch.items()},
        train=[(batch, None)],
        validation=[(batch, None)],
        metric="cosine",
        state={"h": "h_next", "c": "c_next"},
        name="stepped",
    )
    out = tmp_path / "stepped.planish"
    budget = planish.Budget(macs="0.6x", drop=0.5)
    result = planish.optimize(job, "onnxruntime:cpu", budget, out, techniques=("prune",), trials=2, threads=1, keep=("conv*",))
    assert result.verdict == "met"
    assert result.plan is not None and result.plan.widths["cell"] < 64
    fast = planish.load(out)
    h, c = np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32)
    for step in range(5):
        found = fast({"x": inputs[0][step : step + 1].numpy(), "h": h, "c": c})
        h, c = found["h_next"], found["c_next"]
        assert h.shape == c.shape == (1, 64)
        assert np.count_nonzero(~h[0].astype(bool)) == 64 - result.plan.widths["cell"]
