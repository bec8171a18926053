"""Pruning alone, int8 alone, one after the other, and both in one allocation: how fast each makes a CIFAR ResNet within the same drop.

python benchmarks/bench_joint.py --data DIR --depth 56 --drop 1pt --time-limit 600

Every way has the same time, distills, and goes as fast as it can. "one after the other" prunes within three quarters of the drop in
three quarters of the time, then quantizes what came of it within the rest. All artifacts are then measured interleaved, on the test images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cifar
import numpy as np

import planish
from planish.artifact import open_artifact
from planish.console import Console
from planish.graph.capture import capture
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.metrics import get_metric, paired_interval
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.workbench import outputs_of

_FIRST = 0.75
"""The share of drop and time that pruning gets where quantization follows it."""


_WAYS = {"pruning": ("prune", "distill"), "int8": ("quantize", "distill"), "both at once": ("prune", "quantize", "distill")}


def main() -> None:
    """Optimize in four ways, then print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--drop", type=float, default=1.0, help="points of accuracy")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="only measure what lies at --out")
    parser.add_argument("--out", default=None, help="folder of the artifacts; a temporary one by default")
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data))
    work = Path(arguments.out or tempfile.mkdtemp(prefix="planish-bench-"))
    made = {name: work / f"{name}.planish" for name in (*_WAYS, "one after the other")}
    first = work / "pruned first.planish"
    if not arguments.measure:
        for name, techniques in _WAYS.items():
            optimized(job, made[name], techniques, 1.0, arguments)
        pruned = optimized(job, first, _WAYS["pruning"], _FIRST, arguments)
        splits = {name: getattr(job, name) for name in ("train", "validation", "test", "calibration")}
        after = planish.Workload(
            model=pruned.module, example_inputs=job.example_inputs, metric=job.metric, name=f"{job.name}-pruned", **splits
        )
        optimized(after, made["one after the other"], _WAYS["int8"], 1 - _FIRST, arguments)
    compare(job, made, work, arguments)
    for name, path in made.items():
        summary, saved = read_summary(path), 1.0
        for step in ([first] if name == "one after the other" else []) + [path]:
            saved /= read_summary(step).ratios["bit_operations"].median
        print(f"{name:20s} {saved:5.1f}x fewer bit operations; {summary.verdict}: {summary.reason}")


def optimized(job: planish.Workload, out: Path, techniques: Sequence[str], share: float, arguments: argparse.Namespace) -> planish.Result:
    """As fast as may be with these techniques, within a share of drop and time."""
    with Console().running() as console:
        return planish.optimize(
            job,
            budget=planish.Budget(drop=share * arguments.drop / 100),
            out=out,
            techniques=techniques,
            time_limit=share * arguments.time_limit,
            threads=arguments.threads,
            seed=arguments.seed,
            overwrite=True,
            accept_nearest=True,
            events=console,
        )


def compare(job: planish.Workload, made: dict[str, Path], work: Path, arguments: argparse.Namespace) -> None:
    """Print latency and accuracy of the original in its quickest runtime and of each artifact, measured side by side."""
    split = job.materialize(work / "data").test
    assert split is not None and split.targets is not None
    graph = capture(job.model_module(), job.example_inputs)
    files = {}
    for target in available_targets("cpu", arguments.threads):
        if target.runtime in ("onnxruntime", "openvino"):
            (work / target.runtime).mkdir(exist_ok=True)
            files[f"fp32 {target.runtime}"] = target, get_runtime(target.runtime).export(graph, work / target.runtime), graph.signature
    for name, path in made.items():
        artifact = open_artifact(path)
        files[name] = artifact.manifest.target, artifact.model_path, artifact.manifest.signature
    probes = {name: Probe.open(target, path, signature) for name, (target, path, signature) in files.items()}
    timings = interleaved(probes, [np.ascontiguousarray(array[:1]) for array in split.inputs], seconds=10.0)
    best = min((name for name in files if name.startswith("fp32")), key=lambda name: timings[name].latency_s.median)
    outputs = {name: outputs_of(probe, split) for name, probe in probes.items()}
    for probe in probes.values():
        probe.close()
    accuracy = get_metric("accuracy")
    print(f"{machine().processor}, {arguments.threads} threads, batch 1, {split.n} test images, {arguments.time_limit:.0f} s each")
    for name, timing in timings.items():
        faster = ratio(timings[best], timing)
        lost = [100 * value for value in paired_interval(accuracy, outputs[best], outputs[name], split.targets)]
        print(
            f"{name:20s} {files[name][0].runtime:12s} {timing.latency_s.median * 1e6:7.0f} µs  {faster.median:5.2f}x ({faster.low:.2f} to "
            f"{faster.high:.2f})  accuracy {accuracy.score(outputs[name], split.targets):.4f}  drop {lost[0]:+.2f} ({lost[1]:+.2f} to {lost[2]:+.2f})"
        )
    for name in [name for name in made if name != "both at once"]:
        faster = ratio(timings[name], timings["both at once"])
        print(f"both at once over {name}: {faster.median:.2f}x ({faster.low:.2f} to {faster.high:.2f})")


if __name__ == "__main__":
    main()
