"""Operators that pass values on without changing them: a quantizer before one serves behind it too."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from planish.graph.modes import short_name

POOLS = frozenset({"mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})
RECTIFIERS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
PADDINGS = frozenset({"pad", "constant_pad_nd"})
MOVEMENTS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "permute",
        "transpose",
        "slice",
        "select",
        "expand",
        "contiguous",
        "clone",
        "dropout",
        "dropout_",
        "alias",
        "detach",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "pad",
        "constant_pad_nd",
    ]
)
"""Operators whose output lies on the grid of their input: moving values, taking their maximum, and padding with zeros."""


def moves(node: Node) -> bool:
    """Whether a node's output lies on the grid of its first argument, which has a quantizer if it is an activation."""
    name = short_name(node)
    if name not in MOVEMENTS or not node.args or not isinstance(node.args[0], Node) or node.args[0].op == "get_attr":
        return False
    if name == "pad":
        return node.args[2:3] in ((), ("constant",)) and node.args[3:4] in ((), (None,), (0,), (0.0,))
    if name == "constant_pad_nd":
        return node.args[2:3] in ((), (0,), (0.0,))
    return True


def argument(node: Node, position: int) -> Node:
    """The value that a node has at a position, which is no list and no number."""
    value = node.args[position]
    assert isinstance(value, Node), node.format_node()
    return value


def source_of(value: Node, is_wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted value that another is, or is moved from; None if there is none."""
    while not is_wanted(value):
        if not moves(value):
            return None
        value = argument(value, 0)
    return value


def is_rectified(node: Node) -> bool:
    """Whether values are at least zero because of a rectifier, which runtimes fuse into an int8 operator only if zero is the grid's lowest integer."""
    name = short_name(node)
    if name in ("relu", "relu_", "relu6"):
        return True
    return (name in POOLS or moves(node)) and is_rectified(argument(node, 0))
