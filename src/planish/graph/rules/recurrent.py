"""LSTM and GRU, a layer and direction at a time, and their cells: a hidden unit is one unit, with its row in every gate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}


def tie_cell(step: Step, x: Val, states: Sequence[Val], parameters: Sequence[Val]) -> Tensor | None:
    """Tie one layer: weights `[gates * hidden, input]` and `[gates * hidden, hidden]`, biases, states `[..., hidden]`; its hidden ids."""
    gates = GATES[step.name]
    into, recurrent = parameters[0], parameters[1]
    hidden = recurrent.shape[1]
    if recurrent.shape[0] != gates * hidden or 1 not in recurrent.ids:
        return None
    ids = recurrent.ids[1]
    step.ids.contract(x, x.rank - 1, into, 1, step.why)
    step.ids.role(into, 1, "in")
    for val in parameters:
        step.ids.role(val, 0, "out")
        step.ids.tie(val.ids[0].view(gates, hidden), ids[None], step.why)
    step.ids.role(recurrent, 1, "in")
    for state in states:
        last = state.rank - 1
        if last in state.ids:
            step.ids.tie(state.ids[last], ids, step.why)
        else:
            step.ids.fix(ids, step.why)
    return ids


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(step: Step) -> Result | None:
    """One layer in one direction, as capture leaves them; several at once (or a projection) are not covered."""
    if "params" not in step.arguments or "data" in step.arguments or step.value("num_layers") != 1 or step.value("bidirectional"):
        return None
    x, parameters = step.tensor("input"), step.vals("params")
    ids = tie_cell(step, x, step.vals("hx"), parameters)
    if ids is None:
        return None
    step.ids.fix_all(x, f"it is the sequence of {step.why}", range(x.rank - 1))
    return [Val(shape, {len(shape) - 1: ids}) for shape in step.shapes if shape is not None]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(step: Step) -> Result | None:
    """One step of one layer."""
    parameters = [val for val in (step.val(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")) if val is not None]
    ids = tie_cell(step, step.tensor("input"), step.vals("hx"), parameters)
    if ids is None:
        return None
    outs: list[Val | None] = [Val(shape, {1: ids}) for shape in step.shapes if shape is not None]
    return outs if len(outs) > 1 else outs[0]
