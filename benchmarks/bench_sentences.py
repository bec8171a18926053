"""MiniLM-L6 without labels: planish against the best fp32 runtime, interleaved, with the Spearman correlation that each keeps.

python benchmarks/bench_sentences.py --data DIR --length 32 --latency 0.5x --time-limit 1500
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import cifar
import minilm
import numpy as np
import sentences
import torch
from running import optimized

from planish.artifact import open_artifact
from planish.graph.capture import capture
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.metrics import get_metric, paired_interval
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.workbench import predictor


def main() -> None:
    """Optimize, then measure everything side by side and judge it on sentences that nobody learnt from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--length", type=int, default=32, help="tokens of a call")
    parser.add_argument("--latency", default=None, help="limit for planish, such as 0.5x; as fast as possible without")
    parser.add_argument("--drop", default="1pt")
    parser.add_argument("--time-limit", type=float, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--techniques", default="prune,distill")
    parser.add_argument("--measure", action="store_true", help="only measure what lies at --out")
    parser.add_argument("--out", default=None, help="where the artifact goes; a temporary folder by default")
    arguments = parser.parse_args()

    folder = cifar.data_folder(arguments.data)
    job = sentences.job(folder, arguments.length)
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    out = Path(arguments.out) if arguments.out else work / "net.planish"
    if not arguments.measure:
        optimized(job, out, arguments, techniques=tuple(arguments.techniques.split(",")))
    artifact = open_artifact(out)
    summary = read_summary(out)
    print(
        f"{machine().processor}, at most {arguments.threads} threads, batch 1, {arguments.length} tokens, verdict: {summary.verdict} ({summary.reason})"
    )
    print(
        f"widths {artifact.plan.widths}, without {', '.join(artifact.plan.blocks) or 'no block'}, {len(artifact.plan.precisions)} operators in int8"
    )
    graph = capture(job.model_module(), job.example_inputs)
    files = {}
    for target in available_targets("cpu", arguments.threads):
        if target.runtime in ("onnxruntime", "openvino"):
            (work / target.runtime).mkdir()
            files[f"fp32 {target.runtime}"] = (target, get_runtime(target.runtime).export(graph, work / target.runtime))
    files["planish"] = (artifact.manifest.target, artifact.model_path)
    opened = {
        (name, one.threads): Probe.open(one, path, graph.signature)
        for name, (target, path) in files.items()
        for one in ([target] if name == "planish" else target.thread_counts)
    }
    example = [np.ascontiguousarray(tensor.numpy()) for tensor in minilm.tokens(arguments.length)]
    everything = interleaved(opened, example, seconds=5.0)
    chosen = {name: min((key for key in opened if key[0] == name), key=lambda key: everything[key].latency_s.median) for name in files}
    best = min((name for name in files if name != "planish"), key=lambda name: everything[chosen[name]].latency_s.median)
    tokens, spearman = sentences.tokenizer(), get_metric("spearman")
    for name, key in chosen.items():
        timing = everything[key]
        faster = ratio(everything[chosen[best]], timing)
        print(
            f"{name:18s} {timing.latency_s.median * 1e6:7.0f} µs  {faster.median:5.2f}x ({faster.low:.2f} to {faster.high:.2f}), threads {key[1]}"
        )
    for title, sets in sentences.tested_on(folder).items():
        lost = []
        for pairs in sets:
            before, after = (sentences.similarity(predictor(opened[chosen[name]]), tokens, pairs) for name in (best, "planish"))
            figures = [spearman.score(sides, pairs[2]) for sides in (before, after)]
            interval = paired_interval(spearman, before, after, pairs[2])
            lost.append(interval)
            print(
                f"{title}, {len(pairs[2])} pairs: Spearman {figures[0]:.4f} -> {figures[1]:.4f}, lost "
                f"{100 * interval[0]:+.2f} ({100 * interval[1]:+.2f} to {100 * interval[2]:+.2f}) points"
            )
        print(f"{title}: mean loss {100 * float(np.mean([value[0] for value in lost])):+.2f} points")
    for probe in opened.values():
        probe.close()
    print(f"seconds {summary.seconds['total']:.0f}; samples of recovery {artifact.plan.recovery.samples}")
    print(json.dumps(summary.seconds))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
