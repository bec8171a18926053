"""What a program computes on concrete inputs, as far as shapes, integers and indices go: the facts that id propagation needs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planish.graph.graph import Graph

INDEXING = frozenset({"index", "index_select", "gather", "index_put", "_unsafe_index_put"})

Shape = tuple[int, ...]


def short_name(target: Any) -> str:
    """The operator's name without namespace and overload: `aten.conv2d.default` -> "conv2d"."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return str(getattr(target, "__name__", target))


def rule_name(target: Any) -> str:
    """The short name without the underscore of an in-place operator ("relu_" -> "relu"); what rules are looked up by."""
    name = short_name(target)
    return name if name.startswith("_") or not name.endswith("_") else name[:-1]


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by their names in the operator's schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def attribute(module: torch.nn.Module, name: str) -> Any:
    """The parameter, buffer or constant that a get_attr node names."""
    return operator.attrgetter(name)(module)


@dataclass(frozen=True)
class Facts:
    """Shapes and values of one run.

    Args:
        shapes: node name -> shape, or the shapes of several outputs, or None for what is no tensor.
        values: node name -> integer, or the tensor where it serves as an index.
        floating: names of nodes whose (first) output is a floating-point tensor.
    """

    shapes: Mapping[str, Shape | list[Shape | None] | None]
    values: Mapping[str, Any]
    floating: frozenset[str]

    def shape(self, node: str) -> Shape:
        """The shape of a node's (first) output; () for what is no tensor."""
        found = self.shapes[node]
        if isinstance(found, list):
            return next((s for s in found if s is not None), ())
        return found or ()


def _shapes(value: Any) -> Shape | list[Shape | None] | None:
    if isinstance(value, torch.Tensor):
        return tuple(int(k) for k in value.shape)
    if isinstance(value, (tuple, list)):
        return [tuple(int(k) for k in v.shape) if isinstance(v, torch.Tensor) else None for v in value]
    return None


def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one node as in evaluation: batch norm must not touch its running statistics, whatever mode the graph is in."""
    if rule_name(node.target) == "batch_norm" and len(args) > 5:
        args = (*args[:5], False, *args[6:])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def observe(module: GraphModule, inputs: Sequence[torch.Tensor]) -> Facts:
    """Run the program once and keep shapes, integers and indices; each tensor is freed after its last use.

    Neither the module, nor the inputs, nor the global random state change.
    """
    last: dict[Node, Node] = {}
    for node in module.graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    dying: dict[Node, list[Node]] = {}
    for used, user in last.items():
        dying.setdefault(user, []).append(used)
    shapes: dict[str, Shape | list[Shape | None] | None] = {}
    values: dict[str, Any] = {}
    floating: set[str] = set()
    env: dict[Node, Any] = {}
    feed = iter(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in module.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                out: Any = next(feed).clone()
            elif node.op == "get_attr":
                out = attribute(module, str(node.target))
                if isinstance(out, torch.Tensor) and not isinstance(out, torch.nn.Parameter):
                    out = out.clone()
            else:
                out = call(node, map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__))
            env[node] = out
            shapes[node.name] = _shapes(out)
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, torch.Tensor):
                if first.is_floating_point():
                    floating.add(node.name)
                if any(rule_name(user.target) in INDEXING for user in node.users):
                    values[node.name] = out.cpu() if isinstance(out, torch.Tensor) else out
            else:
                values[node.name] = out
            for used in dying.get(node, ()):
                del env[used]
    return Facts(shapes, values, frozenset(floating))


def at_batch(graph: Graph, batch: int) -> tuple[torch.Tensor, ...]:
    """The example inputs with `batch` samples (repeated or cut), wherever axis 0 is dynamic."""
    return tuple(
        t.index_select(0, torch.arange(batch, device=t.device) % t.shape[0]) if spec.shape and isinstance(spec.shape[0], str) else t
        for t, spec in zip(graph.example, graph.signature.inputs, strict=True)
    )
