"""Predicted against measured latency: random plans of ResNet-20 and MiniLM-L6, exported to every runtime and timed there.

python benchmarks/bench_latency.py --data DIR --net resnet20 --plans 24
python benchmarks/bench_latency.py --net minilm --length 32

A prediction is the sum of the kernel tables after the affine correction that the search learns from its trials. Here the correction
that predicts a plan is fitted on all *other* plans. "raw" is the same without any correction.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import cifar
import minilm
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.modes import set_mode
from planish.measure.latency import interleaved, middle, ratio
from planish.measure.machine import available_targets, machine
from planish.measure.probe import Probe
from planish.measure.tables import Table
from planish.measurement import Estimate
from planish.plan import Option, Plan
from planish.prune.apply import apply
from planish.prune.levels import width_levels
from planish.quantize.apply import quantize
from planish.quantize.schemes.int8 import INT8
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import get_runtime
from planish.search.costs import Costs, calibrated
from planish.search.space import Space
from planish.target import Target
from planish.workbench import width_step

_ROUND_S, _VISITS, _PAUSE_S = 0.5, 3, 2.0
Row = tuple[NDArray[np.float64], float, int]
"""Predicted seconds by precision, measured seconds, operators in int8."""


def main() -> None:
    """Measure one net in every deployable runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default (resnet20)")
    parser.add_argument("--net", choices=("resnet20", "minilm"), default="resnet20")
    parser.add_argument("--length", type=int, default=32, help="tokens of a call (minilm)")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="cpu", help="cpu, or one runtime such as openvino:cpu")
    arguments = parser.parse_args()

    graph, split = _net(arguments)
    runtime, _, _ = arguments.target.rpartition(":")
    for target in available_targets("cpu", arguments.threads):
        if target.runtime.startswith("torch") or (runtime and target.runtime != runtime):
            continue
        _bench(arguments.net, graph, split, target, arguments.plans)


def _net(arguments: argparse.Namespace) -> tuple[Graph, Split]:
    if arguments.net == "resnet20":
        folder = cifar.data_folder(arguments.data)
        x, _ = cifar.images(folder / "cifar10_test.tar.xz")
        graph = capture(cifar.resnet(20, folder), (x[:1],))
        split = Split([x[:256].numpy()], None, 256)
    else:
        net, origin = minilm.minilm()
        print(f"MiniLM-L6: {origin}")
        graph = capture(net, minilm.tokens(arguments.length))
        split = Split([array.numpy() for array in minilm.tokens(arguments.length, 32)], None, 32)
    set_mode(graph, False)
    return graph, split


def _bench(name: str, graph: Graph, split: Split, target: Target, count: int) -> None:
    analysis = analyse(graph)
    runtime = get_runtime(target.runtime)
    options = [
        Option("width", group.name, width, 0.0)
        for group in analysis.groups.values()
        if not group.pinned
        for width in width_levels(group, width_step(target))[1:]
    ]
    options += [Option("block", block, 1, 0.0) for block in analysis.blocks]
    whole = everywhere(graph, analysis, INT8)
    if "int8" in runtime.schemes:
        options += [Option("precision", key, "int8", 0.0) for key in whole]
    space = Space(analysis, options, Plan(target.name))
    table = Table(target)
    began = time.monotonic()
    costs = Costs(space, table.seconds)
    tables_s = time.monotonic() - began
    # The same scores for everyone: what goes does not matter to latency.
    scores = {key: np.arange(group.units, dtype=np.float64) for key, group in analysis.groups.items()}
    work = Path(tempfile.mkdtemp(prefix="planish-latency-"))
    example = [np.ascontiguousarray(tensor.numpy()) for tensor in graph.example]
    rows: list[Row] = []
    with Probe.open(target, _exported(runtime, graph, work / "original"), graph.signature) as original:
        base = interleaved({"original": original}, example, seconds=_ROUND_S)["original"].latency_s.median
        rows.append((costs.parts(space.identity), base, 0))
        for number, plan in enumerate(_plans(space, whole, count), 1):
            smaller = apply(graph, analysis, plan, scores).graph
            wanted = dict(plan.precisions)
            if wanted:
                smaller = quantize(smaller, analyse(smaller), wanted, runtime, target, split).graph
            with Probe.open(target, _exported(runtime, smaller, work / str(number)), smaller.signature) as probe:
                seconds = _ratio({"plan": probe, "original": original}, example).median * base
            rows.append((costs.parts(space.assignment(plan)), seconds, len(wanted)))
    _print(name, target, rows, tables_s, len(costs.kernels))


