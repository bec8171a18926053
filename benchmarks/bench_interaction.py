"""Whether the losses of pruning and of precision add up: each alone and both together, on a CIFAR ResNet, without training.

python benchmarks/bench_interaction.py --data DIR --depth 20 56

Loss is the mean Kullback-Leibler divergence from the original's outputs, on the calibration images (where a search sees it) and on test
images (where it counts). "together" is that of one net with both, as a share of the sum: 1 is additive, less a gift, more a debt.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cifar
import numpy as np
import torch
from bench_pruning import cheapest, outputs

from planish import registry
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.divergence import divergence
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.measure.machine import facts
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.contract import Material
from planish.prune.options import sensitivities
from planish.prune.order import orders
from planish.quantize.apply import quantize
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import get_runtime
from planish.target import Target

SCHEMES = ("int8", "w4a8", "w4a4")


def main() -> None:
    """Print a line for each net, share of its MACs and scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, nargs="+", default=[20], choices=(20, 56))
    parser.add_argument("--fewer", type=float, nargs="+", default=[1.2, 1.5, 2.0], help="how many times fewer MACs")
    parser.add_argument("--runtime", default="onnxruntime")
    arguments = parser.parse_args()
    for depth in arguments.depth:
        one(depth, arguments)


def one(depth: int, arguments: argparse.Namespace) -> None:
    """The lines of one net."""
    job = cifar.job(depth, cifar.data_folder(arguments.data))
    data = job.materialize(Path(tempfile.mkdtemp(prefix="planish-bench-")) / "data")
    assert data.test is not None
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    runtime, target = get_runtime(arguments.runtime), Target(arguments.runtime, threads=1, facts=facts())
    order = orders("obs", graph, analysis, Material(data.calibration, None, None), 0)
    options = [option for option in sensitivities(graph, analysis, order, data.calibration, 4) if option.technique == "width"]
    nets: dict[str, Graph] = {"": graph}
    for fewer in arguments.fewer:
        pruned = apply(graph, analysis, cheapest(analysis, options, "obs", 1 / fewer), order)
        compensate(pruned.graph, graph, pruned.kept, data.calibration, seed=0)
        nets[f"MACs / {macs(analysis) / macs(analyse(pruned.graph)):.2f}"] = pruned.graph
    splits = {"calibration": data.calibration, "test": data.test}
    references = {split: outputs(graph, on) for split, on in splits.items()}

    def losses(net: Graph) -> dict[str, float]:
        return {split: distance(net, on, references[split]) for split, on in splits.items()}

    alone: dict[str, dict[str, float]] = {}
    for scheme in SCHEMES:
        for name, net in nets.items():
            found = analyse(net)
            done = quantize(net, found, everywhere(net, found, registry.get("scheme", scheme)), runtime, target, data.calibration).graph
            together = losses(done)
            if not name:
                alone[scheme] = together
                continue
            if name not in alone:
                alone[name] = losses(net)
            shown = ", ".join(
                f"{split} {alone[name][split]:.4f} and {alone[scheme][split]:.4f}, together {together[split]:.4f} = "
                f"{together[split] / (alone[name][split] + alone[scheme][split]):.2f} of the sum"
                for split in splits
            )
            print(f"ResNet-{depth} {name} with {scheme}: {shown}", flush=True)


def distance(net: Graph, split: Split, reference: list[np.ndarray]) -> float:
    """The mean divergence of a net's outputs from the original's on a split."""
    before, after = (torch.from_numpy(values[0]) for values in (reference, outputs(net, split)))
    return float(divergence([before]).per_sample([after], [before]).mean())


if __name__ == "__main__":
    main()
