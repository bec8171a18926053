"""A graph's module run node by node, with values kept only while they are needed: the ground that saliency and compensation stand on."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.data import Split
from planish.errors import DataError
from planish.graph.graph import Graph
from planish.graph.modes import set_mode

Environment = dict[Node, Any]

_LIVE_BYTES = 2**30
_TIMED = 8


@contextmanager
def evaluating(graph: Graph) -> Iterator[None]:
    """The graph in evaluation mode, and back in the mode that it was found in afterwards."""
    training = graph.module.training
    if training:
        set_mode(graph, False)
    try:
        yield
    finally:
        if training:
            set_mode(graph, True)


def spread(split: Split, samples: int) -> NDArray[np.int64]:
    """The numbers of at most `samples` samples, evenly spread over the split."""
    return np.unique(np.linspace(0, split.n - 1, min(samples, split.n)).round().astype(np.int64))


def take(split: Split, samples: int) -> list[Tensor]:
    """At most `samples` calibration samples, evenly spread over the split, as flat input tensors (images in channels-last memory).

    Raises:
        DataError: the split is empty.
    """
    if split.n < 1:
        raise DataError("calibration: at least one sample is needed; the split is empty; give `calibration` or `train`")
    rows = spread(split, samples)
    flat = [torch.from_numpy(np.array(array[rows])) for array in split.inputs]
    return [value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value for value in flat]


def in_batches(flat: list[Tensor], size: int) -> list[list[Tensor]]:
    """Flat inputs in batches of at most `size` samples, as views."""
    return [[value[start : start + size] for value in flat] for start in range(0, len(flat[0]), size)]


class Replay:
    """Runs the nodes of one module in program order over environments that map a node to its value.

    Args:
        module: a captured module; it is read, never changed.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.by_name = {node.name: node for node in self.nodes}
        self._dies: list[list[Node]] = [[] for _ in self.nodes]
        for node in self.nodes:
            if node.users:
                self._dies[max(self.position[user] for user in node.users)].append(node)
            elif node.op not in ("output", "placeholder"):
                self._dies[self.position[node]].append(node)

    def start(self, flat: list[Tensor]) -> Environment:
        """An environment that holds the flat inputs."""
        return dict(zip((node for node in self.nodes if node.op == "placeholder"), flat, strict=True))

    def value(self, node: Node, environment: Environment, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The value of one node whose arguments are in the environment.

        Args:
            parameters: tensors that stand in for parameters or buffers of that name.
        """
        if node.op == "get_attr":
            name = str(node.target)
            if parameters is not None and name in parameters:
                return parameters[name]
            return operator.attrgetter(name)(self.module)
        if node.op == "call_module":
            return operator.attrgetter(str(node.target))(self.module)(*self.arguments(node, environment))
        assert node.op == "call_function" and callable(node.target), node.format_node()
        kwargs = torch.fx.node.map_arg(node.kwargs, environment.__getitem__)
        return node.target(*self.arguments(node, environment), **kwargs)

    def arguments(self, node: Node, environment: Environment) -> tuple[Any, ...]:
        """The positional arguments of a node, as values."""
        return tuple(torch.fx.node.map_arg(node.args, environment.__getitem__))

    def step(self, node: Node, environment: Environment, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Computes one node into the environment (placeholders and the output are skipped) and drops what nobody reads any more."""
        if node.op not in ("placeholder", "output"):
            environment[node] = self.value(node, environment, parameters)
        self.release(node, environment)

    def visits(self, flat: list[Tensor]) -> Iterator[tuple[Node, Environment]]:
        """One run: every node with the environment as it is once the node was computed, before what it was the last to read is dropped."""
        environment = self.start(flat)
        for node in self.nodes:
            if node.op not in ("placeholder", "output"):
                environment[node] = self.value(node, environment)
            yield node, environment
            self.release(node, environment)

    def release(self, node: Node, environment: Environment) -> None:
        """Drops the values that `node` was the last to read."""
        for dead in self._dies[self.position[node]]:
            environment.pop(dead, None)

    def run(
        self,
        environment: Environment,
        first: int = 0,
        parameters: Mapping[str, Tensor] | None = None,
        shifts: Mapping[Node, Tensor] | None = None,
    ) -> list[Any]:
        """The flat outputs, from an environment that holds everything computed before node number `first`.

        Args:
            environment: is consumed.
            first: position of the first node to run.
            parameters: stand-ins by parameter or buffer name. Nodes before `first` that hold their original are read anew.
            shifts: node -> what is added to its value, broadcast.
        """
        if parameters:
            for node in list(environment):
                if node.op == "get_attr" and str(node.target) in parameters:
                    environment[node] = parameters[str(node.target)]
        for node in self.nodes[first:]:
            if node.op == "output":
                return list(torch.fx.node.map_arg(node.args[0], environment.__getitem__))
            self.step(node, environment, parameters)
            if shifts is not None and node in shifts and node in environment:
                environment[node] = environment[node] + shifts[node]
        raise AssertionError("a module ends in an output node")


def samples_within(replay: Replay, split: Split, samples: int, passes: float, seconds: float | None, least: int) -> int:
    """How many of at most `samples` can go through `passes` runs in so many seconds: from the time of one run over a few of them.

    Args:
        split: calibration samples.
        samples: at most.
        passes: runs over all samples that are planned; a part of a run counts as a part.
        seconds: None: no limit.
        least: samples that are used whatever it takes.
    """
    count = min(samples, split.n)
    if seconds is None or count <= least:
        return count
    few = take(split, min(count, _TIMED))
    with torch.inference_mode():
        replay.run(replay.start([value[:1] for value in few]))
        began = time.monotonic()
        replay.run(replay.start(few))
        each = (time.monotonic() - began) / len(few[0])
    return max(least, min(count, int(seconds / max(passes * each, 1e-9))))


def affordable(replay: Replay, graph: Graph, samples: int) -> int:
    """At most `samples`, and so many that the activations that a run keeps alive at once stay within 1 GiB (but at least 8)."""
    peak, environment = 1, replay.start(list(graph.example))
    with evaluating(graph), torch.no_grad():
        for node in replay.nodes:
            replay.step(node, environment)
            alive = {id(v): v.nbytes for n, v in environment.items() if n.op != "get_attr" and isinstance(v, Tensor)}
            peak = max(peak, sum(alive.values()))
    return min(samples, max(8, _LIVE_BYTES * len(graph.example[0]) // peak))
