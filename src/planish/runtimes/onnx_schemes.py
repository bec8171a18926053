"""The ONNX forms of schemes that have no quantize / dequantize pairs: dynamic int8, weights in groups, rows of int8 embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
import torch.onnx.ops
from torch import Tensor, fx
from torch.nn.functional import pad

from planish.graph.attention import trace_attention
from planish.graph.fake_quantize import PER_CHANNEL, along_groups, fake_quantize_dynamic, fake_quantize_per_group
from planish.graph.graph import Graph
from planish.graph.interpret import attribute
from planish.graph.parts import Parts, bias_of, parameter_of, parts_of
from planish.graph.qdq import held

aten = torch.ops.aten
onnx = torch.onnx.ops
_VERSION = 18


def to_onnx_schemes(graph: Graph) -> Graph:
    """A copy in which operators of these schemes call what the exporter turns into ONNX's own operators; it cannot be run.

    `DynamicQuantizeLinear` and `MatMulInteger` are of the standard; `MatMulNBits` is ONNX Runtime's, and OpenVINO reads it too. Rows of an
    embedding are gathered as int8 and then multiplied with their scales, so that nothing is done to the rest of the table.
    """
    changed = graph.copy()
    module = changed.module
    trace_attention(module)
    for node in list(module.graph.nodes):
        parts = parts_of(node)
        if not isinstance(parts, Parts) or parts.weight is None:
            continue
        weight = node.args[parts.weight]
        assert isinstance(weight, fx.Node)
        rounding = weight if weight.target is not aten.t.default else weight.args[0]
        assert isinstance(rounding, fx.Node)
        if rounding.target is fake_quantize_per_group:
            _by_groups(module, node, parts, rounding)
        elif rounding.target is PER_CHANNEL and parts.kind == "embedding":
            _rows(module, node, rounding)
        elif rounding.target is PER_CHANNEL and _is_dynamic(node.args[parts.activations[0]]):
            _dynamically(module, node, parts, rounding)
    module.graph.eliminate_dead_code()
    changed.module = fx.GraphModule(module, module.graph)
    return changed


def drop_zero_points(model: ir.Model) -> None:
    """Weights of transposed convolutions are dequantized without a zero point, which is 0 by default, in place.

    The exporter keeps equal constants once, and of two weights that share theirs OpenVINO computes the transposed convolution in float, and the
    operators around it too, as soon as the model gets a shape that the file leaves open.
    """
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "ConvTranspose" else None
        rounding = weight.producer() if weight is not None else None
        if rounding is not None and rounding.op_type == "DequantizeLinear":
            rounding.replace_input_with(2, None)


def _is_dynamic(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target in (fake_quantize_dynamic, _quantized)


def _constants(module: fx.GraphModule, rounding: fx.Node) -> list[Tensor]:
    """The parameter that a node rounds (through a transposition), its scale and its zero point."""
    parameter = parameter_of(rounding)
    assert parameter is not None
    return [attribute(module, str(node.target)).detach() for node in (parameter, *rounding.args[1:3])]  # type: ignore[union-attr]


def _integers(weight: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    return (weight * scale.reciprocal()).round().add(zero_point).clamp(low, high)


def rounded_rows(module: fx.GraphModule, rounding: fx.Node) -> tuple[Tensor, Tensor]:
    """A weight as int8 and its scales, for a quantizer that is symmetric along one axis."""
    weight, scale, zero_point = _constants(module, rounding)
    _, _, _, axis, low, high = rounding.args
    assert isinstance(low, int) and isinstance(high, int)
    shape = [-1 if axis == d else 1 for d in range(weight.dim())]
    return _integers(weight, scale.view(shape), zero_point.view(shape), low, high).to(torch.int8), scale


def _replace(node: fx.Node, value: fx.Node) -> None:
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _dynamically(module: fx.GraphModule, node: fx.Node, parts: Parts, rounding: fx.Node) -> None:
    weight, scale = rounded_rows(module, rounding)
    activation = node.args[parts.activations[0]]
    assert isinstance(activation, fx.Node)
    if activation.target is fake_quantize_dynamic:
        with module.graph.inserting_before(activation):
            integers = module.graph.call_function(_quantized, (activation.args[0],))
        activation.replace_all_uses_with(integers)
        activation = integers
    with module.graph.inserting_before(node):
        stored = held(module, f"{rounding.name}_int8", (weight if parts.axis else weight.t()).contiguous())
        scales = held(module, f"{rounding.name}_scales", scale)
        _replace(node, module.graph.call_function(_dynamic_product, (activation, stored, scales, bias_of(node))))


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    integers, scale, zero_point = onnx.symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x,),
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
        version=_VERSION,
    )
    return integers, scale, zero_point


def _dynamic_product(quantized: tuple[Tensor, Tensor, Tensor], weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`weight`: int8, [inputs, outputs]."""
    integers, scale, zero_point = quantized
    shape = (*integers.shape[:-1], weight.shape[1])
    sums = onnx.symbolic("MatMulInteger", (integers, weight, zero_point), dtype=torch.int32, shape=shape, version=_VERSION)
    product = sums.to(torch.float32) * (scale * scales)
    return product if bias is None else product + bias


