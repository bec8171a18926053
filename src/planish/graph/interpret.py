"""Run a captured program node by node and look at chosen values on the way: for saliencies, observers and least squares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from planish.errors import UnknownName
from planish.graph.graph import Graph


class _Observing(fx.Interpreter):
    """An interpreter that shows the arguments and result of chosen nodes; it frees a value after its last use."""

    def __init__(self, module: fx.GraphModule, nodes: frozenset[str], visit: Callable[[str, tuple[Any, ...], Any], None]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.wanted = nodes
        self.visit = visit

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        out = getattr(self, n.op)(n.target, args, kwargs)
        if n.name in self.wanted:
            self.visit(n.name, args, out)
        return out


def observe(
    graph: Graph, flat_inputs: Sequence[Tensor], nodes: Collection[str], visit: Callable[[str, tuple[Any, ...], Any], None]
) -> tuple[Tensor, ...]:
    """The flat outputs; on the way `visit(node name, its positional arguments, its result)` is called for each of `nodes`.

    Gradients are recorded if the caller records them; with `torch.no_grad()` every value is freed after its last use.

    Args:
        graph: whose module is run once, in the mode that it is in.
        flat_inputs: one tensor per input of the signature, the batch on axis 0.
        nodes: fx names; of placeholders and parameters (`get_attr`) too.
        visit: called in the order of the program, in this thread; it must not change what it is shown.

    Raises:
        UnknownName: a name in `nodes` that the program has not.
    """
    wanted = frozenset(nodes)
    known = {node.name for node in graph.module.graph.nodes}
    for name in wanted - known:
        raise UnknownName("node", name, known)
    outputs: tuple[Tensor, ...] = _Observing(graph.module, wanted, visit).run(*flat_inputs)
    return outputs


def attribute(module: torch.nn.Module, path: str) -> Any:
    """The parameter, buffer or constant that a `get_attr` node with this target reads."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
