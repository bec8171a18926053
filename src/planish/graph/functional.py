"""In-place operators of a traced program become functional ones, so that a value never changes after it was computed."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_DUNDER = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}


def _returns_view(node: fx.Node) -> bool:
    """Whether the node's result may share memory with its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    if node.target in (aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.flatten.using_ints):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _functional(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.relu.default` for `aten.relu_.default`, `aten.pow.Tensor_Scalar` for `aten.pow_.Scalar`; None where there is none."""
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.startswith("_") or not target._schema.is_mutable:
        return None
    packet = getattr(aten, name[:-1], None)
    if packet is None:
        return None
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    alike = [other for other in overloads if _takes(other) == _takes(target)]
    return next((other for other in alike if other._overloadname == target._overloadname), alike[0] if alike else None)


def _takes(target: torch._ops.OpOverload) -> list[str]:
    """The types of the arguments: what tells overloads apart, whose names may differ in place."""
    return [str(argument.type) for argument in target._schema.arguments]


def _is_private(node: fx.Node, position: dict[fx.Node, int], at: int) -> bool:
    """Whether nobody after `at` can see `node`'s memory other than through `node` itself."""
    for user in node.users:
        if position[user] < at and _returns_view(user) and any(position[later] > at for later in user.users):
            return False
    current = node
    while current.op == "call_function" and _returns_view(current):
        base = current.args[0]
        if not isinstance(base, fx.Node) or any(user is not current and position[user] > position[current] for user in base.users):
            return False
        current = base
    return current.op in ("call_function", "placeholder")


def functionalise(graph: fx.Graph) -> None:
    """Replace in-place operators where that cannot be seen, in place; those that write through a view or to a buffer stay.

    Operators that are known under two names (`__and__`, `bitwise_and`) get the one that exporters know.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        plain = _DUNDER.get(node.target._schema.name.split("::")[1])
        if plain is not None:
            node.target = getattr(getattr(aten, plain), node.target._overloadname)
        functional, first = _functional(node.target), (node.args[0] if node.args else None)
        if functional is None or not isinstance(first, fx.Node):
            continue
        position = {other: index for index, other in enumerate(graph.nodes)}
        at = position[node]
        if not _is_private(first, position, at):
            continue
        node.target = functional
        for user in list(first.users):
            if position[user] > at:
                user.replace_input_with(first, node)
