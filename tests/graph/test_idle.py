"""Channels of an input that never vary: found in data, gone behind the same interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planish
import replaying
from planish.data import Split
from planish.errors import PlanError
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.graph.idle import idle_channels
from planish.graph.surgery import masked_reference, prune
from planish.prune.contract import Material
from planish.prune.levels import width_levels
from planish.prune.order import orders
from planish.runtimes.contract import get_runtime


class Sensors(nn.Module):
    """Features of a table into two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def sensors() -> tuple[Graph, np.ndarray]:
    """A captured net, and samples in which channels 2, 5 and 6 never vary."""
    torch.manual_seed(0)
    graph = capture(Sensors().eval(), (torch.randn(4, 10),))
    x = torch.randn(50, 10).numpy()
    x[:, 2], x[:, 5], x[:, 6] = 0.0, 1.5, -3.0
    return graph, x


def test_channels_that_never_vary_are_found() -> None:
    graph, x = sensors()
    assert idle_channels(graph, [[x[:30]], [x[30:]]]) == {"x": (1, (2, 5, 6))}
    x[40, 5] = 1.6
    assert idle_channels(graph, [[x[:30]], [x[30:]]]) == {"x": (1, (2, 6))}
    assert idle_channels(graph, [[np.zeros((8, 10), np.float32)]]) == {}  # one at least must vary


def test_features_of_a_sequence_are_its_last_axis() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.first(x))).mean(1)

    graph = capture(Sequence().eval(), (torch.randn(3, 7, 6),))
    x = np.random.default_rng(0).normal(size=(20, 7, 6)).astype(np.float32)
    x[:, :, 4] = 2.0
    assert idle_channels(graph, [[x]]) == {"x": (2, (4,))}


def test_they_go_behind_the_same_interface() -> None:
    graph, x = sensors()
    graph.idle = {"x": (1, (2, 5, 6))}
    analysis = analyse(graph)
    group = analysis.groups["input.x"]
    assert (group.units, group.least, group.idle) == (10, 7, (2, 5, 6))
    assert width_levels(group, 8) == (10, 7)
    order = orders("magnitude", graph, analysis, Material(Split([x], None, len(x))), 0)["input.x"]
    assert order.going(3).units.tolist() == [2, 5, 6] and len(order.going(9).units) == 3
    pruned = prune(graph, analysis, {"input.x": [2, 5, 6]})
    assert dict(pruned.graph.module.named_parameters())["first.weight"].shape == (16, 7)
    assert pruned.graph.signature == graph.signature
    for batch in (1, 3, 17):
        inputs = [torch.from_numpy(x[:batch])]
        with torch.no_grad():
            torch.testing.assert_close(pruned.graph.module(*inputs), masked_reference(graph, analysis, {"input.x": [2, 5, 6]}, inputs))
    assert "input.x" not in analyse(pruned.graph).groups
    with pytest.raises(PlanError, match=r"only channels that never vary may go, \[2, 5, 6\]; got 1"):
        prune(graph, analysis, {"input.x": [1, 2, 5, 6]})


class Joined(nn.Module):
    """Two inputs and some padding read as one."""

    def __init__(self, left: int = 0) -> None:
        super().__init__()
        self.left, self.first, self.head = left, nn.Linear(10, 16), nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = torch.nn.functional.pad(torch.cat([a, b], 1), (self.left, 2 - self.left))
        return self.head(torch.relu(self.first(x)))


@pytest.mark.parametrize("left", [0, 2])
def test_inputs_and_padding_that_are_read_as_one_are_told_apart(left: int) -> None:
    """Only channels that are idle in their own input may go, wherever they lie in what is read."""
    torch.manual_seed(0)
    graph = capture(Joined(left).eval(), (torch.randn(4, 4), torch.randn(4, 4)))
    graph.idle = {"a": (1, (2,)), "b": (1, (0, 3))}
    analysis = analyse(graph)
    (group,) = [group for name, group in analysis.groups.items() if name.startswith("input.")]
    assert sorted(group.unit_of["first.weight", 1][[left + 2, left + 4, left + 7]].tolist()) == sorted(group.idle)
    removed = {group.name: list(group.idle)}
    pruned = prune(graph, analysis, removed)
    inputs = [torch.randn(3, 4), torch.randn(3, 4)]
    with torch.no_grad():
        torch.testing.assert_close(pruned.graph.module(*inputs), masked_reference(graph, analysis, removed, inputs))
    live = next(unit for unit in range(group.units) if unit not in group.idle)
    with pytest.raises(PlanError, match=r"only channels that never vary may go"):
        prune(graph, analysis, {group.name: [live]})


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_run_stops_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """A wide first layer whose inputs are mostly dead: they go at no loss, constants that are not zero too."""
    if get_runtime(runtime, require=False).missing() is not None:
        pytest.skip(f"{runtime} is not installed")
    replaying.install(monkeypatch.setattr)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(200, 64)
    x[:, 16:] = torch.linspace(-1, 1, 48)
    job = planish.Workload(
        model=net, example_inputs=(x[:1],), train=[(x[:150], None)], validation=[(x[150:], None)], metric="agreement", name="sensors"
    )
    result = planish.optimize(
        job, f"{runtime}:cpu", planish.Budget(macs="0.5x", drop=0.02), tmp_path / "net.planish", techniques=("prune",), trials=2, threads=1
    )
    assert result.verdict == "met", result.summary.reason
    assert result.plan is not None and result.plan.widths.get("input.input") == 16
    assert any("channels that have one value in all data" in note for note in result.summary.notes)
    with torch.no_grad():
        np.testing.assert_allclose(planish.load(tmp_path / "net.planish")(x.numpy()), result.module(x).numpy(), atol=1e-4)
        assert float((result.module(x) - net(x)).abs().max()) < 0.05
