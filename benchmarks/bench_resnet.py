"""CIFAR ResNets: planish against the best fp32 runtime, NNCF's and ONNX Runtime's int8 and Torch-Pruning, interleaved in one run.

python benchmarks/bench_resnet.py --data DIR --depth 56 --latency 0.36x --time-limit 1800
python benchmarks/bench_resnet.py --data DIR --depth 20 --int8-only
python benchmarks/bench_resnet.py --data DIR --depth 56 --latency 0.36x --time-limit 1800 --torch-pruning 0.5
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import cifar
import numpy as np
import peers
from numpy.typing import NDArray
from running import optimized

import planish
from planish.artifact import open_artifact
from planish.data import Data
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.measure.latency import Timing, interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.metrics import get_metric, paired_interval
from planish.runtimes.contract import get_runtime
from planish.workbench import outputs_of


def main() -> None:
    """Optimize, then measure everything side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--latency", default=None, help="limit for planish, such as 0.4x; as fast as possible without")
    parser.add_argument("--drop", default="1pt")
    parser.add_argument("--time-limit", type=float, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--int8-only", action="store_true", help="post-training int8 alone: no pruning, no recovery")
    parser.add_argument("--no-control", action="store_true", help="leave the dense control out")
    parser.add_argument(
        "--torch-pruning", type=float, default=None, metavar="RATIO", help="also prune with Torch-Pruning, tuned on as many samples"
    )
    parser.add_argument("--out", default=None, help="where the artifact goes; a temporary folder by default")
    arguments = parser.parse_args()

    folder = cifar.data_folder(arguments.data)
    job = cifar.job(arguments.depth, folder)
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    out = Path(arguments.out) if arguments.out else work / "net.planish"
    result = optimized(
        job,
        out,
        arguments,
        techniques=("quantize",) if arguments.int8_only else ("prune", "quantize", "distill"),
        control=not (arguments.no_control or arguments.int8_only),
    )
    compare(job, result, out, work, arguments.threads, arguments.torch_pruning)


def compare(job: planish.Workload, result: planish.Result, out: Path, work: Path, threads: int, ratio_pruned: float | None) -> None:
    """Print latency, accuracy and agreement of every model, measured side by side."""
    data = job.materialize(work / "data")
    split = data.test
    assert split is not None and split.targets is not None
    graph = capture(job.model_module(), job.example_inputs)
    targets = {target.runtime: target for target in available_targets("cpu", threads)}
    files = {}
    for name in ("onnxruntime", "openvino"):
        (work / name).mkdir()
        files[f"fp32 {name}"] = (targets[name], get_runtime(name).export(graph, work / name))
    source = files["fp32 onnxruntime"][1]
    samples = data.calibration.inputs[0][:300]
    entry = graph.signature.inputs[0].name
    files["NNCF int8 openvino"] = (targets["openvino"], peers.nncf_int8(source, samples, work / "nncf.xml", entry))
    reduce_range = not targets["onnxruntime"].facts.has_int8_dot
    static = peers.onnxruntime_int8(source, samples, work / "static.onnx", entry, reduce_range)
    files["static int8 onnxruntime"] = (targets["onnxruntime"], static)
    if ratio_pruned is not None:
        pruned = _torch_pruned(job, result, data, graph, work, ratio_pruned)
        (work / "pruned").mkdir()
        path = get_runtime("openvino").export(pruned, work / "pruned")
        files["Torch-Pruning fp32 openvino"] = (targets["openvino"], path)
        files["Torch-Pruning + NNCF"] = (targets["openvino"], peers.nncf_int8(path, samples, work / "pruned.xml", entry))
    artifact = open_artifact(out)
    files["planish"] = (artifact.manifest.target, artifact.model_path)

    opened = {
        (name, one.threads): Probe.open(one, path, graph.signature)
        for name, (target, path) in files.items()
        for one in ([target] if name == "planish" else target.thread_counts)
    }
    example: list[NDArray[np.float32]] = [np.ascontiguousarray(array[:1]) for array in split.inputs]
    everything = interleaved(opened, example, seconds=5.0)
    chosen = {name: min((key for key in opened if key[0] == name), key=lambda key: everything[key].latency_s.median) for name in files}
    timings = {name: everything[key] for name, key in chosen.items()}
    outputs = {name: outputs_of(opened[key], split) for name, key in chosen.items()}
    for probe in opened.values():
        probe.close()
    best = min((name for name in files if name.startswith("fp32")), key=lambda name: timings[name].latency_s.median)
    rows = [f"{row(name, timings, best, outputs, split.targets)}, threads {chosen[name][1]}" for name in files]
    summary = result.summary
    print(
        f"{machine().processor}, at most {threads} threads, batch 1, {split.n} test images, planish verdict: {summary.verdict} ({summary.reason})"
    )
    for row in rows:
        print(row)
    faster = ratio(timings["NNCF int8 openvino"], timings["planish"])
    print(f"planish over NNCF int8: {faster.median:.2f}x ({faster.low:.2f} to {faster.high:.2f})")
    if summary.control_drop is not None:
        print(f"dense control {summary.control_quality:.4f}; drop against it {summary.control_drop * 100:+.2f} points")
    print(f"seconds {summary.seconds['total']:.0f}; samples of recovery {summary.plan.recovery.samples if summary.plan else 0}")
    print(json.dumps(summary.seconds))


def _torch_pruned(job: planish.Workload, result: planish.Result, data: Data, graph: Graph, work: Path, share: float) -> Graph:
    """Torch-Pruning's net after as much distillation as planish's own plan got."""
    model = job.model_module()
    pruned = capture(peers.torch_pruned(model, job.example_inputs[0], share), job.example_inputs)
    assert data.train is not None and result.summary.plan is not None
    recovery = result.summary.plan.recovery
    report = recover(pruned, Teacher(graph, data.train, work), job, data, recovery)
    print(
        f"Torch-Pruning at {share}: {macs(analyse(graph)) / macs(analyse(pruned)):.2f}x fewer MACs, {report.samples} samples of distillation"
    )
    return pruned


def row(name: str, timings: dict[str, Timing], best: str, outputs: dict[str, list[NDArray[np.float32]]], labels: NDArray[np.int64]) -> str:
    """A line of the table: latency, how many times as fast as `best`, accuracy, its drop, and agreement."""
    accuracy, agreement = get_metric("accuracy"), get_metric("agreement")
    faster = ratio(timings[best], timings[name])
    lost = paired_interval(accuracy, outputs[best], outputs[name], labels)
    return (
        f"{name:27s} {timings[name].latency_s.median * 1e6:7.0f} µs  {faster.median:5.2f}x ({faster.low:.2f} to {faster.high:.2f})  "
        f"accuracy {accuracy.score(outputs[name], labels):.4f}  drop {lost[0] * 100:+.2f} ({lost[1] * 100:+.2f} to {lost[2] * 100:+.2f})  "
        f"agreement {agreement.score(outputs[name], outputs[best]):.4f}"
    )


if __name__ == "__main__":
    main()
