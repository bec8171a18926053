"""Weights that hold many zeros, as an ONNX file keeps them: a bit for every weight, and the values of those that are not zero.

Nodes that both runtimes compute once, while they load, make the dense tensor of them again: what runs is the same as without. ONNX's own
sparse initializers were tried first: OpenVINO refuses them, and ONNX Runtime's indices take 2 bytes for each value at the least, so that int8
weights gain nothing below 67 % zeros (decision 017).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from planish.runtimes.storage import is_worth_packing, packed_bytes

_READERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "DequantizeLinear", "Transpose", "Gather"})
_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8)
_CHAIN_BYTES = 4096
"""Nodes and constants that make weights of bits take 2.5 KB for all weights of a type, and some 130 bytes for each."""
_MOST_COUNTED = 2**24
"""Positions are counted in fp32, the only type in which OpenVINO sums while it loads: whole numbers are exact up to here."""


def pack_zeros(model: ir.Model) -> None:
    """Keep every weight that is worth it as bits and values, in place; other weights, and what the model computes, stay as they are."""
    groups: dict[ir.DataType, list[list[ir.Value]]] = {}
    counted: dict[ir.DataType, int] = {}
    saved: dict[ir.DataType, float] = {}
    for value in model.graph.initializers.values():
        nonzero = _packable(model.graph, value)
        if not nonzero or value.dtype is None:
            continue
        saved[value.dtype] = (
            saved.get(value.dtype, 0.0) + array_of(value).nbytes - packed_bytes(array_of(value).size, nonzero, value.dtype.itemsize)
        )
        lists = groups.setdefault(value.dtype, [])
        if not lists or counted[value.dtype] + nonzero > _MOST_COUNTED:
            lists.append([])
            counted[value.dtype] = 0
        lists[-1].append(value)
        counted[value.dtype] += nonzero
    numbered = [(dtype, values) for dtype, lists in groups.items() for values in lists if saved[dtype] > _CHAIN_BYTES * len(lists)]
    for number, (dtype, values) in enumerate(numbered):
        _pack(model.graph, values, f"packed{number}", dtype)


def _packable(graph: ir.Graph, value: ir.Value) -> int:
    """How many of a weight's values are not zero, where it is worth packing; else 0."""
    tensor = value.const_value
    if tensor is None or not is_weight(graph, value):
        return 0
    count, nonzero = math.prod(tensor.shape.numpy()), int(np.count_nonzero(array_of(value)))
    return nonzero if nonzero <= _MOST_COUNTED and is_worth_packing(count, nonzero, tensor.dtype.itemsize) else 0


def is_weight(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether a constant is a matrix or kernel that operators read which runtimes have ready before they run."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _TYPES or value in graph.inputs or value in graph.outputs:
        return False
    readers = [use.node.op_type for use in value.uses()]
    return bool(readers) and _READERS.issuperset(readers) and len(tensor.shape) >= 2


def array_of(value: ir.Value) -> NDArray[np.generic]:
    """The numbers of a constant."""
    assert value.const_value is not None
    return value.const_value.numpy()


class Chain:
    """Nodes and constants at the start of a graph, with names of their own."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self._first = graph, next(iter(graph))
        self._names = (f"{prefix}_{number}" for number in itertools.count())

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """A new constant."""
        tensor = ir.tensor(np.ascontiguousarray(array))
        held = ir.Value(name=next(self._names), shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(held)
        return held

    def node(self, kind: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> ir.Value:
        """The first output of a new node."""
        made = ir.Node("", kind, inputs, [ir.AttrInt64(key, number) for key, number in attributes.items()], num_outputs=outputs)
        for output in made.outputs:
            output.name = next(self._names)
        self.graph.insert_before(self._first, made)
        made.name = ""  # the name that a graph gives costs 16 bytes
        return made.outputs[0]

    def shaped(self, value: ir.Value, *shape: int) -> ir.Value:
        """The same numbers in another shape."""
        return self.node("Reshape", value, self.constant(np.array(shape, np.int64)))


def _pack(graph: ir.Graph, values: list[ir.Value], prefix: str, dtype: ir.DataType) -> None:
    """One chain of nodes for several weights of a type: bits, the number of each value, and the values in that order behind a zero.

    What can be done for a byte, or for each of the 256 that there are, is: every node's result is copied while ONNX Runtime loads. Bytes are
    counted down the columns of a matrix that is about square: a step of a running sum takes ONNX Runtime a microsecond, however wide it is.
    """
    flat = np.concatenate([array_of(value).reshape(-1) for value in values])
    height = max(1, round(math.sqrt(len(flat) / 8)))
    width = -(-len(flat) // (8 * height))
    padded = np.pad(flat, (0, 8 * height * width - len(flat)))
    counted = padded.reshape(height, width, 8).swapaxes(0, 1)  # down the columns
    chain = Chain(graph, prefix)
    node, real, whole = chain.node, int(ir.DataType.FLOAT), int(ir.DataType.INT32)

    # of each of 256 bytes [256, 8]: for a bit that is set the number of its value within the byte, from 1 on; far below zero for others
    every = node("Cast", chain.constant(np.arange(256, dtype=np.uint8)[:, None]), to=real)
    halves = 0.5 ** np.arange(9, dtype=np.float32)
    here, above = (node("Floor", node("Mul", every, chain.constant(part))) for part in (halves[:-1], halves[1:]))
    bits = node("Sub", here, node("Add", above, above))
    inside = node("CumSum", bits, chain.constant(np.array(1, np.int64)))
    unset = node(
        "Mul", node("Sub", bits, chain.constant(np.array(1, np.float32))), chain.constant(np.array(2.0 * _MOST_COUNTED, np.float32))
    )
    places = node("Cast", node("Add", inside, unset), to=whole)

    # of each stored byte [height * width, 1]: how many values come before its own
    stored = node("Cast", chain.constant(np.packbits(padded != 0, bitorder="little")), to=whole)
    counts = node("ReduceSum", bits, chain.constant(np.array([1], np.int64)), keepdims=0)
    grid = chain.shaped(node("Gather", counts, stored), height, width)
    columns = node("ReduceSum", grid, chain.constant(np.array([0], np.int64)))
    left = node("CumSum", columns, chain.constant(np.array(1, np.int64)), exclusive=1)
    upper = node("CumSum", grid, chain.constant(np.array(0, np.int64)), exclusive=1)
    before = chain.shaped(node("Cast", node("Add", upper, left), to=whole), -1, 1)

    # of each weight: its value, which is the first of the table where its bit is not set
    number = node("Max", node("Add", node("Gather", places, stored), before), chain.constant(np.array(0, np.int32)))
    table = chain.constant(np.concatenate([np.zeros(1, flat.dtype), counted[counted != 0]]))
    sizes = [array_of(value).size for value in values]
    lengths = [*sizes, len(padded) - len(flat)] if len(padded) > len(flat) else sizes
    dense = chain.shaped(node("Gather", table, number), -1)
    pieces = node("Split", dense, chain.constant(np.array(lengths, np.int64)), outputs=len(lengths), axis=0).producer()
    assert pieces is not None
    for value, piece in zip(values, pieces.outputs, strict=False):
        name, shape = value.name, array_of(value).shape
        assert name is not None
        restored = chain.shaped(piece, *shape)
        ir.convenience.replace_all_uses_with(value, restored)
        graph.initializers.pop(name)
        restored.name, restored.dtype, restored.shape = name, dtype, ir.Shape(shape)
