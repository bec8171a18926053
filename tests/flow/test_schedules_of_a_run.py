"""The flow with schedules: units that leave while the net trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import planish
import replaying
import small_jobs
from planish import registry
from planish.errors import UnknownName, UsageError
from planish.report.page import page

_BUDGET = planish.Budget(macs="0.6x", drop=0.3)


@pytest.mark.parametrize("name", [name for name in registry.names("schedule") if name != "one-shot"])
def test_a_run_with_a_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replaying.install(monkeypatch.setattr)
    out = tmp_path / "net.planish"
    result = planish.optimize(
        small_jobs.stripes_job(),
        "onnxruntime:cpu",
        _BUDGET,
        out,
        techniques=("prune", "distill"),
        trials=2,
        threads=1,
        schedule=name,
        time_limit=40,
    )
    assert result.verdict == "met", result.summary.reason
    assert result.plan is not None and result.plan.schedule == name and result.plan.widths
    assert result.ratios["macs"].median <= 0.6
    assert result.summary.history and all(np.isfinite(value) for step in result.summary.history for value in step.values())
    assert f"units leave ({name})" in result.summary.seconds
    assert "How units left" in page(result.summary)
    x, _ = small_jobs.images(5, seed=9)
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(out)(x.numpy()), result.module(x).numpy(), atol=1e-4)


def test_what_a_schedule_needs(tmp_path: Path) -> None:
    job, out = small_jobs.stripes_job(), tmp_path / "net.planish"
    with pytest.raises(UnknownName, match=r"no schedule named 'iterativ'; did you mean 'iterative'"):
        planish.optimize(job, out=out, schedule="iterativ")
    with pytest.raises(UsageError, match=r"'growth' prunes while the net trains; it needs the techniques prune and distill; got prune"):
        planish.optimize(job, out=out, schedule="growth", techniques=("prune",))
    with pytest.raises(UsageError, match=r"a clustering merges units at once; with 'l1' give a saliency; got 'kmeans'"):
        planish.optimize(job, out=out, schedule="l1", saliency="kmeans")
