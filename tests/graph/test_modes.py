"""Train and eval mode are literals of the program, and train like the user's model in train mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nets
from planish.graph.capture import capture
from planish.graph.modes import set_mode, short_name


def test_train_mode_equals_the_models_train_mode() -> None:
    """Without dropout nothing is random: outputs, gradients and running statistics must agree."""
    model, example = nets.resnet()
    graph = capture(model, example)
    model.train()
    set_mode(graph, training=True)
    ours, theirs = graph.module(*example)[0], model(*example)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    mine = dict(graph.module.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    buffers = dict(graph.module.named_buffers())
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)


def test_there_and_back_is_the_identity() -> None:
    model, example = nets.mobilenet()
    graph = capture(model, example)
    before = [(node.args, node.kwargs) for node in graph.module.graph.nodes]
    expected = graph.module(*example)[0]
    set_mode(graph, training=True)
    assert graph.module.training and all(module.training for module in graph.module.modules())
    assert [(node.args, node.kwargs) for node in graph.module.graph.nodes] != before
    set_mode(graph, training=False)
    assert [(node.args, node.kwargs) for node in graph.module.graph.nodes] == before
    assert not any(module.training for module in graph.module.modules())
    assert torch.equal(graph.module(*example)[0], expected)


def test_dropout_is_active_only_in_training() -> None:
    graph = capture(nn.Sequential(nn.Dropout(0.5)), torch.ones(64, 64))
    x = torch.ones(64, 64)
    assert torch.equal(graph(x), x)
    set_mode(graph, training=True)
    torch.manual_seed(0)
    zeros = (graph(x) == 0).float().mean()
    assert abs(zeros - 0.5) < 0.05  # 4096 fair coins: six standard deviations


def test_attention_dropout_that_eval_mode_baked_to_zero_comes_back() -> None:
    model, example = nets.bert(attention_probs_dropout_prob=0.25, hidden_dropout_prob=0.0)
    graph = capture(model, example)

    def rates() -> list[float]:
        nodes = [node for node in graph.module.graph.nodes if short_name(node) == "scaled_dot_product_attention"]
        return [node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) for node in nodes]

    assert rates() == [0.0, 0.0]
    set_mode(graph, training=True)
    assert rates() == [0.25, 0.25]
    twin = graph.copy()
    set_mode(twin, training=False)
    assert rates() == [0.25, 0.25]
    torch.testing.assert_close(twin(example)["logits"], model(**example).logits.detach(), rtol=1e-5, atol=1e-5)


def test_norm_without_statistics_uses_the_batch_in_both_modes() -> None:
    graph = capture(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), torch.randn(4, 3))
    x = 5 + torch.randn(16, 3)
    set_mode(graph, training=True)
    trained = graph(x)
    set_mode(graph, training=False)
    torch.testing.assert_close(graph(x), trained)
    assert graph(x).mean().abs() < 1e-5


def test_cumulative_average_still_learns() -> None:
    graph = capture(nn.Sequential(nn.BatchNorm1d(3, momentum=None)), torch.randn(4, 3))
    set_mode(graph, training=True)
    graph(torch.full((8, 3), 7.0) + torch.randn(8, 3))
    statistics = dict(graph.module.named_buffers())
    assert (statistics["0.running_mean"] > 0.5).all()
    assert any("momentum" in note for note in graph.notes)


@pytest.mark.parametrize("name", nets.ZOO)
def test_every_family_trains_a_step(name: str) -> None:
    model, example = nets.ZOO[name]()
    graph = capture(model, example)
    set_mode(graph, training=True)
    outputs: tuple[Tensor, ...] = graph.module(*graph.example)
    sum(output.square().mean() for output in outputs).backward()
    for key, parameter in graph.module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
