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
from planish import trial
from planish.artifact import open_artifact


@pytest.mark.parametrize(("gain", "threads"), [(0.95, 1), (0.7, 2)])
def test_a_second_thread_must_bring_a_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, threads: int) -> None:
    replaying.install(monkeypatch.setattr)
    before = trial.interleaved

    def interleaved(probes: Any, *arguments: Any, **named: Any) -> Any:
        timings = before(probes, *arguments, **named)
        for key, probe in probes.items():
            if key is not None and probe.target.threads == 2:
                found = timings[key]
                latency = msgspec.structs.replace(found.latency_s, median=gain * found.latency_s.median)
                timings[key] = replace(found, latency_s=latency, rounds=tuple(gain * s for s in found.rounds))
        return timings

    monkeypatch.setattr(trial, "interleaved", interleaved)
    out = tmp_path / "net.planish"
    result = planish.optimize(
        small_jobs.stripes_job(), "onnxruntime:cpu", planish.Budget(latency="0.6x"), out, techniques=("quantize",), trials=1, threads=2
    )
    assert result.verdict == "met"
    assert result.optimized.threads == threads
    manifest = open_artifact(out).manifest
    assert (manifest.target.threads, manifest.threads_tried) == (threads, 2)
    assert [manifest.target_with(most).threads for most in (None, 1, 2, 4)] == [threads, 1, threads, 4]
    assert f"options.inter_op_num_threads = {threads}, 1" in (out / "deploy.py").read_text()
