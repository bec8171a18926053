"""A captured program as an `nn.Module` that takes and gives what the user's model did."""

from __future__ import annotations

from typing import Any

from torch import nn

from planish.graph.graph import Graph
from planish.graph.modes import set_mode


class CapturedModule(nn.Module):
    """A graph in the structure of the original: `module(images)`, `module(a, b)` or `module(input_ids=...)`.

    Parameters and buffers are the graph's own and have their names; `train()` and `eval()` flip the program's literals.
    """

    graph: Graph

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        object.__setattr__(self, "graph", graph)  # no submodule: its parameters would be named "graph.module..."
        self._modules = graph.module._modules
        self._parameters = graph.module._parameters
        self._buffers = graph.module._buffers
        self._non_persistent_buffers_set = graph.module._non_persistent_buffers_set
        self.training = graph.module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs in the original's structure; torch tensors in the original's order, or by name."""
        if kwargs and args:
            names = [spec.name for spec in self.graph.signature.inputs]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs: Any = kwargs or (args[0] if len(args) == 1 and isinstance(args[0], dict) else args)
        return self.graph(inputs)

    def train(self, mode: bool = True) -> CapturedModule:
        """Put the program in train (or eval) mode; also what `eval()` calls."""
        set_mode(self.graph, mode)
        self.training = mode
        return self


def as_module(graph: Graph) -> CapturedModule:
    """The graph as a module in the original's structure; it shares the graph's parameters and its mode."""
    return CapturedModule(graph)
