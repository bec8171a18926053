"""Channels of an input that never vary in the data: padding of a feature vector, a dead sensor, a band that is always black."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Graph

_ROWS = 4096


def idle_channels(graph: Graph, splits: Iterable[Sequence[NDArray[Any]]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Input name -> (axis, channels that have the same value in every sample and at every position), for inputs that have any.

    The axis is 1, where channels of images and features of tables are; of sequences, [n, length, features], it is the last. At least one
    channel must vary.

    Args:
        graph: whose inputs they are; only floating-point inputs with channels of a fixed number count.
        splits: flat inputs of each split, [n, ...] each.
    """
    given = [list(inputs) for inputs in splits]
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for number, spec in enumerate(graph.signature.inputs):
        arrays = [inputs[number] for inputs in given if len(inputs[number]) > 1]
        axis = 2 if len(spec.shape) == 3 and isinstance(spec.shape[2], int) and not isinstance(spec.shape[1], int) else 1
        if not arrays or len(spec.shape) < 2 or not isinstance(spec.shape[axis], int) or arrays[0].dtype.kind != "f":
            continue
        same = _same(arrays, axis)
        if 0 < same.sum() < len(same):
            found[spec.name] = axis, tuple(np.flatnonzero(same).tolist())
    return found


def _same(arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[np.bool_]:
    """[channels], whether a channel has one value alone."""
    first = np.moveaxis(arrays[0][:1], axis, -1).reshape(-1, arrays[0].shape[axis])[0]
    same = np.ones(len(first), bool)
    for array in arrays:
        for start in range(0, len(array), _ROWS):
            if not same.any():
                return same
            rows = np.moveaxis(array[start : start + _ROWS], axis, -1).reshape(-1, len(first))
            same &= (rows == first).all(0)
    return same
