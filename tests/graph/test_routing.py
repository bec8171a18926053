"""Routers: experts go with their row of scores and with what is looked up at their position, or nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanError
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference, prune
from planish.measure.machine import available_targets
from planish.measure.probe import Probe
from planish.prune.levels import width_levels
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


@pytest.mark.parametrize("net", [Numbered, Elsewhere])
def test_positions_that_are_used_for_something_else_keep_every_expert(net: type[Router]) -> None:
    torch.manual_seed(0)
    _, analysis = captured(net)
    assert not any(group.routed for group in analysis.groups.values())
    assert "gate.weight" in analysis.reasons


def test_what_must_stay() -> None:
    assert Group("g", 8, {}, {}).least == 1
    assert Group("g", 8, {}, {}, routed=3).least == 3
    assert Group("g", 8, {}, {}, idle=(1, 2)).least == 6
