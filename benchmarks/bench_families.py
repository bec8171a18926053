"""Every family of nets of the tests, and every real net that is importable, under one contract: a row each.

python benchmarks/bench_families.py
PLANISH_DATA=DIR python benchmarks/bench_families.py --only silero minilm densenet121

Surgery: the pruned net (40 % of every group) against the original with the same elements absent. Export: ONNX Runtime against the module at
batch 1, 3 and 17, before and after pruning, the worst of both. Both are the largest difference relative to the largest value. Seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.surgery import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import families
import nets
import parity
import real_nets


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with Silero's weights; PLANISH_DATA by default")
    parser.add_argument("--only", nargs="+", default=[*families.FAMILIES, *real_nets.PACKAGES], metavar="NET")
    arguments = parser.parse_args()
    if arguments.data:
        os.environ["PLANISH_DATA"] = arguments.data

    head = f"{'architecture':22s} {'parameters':>10s} {'groups':>6s} {'units':>6s} {'surgery':>9s} "
    print(head + "".join(f"{f'export {batch}':>10s}" for batch in parity.BATCHES) + f" {'capture':>9s} {'analysis':>9s}")
    for name in arguments.only:
        if name in families.FAMILIES:
            model, example = families.build(name)
            print(_row(name, model, functools.partial(nets.resized, example), families.STATE.get(name, {})), flush=True)
        elif why := real_nets.missing(name):
            print(f"{name:22s} left out: {why}")
        else:
            net = real_nets.build(name)
            print(_row(name, net.module, net.inputs, net.state), flush=True)


def _row(name: str, model: torch.nn.Module, inputs: Callable[[int], Any], state: Mapping[str, str]) -> str:
    marks = [time.process_time()]
    graph = capture(model, inputs(2), state)
    marks.append(time.process_time())
    analysis = analyse(graph)
    marks.append(time.process_time())
    removed = parity.at_random(analysis)
    error, _ = parity.surgery(graph, analysis, removed, graph.signature.flatten(inputs(parity.batches(graph)[:2][-1])))
    with tempfile.TemporaryDirectory(prefix="planish-bench-") as folder:
        path = Path(folder) / "net.onnx"
        both = [parity.exported(g, inputs, path) for g in (graph, prune(graph, analysis, removed).graph)]
    worst = "".join(f"{max(errors[batch] for errors in both):10.1e}" for batch in both[0])
    if len(both[0]) == 1:
        worst = f"{f'{worst.strip()}, at {next(iter(both[0]))} alone':>30s}"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    units = sum(group.units for group in analysis.groups.values())
    return (
        f"{name:22s} {parameters:10,d} {len(analysis.groups):6d} {units:6d} {error:9.1e} {worst} "
        f"{marks[1] - marks[0]:7.1f} s {marks[2] - marks[1]:7.1f} s"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
