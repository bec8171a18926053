"""Verification: quality is compared where it can be, with a tolerance that its interval explains, and another job is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import making
import planish
from planish.measure.latency import Timing
from planish.verification import Verification, verify

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = X @ torch.from_numpy(making.WEIGHT)
PARTS = {"parameters", "data", "functions", "version"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.verification._SECONDS", 0.02)
    monkeypatch.setattr("planish.verification._PAUSE_S", 0.0)
    monkeypatch.setattr("planish.verification.peak_memory_bytes", lambda *_: 1)


def job(factor: float = 1.0, **changes: Any) -> planish.Workload:
    """A linear map with the artifact's weight, times `factor`; its test split is 40 samples."""
    net = torch.nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(factor * torch.from_numpy(making.WEIGHT.T.copy()))
    arguments = {"model": net, "example_inputs": (X[:2],), "test": [(X, Y.argmax(1))], "metric": "accuracy", "name": "net"}
    return planish.Workload(**arguments | changes)


def verified(path: Path, given: planish.Workload | None, made_from: dict[str, str] | None = None, **claims: Any) -> Verification:
    claims = {"quality": 1.0, "quality_interval": (1.0, 1.0), "latency_s": planish.Estimate(9.0, 9.0, 9.0, 9)} | claims
    measured = {"original": making.measurement(), "optimized": making.measurement(**claims)}
    making.artifact(path / "net.planish", measurements=measured, job=made_from or {}, overwrite=True)
    return verify(path / "net.planish", given)


def said(found: Verification) -> list[str]:
    return [finding for finding in found.findings if "latency" not in finding]


def test_quality_with_labels_is_judged(tmp_path: Path) -> None:
    found = verified(tmp_path, job())
    assert (found.holds, found.quality, said(found)) == (True, 1.0, [])
    found = verified(tmp_path, job(), quality=0.9, quality_interval=(0.85, 0.95))
    assert not found.holds
    assert said(found) == ["its quality on test is 1.0000, 0.9000 is claimed"]
    found = verified(tmp_path, job(), quality=0.92, quality_interval=(0.85, 1.0))
    assert not found.holds, "the samples are the same: the interval is no excuse"
    assert verified(tmp_path, job(), quality=0.96).holds, "one or two of 40 samples may round otherwise"
    elsewhere = msgspec.structs.replace(making.measurement().machine, fingerprint="elsewhere")
    found = verified(tmp_path, job(), quality=0.92, quality_interval=(0.85, 1.0), machine=elsewhere)
    assert found.holds
    assert said(found)[-1].endswith("is 1.0000, 0.9200 is claimed: on another machine, and within the claimed interval, 0.8500 to 1.0000")


def test_the_tolerance_follows_the_metric_s_scale(tmp_path: Path) -> None:
    """An error of 1000 that is 1000.5 now agrees to half a thousandth; one of 0.001 that is 0.0015 does not."""

    def off_by(value: float) -> planish.Workload:
        return job(metric=lambda outputs, targets: value, higher_is_better=False)

    assert verified(tmp_path, off_by(1000.5), quality=1000.0, quality_interval=(1000.0, 1000.0)).holds
    assert not verified(tmp_path, off_by(0.0015), quality=0.001, quality_interval=(0.001, 0.001)).holds


def test_without_labels_it_is_compared_with_the_original(tmp_path: Path) -> None:
    blind = {"test": [(X, Y.argmax(1))], "metric": "agreement"}
    assert verified(tmp_path, job(**blind)).quality == 1.0
    found = verified(tmp_path, job(-1.0, **blind))
    assert found.quality is not None
    assert found.quality < 0.5
    assert not found.holds


def test_evaluate_is_called_with_the_artifact(tmp_path: Path) -> None:
    def evaluate(predict: Any) -> float:
        return float((predict(X) - Y).abs().max() < 1e-3)

    claims = {"quality_interval": None, "split": "evaluate"}
    assert verified(tmp_path, job(evaluate=evaluate), **claims).quality == 1.0
    assert not verified(tmp_path, job(evaluate=lambda predict: 0.5), **claims).holds
    assert verified(tmp_path, job(evaluate=lambda predict: torch.rand(1).item()), **claims).quality == pytest.approx(0.4963, abs=1e-4)
    drawn = iter((0.5, 0.6))
    found = verified(tmp_path, job(evaluate=lambda predict: next(drawn)), **claims)
    assert found.holds
    assert "reported and not judged, since a second call of `evaluate` gave 0.6000" in said(found)[-1]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    cases: list[tuple[planish.Workload | None, dict[str, Any], str]] = [
        (None, {}, "no job was given"),
        (job(test=None), {}, "the job has no data to judge it on"),
        (job(), {"quality": None, "quality_interval": None, "split": ""}, "none is claimed"),
        (job(), {"split": "validation"}, "it is claimed on validation, and the job is judged on test"),
    ]
    for given, claims, why in cases:
        found = verified(tmp_path, given, **claims)
        assert found.holds
        assert said(found) == [f"quality was not compared: {why}"]


def test_another_job_is_named_and_not_held_against_the_artifact(tmp_path: Path) -> None:
    made_from = job().fingerprint(job().materialize(tmp_path / "data"))
    assert set(made_from) == PARTS
    assert said(verified(tmp_path, job(), made_from)) == []
    found = verified(tmp_path, job(-1.0), made_from, quality=0.5, quality_interval=(0.5, 0.5))
    assert found.holds
    assert found.quality == 1.0
    assert said(found) == ["another job: parameters differ", "quality was not compared: it is claimed for another job"]
    assert said(verified(tmp_path, job(version="2"), made_from))[0] == "another job: version differs"


@pytest.mark.parametrize(
    ("slower", "attempts", "holds", "said"), [(1.1, 1, True, ""), (1.4, 3, True, "virtual"), (2.0, 3, False, "ms are claimed")]
)
def test_a_slower_latency_is_taken_again_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, attempts: int, holds: bool, said: str
) -> None:
    calls = []

    def interleaved(probes: dict[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        calls.append(1)
        now = planish.Estimate(0.01 * slower, 0.01 * slower, 0.01 * slower, 9)
        return {"artifact": Timing(now, now, 1, (0.01 * slower,) * 9, (0.01,) * 9)}

    monkeypatch.setattr("planish.verification.interleaved", interleaved)
    claimed = planish.Estimate(0.01, 0.01, 0.01, 9)
    found = verified(tmp_path, job(), latency_s=claimed)
    assert len(calls) == attempts
    assert found.holds is holds, found.findings
    assert any(said in finding for finding in found.findings) or not said
