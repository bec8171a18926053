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
from planish import conclude, trial, verification, workbench
from planish.artifact import open_artifact
from planish.measure.latency import estimate


@pytest.mark.parametrize(
    ("gain", "limit", "threads"),
    [
        pytest.param(0.95, "0.3x", 1, id="a twentieth quicker"),
        pytest.param(0.85, "0.3x", 2, id="more than a tenth quicker"),
        pytest.param(0.85, "0.8x", 1, id="with room below the limit a tenth is not enough"),
        pytest.param(0.7, "0.8x", 2, id="with room below the limit three tenths are"),
        pytest.param(0.95, "0.27x", 2, id="one thread misses the limit, two hold it"),
    ],
)
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


@pytest.mark.parametrize(
    ("is_original_slowed", "threads"), [pytest.param(True, 2, id="the machine changed"), pytest.param(False, 1, id="it did not")]
)
def test_a_core_that_is_taken_at_the_end_does_not_take_a_thread_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_original_slowed: bool, threads: int
) -> None:
    """Two threads were twice as quick in every trial; in the final comparison they are slower, which counts if the original is as usual."""
    replaying.install(monkeypatch.setattr)
    before = trial.interleaved

    def scaled(gain: float) -> Any:
        def interleaved(probes: Any, *arguments: Any, **named: Any) -> Any:
            timings = before(probes, *arguments, **named)
            original = max(found.latency_s.median for found in timings.values())
            for key, probe in probes.items():
                found = timings[key]
                if probe.target.threads == 2 and (is_original_slowed or found.latency_s.median < original):
                    rounds = tuple(gain * s for s in found.rounds)
                    timings[key] = replace(found, latency_s=estimate(rounds), rounds=rounds)
            return timings

        return interleaved

    for module in (workbench, trial):
        monkeypatch.setattr(module, "interleaved", scaled(0.5))
    monkeypatch.setattr(conclude, "interleaved", scaled(1.2))
    monkeypatch.setattr(conclude, "_PAUSE_S", 0.0)
    result = planish.optimize(
        small_jobs.stripes_job(), "onnxruntime:cpu", out=tmp_path / "net.planish", techniques=("quantize",), trials=1, threads=2
    )
    assert result.optimized.threads == threads


def test_the_original_has_the_same_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is quicker with one thread, so every ratio is relative to that, in trials too; `planish bench` gives it as well."""
    replaying.install(monkeypatch.setattr)
    before = trial.interleaved

    def interleaved(probes: Any, *arguments: Any, **named: Any) -> Any:
        timings = before(probes, *arguments, **named)
        for key, probe in probes.items():
            if probe.target.threads == 2:
                found = timings[key]
                latency = msgspec.structs.replace(found.latency_s, median=1.5 * found.latency_s.median)
                timings[key] = replace(found, latency_s=latency, rounds=tuple(1.5 * s for s in found.rounds))
        return timings

    for module in (workbench, trial, conclude, verification):
        monkeypatch.setattr(module, "interleaved", interleaved)
    out = tmp_path / "net.planish"
    result = planish.optimize(
        small_jobs.stripes_job(), "onnxruntime:cpu", planish.Budget(latency="0.5x"), out, techniques=("quantize",), trials=1, threads=2
    )
    share = result.optimized.size_bytes / result.original.size_bytes
    assert (result.original.threads, result.optimized.threads) == (1, 1)
    assert result.summary.ratios["latency"].median == pytest.approx(share, rel=0.01)
    found = next(one for one in result.summary.trials if one.stage == "trial")
    assert found.latency_ratio is not None and found.size_bytes is not None
    assert found.latency_ratio.median == pytest.approx(found.size_bytes / result.original.size_bytes, rel=0.01)
    rows = verification.bench(small_jobs.stripes_job(), [out], threads=2, seconds=0.1)
    shown = {(row.name, row.target): row.threads for row in rows}
    assert shown["original", "onnxruntime:cpu"] == shown[str(out), "onnxruntime:cpu"] == 1
