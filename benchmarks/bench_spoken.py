"""Spoken digits by a small LSTM and a small GRU: what each scheme costs and keeps in each runtime, and which one planish chooses.

python benchmarks/bench_spoken.py --data DIR
python benchmarks/bench_spoken.py --data DIR --cells lstm --hidden 256 --latency 0.6x

Every operator that has a form in a scheme takes it. Accuracy is that of the test takes, of which each goes through alone, as latency is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import cifar
import numpy as np
import spoken
import torch
from numpy.typing import NDArray
from running import optimized

import planish
from planish import registry
from planish.artifact import open_artifact
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.plan import DEFAULT_SCHEMES
from planish.quantize.apply import quantize
from planish.quantize.subjects import everywhere
from planish.report.file import read_summary
from planish.runtimes.contract import get_runtime
from planish.target import Target


def main() -> None:
    """For each cell: train, measure every scheme everywhere, let planish choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--cells", nargs="+", choices=("lstm", "gru"), default=["lstm", "gru"])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--latency", default=None, help="limit for planish, such as 0.6x; as fast as possible without")
    parser.add_argument("--drop", default="1pt")
    parser.add_argument("--time-limit", type=float, default=240.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring side by side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    heard = spoken.recordings(cifar.data_folder(arguments.data))
    print(f"{machine().processor}, {machine().isa}, {arguments.threads} threads, batch 1, {spoken.STEPS} steps of {spoken.BANDS} bands")
    for cell in arguments.cells:
        _bench(cell, heard, arguments)


def _bench(cell: str, heard: dict[str, spoken.Heard], arguments: argparse.Namespace) -> None:
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    net = spoken.trained(cell, arguments.hidden, heard["train"], arguments.epochs)
    with torch.inference_mode():
        wanted = net(heard["test"].features).argmax(1).numpy()
    graph = capture(net, (heard["test"].features[:1],))
    files = _exported(graph, heard["train"].features[::5].numpy(), arguments.threads, work)
    name = f"{cell} of {arguments.hidden} cells, two layers"
    print(f"{name}: accuracy in torch {float((wanted == heard['test'].digits.numpy()).mean()):.4f}")

    job = planish.Workload(
        model=net,
        example_inputs=(heard["test"].features[:1],),
        **{split: [((found.features,), found.digits)] for split, found in heard.items()},
        name=f"spoken-{cell}",
    )
    out = work / "net.planish"
    optimized(job, out, arguments, techniques=("quantize",))
    artifact, summary = open_artifact(out), read_summary(out)
    files["planish"] = (artifact.manifest.target, artifact.model_path)
    _compare(files, graph, heard["test"], wanted, arguments.seconds)
    print(f"planish chose {artifact.manifest.target.name}: {dict(artifact.plan.precisions)}; {summary.verdict} ({summary.reason})")
    figures = ", ".join(f"{name} {found.median:.2f}x ({found.low:.2f} to {found.high:.2f})" for name, found in summary.ratios.items())
    print(f"  {figures}; {summary.seconds['total']:.0f} s")


def _exported(graph: Graph, features: NDArray[np.float32], threads: int, work: Path) -> dict[str, tuple[Target, Path]]:
    """The net in fp32 and in every scheme, for every runtime that executes it."""
    analysis = analyse(graph)
    split = Split([features], None, len(features))
    files = {}
    for target in available_targets("cpu", threads):
        if target.runtime.startswith("torch"):
            continue
        runtime = get_runtime(target.runtime)
        for scheme in ("fp32", *(name for name in DEFAULT_SCHEMES if name in runtime.schemes)):
            known = registry.get("scheme", scheme) if scheme != "fp32" else None
            whole = everywhere(graph, analysis, known) if known is not None else {}
            done = quantize(graph, analysis, whole, runtime, target, split)
            kinds = Counter(analysis.operators[name].kind for name in done.operators)
            if known is not None and not kinds:
                continue
            folder = work / f"{target.runtime}-{scheme}"
            folder.mkdir()
            label = f"{scheme} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else scheme
            files[f"{target.runtime} {label}"] = (target, runtime.export(done.graph, folder))
    return files


def _compare(files: dict[str, tuple[Target, Path]], graph: Graph, test: spoken.Heard, wanted: NDArray[np.int64], seconds: float) -> None:
    """Print latency against the quickest fp32, accuracy, agreement with the original in torch, and size."""
    probes = {name: Probe.open(target, path, graph.signature) for name, (target, path) in files.items()}
    timings = interleaved(probes, [tensor.numpy() for tensor in graph.example], seconds=seconds)
    best = min((name for name in files if name.endswith("fp32")), key=lambda name: timings[name].latency_s.median)
    for name, probe in probes.items():
        found = np.concatenate([probe.outputs([row[None]])[0].argmax(1) for row in test.features.numpy()])
        faster, latency = ratio(timings[best], timings[name]), timings[name].latency_s
        sure = "" if latency.trustworthy else ", not trustworthy"
        print(
            f"  {name:44s} {latency.median * 1e6:7.0f} µs ({latency.low * 1e6:.0f} to {latency.high * 1e6:.0f}{sure})  "
            f"{faster.median:5.2f}x ({faster.low:.2f} to {faster.high:.2f})  accuracy {np.mean(found == test.digits.numpy()):.4f}  "
            f"agreement {np.mean(found == wanted):.4f}  {files[name][1].stat().st_size / 1000:.0f} kB"
        )
        probe.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
