"""Muon: orthogonal directions, lengths that follow the weight's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planish.data import Split
from planish.graph.capture import capture
from planish.train.loop import Settings, fit
from planish.train.muon import Muon, convolved_weights, orthogonal


@pytest.mark.parametrize("shape", [(3, 6, 40), (2, 40, 6), (1, 5, 5)])
def test_singular_values_are_brought_together(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1.0, 0.2, min(shape[1:])).expand(shape[0], -1)
    made = orthogonal(u @ torch.diag_embed(s) @ v)
    found = torch.linalg.svdvals(made)
    assert found.min() > 0.4 and found.max() < 1.3
    torch.testing.assert_close(
        u.transpose(1, 2) @ made @ v.transpose(1, 2), torch.diag_embed(found.gather(1, _order(u, made, v))), atol=1e-4, rtol=0
    )


def _order(u: torch.Tensor, made: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Where each of the old singular directions is among the new ones."""
    along = torch.diagonal(u.transpose(1, 2) @ made @ v.transpose(1, 2), dim1=1, dim2=2)
    return along.argsort(descending=True).argsort()


def test_a_step_is_a_share_of_the_weight_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e6):
        weights = [torch.nn.Parameter(torch.randn(8, 4, 3, 3).mul(size).to(memory_format=torch.channels_last)) for size in (1.0, 100.0)]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = scale * torch.randn_like(weight)
        Muon(weights, lr=0.01).step()
        for weight, was in zip(weights, before, strict=True):
            assert ((weight - was).norm() / was.norm()).item() == pytest.approx(0.01, rel=1e-3)


def test_with_a_decaying_rate_it_finds_the_filters() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4, 6, 6) * torch.tensor([1.0, 0.3, 0.1, 0.03]).view(1, 4, 1, 1)
    filters = torch.randn(8, 4, 3, 3)
    wanted = torch.nn.functional.conv2d(x, filters)
    weight = torch.nn.Parameter(torch.full((8, 4, 3, 3), 0.1))
    optimizer = Muon([weight], lr=0.3)
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - i / 200)
        optimizer.zero_grad()
        (torch.nn.functional.conv2d(x, weight) - wanted).square().mean().backward()
        optimizer.step()
    assert ((weight - filters).norm() / filters.norm()).item() < 0.02, "the weak channels' filters too"


def test_the_memory_layout_changes_nothing() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    made = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(start.clone().to(memory_format=layout))
        weight.grad = gradient.clone().to(memory_format=layout)
        Muon([weight], lr=0.1, weight_decay=0.1).step()
        made.append(weight.detach().contiguous())
    torch.testing.assert_close(made[0], made[1])


def test_it_gets_dense_filters_alone() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(1, 8, 3)
            self.apart = torch.nn.Conv2d(8, 8, 3, groups=8)
            self.paired = torch.nn.Conv2d(8, 8, 1, groups=2)
            self.up = torch.nn.ConvTranspose2d(8, 4, 2, 2)
            self.place = torch.nn.Parameter(torch.zeros(1, 4, 1, 1))
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.up(self.paired(self.apart(self.stem(x)))) + self.place).mean((2, 3)))

    net = Net()
    graph = capture(net, (torch.zeros(2, 1, 9, 9),))
    assert [tuple(weight.shape) for weight in convolved_weights(graph)] == [(8, 1, 3, 3), (8, 4, 2, 2)]
    was = {name: tensor.clone() for name, tensor in graph.module.named_parameters()}
    x = np.random.default_rng(0).normal(size=(64, 1, 9, 9)).astype(np.float32)
    report = fit(
        graph,
        Split([x], None, 64),
        lambda outputs, _: outputs[0].square().mean(),
        Settings(64, optimizer="muon", batch_size=64, warm_up=0.0),
    )
    assert report.steps == 1 and report.optimizer == "muon"
    change = {name: ((tensor - was[name]).norm() / was[name].norm()).item() for name, tensor in graph.module.named_parameters()}
    for name in ("stem.weight", "up.weight"):
        assert change[name] == pytest.approx(0.5 * 0.02 * 0.4, rel=0.05), "half of the schedule lies behind the middle of its only step"
