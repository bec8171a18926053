"""Routers: experts go with their row of scores and with what is looked up at their position, or nothing does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.data import Split
from planish.errors import PlanError
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune
from planish.measure.machine import available_targets
from planish.measure.probe import Probe
from planish.prune.levels import width_levels
from planish.prune.options import sensitivities
from planish.prune.order import Order
from planish.runtimes.contract import get_runtime


class Router(nn.Module):
    """Six experts, each one matrix; how the picked ones are found is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.gate = nn.Linear(5, 16), nn.Linear(16, 6)
        self.experts = nn.Parameter(torch.randn(6, 16, 16) / 4)
        self.head = nn.Linear(16, 3)

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        return self.head(x + self.mixed(x, torch.softmax(self.gate(x), -1)))


class BestOne(Router):
    """A switch: the best expert of each sample, looked up."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        return torch.bmm(self.experts[scores.argmax(-1)], x.unsqueeze(-1)).squeeze(-1)


class Scattered(Router):
    """The best two, whose weights are scattered among zeros; every expert runs."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, places = scores.topk(2, -1)
        spread = torch.zeros_like(scores).scatter(1, places, weights / weights.sum(-1, keepdim=True))
        return torch.einsum("ne,eoi,ni->no", spread, self.experts, x)


class Marked(Router):
    """The best two, marked by ones."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        _, places = scores.topk(2, -1)
        marks = F.one_hot(places, 6).sum(1).to(x.dtype)
        return torch.einsum("ne,eoi,ni->no", marks * scores, self.experts, x)


class Numbered(Router):
    """The best one's number is used as a number: renumbering would change what is computed."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        return x * scores.argmax(-1, keepdim=True).to(x.dtype)


class Elsewhere(Router):
    """The best one's number looks something up that has nothing to do with experts."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 1.5, 6)[scores.argmax(-1)].unsqueeze(-1)


def captured(net: type[Router]) -> tuple[Graph, Analysis]:
    graph = capture(net().eval(), (torch.randn(4, 5),))
    return graph, analyse(graph)


@pytest.mark.parametrize(("net", "picked"), [(BestOne, 1), (Scattered, 2), (Marked, 2)])
def test_experts_are_units(net: type[Router], picked: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, analysis = captured(net)
    group = next(group for group in analysis.groups.values() if group.routed)
    assert (group.units, group.routed, group.exact) == (6, picked, False)
    assert {("gate.weight", 0), ("gate.bias", 0), ("experts", 0)} <= set(group.unit_of)
    assert width_levels(group, 8) == tuple(range(6, picked - 1, -1))
    removed = {group.name: [1, 4]}
    pruned = prune(graph, analysis, removed)
    for batch in (1, 3, 17):
        inputs = [torch.randn(batch, 5)]
        with torch.no_grad():
            torch.testing.assert_close(pruned.graph.module(*inputs), masked_reference(graph, analysis, removed, inputs))
    _exported(pruned.graph, tmp_path)
    with pytest.raises(PlanError, match=f"must keep at least {'one' if picked == 1 else picked} of its 6 units"):
        prune(graph, analysis, {group.name: list(range(7 - picked))})


def _exported(graph: Graph, folder: Path) -> None:

    target = next(target for target in available_targets("cpu", 1) if target.runtime == "onnxruntime")
    path = get_runtime("onnxruntime").export(graph, folder)
    with Probe.open(target, path, graph.signature) as probe:
        x = torch.randn(7, 5)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(probe.outputs([x.numpy()])[0]), graph.module(x)[0], atol=1e-5, rtol=1e-4)


class Told(Router):
    """The best one's number is an output, beside what it looked up."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.entry(x))
        best = self.gate(x).argmax(-1)
        return self.head(torch.bmm(self.experts[best], x.unsqueeze(-1)).squeeze(-1)), best


class TwoRouters(Router):
    """Positions of two routers added, and stacked, before anything is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(16, 6)

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        both = torch.stack([scores.argmax(-1), self.second(x).argmax(-1)], -1)
        return (self.experts[both] @ x[:, None, :, None]).sum((1, 3)) + x * both.sum(-1, keepdim=True).to(x.dtype)


class Chosen(Router):
    """Positions are themselves looked up, by numbers that are no positions."""

    def mixed(self, x: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(2, -1).indices.index_select(1, torch.tensor([1]))
        return torch.bmm(self.experts[best.squeeze(1)], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("net", [Numbered, Elsewhere, Told, TwoRouters, Chosen])
def test_positions_that_are_used_for_something_else_keep_every_expert(net: type[Router]) -> None:
    torch.manual_seed(0)
    _, analysis = captured(net)
    assert not any(group.routed for group in analysis.groups.values())
    assert "gate.weight" in analysis.reasons


def test_an_expert_that_is_never_picked_costs_nothing() -> None:
    """Zeros in a router are scores like any other: losses are those of nets that lack the expert."""
    torch.manual_seed(0)
    net = Scattered().eval()
    with torch.no_grad():
        net.gate.bias[3] = -100.0
    graph = capture(net, (torch.randn(4, 5),))
    analysis = analyse(graph)
    name = next(name for name, group in analysis.groups.items() if group.routed)
    scores = {key: np.arange(group.units, dtype=float) for key, group in analysis.groups.items()}
    scores[name] = np.where(np.arange(6) == 3, 0.0, 1.0)
    x = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    options = sensitivities(graph, analysis, {key: Order(value) for key, value in scores.items()}, Split([x], None, 96), 8)
    losses = {option.value: option.loss for option in options if option.subject == name}
    assert losses[5] < 1e-9 < losses[4]


def test_what_must_stay() -> None:
    assert Group("g", 8, {}, {}).least == 1
    assert Group("g", 8, {}, {}, routed=3).least == 3
    assert Group("g", 8, {}, {}, idle=(1, 2)).least == 6
