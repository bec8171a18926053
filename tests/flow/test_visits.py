"""Trials that surprise are visited again: one slow moment of the machine decides nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planish
import replaying
import small_jobs
from planish import trial


def test_a_trial_that_surprises_is_measured_again_and_its_median_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)
    calm = trial.interleaved
    slow: list[str] = []
    measured: list[str] = []

    def interleaved(probes: Any, *arguments: Any, **named: Any) -> Any:
        timings = calm(probes, *arguments, **named)
        (target,) = [key for key in probes if key[0] == "optimized"]
        path = replaying.path_of(probes[target]).parent
        if path.parent.name == "trials":
            measured.append(path.name)
        if path.parent.name == "trials" and len(set(measured)) == 2 and not slow:
            slow.append(path.name)
            late = timings[target]
            latency = msgspec.structs.replace(late.latency_s, median=1.6 * late.latency_s.median)
            timings[target] = replace(late, latency_s=latency, rounds=tuple(1.6 * s for s in late.rounds))
        return timings

    monkeypatch.setattr(trial, "interleaved", interleaved)
    result = planish.optimize(
        small_jobs.stripes_job(),
        "onnxruntime:cpu",
        planish.Budget(latency="0.3x", drop=0.5),
        tmp_path / "net.planish",
        techniques=("prune", "quantize"),
        trials=6,
        threads=1,
    )
    (name,) = slow
    (found,) = [t for t in result.summary.trials if t.stage == "trial" and t.plan.digest == name]
    assert measured.count(name) == 3, "the slow figure and two more"
    size = found.size_bytes / result.original.size_bytes
    assert found.latency_ratio.median == pytest.approx(size, rel=0.05), "replayed latencies follow the size"
