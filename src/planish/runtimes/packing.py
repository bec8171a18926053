"""Weights that hold many zeros, as an ONNX file keeps them: a bit for every weight, and the values of those that are not zero.

Nodes that both runtimes compute once, while they load, make the dense tensor of them again: what runs is the same as without. ONNX's own
sparse initializers were tried first: OpenVINO refuses them, and ONNX Runtime's indices take 2 bytes for each value at the least, so that int8
weights gain nothing below 67 % zeros (decision 016).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from planish.runtimes.storage import is_worth_packing

_READERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "DequantizeLinear", "Transpose", "Gather"})
_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8)
_MOST_COUNTED = 2**24
"""Positions are counted in fp32, the only type in which OpenVINO sums while it loads: whole numbers are exact up to here."""


def pack_zeros(model: ir.Model) -> None:
    """Keep every weight that is worth it as bits and values, in place; other weights, and what the model computes, stay as they are."""
    groups: dict[ir.DataType, list[list[ir.Value]]] = {}
    for value in model.graph.initializers.values():
        if _is_packable(model.graph, value):
            assert value.const_value is not None
            lists = groups.setdefault(value.const_value.dtype, [[]])
            if sum(_nonzero(other) for other in [*lists[-1], value]) > _MOST_COUNTED:
                lists.append([])
            lists[-1].append(value)
    numbered = [(dtype, values) for dtype, lists in groups.items() for values in lists if values]
    for number, (dtype, values) in enumerate(numbered):
        _pack(model.graph, values, f"packed{number}", dtype)


def _array(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _nonzero(value: ir.Value) -> int:
    return int(np.count_nonzero(_array(value)))


def _is_packable(graph: ir.Graph, value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _TYPES or value in graph.inputs or value in graph.outputs:
        return False
    readers = [use.node.op_type for use in value.uses()]
    if not readers or not _READERS.issuperset(readers) or len(tensor.shape) < 2:
        return False
    count = math.prod(tensor.shape.numpy())
    return is_worth_packing(count, _nonzero(value), tensor.dtype.itemsize) and 0 < _nonzero(value) <= _MOST_COUNTED


def _pack(graph: ir.Graph, values: list[ir.Value], prefix: str, dtype: ir.DataType) -> None:
    """One chain of nodes for several weights of a type: bits, running count of those that are set, values by that count (0: the zero)."""
    flat = np.concatenate([_array(value).reshape(-1) for value in values])
    is_set = flat != 0
    first = next(iter(graph))
    names = iter(f"{prefix}_{number}" for number in range(10_000))

    def constant(array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array))
        held = ir.Value(name=next(names), shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(held)
        return held

    def node(kind: str, inputs: list[ir.Value], outputs: int = 1, **attributes: int) -> ir.Value:
        made = ir.Node("", kind, inputs, [ir.AttrInt64(key, number) for key, number in attributes.items()], num_outputs=outputs)
        for output in made.outputs:
            output.name = next(names)
        graph.insert_before(first, made)
        return made.outputs[0]

    powers = 2.0 ** np.arange(9, dtype=np.float32)
    packed = node("Cast", [constant(np.packbits(is_set, bitorder="little")[:, None])], to=int(ir.DataType.FLOAT))
    above, here = (node("Floor", [node("Div", [packed, constant(part[None])])]) for part in (powers[1:], powers[:-1]))
    bits = node("Sub", [here, node("Mul", [above, constant(np.array(2, np.float32))])])
    bits = node("Reshape", [bits, constant(np.array([-1], np.int64))])
    counted = node("Mul", [bits, node("CumSum", [bits, constant(np.array(0, np.int64))])])
    table = constant(np.concatenate([np.zeros(1, flat.dtype), flat[is_set]]))
    dense = node("Gather", [table, node("Cast", [counted], to=int(ir.DataType.INT32))])
    sizes = [_array(value).size for value in values]
    rest = -len(flat) % 8
    lengths = constant(np.array([*sizes, rest] if rest else sizes, np.int64))
    pieces = node("Split", [dense, lengths], outputs=len(sizes) + bool(rest), axis=0).producer()
    assert pieces is not None
    for value, piece in zip(values, pieces.outputs, strict=False):
        name, array = value.name, _array(value)
        assert name is not None
        whole = node("Reshape", [piece, constant(np.array(array.shape, np.int64))])
        ir.convenience.replace_all_uses_with(value, whole)
        graph.initializers.pop(name)
        whole.name, whole.dtype, whole.shape = name, dtype, ir.Shape(array.shape)
