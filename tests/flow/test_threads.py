"""An artifact runs with as many threads as are worth having."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planish
import replaying
import small_jobs
from planish import conclude, trial
from planish.artifact import open_artifact


@pytest.mark.parametrize(("gain", "limit", "threads"), [(0.95, "0.3x", 1), (0.85, "0.3x", 2), (0.85, "0.8x", 1), (0.7, "0.8x", 2)])
def test_a_second_thread_must_be_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, limit: str, threads: int) -> None:
    """A tenth quicker, or three tenths where one thread holds the limit with room to spare."""
    replaying.install(monkeypatch.setattr)
    before = trial.interleaved

    def interleaved(probes: Any, *arguments: Any, **named: Any) -> Any:
        timings = before(probes, *arguments, **named)
        original = max(found.latency_s.median for found in timings.values())
        for key, probe in probes.items():
            found = timings[key]
            if probe.target.threads == 2 and found.latency_s.median < original:
                latency = msgspec.structs.replace(found.latency_s, median=gain * found.latency_s.median)
                timings[key] = replace(found, latency_s=latency, rounds=tuple(gain * s for s in found.rounds))
        return timings

    for module in (trial, conclude):
        monkeypatch.setattr(module, "interleaved", interleaved)
    out = tmp_path / "net.planish"
    result = planish.optimize(
        small_jobs.stripes_job(), "onnxruntime:cpu", planish.Budget(latency=limit), out, techniques=("quantize",), trials=1, threads=2
    )
    assert result.verdict == "met"
    assert result.optimized.threads == threads
    manifest = open_artifact(out).manifest
    assert (manifest.target.threads, manifest.threads_tried) == (threads, 2)
    assert [manifest.target_with(most).threads for most in (None, 1, 2, 4)] == [threads, 1, threads, 4]
    assert f"options.inter_op_num_threads = {threads}, 1" in (out / "deploy.py").read_text()
