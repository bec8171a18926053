"""What a model file says and keeps beyond its format: the type of its floats, and weights that hold many zeros as bits and values."""

from __future__ import annotations

FLOATS = "floats"
"""The key of the metadata that names the type in which floating-point operators are to be computed, where that is not fp32."""

_WORTH = 0.75
_LEAST_BYTES = 2048
"""Of a weight: the nodes that restore its shape take some 130 bytes."""


def packed_bytes(count: float, nonzero: float, each: float) -> float:
    """Bytes of `count` weights of `each` bytes, of which so many are not zero: the fewer of dense and packed, where packing is worth it."""
    return count / 8 + nonzero * each if is_worth_packing(count, nonzero, each) else count * each


def is_worth_packing(count: float, nonzero: float, each: float) -> bool:
    """Whether a file keeps a weight as bits and values: where that saves a quarter of it at least, and it is not tiny."""
    dense = count * each
    return dense >= _LEAST_BYTES and count / 8 + nonzero * each <= _WORTH * dense
