"""Batch-norm recalibration: the statistics of the data exactly, and nothing else touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nets import MobileNet, ResNet, images, randomise_norms
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.fold import fold_batch_norm
from planish.train.norms import has_batch_norm, recalibrate_batch_norm


def split_of(samples: int, size: int = 8) -> Split:
    return Split([images(samples, size, seed=7)[0].mul(2).add(1).numpy()], None, samples)


def test_first_norm_gets_the_exact_statistics_of_all_samples() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    graph = capture(randomise_norms(net).eval(), images(2, 8))
    split = split_of(100)
    assert recalibrate_batch_norm(graph, split, samples=100, batch_size=32) == 2  # 32 + 32 + 32; a rest of 4 is no batch
    buffers = dict(graph.module.named_buffers())
    with torch.no_grad():
        used = np.sort(np.random.default_rng(0).permutation(100)[:100])[:96]
        hidden = net[0](torch.from_numpy(split.inputs[0][used]))
    torch.testing.assert_close(buffers["1.running_mean"], hidden.mean((0, 2, 3)))
    torch.testing.assert_close(buffers["1.running_var"], hidden.transpose(0, 1).flatten(1).var(1))


def test_one_batch_equals_torch_in_train_mode_with_momentum_one() -> None:
    torch.manual_seed(0)
    net = randomise_norms(ResNet(1, 8))
    graph = capture(net.eval(), images(2, 8))
    split = split_of(64)
    recalibrate_batch_norm(graph, split, samples=64, batch_size=64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.from_numpy(split.inputs[0]))
    expected = dict(net.named_buffers())
    found = {name: buffer for name, buffer in graph.module.named_buffers() if "running" in name}
    assert len(found) == 2 * 7
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-5)


def test_nothing_else_is_disturbed() -> None:
    torch.manual_seed(0)
    graph = capture(randomise_norms(MobileNet()).eval(), images(2, 16))
    code = graph.module.code
    before = {name: p.clone() for name, p in graph.module.named_parameters()}
    state = torch.get_rng_state()
    recalibrate_batch_norm(graph, split_of(40, 16))
    assert graph.module.code == code and not graph.module.training
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in graph.module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    x = torch.from_numpy(split_of(40, 16).inputs[0])
    with torch.no_grad():
        again = graph.module(x)[0]
        recalibrate_batch_norm(graph, split_of(40, 16))
        assert torch.equal(graph.module(x)[0], again)


def test_it_repairs_statistics_that_are_off() -> None:
    torch.manual_seed(0)
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), images(2, 8))
    split = split_of(128)
    recalibrate_batch_norm(graph, split)
    x = torch.from_numpy(split.inputs[0])
    with torch.no_grad():
        right = graph.module(x)[0]
        for name, buffer in graph.module.named_buffers():
            if "running" in name:
                buffer.mul_(3).add_(0.5)
        wrong = graph.module(x)[0]
        recalibrate_batch_norm(graph, split)
        torch.testing.assert_close(graph.module(x)[0], right)
    assert (wrong - right).abs().mean() > 0.05 * right.abs().mean()


def test_folded_or_nan_statistics_are_left_alone() -> None:
    torch.manual_seed(0)
    graph = capture(randomise_norms(ResNet(1, 8)).eval(), images(2, 8))
    folded = fold_batch_norm(graph)
    assert not has_batch_norm(folded) and recalibrate_batch_norm(folded, split_of(8)) == 0
    split = split_of(64)
    split.inputs[0][3] = np.nan
    before = {name: b.clone() for name, b in graph.module.named_buffers()}
    assert recalibrate_batch_norm(graph, split) == 0
    assert all(torch.equal(b, before[name]) for name, b in graph.module.named_buffers())


@pytest.mark.parametrize("samples", [1, 2])
def test_a_single_sample_gives_finite_statistics(samples: int) -> None:
    torch.manual_seed(0)
    graph = capture(randomise_norms(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).eval(), (torch.randn(2, 3),))
    recalibrate_batch_norm(graph, Split([np.ones((samples, 3), np.float32)], None, samples))
    assert all(bool(torch.isfinite(b).all()) for b in graph.module.buffers())
