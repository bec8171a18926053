"""Hints: what operators read in the middle of a net, where student and teacher agree on its shape, taught beside the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from planish.graph.graph import Graph
from planish.graph.modes import short_name
from planish.graph.replay import evaluating
from planish.quantize.equalize.smooth import SMOOTHED

aten = torch.ops.aten
_MAPS = ("linear", "addmm")
_IMAGES = (
    "conv1d",
    "conv2d",
    "conv3d",
    "mean",
    "avg_pool2d",
    "adaptive_avg_pool2d",
    "max_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool3d",
    "max_pool3d",
)
_READS = {"addmm": 1}
"""Which argument of an operator holds the data, where it is not the first."""
MOST = 4
"""Hints at most."""
LARGEST = 4096
"""Numbers a sample and hint: what is worth keeping for every sample."""


@dataclass(frozen=True)
class Hint:
    """A value that teacher and student both have.

    Args:
        reader: name of the operator's node that reads it, in both.
        pooled: the size that its positions are averaged to, where it is an image of more than `LARGEST` numbers.
        numbers: of one sample, after pooling.
    """

    reader: str
    pooled: tuple[int, ...]
    numbers: int


def shared_hints(teacher: Graph, student: Graph, sample: Sequence[Tensor], room: float = math.inf) -> tuple[Hint, ...]:
    """What a teacher can show a student: for each resolution the last value that both have in one shape and scale, the deepest four at most.

    Args:
        teacher: the original, as captured or with norms folded.
        student: made from it: its operators have kept their names.
        sample: flat inputs of one sample, as they will be trained on (a sequence may be longer than the example's).
        room: numbers a sample that all hints together may have; the deepest come first.

    References:
        Romero et al. 2015 (FitNets).
    """
    ours, theirs = _shapes(student, sample), _shapes(teacher, sample)
    rescaled = {node.name for node in student.module.graph.nodes if SMOOTHED in node.meta}
    readings = _readings(teacher)
    last: dict[tuple[int, ...], Hint] = {}
    for reader, shape in theirs.items():
        if ours.get(reader) == shape and reader not in rescaled:
            pooled = _pooled(shape) if readings[reader].is_image else ()
            numbers = math.prod((shape[0], *pooled) if pooled else shape)
            if numbers <= LARGEST:
                resolution = shape[1:]  # of one sample: channels, then positions; or a sequence's length and features
                last.pop(resolution, None)
                last[resolution] = Hint(reader, pooled, numbers)
    chosen: list[Hint] = []
    for hint in reversed(last.values()):
        if len(chosen) < MOST and sum(other.numbers for other in chosen) + hint.numbers <= room:
            chosen.append(hint)
    return tuple(reversed(chosen))


def with_hints(graph: Graph, hints: Sequence[Hint]) -> Graph:
    """The same program with hints as further outputs; the graph itself where there are none.

    Parameters, buffers and the mode's state at this moment are shared with `graph`: training one trains the other.
    """
    if not hints:
        return graph
    found = _readings(graph)
    return _extended(graph, [(found[hint.reader].value, hint.pooled) for hint in hints])


def _extended(graph: Graph, values: Sequence[tuple[fx.Node, tuple[int, ...]]]) -> Graph:
    result = next(iter(graph.module.graph.find_nodes(op="output")))
    copied = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.module.graph, nodes)
    further = [_averaged(copied, nodes[value], pooled) for value, pooled in values]
    outputs = result.args[0]
    assert isinstance(outputs, (tuple, list))
    copied.output((*(nodes[node] if isinstance(node, fx.Node) else node for node in outputs), *further))
    module = fx.GraphModule(graph.module, copied)
    for submodule in module.modules():
        submodule.training = graph.module.training
    return replace(graph, module=module)


def _averaged(graph: fx.Graph, value: fx.Node, size: tuple[int, ...]) -> fx.Node:
    if not size:
        return value
    pool = aten.adaptive_avg_pool2d.default if len(size) == 2 else aten.adaptive_avg_pool3d.default
    return graph.call_function(pool, (value, list(size)))


@dataclass(frozen=True)
class _Reading:
    """What an operator reads; `is_image`: it takes channels first, then positions."""

    value: fx.Node
    is_image: bool


def _readings(graph: Graph) -> dict[str, _Reading]:
    """Name of each operator that has a weight or pools -> the computed value that it reads, in program order."""
    out = {}
    for node in graph.module.graph.nodes:
        if short_name(node) in (*_MAPS, *_IMAGES):
            read = node.args[_READS.get(short_name(node), 0)]
            if isinstance(read, fx.Node) and read.op == "call_function":
                out[node.name] = _Reading(read, short_name(node) in _IMAGES)
    return out


def _shapes(graph: Graph, sample: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Reader -> shape of one sample of what it reads, where that is floating point and has one row for each sample."""
    readings = _readings(graph)
    if not readings:
        return {}
    own = len(graph.signature.outputs)
    with evaluating(graph), torch.inference_mode():
        extended = _extended(graph, [(reading.value, ()) for reading in readings.values()]).module
        two: Sequence[Tensor] = extended(*[torch.cat([tensor, tensor]) for tensor in sample])[own:]
        three: Sequence[Tensor] = extended(*[torch.cat([tensor, tensor, tensor]) for tensor in sample])[own:]
    return {
        reader: tuple(a.shape[1:])
        for reader, a, b in zip(readings, two, three, strict=True)
        if a.is_floating_point() and a.dim() > 1 and (len(a), len(b)) == (2, 3)
    }


def _pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The size that an image's positions are averaged to; () where it is small enough, or no image."""
    if len(shape) not in (3, 4) or math.prod(shape) <= LARGEST:
        return ()
    factor = 2
    while shape[0] * math.prod(-(-side // factor) for side in shape[1:]) > LARGEST and factor < max(shape[1:]):
        factor += 1
    return tuple(-(-side // factor) for side in shape[1:])
