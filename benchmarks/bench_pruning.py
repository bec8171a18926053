"""Pruning criteria on a CIFAR ResNet: every saliency and every clustering at fewer MACs, one search and one recovery for all.

python benchmarks/bench_pruning.py --data DIR --depth 20 --fewer 1.5 2
python benchmarks/bench_pruning.py --data DIR --depth 20 --fewer 2 --only taylor random kmeans --seeds 3
python benchmarks/bench_pruning.py --data DIR --depth 20 --fewer 1.5 2 --option B --only obs torch-pruning:l2

Each criterion orders the units of every group; the search solves for the widths (no blocks go) with the least sum of losses measured under
that order; the net is cut, compensated and trained for the same images in the same order. Drops are in points on the test images, with the
paired 95 % interval, against the original tuned on as many images. A criterion `torch-pruning:NAME` is Torch-Pruning's own pruner, over the
whole net, with the same recovery and without compensation, which it has not; it needs shortcuts of option B (it corrupts option A).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cifar
import numpy as np
import peers
import torch

import planish
from planish import registry
from planish.data import Data, Split
from planish.distill.losses import label_loss
from planish.distill.recover import recover
from planish.distill.teacher import Teacher
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.macs import macs
from planish.metrics import get_metric, paired_interval
from planish.plan import Option, Plan, Recovery
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.contract import Material
from planish.prune.options import sensitivities
from planish.prune.order import orders
from planish.search.contract import Limits
from planish.search.costs import Costs
from planish.search.solver import Solver
from planish.search.space import Space

_MULTIPLE = 4


def main() -> None:
    """Print a line for every criterion, share of MACs and seed."""
    clusterings = [f"{name}:{of}" for name in registry.names("redundancy") for of in ("weights", "activations")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the data; PLANISH_DATA by default")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--fewer", type=float, nargs="+", default=[1.5, 2.0], help="how many times fewer MACs")
    parser.add_argument("--only", nargs="+", default=[*registry.names("saliency"), *clusterings], help="criteria")
    parser.add_argument("--images", type=int, default=20000, help="of recovery; 0: compensation alone")
    parser.add_argument("--option", default="A", choices=("A", "B"), help="shortcuts; both compute the same before pruning")
    parser.add_argument("--blocks", action="store_true", help="let whole blocks go too")
    parser.add_argument("--calibration", type=int, default=512, help="images that compensation and sensitivities see")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()

    job = cifar.job(arguments.depth, cifar.data_folder(arguments.data), option=arguments.option, calibration=arguments.calibration)
    work = Path(tempfile.mkdtemp(prefix="planish-bench-"))
    data = job.materialize(work / "data")
    assert data.test is not None and data.train is not None and data.labelled is not None and data.labelled.targets is not None
    graph = capture(job.model_module(), job.example_inputs)
    analysis = analyse(graph)
    original = outputs(graph, data.test)
    few = [torch.from_numpy(original[0][:16])]
    material = Material(data.calibration, data.labelled, label_loss("accuracy", few, data.labelled.targets[:16]))
    judge = Judge(job, data, Teacher(graph, data.train, work), Recovery(samples=arguments.images), macs(analysis))
    for seed in range(arguments.seeds):
        quality = judge.tune(graph, seed)
        print(f"ResNet-{arguments.depth}, option {arguments.option}, seed {seed}: control {quality:.4f}", flush=True)
        for name in arguments.only:
            began = time.monotonic()
            if name.startswith("torch-pruning:"):
                for fewer in arguments.fewer:
                    peer = peers.torch_pruned_to(job.model_module(), job.example_inputs[0], macs(analysis) / fewer, name.partition(":")[2])
                    judge(name, capture(peer, job.example_inputs), seed, time.monotonic() - began)
                continue
            order = orders(name, graph, analysis, material, seed)
            ordered = time.monotonic() - began
            options = [
                o for o in sensitivities(graph, analysis, order, data.calibration, _MULTIPLE) if arguments.blocks or o.technique == "width"
            ]
            for fewer in arguments.fewer:
                plan = cheapest(analysis, options, name, 1 / fewer)
                pruned = apply(graph, analysis, plan, order)
                compensate(pruned.graph, graph, pruned.kept, data.calibration, samples=data.calibration.n, seed=seed)
                judge(name, pruned.graph, seed, ordered, time.monotonic() - began)


class Judge:
    """Recovers one net after another for as many images, and prints what it lost against the original tuned as long."""

    def __init__(self, job: planish.Workload, data: Data, teacher: Teacher, recovery: Recovery, full_macs: int) -> None:
        self.job, self.data, self.teacher, self.recovery, self.full_macs = job, data, teacher, recovery, full_macs
        self.tuned: list[np.ndarray] = []

    def tune(self, graph: Graph, seed: int) -> float:
        """The accuracy of the control: the original after as much training."""
        control = graph.copy()
        if self.recovery.samples:
            recover(control, self.teacher, self.job, self.data, self.recovery, seed=seed, is_control=True)
        self.tuned = outputs(control, self.data.test)
        return get_metric("accuracy").score(self.tuned, self.data.test.targets)

    def __call__(self, name: str, smaller: Graph, seed: int, seconds: float, total: float = 0.0) -> None:
        """A line about a net whose units `name` ordered in so many seconds, and that was there after `total`."""
        nets = [outputs(smaller, self.data.test)]
        if self.recovery.samples:
            recover(smaller, self.teacher, self.job, self.data, self.recovery, seed=seed)
            nets.append(outputs(smaller, self.data.test))
        before, after = (paired_interval(get_metric("accuracy"), self.tuned, net, self.data.test.targets) for net in (nets[0], nets[-1]))
        print(
            f"  {name:20s} MACs / {self.full_macs / macs(analyse(smaller)):.2f}  drop {100 * after[0]:+6.2f} ({100 * after[1]:+.2f} to "
            f"{100 * after[2]:+.2f})  before recovery {100 * before[0]:+6.2f}  ordered in {seconds:.1f} s, there after {total:.0f} s",
            flush=True,
        )


def cheapest(analysis: Analysis, options: list[Option], name: str, share: float) -> Plan:
    """The widths with the least predicted loss at that share of the MACs."""
    space = Space(analysis, options, Plan("onnxruntime:cpu", saliency=name))
    solver = Solver(space, Costs(space, None), Limits({"macs": share * macs(analysis)}))
    return solver.ask(1)[0]


@torch.inference_mode()
def outputs(graph: Graph, split: Split) -> list[np.ndarray]:
    """The class logits of a graph on a split."""
    return [np.concatenate([graph.module(torch.from_numpy(inputs[0]))[0].numpy() for inputs, _ in split.batches(250)])]


if __name__ == "__main__":
    main()
