"""Capture, groups and surgery: seconds and peak memory, each net in a fresh process; how they grow with depth.

python benchmarks/bench_analysis.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import cifar
import minilm
import numpy as np
import torch

from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.modes import set_mode
from planish.plan import Plan
from planish.prune.apply import apply
from planish.prune.levels import width_levels

_NETS = ("resnet20", "resnet56", "bert-6", "bert-12", "bert-24")


def main() -> None:
    """Run every net in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="accepted for symmetry; this benchmark needs none")
    parser.add_argument("--net", choices=_NETS)
    arguments = parser.parse_args()
    if arguments.net:
        print(json.dumps(_measure(arguments.net)))
        return
    print(
        f"{'net':10s} {'nodes':>6s} {'groups':>6s} {'blocks':>6s} {'capture':>9s} {'groups':>8s} {'surgery':>8s} {'total':>8s}  peak memory (model)"
    )
    for name in _NETS:
        found = json.loads(subprocess.run([sys.executable, __file__, "--net", name], check=True, capture_output=True, text=True).stdout)
        seconds = found["capture"], found["analyse"], found["surgery"]
        print(
            f"{name:10s} {found['nodes']:6d} {found['groups']:6d} {found['blocks']:6d} {seconds[0]:7.2f} s {seconds[1]:6.2f} s "
            f"{seconds[2]:6.2f} s {sum(seconds):6.2f} s  {found['peak'] / 2**20:.0f} MiB, {found['before'] / 2**20:.0f} before ({found['weights'] / 2**20:.0f})"
        )


def _measure(name: str) -> dict[str, float]:
    if name.startswith("resnet"):
        model: torch.nn.Module = cifar.ResNet((int(name[6:]) - 2) // 6).eval()
        example: tuple[torch.Tensor, ...] = (torch.randn(1, 3, 32, 32),)
    else:
        model, example = minilm.bert(int(name[5:])), minilm.tokens(128)
    before = _peak()
    marks = [time.perf_counter()]
    graph = capture(model, example)
    set_mode(graph, False)
    marks.append(time.perf_counter())
    analysis = analyse(graph)
    marks.append(time.perf_counter())
    widths = {group.name: levels[len(levels) // 2] for group in analysis.groups.values() if len(levels := width_levels(group, 8)) > 1}
    scores = {key: np.arange(group.units, dtype=np.float64) for key, group in analysis.groups.items()}
    apply(graph, analysis, Plan("onnxruntime:cpu", widths=widths), scores)
    marks.append(time.perf_counter())
    capture_s, analyse_s, surgery_s = np.diff(marks).tolist()
    return {
        "nodes": len(graph.module.graph.nodes),
        "groups": len(analysis.groups),
        "blocks": len(analysis.blocks),
        "capture": capture_s,
        "analyse": analyse_s,
        "surgery": surgery_s,
        "peak": _peak(),
        "before": before,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
