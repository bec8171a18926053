"""What a net's last operator reads: a representation that the teacher teaches beside its outputs, at the price of a few numbers a sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from planish.graph.graph import Graph
from planish.graph.modes import short_name

_WEIGHTED = ("linear", "addmm", "conv1d", "conv2d", "conv3d")
_READS = {"addmm": 1}
"""Which argument of an operator holds the data, where it is not the first."""
LARGEST = 4096
"""Numbers a sample: what is worth keeping for every sample."""


def with_representation(graph: Graph, largest: int = LARGEST) -> Graph | None:
    """The same program, with what its last linear map or convolution reads as one more output; None where it has no such, or one of
    more than `largest` numbers a sample.

    Parameters, buffers and the mode's state at this moment are shared with `graph`: training one trains the other.

    References:
        Romero et al. 2015 (FitNets) for hints; here at the last layer alone, where the teacher's can be kept.
    """
    result = next(iter(graph.module.graph.find_nodes(op="output")))
    outputs = result.args[0]
    read = _read_by_the_last(outputs[0]) if isinstance(outputs, (tuple, list)) and isinstance(outputs[0], fx.Node) else None
    if read is None:
        return None
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.module.graph, values)
    copied.output((*(values[node] if isinstance(node, fx.Node) else node for node in outputs), values[read]))
    module = fx.GraphModule(graph.module, copied)
    for submodule in module.modules():
        submodule.training = graph.module.training
    with torch.inference_mode():
        *_, found = module(*graph.example)
        *_, twice = module(*[torch.cat([tensor, tensor]) for tensor in graph.example])
    samples = len(graph.example[0])
    is_apart = found.is_floating_point() and found.dim() > 1 and (len(found), len(twice)) == (samples, 2 * samples)
    return replace(graph, module=module) if is_apart and found[0].numel() <= largest else None


def _read_by_the_last(node: fx.Node) -> fx.Node | None:
    """What the last weighted operator before a node reads, where all between them has a single input."""
    while node.op == "call_function":
        inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if short_name(node) in _WEIGHTED:
            read = node.args[_READS.get(short_name(node), 0)]
            return read if isinstance(read, fx.Node) and read.op == "call_function" else None
        if len(inputs) != 1:
            return None
        node = inputs[0]
    return None
