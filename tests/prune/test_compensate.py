"""Compensation against nets that it can restore exactly, and against doing nothing on those that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import calibration, captured, outputs, relative_error
from torch import Tensor, nn

import nets
from planish.errors import DataError
from planish.graph.blocks import bypass
from planish.graph.surgery import prune
from planish.plan import Plan
from planish.prune.apply import apply
from planish.prune.compensate import compensate
from planish.prune.contract import Material
from planish.prune.levels import width_levels
from planish.prune.order import orders


def seeded(build: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nets.randomise_norms(build()).eval()


class Dependent(nn.Module):
    """Two convolutions; channel 2 between them is the sum of channels 0 and 1, plus a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.first.weight[2] = self.first.weight[0] + self.first.weight[1]
            self.first.bias[2] = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


class Tokens(nn.Module):
    """Two linear maps over tokens; hidden unit 3 is unit 1 doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4)
        with torch.no_grad():
            self.first.weight[3] = 2 * self.first.weight[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Residual(nn.Module):
    """Two residual branches of one linear operator each: the second can stand in for both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(5, 5, 1, bias=False), nn.Conv2d(5, 5, 1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.norm(self.b(x))


class Depthwise(nn.Module):
    """A depthwise convolution between two others; its input's channel 1 repeats channel 0."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.expand.weight[1], self.expand.bias[1] = self.expand.weight[0], self.expand.bias[0]
            self.depthwise.weight[1] = self.depthwise.weight[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x)))


@pytest.mark.parametrize(
    ("build", "shape", "group", "unit"),
    [(Dependent, (2, 3, 8, 8), "first", 2), (Tokens, (2, 6, 5), "first", 3), (Depthwise, (2, 3, 8, 8), "expand", 1)],
)
def test_a_dependent_unit_is_replaced_exactly(build: type[nn.Module], shape: tuple[int, ...], group: str, unit: int) -> None:
    graph, analysis = captured(seeded(build), (torch.randn(shape),))
    split = calibration(graph, 96)
    pruned = prune(graph, analysis, {group: [unit]})
    want = outputs(graph, split)
    assert relative_error(outputs(pruned.graph, split), want) > 0.05
    done = compensate(pruned.graph, graph, pruned.kept, split, strengths=(1e-9,))
    assert done.samples == 96 and not done.skipped
    # the Gram matrix is summed in float32: its relative error of about 1e-6 times a condition number in the hundreds
    assert relative_error(outputs(pruned.graph, split), want) < 1e-3
    assert all(after < 1e-5 for _, after in done.fitted.values())


def test_the_next_branch_takes_over_a_bypassed_block() -> None:
    graph, analysis = captured(seeded(Residual), (torch.randn(2, 5, 6, 6),))
    split = calibration(graph, 96)
    without = bypass(graph, analysis, ["a"])
    want = outputs(graph, split)
    before = relative_error(outputs(without, split), want)
    done = compensate(without, graph, {}, split, strengths=(1e-9,))
    assert list(done.fitted) == ["b.weight"]
    assert relative_error(outputs(without, split), want) < 1e-3 < 0.1 < before


def test_batch_norm_holds_the_statistics_of_what_reaches_it() -> None:
    graph, analysis = captured(seeded(Residual), (torch.randn(2, 5, 6, 6),))
    split = calibration(graph, 96)
    without = bypass(graph, analysis, ["a"])
    compensate(without, graph, {}, split)
    x = torch.from_numpy(split.inputs[0])
    reaches = nn.functional.conv2d(x, without.module.get_parameter("b.weight")).detach()
    torch.testing.assert_close(without.module.get_buffer("norm.running_mean"), reaches.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without.module.get_buffer("norm.running_var"), reaches.var((0, 2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("net", ["resnet_a", "resnet_b", "mobilenet", "densenet", "bert", "bert_masked", "lstm"])
def test_an_untouched_net_stays_as_it_is(net: str) -> None:
    graph, _ = captured(*nets.ZOO[net]())
    copied = graph.copy()
    done = compensate(copied, graph, {}, calibration(graph, 8))
    assert not done.fitted
    for name, value in graph.module.state_dict().items():
        assert torch.equal(value, copied.module.state_dict()[name]), name


@pytest.mark.parametrize("net", ["resnet_a", "resnet_b", "mobilenet", "densenet", "bert", "lstm"])
def test_compensation_brings_any_net_closer(net: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    split, unseen = calibration(graph, 192), calibration(graph, 64, seed=6)
    widths = {name: width_levels(group, 2)[len(width_levels(group, 2)) // 3] for name, group in analysis.groups.items()}
    left = apply(graph, analysis, Plan("cpu", widths=widths), orders("magnitude", graph, analysis, Material(split), 0))
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    want, raw = outputs(graph, unseen), outputs(left.graph, unseen)
    compensate(left.graph, graph, left.kept, split)
    assert relative_error(outputs(left.graph, unseen), want) < relative_error(raw, want)
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


def test_same_seed_same_weights_and_mode_restored() -> None:
    graph, analysis = captured(*nets.resnet())
    split = calibration(graph, 32)
    results = []
    for _ in range(2):
        pruned = prune(graph, analysis, {"layer1.0.conv1": [0, 1]})
        compensate(pruned.graph, graph, pruned.kept, split)
        assert not pruned.graph.module.training
        results.append(outputs(pruned.graph, split))
    assert torch.equal(*results)


def test_shared_weights_are_left_alone_by_name() -> None:
    graph, _ = captured(*nets.bert_masked())
    done = compensate(graph.copy(), graph, {}, calibration(graph, 8))
    assert any("embeddings" in name or "decoder" in name for name in done.skipped), done.skipped
    assert set(done.skipped.values()) == {"its parameters are shared"}


def test_no_calibration_samples() -> None:
    graph, _ = captured(seeded(Residual), (torch.randn(2, 5, 6, 6),))
    empty = calibration(graph, 2)
    empty = type(empty)([array[:0] for array in empty.inputs], None, 0)
    with pytest.raises(DataError, match="at least one sample"):
        compensate(graph.copy(), graph, {}, empty)


def test_a_constant_channel_does_no_harm() -> None:
    graph, analysis = captured(*nets.resnet())
    with torch.no_grad():
        graph.module.get_parameter("layer1.0.conv1.weight")[3] = 0
        graph.module.get_parameter("layer1.0.bn2.weight")[1] = 0
    pruned = prune(graph, analysis, {"layer1.0.conv1": [0], "layer2.0.conv1": [1, 2]})
    split = calibration(graph, 32)
    compensate(pruned.graph, graph, pruned.kept, split)
    assert bool(torch.isfinite(outputs(pruned.graph, split)).all())
    assert all(np.isfinite(value.numpy()).all() for value in pruned.graph.module.state_dict().values())
