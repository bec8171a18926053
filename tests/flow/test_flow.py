"""The whole flow on one small net, with the real clock and no network: what comes out, and that it is true of what was written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import planish
import small_jobs
from planish import cli, conclude, flow, trial, verification, workbench
from planish.measure import latency
from planish.result import Result

KEYS = ("verdict", "target", "original", "optimized", "ratios", "drop", "drop_interval", "artifact", "plan", "trials", "seconds")
NO_NETWORK = """
import socket

def refuse(*_, **__):
    raise OSError("there is no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture(scope="module")
def tried() -> list[str]:
    """Addresses that somebody tried to reach meanwhile."""
    return []


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory, tried: list[str]) -> Iterator[Result]:
    """One real run, without a network in this process or any that it starts."""
    folder = tmp_path_factory.mktemp("met")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(str(arguments))
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        for name in ("getaddrinfo", "create_connection"):
            patch.setattr(socket, name, refuse)
        for module in (workbench, trial, conclude):
            patch.setattr(module, "interleaved", lambda probes, flat, seconds=0.0: latency.interleaved(probes, flat, seconds=0.25))
        patch.setattr(workbench, "_EAGER", ("torch",))
        yield planish.optimize(
            small_jobs.stripes_job(),
            "onnxruntime:cpu",
            planish.Budget(latency="0.8x", drop=0.05),
            folder / "stripes.planish",
            trials=1,
            threads=1,
            techniques=("quantize", "distill"),
            control=True,
        )


def test_the_budget_is_met_as_measured_without_a_network(met: Result, tried: list[str]) -> None:
    assert met.verdict == "met", met.reason
    assert met.ratios["latency"].median <= 0.8
    assert met.ratios["latency"].median == pytest.approx(met.optimized.latency_s.median / met.original.latency_s.median, rel=0.2)
    assert met.drop == pytest.approx(met.original.quality - met.optimized.quality)
    assert met.drop <= 0.05
    assert met.drop_interval[0] <= met.drop <= met.drop_interval[1]
    assert met.split == "test"
    assert met.original.latency_s.n > 1 and met.original.roofline_s > 0
    assert "torch:cpu" in met.baselines
    assert met.plan.precisions and not met.plan.widths
    assert met.optimized.proof.int8_kernels > 0
    assert met.optimized.peak_memory_bytes is not None
    assert tried == []


def test_the_dense_control_is_another_net_judged_on_the_same_images(met: Result) -> None:
    assert met.plan is not None and met.plan.recovery.samples > 0
    assert met.summary.control_quality is not None and met.summary.control_drop is not None and met.original.quality is not None
    gained = met.summary.control_quality - met.original.quality
    assert met.summary.control_drop == pytest.approx(met.drop + gained)


def test_the_diagnosis_speaks_of_every_operator_that_the_plan_quantizes(met: Result) -> None:
    found = met.diagnosis
    assert (found.metric, found.split, found.samples) == ("accuracy", "validation", 64)
    schemes = {row.name: row.scheme for row in found.operators if row.scheme != "fp32"}
    assert schemes == {name: scheme for name, scheme in met.plan.precisions.items() if scheme != "fp32"}
    assert all("int8" in row.sqnr_alone_db and row.sqnr_without_db is not None for row in found.operators)
    assert met.seconds["diagnosis of quantization"] < 60


def test_the_json_object_has_the_design_s_keys(met: Result) -> None:
    data = json.loads(json.dumps(met.to_json(), allow_nan=False))
    assert set(data) >= set(KEYS)
    assert set(data["ratios"]) == {"latency", "size", "memory", "macs", "bit_operations"}
    assert all(isinstance(value, float) for value in data["ratios"].values())
    assert data["ratios"]["size"] == pytest.approx(met.optimized.size_bytes / met.original.size_bytes)
    assert data["ratios"]["macs"] == 1
    assert data["artifact"] == str(met.path)
    assert data["seconds"] == met.seconds["total"] > 0
    assert {"candidate", "trial", "winner"} >= {trial["stage"] for trial in data["trials"]}
    for side in ("original", "optimized"):
        assert {"quality", "latency_s", "size_bytes", "peak_memory_bytes", "macs", "runtime", "machine"} <= set(data[side])
        assert {"median", "low", "high"} <= set(data[side]["latency_s"])


def test_module_and_artifact_agree_with_the_stated_quality(met: Result) -> None:
    x, y = small_jobs.images(320, seed=2)
    x, y = x[256:], y[256:]
    scores = torch.from_numpy(planish.load(met.path, threads=1)(x.numpy()))
    assert float((scores.argmax(1) == y).float().mean()) == pytest.approx(met.optimized.quality)
    with torch.inference_mode():
        module = met.module(x)
    assert (module.argmax(1) == scores.argmax(1)).float().mean() >= 0.97


def test_the_artifact_runs_where_torch_is_not(met: Result, tmp_path: Path) -> None:
    x, _ = small_jobs.images(3, seed=5)
    np.save(tmp_path / "x.npy", x.numpy())
    code = f"""
        import sys
        for name in ("torch", "onnx", "scipy", "sqlalchemy", "sklearn"):
            sys.modules[name] = None
        import numpy as np, planish
        np.save({str(tmp_path / "y.npy")!r}, planish.load({str(met.path)!r}, threads=1)(np.load({str(tmp_path / "x.npy")!r})))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), planish.load(met.path, threads=1)(x.numpy()))


def test_verify_measures_quality_and_outputs_again(met: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.verification._SECONDS", 0.2)
    found = planish.verify(met.path, small_jobs.stripes_job())
    assert found.same_machine
    assert found.quality == met.optimized.quality
    assert found.sqnr_db is None or found.sqnr_db > 60
    assert found.size_bytes == met.optimized.size_bytes
    # A busy machine may well be slower now than it was then; anything else must hold.
    assert found.holds or all("ms here and now" in finding or "trustworthy" in finding for finding in found.findings)


def test_an_artifact_that_was_changed_does_not_verify(met: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.planish"
    shutil.copytree(met.path, copy)
    model = copy / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert cli.main(["verify", str(copy)]) == 2
    assert "model.onnx" in capsys.readouterr().err.splitlines()[-1]


def test_the_report_of_the_run_is_a_page(met: Result, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["report", str(met.path), "-o", str(page)]) == 0
    text = page.read_text()
    assert "second" in text and "int8" in text and "NaN" not in text.split("<script")[0]


def test_nothing_else_is_left_behind(met: Result) -> None:
    names = {path.name for path in met.path.parent.iterdir()}
    assert names - {"__pycache__"} == {"sitecustomize.py", "stripes.planish", "stripes.study"}


def test_the_job_s_own_model_is_as_it_was(met: Result) -> None:
    net = small_jobs.trained()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flow.inspect(small_jobs.stripes_job(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_bench_puts_the_original_and_artifacts_in_one_table(met: Result) -> None:
    rows = verification.bench(small_jobs.stripes_job(), [met.path], threads=1, seconds=0.5)
    by_name = {row.name: row for row in rows if row.target == "onnxruntime:cpu"}
    assert by_name[str(met.path)].ratio.median < 1 <= by_name["original"].ratio.median + 0.05
    assert by_name["original"].quality == met.original.quality
    assert "torch:cpu" in {row.target for row in rows}, "what the user has today stands beside it"
