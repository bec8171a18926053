"""Short convolutions as products of windows: the same function, for every stride, padding and number of positions."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nets
import parity
from planish.graph.capture import capture
from planish.graph.modes import short_name
from planish.graph.windows import short_convolutions
from planish.runtimes.contract import get_runtime


class Convolution(nn.Module):
    """One convolution of a fixed length."""

    def __init__(self, length: int, kernel: int, stride: int, padding: int, bias: bool, channels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 7, kernel, stride, padding, bias=bias)
        self.length = length
        self.fc = nn.Linear(7 * ((length + 2 * padding - kernel) // stride + 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x.unflatten(2, (self.length, 1)).squeeze(3))).flatten(1))


def made(length: int, kernel: int, stride: int, padding: int, bias: bool = True, channels: int = 5) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Convolution(length, kernel, stride, padding, bias, channels).eval()
        return net, torch.randn(2, channels, length)


def kinds(module: torch.fx.GraphModule) -> list[str]:
    return [short_name(node) for node in module.graph.nodes if node.op == "call_function"]


CASES = [case for case in product((1, 4, 9), (1, 3, 4), (1, 2), (0, 1, 2)) if case[1] <= case[0] + 2 * case[3]]
SEES_PADDING_ALONE = (1, 1, 2, 1)


@pytest.mark.parametrize(("length", "kernel", "stride", "padding"), CASES)
@torch.no_grad()
def test_windows_compute_what_the_convolution_does(length: int, kernel: int, stride: int, padding: int) -> None:
    net, x = made(length, kernel, stride, padding, bias=kernel != 3)
    graph = capture(net, x)
    rewritten = short_convolutions(graph, most=20)
    assert "conv1d" in kinds(graph.module)
    assert ("conv1d" in kinds(rewritten.module)) == ((length, kernel, stride, padding) == SEES_PADDING_ALONE)
    other = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    for batch in (x, other):
        assert parity.difference(rewritten.module(batch), graph.module(batch)) < 1e-6


def test_taps_that_see_only_padding_are_left_out() -> None:
    net, x = made(length=1, kernel=3, stride=1, padding=1)
    rewritten = short_convolutions(capture(net, x), 8)
    assert rewritten.module.get_parameter("conv1d_windows").shape == (7, 5)


def test_long_convolutions_and_free_lengths_stay() -> None:
    net, x = made(length=12, kernel=3, stride=1, padding=1)
    assert "conv1d" in kinds(short_convolutions(capture(net, x), most=11).module)
    assert "conv1d" not in kinds(short_convolutions(capture(net, x), most=12).module)
    free = capture(nn.Conv1d(5, 7, 3, padding=1), torch.randn(2, 5, 4))
    assert isinstance(free.signature.inputs[0].shape[2], str)
    assert "conv1d" in kinds(short_convolutions(free, 8).module)


@torch.no_grad()
def test_onnx_runtime_gets_no_short_convolution_and_computes_the_same(tmp_path: Path) -> None:
    layers = [nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nets.randomise_norms(nn.Sequential(*layers)).eval()
        graph = capture(net, torch.randn(2, 5, 6))
        inputs = [torch.randn(batch, 5, 6) for batch in parity.BATCHES]
    path = get_runtime("onnxruntime").export(graph, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert not {"Conv", "BatchNormalization"} & {node.op_type for node in onnx.load(path).graph.node}
    for x in inputs:
        found = session.run(None, {graph.signature.inputs[0].name: x.numpy()})
        assert parity.difference([torch.from_numpy(found[0])], [net(x)]) < 1e-5


def test_a_batch_that_runs_along_the_convolution_is_left_alone(tmp_path: Path) -> None:
    """Frames as the batch: the number of positions is that of the samples, and no literal may stand for it."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(5, 7, 3, padding=1), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x.t().unsqueeze(0))).squeeze(0).t())

    graph = capture(Frames().eval(), (torch.randn(4, 5),))
    assert "conv1d" in kinds(short_convolutions(graph, 8).module)