def _ratio(probes: dict[str, Probe], example: list[Any]) -> Estimate:
    """Plan ÷ original: measured up to three times, a pause between, while it is not trustworthy."""
    visits: list[Estimate] = []
    while len(visits) < _VISITS and not any(visit.trustworthy for visit in visits):
        if visits:
            time.sleep(_PAUSE_S)
        timings = interleaved(probes, example, seconds=_ROUND_S)
        visits.append(ratio(timings["plan"], timings["original"]))
    return middle(visits)


def _exported(runtime: Any, graph: Graph, folder: Path) -> Path:
    folder.mkdir(parents=True)
    return cast(Path, runtime.export(graph, folder))


def _plans(space: Space, whole: dict[str, str], count: int) -> list[Plan]:
    """Half of them in floating point, half in int8 (all operators, or a random part), from barely to drastically smaller."""
    draw = random.Random(0)
    out: list[Plan] = []
    offered = {v.subject for v in space.variables if v.technique == "precision"}
    for number in range(count):
        smaller = (number // 2) / max(1, count // 2 - 1)
        widths, blocks = {}, []
        for variable in space.variables:
            if variable.technique == "width" and draw.random() < 0.3 + 0.6 * smaller:
                furthest = max(1, round(smaller * (len(variable.values) - 1)))
                width = variable.values[draw.randint(1, furthest)]
                assert isinstance(width, int)
                widths[variable.subject] = width
            if variable.technique == "block" and draw.random() < 0.5 * smaller:
                blocks.append(variable.subject)
        share = draw.choice((0.5, 1.0))
        precisions = {key: "int8" for key in whole if key in offered and draw.random() < share} if number % 2 and offered else {}
        plan = space.template.replace(widths=widths, blocks=tuple(blocks), precisions=precisions)
        out.append(space.plan(space.assignment(plan)))
    return out


def _print(name: str, target: Target, rows: list[Row], tables_s: float, kernels: int) -> None:
    parts, measured = np.stack([row[0] for row in rows]), np.array([row[1] for row in rows])
    predicted, corrected = parts.sum(1), np.empty_like(measured)
    for i in range(len(rows)):
        rest = np.arange(len(rows)) != i
        factors, fit = calibrated(parts[rest], measured[rest])
        corrected[i] = fit(float(parts[i] @ factors))
    errors = corrected / measured - 1
    print(
        f"{name} in {target.name}, {target.threads} threads, {machine().processor}: {len(rows) - 1} plans from "
        f"{measured.min() / measured[0]:.2f}x to {measured.max() / measured[0]:.2f}x; {kernels} kernels in {tables_s:.0f} s"
    )
    print(
        f"  within 10 %: {np.mean(np.abs(errors) <= 0.1):.0%}  mean error {np.abs(errors).mean():.1%}  worst {np.abs(errors).max():.1%}  "
        f"Spearman {spearmanr(predicted, measured)[0]:.3f}  raw within 10 %: {np.mean(np.abs(predicted / measured - 1) <= 0.1):.0%}"
    )
    for kind, chosen in (("fp32", [row[2] == 0 for row in rows]), ("int8", [row[2] > 0 for row in rows])):
        if any(chosen):
            part = np.abs(errors[np.array(chosen)])
            print(f"  {kind}: {len(part)} plans, within 10 %: {np.mean(part <= 0.1):.0%}, mean error {part.mean():.1%}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