def _rows(module: fx.GraphModule, node: fx.Node, rounding: fx.Node) -> None:
    weight, scale = rounded_rows(module, rounding)
    with module.graph.inserting_before(node):
        read = [held(module, f"{rounding.name}_int8", weight), held(module, f"{rounding.name}_scales", scale[:, None])]
    look_up_rows(node, read)


def look_up_rows(node: fx.Node, read: Sequence[fx.Node]) -> None:
    """Puts a look-up of int8 rows, which are then multiplied with their scales, in the place of an embedding.

    Args:
        read: the nodes of the rows, int8 [rows, width], and of their scales, float32 [rows, 1].
    """
    with node.graph.inserting_before(node):
        _replace(node, node.graph.call_function(_scaled_rows, (*read, node.args[1])))


def _scaled_rows(weight: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    rows: Tensor = aten.embedding.default(weight, indices)
    factors: Tensor = aten.embedding.default(scales, indices)
    return rows.to(torch.float32) * factors


def _by_groups(module: fx.GraphModule, node: fx.Node, parts: Parts, rounding: fx.Node) -> None:
    weight, scale, zero_point = _constants(module, rounding)
    _, _, _, group, low, high = rounding.args
    assert isinstance(group, int) and isinstance(low, int) and isinstance(high, int)
    matrix = weight.t() if parts.axis else weight
    tensors = packed_groups(matrix, scale, zero_point, group, low, high)
    with module.graph.inserting_before(node):
        read = [held(module, f"{rounding.name}_{name}", tensor) for name, tensor in tensors.items()]
    multiply_by_groups(node, parts, read, matrix.shape[1], len(matrix), (high - low).bit_length(), group)


def packed_groups(matrix: Tensor, scale: Tensor, zero_point: Tensor, group: int, low: int, high: int) -> dict[str, Tensor]:
    """What `MatMulNBits` keeps of a matrix `[rows, columns]` whose groups have these scales and zero points, `[rows, groups]`.

    Returns:
        "packed", uint8 [rows, groups, bytes of a group]; "scales", float32 [rows, groups]; "zeros", uint8 [rows, bytes of the groups].
    """
    scales, zeros = (along_groups(values, group, matrix.shape[1]) for values in (scale, zero_point))
    bits = (high - low).bit_length()
    columns = scale.shape[1] * group
    packed = _packed(pad(_integers(matrix, scales, zeros, low, high).to(torch.uint8), (0, columns - matrix.shape[1])), bits)
    return {
        "packed": packed.reshape(len(matrix), scale.shape[1], -1).contiguous(),
        "scales": scale,
        "zeros": _packed(zero_point.to(torch.uint8), bits).contiguous(),
    }


def multiply_by_groups(node: fx.Node, parts: Parts, read: Sequence[fx.Node], inputs: int, outputs: int, bits: int, group: int) -> None:
    """Puts `MatMulNBits` in the place of an operator; `read` are the nodes of `packed_groups`, in its order."""
    with node.graph.inserting_before(node):
        arguments = (node.args[parts.activations[0]], *read, bias_of(node), inputs, outputs, bits, group)
        _replace(node, node.graph.call_function(_grouped_product, arguments))


def _packed(values: Tensor, bits: int) -> Tensor:
    """Values of 8 bits as they are; of 4 bits two in a byte, the first in its lower half, rows filled up with a zero."""
    if bits == 8:
        return values
    values = pad(values, (0, values.shape[1] % 2))
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _grouped_product(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, inputs: int, outputs: int, bits: int, group: int
) -> Tensor:
    product = onnx.symbolic(
        "com.microsoft::MatMulNBits",
        (x, packed, scales, zeros),
        attrs={"K": inputs, "N": outputs, "bits": bits, "block_size": group, "accuracy_level": 0},
        dtype=torch.float32,
        shape=(*x.shape[:-1], outputs),
        version=1,
    )
    return product if bias is None else product + bias
