"""Silero's voice detector: speed-up per chunk at 99 % frame agreement or more, on spoken digits in noise, states carried along.

python benchmarks/bench_silero.py --data DIR --latency 0.73x --time-limit 420
python benchmarks/bench_silero.py --data DIR --techniques quantize
python benchmarks/bench_silero.py --data DIR --bounds-only

What the machine allows comes first: the roofline, an empty net's call, and the sum over kernels. Then the original in every runtime, and
planish's net, interleaved; the agreement is that of its artifact with the original in torch on sequences that nothing else has seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import cifar
import numpy as np
import silero
import torch
from running import optimized
from torch import nn

import planish
from planish.artifact import open_artifact
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.measure.latency import interleaved, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.measure.roofline import peaks, roofline_s
from planish.measure.tables import Table
from planish.plan import Plan
from planish.runtimes.contract import get_runtime
from planish.runtimes.to_onnx import to_onnx
from planish.search.costs import Costs
from planish.search.space import Space
from planish.target import Target

_LENGTH = 250
"""Chunks of a sequence: 8 s."""
_DIFFERENT_SEEDS = {"train": 1, "validation": 2, "test": 3}


class Empty(nn.Module):
    """The same interface and next to no arithmetic: what a call costs before a net costs anything."""

    def forward(self, audio: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"probability": audio[:, :1] + 1, "h_next": h + 1, "c_next": c + 1}


def main() -> None:
    """Print the bounds, optimize, then measure everything side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--latency", default="0.73x", help="limit for planish, relative to its own export of the original")
    parser.add_argument("--drop", type=float, default=0.01, help="of the share of chunks that are decided as the original does")
    parser.add_argument("--techniques", nargs="+", default=["prune", "distill"])
    parser.add_argument("--time-limit", type=float, default=420.0)
    parser.add_argument("--sequences", type=int, default=400, help="of 8 s to train on; 24 each to search and to judge with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bounds-only", action="store_true")
    parser.add_argument("--out", default=None, help="where the artifact goes; a temporary folder by default")
    arguments = parser.parse_args()

    folder, work = cifar.data_folder(arguments.data), Path(tempfile.mkdtemp(prefix="planish-bench-"))
    net = silero.silero(folder)
    spoken = silero.recordings(folder)
    counts = {"train": arguments.sequences, "validation": 24, "test": 24}
    heard = {
        name: silero.chunks(silero.sequences(spoken[name == "test"], counts[name], _LENGTH, seed))
        for name, seed in _DIFFERENT_SEEDS.items()
    }
    job = silero.job(net, {name: heard[name] for name in ("train", "validation")})
    graph = capture(net, job.example_inputs, silero.STATE)
    empty = capture(Empty(), job.example_inputs, silero.STATE)
    targets = [t for t in available_targets("cpu", arguments.threads) if t.runtime != "torch-compile"]
    print(f"{machine().processor}, {arguments.threads} threads, batch 1")
    bounds(graph, targets)
    if arguments.bounds_only:
        compare(net, graph, empty, targets, None, heard["test"], work)
        return
    out = Path(arguments.out) if arguments.out else work / "net.planish"
    result = optimized(job, out, arguments, target=arguments.target, techniques=tuple(arguments.techniques))
    summary = result.summary
    print(f"verdict: {summary.verdict} ({summary.reason})")
    print(f"latency {summary.ratios['latency']}, MACs {summary.ratios['macs']}, drop by evaluate {summary.drop}")
    print(json.dumps({name: list(units) for name, units in (summary.groups or {}).items()}))
    compare(net, graph, empty, targets, out, heard["test"], work)
    print(json.dumps(summary.seconds))


def bounds(graph: Graph, targets: list[Target]) -> None:
    """Print what arithmetic and memory allow, and what the kernels of each runtime add up to."""
    analysis = analyse(graph)
    count = macs(analysis)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in graph.module.parameters())
    best = peaks(targets[0].threads)
    bound = roofline_s(targets[0], count, weights, best=best)
    assert bound is not None
    print(
        f"roofline: {count:,d} MACs at {best.macs_per_s / 1e9:.0f} G/s are {count / best.macs_per_s * 1e6:.1f} µs; "
        f"{weights / 1e6:.2f} MB of weights from cache make it {bound * 1e6:.1f} µs"
    )
    for target in targets:
        if target.runtime.startswith("torch"):
            continue
        space = Space(analysis, [], Plan(target.name))
        costs = Costs(space, Table(target, is_sized=True).seconds)
        seconds = float(np.sum(costs.parts(space.identity)))
        print(f"  sum over {len(costs.kernels)} kernels in {target.name}: {seconds * 1e6:.1f} µs ({len(costs.unmeasured)} unmeasured)")


def compare(net: nn.Module, graph: Graph, empty: Graph, targets: list[Target], out: Path | None, heard: silero.Audio, work: Path) -> None:
    """Print the latency of the original everywhere, of an empty net, and of planish's; and how planish's decides."""
    files, of = {}, {"original": graph, "empty": empty}
    for name, one in of.items():
        for target in targets:
            place = work / f"{name}-{target.runtime}"
            place.mkdir()
            files[f"{name} {target.name}"] = (target, get_runtime(target.runtime).export(one, place))
    # What others would run: without what planish does to convolutions for this runtime.
    plain = work / "plain.onnx"
    to_onnx(graph, plain)
    files["plain onnxruntime:cpu"] = (next(t for t in targets if t.runtime == "onnxruntime"), plain)
    if out is not None:
        artifact = open_artifact(out)
        files["planish"] = (artifact.manifest.target, artifact.model_path)
    signatures = {name: empty.signature if name.startswith("empty") else graph.signature for name in files}
    probes = {name: Probe.open(target, path, signatures[name]) for name, (target, path) in files.items()}
    timings = interleaved(probes, [tensor.numpy() for tensor in graph.example], seconds=3.0)
    best = min((n for n in files if n.startswith("original")), key=lambda n: timings[n].latency_s.median)
    for name in files:
        faster, latency = ratio(timings[best], timings[name]), timings[name].latency_s
        sure = "" if latency.trustworthy else ", not trustworthy"
        print(
            f"{name:28s} {latency.median * 1e6:6.1f} µs ({latency.low * 1e6:.1f} to {latency.high * 1e6:.1f}{sure})  "
            f"{faster.median:5.2f}x ({faster.low:.2f} to {faster.high:.2f})"
        )
    for probe in probes.values():
        probe.close()
    if out is not None:
        deployed = planish.load(out, threads=1)
        wanted, _, _ = silero.stepped(silero.in_torch(net), heard)
        found, _, _ = silero.stepped(deployed, heard)
        each = ((found > 0.5) == (wanted > 0.5)).mean(1)
        print(
            f"frame agreement on {wanted.size} chunks that were not seen: {silero.agreement(found, wanted):.4f} (worst sequence "
            f"{each.min():.4f}); speech by the original {np.mean(wanted > 0.5):.2f}; probability differs by {np.abs(found - wanted).mean():.4f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
