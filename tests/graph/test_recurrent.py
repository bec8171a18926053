"""LSTM and GRU: one node per layer and direction, any length, equal to torch's own, outputs and states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.graph.modes import set_mode, short_name


class Stack(nn.Module):
    """A recurrent stack that gives its output and its final states."""

    def __init__(self, kind: type[nn.Module], **settings: object) -> None:
        super().__init__()
        self.rnn = kind(5, 7, **settings)
        self.is_lstm = kind is nn.LSTM
        self.batch_first = bool(settings.get("batch_first"))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, last = self.rnn(x if self.batch_first else x.transpose(0, 1))
        states = last if self.is_lstm else (last,)
        return (y if self.batch_first else y.transpose(0, 1), *(state.transpose(0, 1) for state in states))


SETTINGS = [
    {"num_layers": 1, "batch_first": True},
    {"num_layers": 2, "batch_first": False, "dropout": 0.3},
    {"num_layers": 2, "batch_first": True, "bidirectional": True},
    {"num_layers": 1, "batch_first": False, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["one", "two", "both", "unbiased"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_equals_torch_with_one_node_per_layer_and_direction(kind: type[nn.Module], settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Stack(kind, **settings).eval()
    graph = capture(model, torch.randn(2, 6, 5))
    assert graph.signature.inputs[0].shape == ("batch", "sequence", 5)
    nodes = [node for node in graph.module.graph.nodes if short_name(node) in ("lstm", "gru")]
    layers, directions = int(str(settings["num_layers"])), 2 if settings.get("bidirectional") else 1
    assert len(nodes) == layers * directions
    assert all(node.args[-5] == 1 and node.args[-2] is False for node in nodes)
    for batch, length in ((1, 6), (3, 1), (4, 9)):
        x = torch.randn(batch, length, 5)
        for ours, theirs in zip(graph.module(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_gradients_equal_torchs(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Stack(kind, num_layers=2, batch_first=True)
    graph = capture(model, torch.randn(2, 6, 5))
    set_mode(graph, training=True)
    x = torch.randn(3, 4, 5)
    graph.module(x)[0].square().sum().backward()
    model.train()
    model(x)[0].square().sum().backward()
    mine = dict(graph.module.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_dropout_lies_between_layers_only() -> None:
    graph = capture(Stack(nn.LSTM, num_layers=3, batch_first=True, dropout=0.4), torch.randn(2, 6, 5))
    nodes = [short_name(node) for node in graph.module.graph.nodes if short_name(node) in ("lstm", "dropout")]
    assert nodes == ["lstm", "dropout", "lstm", "dropout", "lstm"]
    set_mode(graph, training=True)
    x = torch.randn(2, 6, 5)
    assert not torch.equal(graph.module(x)[0], graph.module(x)[0])


def test_layers_do_not_share_an_initial_state() -> None:
    """Their hidden sizes must be free of each other when they are pruned."""
    graph = capture(Stack(nn.LSTM, num_layers=2, batch_first=True), torch.randn(2, 6, 5))
    first, second = (node for node in graph.module.graph.nodes if short_name(node) == "lstm")
    assert {short_name(node) for node in (*first.args[1], *second.args[1])} == {"zeros"}
    assert not set(first.args[1]) & set(second.args[1])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
@torch.no_grad()
def test_layers_whose_last_state_is_read_do_not_share_their_cells(kind: type[nn.Module], bidirectional: bool) -> None:
    """The states of all layers are one tensor, of which the last layer's alone are read."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 7, 3, batch_first=True, bidirectional=bidirectional)
            self.fc = nn.Linear(14 if bidirectional else 7, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[1]
            h = h[0] if kind is nn.LSTM else h
            return self.fc(torch.cat([h[-2], h[-1]], 1) if bidirectional else h[-1])

    torch.manual_seed(0)
    model = Last()
    graph = capture(model, torch.randn(2, 6, 5))
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    assert [group.units for group in analyse(graph).groups.values()] == [7] * (6 if bidirectional else 3)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell], ids=["lstm", "gru"])
def test_cells_become_linear_maps(kind: type[nn.Module]) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, 4)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            state = self.cell(x, (h, h) if kind is nn.LSTMCell else h)
            return state[0] if kind is nn.LSTMCell else state

    torch.manual_seed(0)
    model = Steps()
    graph = capture(model, (torch.randn(2, 3), torch.randn(2, 4)))
    assert "linear" in {short_name(node) for node in graph.module.graph.nodes}
    inputs = (torch.randn(5, 3), torch.randn(5, 4))
    torch.testing.assert_close(graph(inputs), model(*inputs), rtol=1e-5, atol=1e-6)
