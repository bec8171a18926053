"""Weights that take few different values, as an ONNX file keeps them: the values once, and for every weight which of them it is.

Nodes that both runtimes compute once, while they load, make the dense tensor again: what runs is the same as without. Up to 16 values
take half a byte for each weight (a byte looks up two of them at once), up to 256 one byte.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from planish.runtimes.packing import Chain, array_of, is_weight
from planish.runtimes.storage import packed_bytes

FEW, MANY = 16, 256
_LOOKED_AT = 4096
_NODES_BYTES = 400
"""What nodes and constants take besides the values and the numbers."""


def pack_codebooks(model: ir.Model) -> None:
    """Keep every weight that is worth it as numbers of values, in place; other weights, and what the model computes, stay as they are."""
    for number, value in enumerate(list(model.graph.initializers.values())):
        if is_weight(model.graph, value):
            values = array_of(value)
            distinct = _few(values)
            if distinct is not None and _bytes(values, len(distinct)) + _NODES_BYTES < _otherwise(values):
                _pack(model.graph, value, distinct, f"codebook{number}")


def _otherwise(values: NDArray[np.generic]) -> float:
    """What a weight may take to be left to others: three quarters of its bytes, or those of its values that are not zero."""
    return min(0.75 * values.nbytes, packed_bytes(values.size, int(np.count_nonzero(values)), values.dtype.itemsize))


def _few(values: NDArray[np.generic]) -> NDArray[np.generic] | None:
    """The values of a tensor, ascending, where they are few."""
    flat = values.reshape(-1)
    if len(np.unique(flat[:: max(1, len(flat) // _LOOKED_AT)])) > MANY:
        return None
    distinct = np.unique(flat)
    return distinct if len(distinct) <= MANY else None


def _bytes(values: NDArray[np.generic], count: int) -> float:
    each = values.dtype.itemsize
    return values.size / 2 + 2 * MANY * each if count <= FEW else values.size + MANY * each


def _pack(graph: ir.Graph, value: ir.Value, distinct: NDArray[np.generic], prefix: str) -> None:
    values, name, dtype = array_of(value), value.name, value.dtype
    assert name is not None and dtype is not None
    stored: NDArray[np.generic]
    table: NDArray[np.generic]
    numbers = np.searchsorted(distinct, values.reshape(-1)).astype(np.uint8)
    chain = Chain(graph, prefix)
    if len(distinct) <= FEW:
        padded = np.pad(numbers, (0, len(numbers) % 2))
        stored = padded[0::2] | (padded[1::2] << 4)
        filled = np.pad(distinct, (0, FEW - len(distinct)))
        table = np.stack([filled[np.arange(256) % FEW], filled[np.arange(256) // FEW]], axis=1)
    else:
        stored, table = numbers, distinct
    looked_up = chain.node("Gather", chain.constant(table), chain.node("Cast", chain.constant(stored), to=int(ir.DataType.INT32)))
    if len(distinct) <= FEW and len(numbers) % 2:
        flat = chain.shaped(looked_up, -1)
        start, end = chain.constant(np.array([0], np.int64)), chain.constant(np.array([len(numbers)], np.int64))
        looked_up = chain.node("Slice", flat, start, end)
    restored = chain.shaped(looked_up, *values.shape)
    ir.convenience.replace_all_uses_with(value, restored)
    graph.initializers.pop(name)
    restored.name, restored.dtype, restored.shape = name, dtype, ir.Shape(values.shape)
