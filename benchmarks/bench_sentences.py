"""MiniLM-L6 without labels: planish against the best fp32 runtime and today's int8, interleaved, with the Spearman correlation that each keeps.

python benchmarks/bench_sentences.py --data DIR --length 32 --latency 0.5x --time-limit 1500
python benchmarks/bench_sentences.py --data DIR --length 32 --techniques prune,quantize,distill --time-limit 1500 --peers
python benchmarks/bench_sentences.py --data DIR --length 32 --techniques quantize --time-limit 300 --peers --schemes
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cifar
import minilm
import numpy as np
import peers
import sentences
import torch
from numpy.typing import NDArray
from running import optimized

from planish import registry
from planish.artifact import open_artifact
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.metrics import get_metric, paired_interval
from planish.plan import DEFAULT_SCHEMES
from planish.quantize.apply import quantize
from planish.quantize.subjects import everywhere
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.target import Target
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
    parser.add_argument("--peers", action="store_true", help="also NNCF's int8 and ONNX Runtime's dynamic int8")
    parser.add_argument("--schemes", action="store_true", help="also every scheme of planish everywhere, in each runtime")
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
        f"widths {artifact.plan.widths}, without {', '.join(artifact.plan.blocks) or 'no block'}, "
        f"precisions {dict(Counter(artifact.plan.precisions.values()))}, floats in {artifact.plan.floats}"
    )
    graph = capture(job.model_module(), job.example_inputs)
    files = {}
    for target in available_targets("cpu", arguments.threads):
        if target.runtime in ("onnxruntime", "openvino"):
            (work / target.runtime).mkdir()
            files[f"fp32 {target.runtime}"] = (target, get_runtime(target.runtime).export(graph, work / target.runtime))
    if arguments.peers:
        files |= _peers(files, folder, work)
    if arguments.schemes:
        files |= _schemes(graph, [target for target, _ in files.values()], folder, work)
    files["planish"] = (artifact.manifest.target, artifact.model_path)
    opened = {
        (name, one.threads): Probe.open(one, path, graph.signature)
        for name, (target, path) in files.items()
        for one in ([target] if name == "planish" else target.thread_counts)
    }
    example = [np.ascontiguousarray(tensor.numpy()) for tensor in minilm.tokens(arguments.length)]
    everything = interleaved(opened, example, seconds=5.0)
    chosen = {name: min((key for key in opened if key[0] == name), key=lambda key: everything[key].latency_s.median) for name in files}
    best = min((name for name in files if name.startswith("fp32")), key=lambda name: everything[chosen[name]].latency_s.median)
    tokens, spearman = sentences.tokenizer(), get_metric("spearman")
    for name, key in chosen.items():
        timing = everything[key]
        faster = ratio(everything[chosen[best]], timing)
        print(
            f"{name:24s} {timing.latency_s.median * 1e6:7.0f} µs  {faster.median:5.2f}x ({faster.low:.2f} to {faster.high:.2f}), threads {key[1]}"
        )
    for title, sets in sentences.tested_on(folder).items():
        before = [sentences.similarity(predictor(opened[chosen[best]]), tokens, pairs) for pairs in sets]
        for name in files:
            if name.startswith("fp32"):
                continue
            lost = []
            for pairs, kept in zip(sets, before, strict=True):
                after = sentences.similarity(predictor(opened[chosen[name]]), tokens, pairs)
                figures = [spearman.score(sides, pairs[2]) for sides in (kept, after)]
                interval = paired_interval(spearman, kept, after, pairs[2])
                lost.append(interval)
                print(
                    f"{name}: {title}, {len(pairs[2])} pairs: Spearman {figures[0]:.4f} -> {figures[1]:.4f}, lost "
                    f"{100 * interval[0]:+.2f} ({100 * interval[1]:+.2f} to {100 * interval[2]:+.2f}) points"
                )
            print(f"{name}: {title}: mean loss {100 * float(np.mean([value[0] for value in lost])):+.2f} points")
    for probe in opened.values():
        probe.close()
    print(f"seconds {summary.seconds['total']:.0f}; samples of recovery {artifact.plan.recovery.samples}")
    print(json.dumps(summary.seconds))


Files = dict[str, tuple[Target, Path]]


def _calibrating(folder: Path) -> dict[str, NDArray[np.int64]]:
    """300 sentences without labels, as tokens."""
    found = sentences.tokenizer()(sentences.text(folder)[:300])
    return {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}


def _peers(files: Files, folder: Path, work: Path) -> Files:
    """What today's tools make of the fp32 files: each in its own runtime."""
    columns = _calibrating(folder)
    samples = [{name: values[i : i + 1] for name, values in columns.items()} for i in range(300)]
    found = {}
    if "fp32 openvino" in files:
        target, model = files["fp32 openvino"]
        found["NNCF int8"] = (target, peers.nncf_transformer(model, samples, work / "nncf.xml"))
    target, model = files["fp32 onnxruntime"]
    found["ORT dynamic"] = (target, peers.onnxruntime_dynamic(model, work / "dynamic.onnx", target.weight_range < 127))
    return found


def _schemes(graph: Graph, targets: Sequence[Target], folder: Path, work: Path) -> Files:
    """Every scheme for all operators that have a form in it, in every runtime that executes it."""
    analysis, columns = analyse(graph), _calibrating(folder)
    split = Split([columns[spec.name] for spec in graph.signature.inputs], None, 300)
    found = {}
    for target in {target.runtime: target for target in targets}.values():
        runtime = get_runtime(target.runtime)
        for name in (name for name in DEFAULT_SCHEMES if name in runtime.schemes):
            if name == "bf16" and not target.facts.has_bf16:
                continue
            done = quantize(graph, analysis, everywhere(graph, analysis, registry.get("scheme", name)), runtime, target, split).graph
            done.floats = "bf16" if name == "bf16" else "fp32"
            (work / f"{target.runtime}-{name}").mkdir()
            found[f"{name} {target.runtime}"] = (target, runtime.export(done, work / f"{target.runtime}-{name}"))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
