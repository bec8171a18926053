"""Graph nets on Cora: planish against the fp32 runtimes, interleaved in one run.

python benchmarks/bench_graph.py --data DIR --time-limit 90
python benchmarks/bench_graph.py --data DIR --net gat --latency 0.6x --time-limit 180
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar
import cora
import numpy as np
from bench_resnet import row
from running import optimized

import planish
from planish.artifact import open_artifact
from planish.graph.capture import capture
from planish.measure.latency import interleaved
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.runtimes.contract import get_runtime
from planish.workbench import outputs_of


def main() -> None:
    """Train, optimize, then measure everything side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--net", default="gcn", choices=("gcn", "sage", "gat"))
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--latency", default=None, help="limit for planish, such as 0.4x; as fast as possible without")
    parser.add_argument("--drop", default="1pt")
    parser.add_argument("--time-limit", type=float, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="where the artifact goes; a temporary folder by default")
    arguments = parser.parse_args()

    job = cora.job(arguments.net, arguments.hidden, cifar.data_folder(arguments.data))
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    out = Path(arguments.out) if arguments.out else work / "net.planish"
    result = optimized(job, out, arguments)
    compare(job, result, out, work, arguments.threads)


def compare(job: planish.Workload, result: planish.Result, out: Path, work: Path, threads: int) -> None:
    """Print latency, accuracy and agreement of both nets, the original in every runtime, measured side by side."""
    split = job.materialize(work / "data").test
    assert split is not None and split.targets is not None
    graph = capture(job.model_module(), job.example_inputs)
    artifact = open_artifact(out)
    opened = {"planish": Probe.open(artifact.manifest.target, artifact.model_path, graph.signature)}
    for target in available_targets("cpu", threads):
        if target.runtime in ("onnxruntime", "openvino"):
            (work / target.runtime).mkdir()
            path = get_runtime(target.runtime).export(graph, work / target.runtime)
            for one in target.thread_counts:
                opened[f"fp32 {target.runtime}, {one.threads} threads"] = Probe.open(one, path, graph.signature)
    timings = interleaved(opened, [np.ascontiguousarray(array[:1]) for array in split.inputs], seconds=5.0)
    outputs = {name: outputs_of(probe, split) for name, probe in opened.items()}
    for probe in opened.values():
        probe.close()
    best = min((name for name in opened if name != "planish"), key=lambda name: timings[name].latency_s.median)
    summary = result.summary
    print(f"{machine().processor}, one graph of {split.inputs[0].shape[1]} nodes, verdict: {summary.verdict} ({summary.reason})")
    for name in opened:
        print(row(name, timings, best, outputs, split.targets))
    plan = summary.plan
    if plan is not None:
        print(f"planish runs in {plan.target}; widths {plan.widths}, precisions {plan.precisions}, samples {plan.recovery.samples}")
    print(f"seconds {summary.seconds['total']:.0f}")


if __name__ == "__main__":
    main()
