"""What can be rounded while weights stream past, found before any is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from planish.errors import UsageError
from planish.graph.graph import Graph
from planish.graph.modes import short_name
from planish.graph.parts import Parts, is_parameter, known_parts, parts_of
from planish.streaming.segments import first_output

_RESHAPING = frozenset({"view", "reshape", "_unsafe_view", "expand", "unflatten", "split", "split_with_sizes", "chunk", "slice"})


@dataclass(frozen=True)
class Subjects:
    """The operators of a program that have a weight.

    Args:
        inputs: those whose weights are rounded by groups -> what they multiply.
        embeddings: those whose rows are rounded.
        skipped: those that stay in float -> why.
    """

    inputs: Mapping[Node, Node]
    embeddings: Collection[Node]
    skipped: Mapping[Node, str]


def subjects(module: GraphModule, stored: Mapping[str, str]) -> Subjects:
    """The operators with weights, sorted by what becomes of them.

    Args:
        module: the program.
        stored: parameter -> the name of its tensor; of tied ones the same.

    Raises:
        UsageError: no weight can be rounded.
    """
    readers: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in stored:
            readers.setdefault(stored[str(node.target)], []).extend(node.users)
    inputs: dict[Node, Node] = {}
    embeddings: dict[Node, str] = {}
    skipped: dict[Node, str] = {}
    for node in module.graph.nodes:
        parts = parts_of(node) if node.op == "call_function" else ""
        if not isinstance(parts, Parts) or parts.weight is None:
            continue
        weight = node.args[parts.weight]
        if not (isinstance(weight, Node) and weight.op == "get_attr" and is_parameter(weight)):
            continue
        tensor = stored[str(weight.target)]
        source = node.args[parts.activations[0]] if parts.activations else None
        if parts.kind == "embedding":
            embeddings[node] = tensor
        elif sum(_kind(reader) != "embedding" for reader in readers[tensor]) > 1:
            skipped[node] = "its weight is shared with another operator"
        elif isinstance(source, Node) and source.op == "get_attr":
            skipped[node] = "it multiplies a parameter"
        elif parts.kind != "linear" and not (parts.kind == "matmul" and parts.axis == 1):
            skipped[node] = f"{parts.kind} stays in float where weights stream past"
        else:
            assert isinstance(source, Node)
            inputs[node] = source
    if not inputs:
        raise UsageError("model: it must have linear maps with weights of their own; it has none")
    for node, tensor in embeddings.items():
        if not all(reader in inputs or reader in embeddings for reader in readers[tensor]):
            skipped[node] = "its weight is read in float too"
    return Subjects(inputs, frozenset(embeddings.keys() - skipped.keys()), skipped)


def _kind(node: Node) -> str:
    parts = parts_of(node)
    return parts.kind if isinstance(parts, Parts) else ""


def weight_of(node: Node) -> Node:
    """The parameter of an operator whose weight is rounded."""
    weight = node.args[known_parts(node).weight or 0]
    assert isinstance(weight, Node)
    return weight


def is_reshaped(node: Node, inputs: Mapping[Node, Node]) -> bool:
    """Whether a shape is written out between an operator and those, with weights, that make what it reads.

    Args:
        inputs: operators with weights -> what they multiply, `node` among them.
    """
    seen: set[Node] = set()
    stack = [inputs[node]]
    while stack:
        source = stack.pop()
        if source not in seen and source not in inputs:
            seen.add(source)
            if short_name(source) in _RESHAPING:
                return True
            stack.extend(source.all_input_nodes)
    return False


def check_first(graph: Graph) -> None:
    """Refuse a model that cannot be judged by its first output, before hours of work.

    Raises:
        UsageError: the first output is not computed, no floats, or has no axis of samples in front and one of values behind.
    """
    taken, given = graph.signature.inputs[0], graph.signature.outputs[0]
    is_judged = first_output(graph.module).op == "call_function" and given.dtype.startswith("float") and len(given.shape) > 1
    if not is_judged or given.shape[0] != taken.shape[0]:
        raise UsageError(
            f"model: its first output must be floats, computed, of shape [samples, ..., values], to be judged by; {given.name!r} is "
            f"{given.dtype} {list(given.shape)}"
        )
