"""Makes small artifacts and summaries for the tests of the artifact, the report and the command line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from planish.artifact import Artifact, write
from planish.artifact.manifest import MANIFEST
from planish.budget import Budget
from planish.measure.machine import facts, machine
from planish.measurement import Diagnosis, Estimate, Measurement, Outcome, Proof, Sensitivity
from planish.plan import Plan
from planish.result import OperatorRow, Search, Summary, Trial
from planish.runtimes.contract import get_runtime
from planish.signature import Signature, TensorSpec
from planish.target import Target

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
SIGNATURE = Signature(
    inputs=(TensorSpec("images", "float32", ("batch", 4)),),
    outputs=(TensorSpec("scores", "float32", ("batch", 3)),),
    takes="tensor",
    gives="tensor",
)


def model_bytes(*, external: str | None = None) -> bytes:
    """An ONNX model that multiplies `images [batch, 4]` with `WEIGHT`; with `external`, the weight claims to live in that file."""
    weight = numpy_helper.from_array(WEIGHT, "weight")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=external)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "weight"], ["scores"])],
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model) if external is None else None
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The working directory is `folder` meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def measurement(**changes: Any) -> Measurement:
    """A measurement of this machine with plausible figures."""
    figures: dict[str, Any] = {
        "runtime": "onnxruntime:cpu",
        "machine": machine(),
        "threads": 1,
        "batch": 1,
        "latency_s": Estimate(1.4e-3, 1.3e-3, 1.5e-3, 200),
        "cpu_s": Estimate(1.35e-3, 1.3e-3, 1.4e-3, 200),
        "size_bytes": 3_535_000,
        "peak_memory_bytes": 42_000_000,
        "macs": 126_000_000,
        "quality": 0.8958,
        "quality_interval": (0.8871, 0.9042),
        "split": "test",
        "sqnr_db": 141.0,
        "proof": Proof("CPU", {"Conv": 19}, {"f32": 19}, 0, 19),
        "roofline_s": 0.9e-3,
        "versions": get_runtime("onnxruntime").versions(),
        "warm_up": 12,
    }
    return Measurement(**(figures | changes))


def artifact(folder: Path, **changes: Any) -> Artifact:
    """An artifact at `folder` that computes `images @ WEIGHT`."""
    source = Path(tempfile.mkdtemp()) / "model.onnx"
    source.write_bytes(changes.pop("model_data", model_bytes()))
    inputs = np.ones((2, 4), np.float32)
    arguments: dict[str, Any] = {
        "name": "net",
        "model": source,
        "plan": Plan("onnxruntime:cpu", widths={"a": 8}),
        "signature": SIGNATURE,
        "target": Target("onnxruntime", threads=1, facts=facts()),
        "measurements": {"original": measurement(), "optimized": measurement()},
        "weights": {"weight": WEIGHT},
        "result_json": msgspec.json.encode(summary(name="net")),
        "check": ([inputs], [inputs @ WEIGHT]),
    }
    try:
        return write(folder, **(arguments | changes))
    finally:
        shutil.rmtree(source.parent)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change the manifest as somebody with the source of planish would: all checksums hold afterwards."""
    from planish.artifact.manifest import Entry, Manifest

    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    names = changes.pop("names", None) or [
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
    ]
    files = {name: Entry(hashlib.sha256((folder / name).read_bytes()).hexdigest(), (folder / name).stat().st_size) for name in names}
    (folder / MANIFEST).write_bytes(msgspec.structs.replace(manifest, **({"files": files} | changes)).encode())


def diagnosis(**changes: Any) -> Diagnosis:
    """Four operators, each with another cure."""

    def row(name: str, scheme: str, int8: float, others: float, **more: Any) -> Sensitivity:
        alone = {"int8": int8} | ({} if scheme in ("fp32", "int8") else {scheme: int8 + 20})
        figures = {"sqnr_with_db": 24.0, "sqnr_without_db": others, "quality_with": 0.88, "quality_without": 0.893, "clipped": 0.002}
        tried = "int8" if scheme == "fp32" else scheme
        return Sensitivity(name=name, kind="linear", scheme=scheme, tried=tried, sqnr_alone_db=alone, **(figures | more))

    figures: dict[str, Any] = {
        "metric": "accuracy",
        "split": "validation",
        "samples": 64,
        "quality": 0.8958,
        "sqnr_db": 24.0,
        "quality_all": 0.88,
        "operators": (
            row("head", "fp32", 3.1, 24.0, sqnr_with_db=2.9, quality_with=0.4),
            row("layer3.0.fc", "int8-weights", 11.5, 24.4),
            row("layer2.0.fc", "int8-dynamic", 14.0, 24.3, clipped=0.03),
            row("layer1.0.conv1", "int8", 25.0, 31.5),
            row("layer1.0.conv2", "int8", 36.0, 24.1, sqnr_without_db=None, quality_without=None),
            row("layer1.1.conv1", "int8", 46.0, 24.1),
        ),
        "findings": ("head (the last operator) is kept in fp32: in int8 it would take the outputs from 24 to 3 dB",),
    }
    return Diagnosis(**(figures | changes))


