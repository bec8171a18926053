"""Sensitivities: what costs nothing is predicted to cost nothing, narrower never less than wider, the caller's graph untouched."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from pruning import calibration, captured, material, outputs
from torch import nn
from torch.nn import functional as F

import nets
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.graph.surgery import prune
from planish.plan import Option, Plan
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.contract import Material
from planish.prune.levels import width_levels
from planish.prune.options import sensitivities
from planish.prune.order import orders
from planish.testing.saliency import plant_dead


def measured(graph: Graph, analysis: Analysis, samples: int = 24, multiple: int = 4) -> list[Option]:
    split = calibration(graph, samples)
    return sensitivities(graph, analysis, orders("magnitude", graph, analysis, Material(split), 0), split, multiple)


@pytest.mark.parametrize("net", ["resnet_a", "resnet_b", "mobilenet", "densenet", "bert", "bert_masked", "lstm", "two_inputs"])
def test_every_level_and_block_once(net: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    options = measured(graph, analysis)
    expected = [("width", name, width) for name, group in analysis.groups.items() for width in width_levels(group, 4)[1:]]
    expected += [("block", name, 1) for name in analysis.blocks]
    assert [(option.technique, option.subject, option.value) for option in options] == expected
    for name in analysis.groups:
        losses = [option.loss for option in options if option.technique == "width" and option.subject == name]
        assert all(0 <= wide <= narrow for wide, narrow in itertools.pairwise(losses)), name
    assert options == measured(graph, analysis)
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def test_dead_units_and_idle_blocks_cost_nothing() -> None:
    graph, analysis = captured(*nets.resnet(blocks=2, width=16))
    graph = plant_dead(graph, analysis, {"layer1.0.conv1": np.arange(8)})
    with torch.no_grad():
        graph.module.get_parameter("layer2.1.bn2.weight").zero_()
        graph.module.get_parameter("layer2.1.bn2.bias").zero_()
    loss = {(o.technique, o.subject, o.value): o.loss for o in measured(graph, dataclasses.replace(analysis), 48, 8)}
    assert loss["width", "layer1.0.conv1", 8] < 1e-3 * loss["width", "layer1.1.conv1", 8]
    assert loss["block", "layer2.1", 1] < 0.05 * loss["block", "layer1.1", 1]


def test_a_pinned_group_has_no_option_and_progress_ends_at_its_total() -> None:
    graph, _ = captured(*nets.resnet())
    analysis = analyse(graph, keep=("layer1.0.conv1.*",))
    split = calibration(graph, 9)
    ticks: list[tuple[int, int]] = []
    options = sensitivities(
        graph, analysis, orders("magnitude", graph, analysis, Material(split), 0), split, 4, lambda done, total: ticks.append((done, total))
    )
    assert not any(option.subject == "layer1.0.conv1" for option in options if option.technique == "width")
    assert [done for done, _ in ticks] == list(range(1, ticks[0][1] + 1))


def test_a_width_is_predicted_as_compensation_leaves_it() -> None:
    # One hidden layer: refitting the reader is all that compensation does, so that prediction and truth are the same regression
    # but for the strength of the ridge, which compensation chooses.
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), (torch.randn(2, 6),))
    split = calibration(graph, 384)
    order = orders("magnitude", graph, analysis, Material(split), 0)
    (option,) = sensitivities(graph, analysis, order, split, 8, kind="values")
    left = apply(graph, analysis, Plan("cpu", widths={"0": 8}), order)
    compensate(left.graph, graph, left.kept, split)
    want = outputs(graph, split)
    truth = float(divergence([want], "values").per_sample([outputs(left.graph, split)], [want]).mean())
    assert option.loss == pytest.approx(truth, rel=0.1)


def test_units_that_must_stay_limit_the_levels() -> None:
    graph, analysis = captured(*nets.resnet(width=16))
    split = calibration(graph, 6)
    order = dict(orders("magnitude", graph, analysis, Material(split), 0))
    order["layer2.0.conv1"].scores[:20] = np.nan
    options = sensitivities(graph, analysis, order, split, 8)
    assert [o.value for o in options if o.technique == "width" and o.subject == "layer2.0.conv1"] == [24]


def test_little_time_means_fewer_samples_and_the_same_options() -> None:
    graph, analysis = captured(*nets.resnet())
    split = calibration(graph, 96)
    order = orders("magnitude", graph, analysis, Material(split), 0)
    hurried = sensitivities(graph, analysis, order, split, 4, seconds=1e-6)
    patient = sensitivities(graph, analysis, order, split, 4, seconds=1e6)
    assert [(o.subject, o.value) for o in hurried] == [(o.subject, o.value) for o in patient]
    assert hurried != patient
    assert hurried == sensitivities(graph, analysis, order, split, 4, samples=24)
    assert patient == sensitivities(graph, analysis, order, split, 4)


class LinearAttention(nn.Module):
    """Places of queries and keys give 1 where their weights are zero, and no weight reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.o = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weighed = q @ (k.transpose(-1, -2) @ v) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return self.o(weighed.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_units_that_zeros_do_not_silence_are_judged_by_nets_that_lack_them() -> None:
    torch.manual_seed(0)
    graph, analysis = captured(LinearAttention(), (torch.randn(2, 5, 6),))
    split = calibration(graph, 24)
    order = orders("random", graph, analysis, material(graph, 24), 0)
    found = {(o.subject, o.value): o.loss for o in sensitivities(graph, analysis, order, split, 1)}
    inputs = [torch.from_numpy(value) for value in split.inputs]
    original = list(graph.module(*inputs))
    measure = divergence(original)
    worst = 0.0
    for width in (3, 2, 1):
        gone = order["q.size"].going(4 - width).units.tolist()
        smaller = list(prune(graph, analysis, {"q.size": gone}).graph.module(*inputs))
        worst = max(worst, float(measure.per_sample(smaller, original).double().mean()))
        assert found["q.size", width] == pytest.approx(worst, rel=1e-4)
