"""The ONNX forms of LSTM and GRU: float, weights stored as int8, and ONNX Runtime's LSTM that rounds its input and state at every step."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.onnx.ops
from torch import Tensor, fx

from planish.graph.fake_quantize import PER_CHANNEL, dynamic_lstm
from planish.graph.interpret import attribute
from planish.graph.parts import parameter_of
from planish.graph.qdq import held
from planish.runtimes.onnx_schemes import rounded_rows

aten = torch.ops.aten
_LSTM_GATES = (0, 3, 1, 2)  # torch keeps i, f, g, o; ONNX i, o, f, c
_GRU_GATES = (1, 0, 2)  # torch keeps r, z, n; ONNX z, r, h
_DEQUANTIZED = "planish::Dequantized"


def pack_recurrent(module: fx.GraphModule) -> None:
    """Replace LSTM and GRU nodes by forms for export alone, whose weights have ONNX's layout and order of gates, in place.

    Rounded weights are kept as int8. `DynamicQuantizeLSTM` is ONNX Runtime's alone.
    """
    for node in list(module.graph.nodes):
        if node.target not in (aten.lstm.input, aten.gru.input, dynamic_lstm):
            continue
        x, state, weights, biased, *_, first = node.args
        states = [state] if node.target is aten.gru.input else list(state)
        gates = _GRU_GATES if node.target is aten.gru.input else _LSTM_GATES
        matrices = list(zip((f"{node.name}_w", f"{node.name}_r"), weights[:2], strict=True))
        with module.graph.inserting_before(node):
            bias = _bias(module, node.name, weights[2:] if biased else (), weights[0], gates)
            if node.target is dynamic_lstm:
                integers = [_int8(module, name, weight, gates) for name, weight in matrices]
                # the operator rounds its input itself
                node.args, node.target = (x.args[0], *states, *integers[0], *integers[1], bias, first), _dynamic
            else:
                values = [_matrix(module, name, weight, gates) for name, weight in matrices]
                node.args = (x, *states, *values, bias, first)
                node.target = torch.ops.planish.onnx_gru.default if node.target is aten.gru.input else torch.ops.planish.onnx_lstm.default
    module.graph.eliminate_dead_code()


def _parameter(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = attribute(module, str(node.target))
    return value.detach()


def _ordered(value: Tensor, gates: Sequence[int]) -> Tensor:
    """Rows of all gates in ONNX's order."""
    each = value.chunk(len(gates))
    return torch.cat([each[gate] for gate in gates])


def _bias(module: fx.GraphModule, name: str, biases: Sequence[fx.Node], weight: fx.Node, gates: Sequence[int]) -> fx.Node:
    """Both biases [1, 2 * rows], zero where there are none."""
    parameter = parameter_of(weight)
    assert parameter is not None
    values = [_ordered(_parameter(module, bias), gates) for bias in biases] or [torch.zeros(2 * len(_parameter(module, parameter)))]
    return held(module, f"{name}_b", torch.cat(values).unsqueeze(0))


def _int8(module: fx.GraphModule, name: str, rounding: fx.Node, gates: Sequence[int]) -> tuple[fx.Node, fx.Node]:
    """A rounded matrix as int8 [1, inputs, rows], and its scales [rows, 1], in ONNX's order of gates."""
    integers, scales = rounded_rows(module, rounding)
    stored = held(module, f"{name}_int8", _ordered(integers, gates).t().unsqueeze(0).contiguous())
    return stored, held(module, f"{name}_scales", _ordered(scales, gates).unsqueeze(1))


def _matrix(module: fx.GraphModule, name: str, weight: fx.Node, gates: Sequence[int]) -> fx.Node:
    """A matrix [1, rows, inputs] in float: as it is stored, or made from int8."""
    if weight.target is not PER_CHANNEL:
        return held(module, name, _ordered(_parameter(module, weight), gates).unsqueeze(0))
    stored, scales = _int8(module, name, weight, gates)
    return module.graph.call_function(_dequantized, (stored, scales))


def _dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """What `write_dequantized` spells out: the exporter would compute it where a layer is small, and store floats."""
    _, inputs, rows = integers.shape
    return torch.onnx.ops.symbolic(_DEQUANTIZED, (integers, scales), dtype=torch.float32, shape=(1, rows, inputs), version=1)


def write_dequantized(model: ir.Model) -> None:
    """Spell out how matrices become float, in place, so that both runtimes do it when they load the model.

    Calls then take what those of a float layer take. ONNX Runtime would carry out a `DequantizeLinear` in every call (8 % of an LSTM with 128
    cells). OpenVINO keeps one, and also a conversion that is multiplied at once, for later wherever something else in the model is in static int8,
    and then refuses the layer: hence the transposition.
    """
    domain, _, kind = _DEQUANTIZED.partition("::")
    for node in list(model.graph):
        if (node.domain, node.op_type) != (domain, kind):
            continue
        integers, scales = node.inputs
        cast = ir.Node("", "Cast", [integers], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        turned = ir.Node("", "Transpose", cast.outputs, [ir.AttrInt64s("perm", [0, 2, 1])])
        scaled = ir.Node("", "Mul", [turned.outputs[0], scales])
        model.graph.insert_before(node, [cast, turned, scaled])
        ir.convenience.replace_all_uses_with(node.outputs[0], scaled.outputs[0])
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(domain, None)


def _dynamic(
    x: Tensor, h: Tensor, c: Tensor, w: Tensor, w_scales: Tensor, r: Tensor, r_scales: Tensor, bias: Tensor, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    steps = x.transpose(0, 1) if batch_first else x
    w_scales, r_scales = w_scales.t(), r_scales.t()
    zeros = torch.zeros_like(w_scales, dtype=torch.int8)
    y, h, c = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::DynamicQuantizeLSTM",
        (steps, w, r, bias, None, h, c, None, w_scales, zeros, r_scales, zeros),
        attrs={"hidden_size": r.shape[1]},
        dtypes=(torch.float32,) * 3,
        shapes=((steps.shape[0], 1, steps.shape[1], r.shape[1]), h.shape, c.shape),
        version=1,
    )
    y = y.squeeze(1)
    return y.transpose(0, 1) if batch_first else y, h, c
