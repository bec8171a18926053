"""LSTM and GRU in capture: every layer and direction becomes one `aten.lstm.input` / `aten.gru.input` node, with any sequence length.

`torch.export` would unroll the loop over time. During capture a `TorchFunctionMode` (thread-local, nothing is patched) catches
`torch.lstm` and `torch.gru`, splits them by layer and direction, and calls an operator with a fake kernel; `to_aten` then puts the
real operator in its place. The cells that a caller steps are written out as linear maps and gates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


@torch.library.custom_op("planish::lstm", mutates_args=())
def _lstm(x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], has_biases: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, h, c = aten.lstm.input(x, [h0, c0], weights, has_biases, 1, 0.0, False, False, batch_first)
    return y.clone(), h.clone(), c.clone()


@_lstm.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], has_biases: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weights[1].shape[1]), torch.empty_like(h0), torch.empty_like(c0)


@torch.library.custom_op("planish::gru", mutates_args=())
def _gru(x: Tensor, h0: Tensor, weights: list[Tensor], has_biases: bool, batch_first: bool) -> tuple[Tensor, Tensor]:
    y, h = aten.gru.input(x, h0, weights, has_biases, 1, 0.0, False, False, batch_first)
    return y.clone(), h.clone()


@_gru.register_fake
def _(x: Tensor, h0: Tensor, weights: list[Tensor], has_biases: bool, batch_first: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weights[1].shape[1]), torch.empty_like(h0)


def _layers(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    one: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The output and final states of a stack, by one call of `one` per layer and direction; `states` are `[layers * directions, B, H]`."""
    directions, each, time = (2 if bidirectional else 1), (4 if has_biases else 2), (1 if batch_first else 0)
    finals: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            initial = [state[index : index + 1] for state in states]
            value = torch.flip(x, [time]) if direction else x
            y, *last = one(value, *initial, list(weights[index * each : (index + 1) * each]), has_biases, batch_first)
            outputs.append(torch.flip(y, [time]) if direction else y)
            for final, state in zip(finals, last, strict=True):
                final.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < layers - 1:
            x = torch.dropout(x, dropout, False)
    return (x, *(torch.cat(final, 0) if len(final) > 1 else final[0] for final in finals))


def _is_stack(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments of the padded overload (`has_biases` is fourth), not of the packed one."""
    return len(args) == 9 and isinstance(args[3], bool)


def _lstm_cell(x: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> tuple[Tensor, Tensor]:
    gates = torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(hx[0], w_hh, b_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    xr, xz, xn = torch.nn.functional.linear(x, w_ih, b_ih).chunk(3, 1)
    hr, hz, hn = torch.nn.functional.linear(h, w_hh, b_hh).chunk(3, 1)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (1 - z) * n + z * h


class Recurrence(TorchFunctionMode):
    """While active, recurrent operators trace as one node per layer and direction, and cells as linear maps and gates."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            raise RuntimeError("_pack_padded_sequence gives a tensor whose shape depends on the values of the lengths")
        if kwargs:
            return func(*args, **kwargs)
        if func is torch.lstm and _is_stack(args) and args[1][0].shape[-1] == args[1][1].shape[-1]:
            x, states, weights, biases, layers, dropout, _, both, first = args
            return _layers(x, states, weights, biases, layers, dropout, both, first, torch.ops.planish.lstm)
        if func is torch.gru and _is_stack(args):
            x, state, weights, biases, layers, dropout, _, both, first = args
            return _layers(x, [state], weights, biases, layers, dropout, both, first, torch.ops.planish.gru)
        if func is torch.lstm_cell:
            return _lstm_cell(*args)
        if func is torch.gru_cell:
            return _gru_cell(*args)
        return func(*args)


def to_aten(graph: fx.Graph) -> None:
    """Put the real operators in the place of those that capture traced, each with an initial state of its own, in place."""
    for node in list(graph.nodes):
        if node.target is torch.ops.planish.lstm.default:
            x, h, c, weights, biases, first = node.args
            node.target = aten.lstm.input
            node.args = (x, [_own_state(h, node), _own_state(c, node)], weights, biases, 1, 0.0, False, False, first)
        elif node.target is torch.ops.planish.gru.default:
            x, h, weights, biases, first = node.args
            node.target = aten.gru.input
            node.args = (x, _own_state(h, node), weights, biases, 1, 0.0, False, False, first)


def pick_states(graph: fx.Graph) -> None:
    """Read a layer's final state where it is made, in place of selecting it from the states of all layers, which are one tensor.

    As parts of one tensor the layers would share their hidden size: `_, (h, _) = lstm(x)` and `h[-1]`, in which one layer is read.
    """
    for node in list(graph.nodes):
        if node.target is not aten.select.int or node.args[1] != 0 or not isinstance(node.args[2], int):
            continue
        states = node.args[0]
        if states.target is not aten.cat.default or (len(states.args) > 1 and states.args[1] != 0):
            continue
        parts = states.args[0]
        if not all(_is_final_state(part) for part in parts):
            continue
        node.args = (parts[node.args[2]], 0, 0)


def _is_final_state(node: fx.Node) -> bool:
    """Whether this is the last hidden or cell state `[1, batch, hidden]` of one layer and direction."""
    if node.target is not operator.getitem or node.args[1] == 0:
        return False
    layer = node.args[0]
    return isinstance(layer, fx.Node) and layer.target in (aten.lstm.input, aten.gru.input)


def from_aten(graph: fx.Graph) -> None:
    """The inverse of `to_aten`, for tracing again: the operators that have a fake kernel, in place."""
    for node in graph.nodes:
        if node.target is aten.lstm.input:
            x, (h, c), weights, biases, *_, first = node.args
            node.target, node.args = torch.ops.planish.lstm.default, (x, h, c, weights, biases, first)
        elif node.target is aten.gru.input:
            x, h, weights, biases, *_, first = node.args
            node.target, node.args = torch.ops.planish.gru.default, (x, h, weights, biases, first)


def _own_state(state: fx.Node, user: fx.Node) -> fx.Node:
    """A slice of a constant fill becomes a fill of its own, so that layers do not share a hidden size through their initial state."""
    if state.target is not aten.slice.Tensor:
        return state
    source = state.args[0]
    if not isinstance(source, fx.Node) or source.target is not aten.zeros.default:
        return state
    sizes = source.args[0]
    assert isinstance(sizes, (list, tuple))
    with user.graph.inserting_before(user):
        own = user.graph.call_function(aten.zeros.default, ([1, *sizes[1:]],), dict(source.kwargs))
    own.meta = dict(state.meta)
    return own
