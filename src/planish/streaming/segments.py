"""A program cut where a weight is rounded, so that each part runs over all batches once the weights that it reads are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Segment:
    """Nodes that run one after the other, for one batch after the other.

    Args:
        nodes: in the order of the program.
        tensors: the parameters and buffers that they read.
        takes: values of earlier segments (and inputs) that they read.
        gives: values of theirs that later segments read.
        ends: values that nobody reads behind this segment.
        rounded: operators among the nodes whose weights are rounded; each reads a value of `takes`.
    """

    nodes: tuple[Node, ...]
    tensors: tuple[Node, ...]
    takes: tuple[Node, ...]
    gives: tuple[Node, ...]
    ends: tuple[Node, ...]
    rounded: tuple[Node, ...]


def segments(module: GraphModule, inputs: Mapping[Node, Node]) -> list[Segment]:
    """The program in segments, each of which begins where an operator reads what the one before gives.

    Args:
        module: the program.
        inputs: operator whose weight is rounded -> the activation that it multiplies.
    """
    runs: list[list[Node]] = [[]]
    made: set[Node] = set()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node in inputs and inputs[node] in made:
            runs.append([])
            made = set()
        runs[-1].append(node)
        made.add(node)
    place = {node: index for index, nodes in enumerate(runs) for node in nodes}
    last = {
        node: max((place[user] for user in node.users if user.op != "output"), default=place.get(node, 0))
        for node in module.graph.nodes
        if node.op not in ("get_attr", "output")
    }
    return [_segment(nodes, index, place, last, inputs) for index, nodes in enumerate(runs)]


def first_output(module: GraphModule) -> Node:
    """The value that the program gives first."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    value: Node = output.args[0][0]
    return value


def _segment(
    nodes: Sequence[Node], index: int, place: Mapping[Node, int], last: Mapping[Node, int], inputs: Mapping[Node, Node]
) -> Segment:
    read = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes))
    takes = tuple(node for node in read if node.op != "get_attr" and place.get(node, -1) < index)
    return Segment(
        tuple(nodes),
        tuple(node for node in read if node.op == "get_attr"),
        takes,
        tuple(node for node in nodes if last[node] > index),
        tuple(node for node in takes if last[node] == index),
        tuple(node for node in nodes if node in inputs),
    )
