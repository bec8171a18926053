"""The flow with masks: a limit on the size met by zeros, said plainly; none where they bring nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import planish
import replaying
import small_jobs
from planish.artifact import open_artifact
from planish.errors import UnknownName, UsageError
from planish.measure.memory import size_bytes


@pytest.mark.parametrize(("techniques", "limit"), [(("mask", "distill"), "0.4x"), (("mask", "quantize", "distill"), "0.2x")])
def test_a_limit_on_the_size_is_met_by_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, techniques: tuple[str, ...], limit: str
) -> None:
    replaying.install(monkeypatch.setattr)
    out = tmp_path / "net.planish"
    job = small_jobs.stripes_job()
    budget, schemes = planish.Budget(size=limit, drop=0.2), ("int8",) if "quantize" in techniques else None  # codebooks alone would hold it
    result = planish.optimize(job, "onnxruntime:cpu", budget, out, techniques=techniques, schemes=schemes, trials=4, threads=1)
    summary, plan = result.summary, result.plan
    assert result.verdict == "met", summary.reason
    assert plan is not None and plan.masks and plan.masking == "sparsegpt" and plan.recovery.samples > 0
    assert ("int8" in plan.precisions.values()) == ("quantize" in techniques)
    assert summary.ratios["size"].median <= float(limit[:-1])
    assert summary.optimized is not None and size_bytes(out / open_artifact(out).manifest.model) == summary.optimized.size_bytes
    zeros = 0
    for name, pattern in plan.masks.items():
        weight = dict(result.module.named_parameters())[f"{name}.weight"]
        gone = int((weight == 0).sum())
        assert gone == len(weight) * int(float(pattern[:-1]) / 100 * weight[0].numel()), f"recovery kept the zeros of {name}"
        zeros += gone
    (note,) = [note for note in summary.notes if note.startswith("masks:")]
    assert f"masks: {zeros} of 37696 weights are zero; onnxruntime multiplies by them as by others: the net" in note
    assert "instead of" in note
    x, _ = small_jobs.images(5, seed=9)
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(out)(x.numpy()), result.module(x).numpy(), atol=1e-4 if len(techniques) == 2 else 0.2)


@pytest.mark.parametrize(
    ("target", "budget", "why"),
    [
        ("onnxruntime:cpu", {"macs": "0.6x"}, "no limit on the size asks for them"),
        ("torch:cpu", {"size": "0.6x"}, "its file keeps zeros as it keeps other weights"),
    ],
)
def test_where_masks_bring_nothing_there_are_none_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, budget: dict[str, str], why: str
) -> None:
    replaying.install(monkeypatch.setattr)
    result = planish.optimize(
        small_jobs.stripes_job(),
        target,
        planish.Budget(**budget, drop=0.5),
        tmp_path / "net.planish",
        techniques=("prune", "mask"),
        masking="sparsegpt:2:4",
        trials=1,
        threads=1,
    )
    assert result.plan is not None and not result.plan.masks
    name = target.partition(":")[0]
    assert f"masks: none, since {name} computes with zeros as with other weights, and {why}" in result.summary.notes


def test_one_pattern_by_name_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2:4 is there for who asks for it; the study knows what was asked for."""
    replaying.install(monkeypatch.setattr)
    out = tmp_path / "net.planish"
    budget = planish.Budget(size="0.7x", drop=0.5)
    job = small_jobs.stripes_job()
    first = planish.optimize(
        job, "onnxruntime:cpu", budget, out, techniques=("mask",), masking="wanda:2:4", trials=2, threads=1, accept_nearest=True
    )
    assert first.plan is not None and first.plan.masks == {"second": "2:4"} and first.plan.masking == "wanda"
    again = planish.resume(out, job, overwrite=True)
    assert again.plan == first.plan
    weight = dict(again.module.named_parameters())["second.weight"]
    assert bool(((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1) == 2).all())


def test_what_makes_no_sense_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no masking named 'wonda'; did you mean 'wanda'"):
        planish.optimize(small_jobs.stripes_job(), out=tmp_path / "net.planish", masking="wonda")
    with pytest.raises(UsageError, match=r"a pattern is a share of zeros, as 75%, .*; got '5:4'"):
        planish.optimize(small_jobs.stripes_job(), out=tmp_path / "net.planish", masking="wanda:5:4")