def summary(**changes: Any) -> Summary:
    """A result that met its budget: ten trials, three operators, two baselines."""
    plan = Plan("onnxruntime:cpu", widths={"layer1.0.conv1": 24}, blocks=("layer2.1",), precisions={"layer1.0.conv1": "int8"})
    rng = np.random.default_rng(0)
    trials = []
    for i in range(10):
        ratio = 0.35 + 0.06 * i
        is_trial = i % 2 == 0
        trials.append(
            Trial(
                plan=plan.replace(seed=i),
                stage="trial" if is_trial else "candidate",
                outcome=Outcome("measured") if i != 6 else Outcome("quality lost", "the drop is 0.031, allowed are 0.01"),
                loss=0.4 - 0.03 * i,
                drop=float(0.03 - 0.003 * i + rng.normal(0, 0.002)),
                predicted_latency_s=1.4e-3 * ratio * 1.05,
                latency_ratio=Estimate(ratio, ratio - 0.02, ratio + 0.02, 100) if is_trial else None,
                macs=int(126e6 * ratio),
                size_bytes=int(3.5e6 * ratio) if is_trial else None,
                seconds=4.0 + i,
            )
        )
    trials.append(msgspec.structs.replace(trials[2], stage="winner", drop=0.004))
    figures: dict[str, Any] = {
        "name": "resnet56",
        "verdict": "met",
        "reason": "every limit holds on the artifact as measured",
        "target": "onnxruntime:cpu",
        "budget": Budget(latency="0.5x", drop="1pt"),
        "metric": "accuracy",
        "higher_is_better": True,
        "original": measurement(),
        "optimized": measurement(
            latency_s=Estimate(0.62e-3, 0.58e-3, 0.66e-3, 200),
            cpu_s=Estimate(0.61e-3, 0.58e-3, 0.65e-3, 200),
            size_bytes=812_000,
            peak_memory_bytes=31_000_000,
            macs=61_000_000,
            quality=0.8910,
            proof=Proof("CPU", {"QLinearConv": 17, "Conv": 2}, {"i8": 17, "f32": 2}, 17, 2),
        ),
        "elsewhere": {"openvino:cpu": Estimate(1.02, 1.0, 1.05, 22), "torch:cpu": Estimate(6.6, 6.4, 6.9, 22)},
        "baselines": {
            "openvino:cpu": measurement(runtime="openvino:cpu", latency_s=Estimate(1.5e-3, 1.4e-3, 1.6e-3, 200)),
            "torch:cpu": measurement(runtime="torch:cpu", latency_s=Estimate(9.6e-3, 9.1e-3, 10.2e-3, 200)),
        },
        "ratios": {
            "latency": Estimate(0.443, 0.43, 0.46, 200),
            "size": Estimate(0.23, 0.23, 0.23, 1),
            "memory": Estimate(0.74, 0.74, 0.74, 1),
            "macs": Estimate(0.484, 0.484, 0.484, 1),
        },
        "drop": 0.0048,
        "drop_interval": (-0.0021, 0.0114),
        "split": "test",
        "plan": plan,
        "trials": tuple(trials),
        "operators": (
            OperatorRow(
                name="layer1.0.conv1", kind="conv", width_before=32, width_after=24, precision="int8", time_before_s=9e-5, time_after_s=3e-5
            ),
            OperatorRow(name="layer2.1.conv1", kind="conv", width_before=64, precision="removed", time_before_s=8e-5, time_after_s=0.0),
            OperatorRow(
                name="head",
                kind="linear",
                width_before=10,
                width_after=10,
                time_before_s=4e-6,
                time_after_s=4e-6,
                why="the program's output",
            ),
        ),
        "groups": {"layer1.0.conv1": (32, 24)},
        "search": Search(method="solver", candidates=5, trials=5, gap=0.004, kkt_residual=1e-4, affine=(2e-5, 1.03)),
        "seconds": {"capture": 2.1, "options": 14.0, "search": 31.0, "recover": 88.0, "verify": 9.0, "total": 146.0},
        "notes": ("the drop was guided by validation and judged on test",),
        "diagnosis": diagnosis(),
        "machine": machine(),
        "artifact": "out/net.planish",
    }
    return Summary(**(figures | changes))
