"""Concatenations in int8: all parts and the whole lie on one grid, so that bytes are moved and none is rounded again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch.fx import Node

from planish.graph.modes import short_name
from planish.quantize.arithmetic import Quantizer, quantizer_from_range
from planish.quantize.movements import is_rectified, source_of


def parts_of_concatenation(node: Node) -> tuple[Node, ...]:
    """The values that a node concatenates; empty where it does not, or where one of them is a parameter or no floating-point value."""
    if short_name(node) != "cat" or not isinstance(node.args[0], (list, tuple)):
        return ()
    parts = tuple(part for part in node.args[0] if isinstance(part, Node) and part.op != "get_attr")
    values = [part.meta.get("val") for part in parts]
    is_float = all(not isinstance(value, torch.Tensor) or value.is_floating_point() for value in values)
    return parts if is_float and len(parts) == len(node.args[0]) else ()


def grids_in_common(concatenations: Iterable[Node], values: Collection[Node], order: Mapping[Node, int]) -> dict[Node, tuple[Node, ...]]:
    """Values that must share a quantizer: the last of each set -> all of them, in the order of the program.

    Args:
        concatenations: those that are int8. One without a quantizer behind it (a rectifier comes between) leaves its parts their own, as
            does one of parts of which only some are rectified: their grid in common would begin below zero, and ONNX Runtime run what
            issues the rectified ones in float.
        values: that have a quantizer.
        order: of the nodes.
    """
    sets: list[set[Node]] = []
    for node in concatenations:
        parts = [source_of(part, values.__contains__) for part in parts_of_concatenation(node)]
        joined = {node, *(part for part in parts if part is not None)}
        if node not in values or None in parts or len({_is_rectified(part) for part in joined}) > 1:
            continue
        for other in [known for known in sets if known & joined]:
            joined |= other
            sets.remove(other)
        sets.append(joined)
    return {max(found, key=order.__getitem__): tuple(sorted(found, key=order.__getitem__)) for found in sets}


def _is_rectified(value: Node) -> bool:
    return all(map(_is_rectified, found)) if (found := parts_of_concatenation(value)) else is_rectified(value)


def with_shared(found: Mapping[str, Quantizer], shared: Mapping[str, tuple[str, ...]]) -> dict[str, Quantizer]:
    """Quantizers of which those that are shared cover the ranges of all values that share them.

    Args:
        found: value -> the quantizer that suits it.
        shared: value -> the values that have its quantizer, itself among them.
    """
    out = dict(found)
    for value, members in shared.items():
        known = [found[member] for member in members if member in found]
        if value in found:
            low, high = torch.stack([quantizer.low for quantizer in known]), torch.stack([quantizer.high for quantizer in known])
            out[value] = quantizer_from_range(low.amin(0), high.amax(0), found[value].grid)
    return out
