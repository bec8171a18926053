"""Folding batch norm is exact in eval mode, and leaves what it cannot fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nets
from planish.graph.capture import capture
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.modes import short_name


def count(graph: Graph, name: str) -> int:
    return sum(short_name(node) == name for node in graph.module.graph.nodes)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    ],
    ids=["conv1d", "grouped", "conv3d", "transposed", "grouped-transposed", "linear"],
)
def test_fold_is_exact(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nets.randomise_norms(nn.Sequential(layer, norm)).eval()
    x = torch.randn(shape)
    graph = capture(model, x)
    folded = fold_batch_norm(graph)
    assert count(graph, "batch_norm") == 1 and count(folded, "batch_norm") == 0
    assert set(dict(folded.module.named_parameters())) == {"0.weight", "0.bias"}
    torch.testing.assert_close(folded(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(graph(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_resnet_folds_all_and_densenet_what_it_can() -> None:
    for model, example, left in ((*nets.resnet(), 0), (*nets.densenet(), 8)):
        graph = capture(model, example)
        folded = fold_batch_norm(graph)
        assert count(folded, "batch_norm") == left
        torch.testing.assert_close(folded(example)[0], graph(example)[0], rtol=1e-5, atol=1e-5)


def test_shared_weights_are_folded_apart() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(torch.relu(self.first(self.conv(x)))))

    torch.manual_seed(0)
    model = nets.randomise_norms(Shares()).eval()
    with torch.no_grad():
        model.second.weight.mul_(3)
    x = torch.randn(2, 3, 8, 8)
    folded = fold_batch_norm(capture(model, x))
    assert count(folded, "batch_norm") == 0
    torch.testing.assert_close(folded(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_convolution_with_another_reader_is_left() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    model = nets.randomise_norms(Reads()).eval()
    x = torch.randn(2, 3, 4, 4)
    folded = fold_batch_norm(capture(model, x))
    assert count(folded, "batch_norm") == 1
    torch.testing.assert_close(folded(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_norm_over_the_batch_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert count(fold_batch_norm(capture(model, torch.randn(2, 3, 4, 4))), "batch_norm") == 1
