"""What reads a group: the convolutions and linear maps that contract its units, and the second moments of what they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.data import Split
from planish.graph.contraction import Contraction, contraction
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.moments import Moments
from planish.graph.replay import Replay, affordable, evaluating, in_batches, take

_MOMENT_BYTES, _MOST_BYTES = 2**29, 2**30  # of Gram matrices; readers beyond that are left out
_CHUNK = 64


def readers(replay: Replay, group: Group, parameters: Mapping[str, Tensor]) -> list[Contraction]:
    """Ungrouped convolutions and linear maps whose weight contracts the group, each weight read once."""
    names = {name for (name, dim), role in group.roles.items() if role == "in" and dim == 1}
    found = [operator for node in replay.nodes if (operator := contraction(node, parameters)) is not None]
    return [o for o in found if o.weight in names and o.groups == 1 and sum(o.weight == other.weight for other in found) == 1]


def moments_of_readers(
    replay: Replay, analysis: Analysis, chunks: list[list[Tensor]], most_bytes: int = _MOMENT_BYTES
) -> dict[str, Moments]:
    """The second moments of the inputs of every operator that reads a group, by its weight's name; patches of a convolution are sampled.

    Args:
        replay: of the original, in evaluation mode.
        analysis: of the original.
        chunks: batches of flat inputs.
        most_bytes: of all moments together; what would exceed them is left out.
    """
    parameters = dict(replay.module.named_parameters(remove_duplicate=False))
    wanted: dict[Node, Contraction] = {o.node: o for group in analysis.groups.values() for o in readers(replay, group, parameters)}
    moments: dict[str, Moments] = {}
    budget = most_bytes
    for operator in list(wanted.values()):
        columns = parameters[operator.weight][0].numel()
        if 4 * columns**2 > budget:
            del wanted[operator.node]
            continue
        budget -= 4 * columns**2
        moments[operator.weight] = Moments(1, columns)
    generator = torch.Generator().manual_seed(0)
    for operator, given, output in readings(replay, wanted, chunks):
        weight = parameters[operator.weight]
        positions = operator.draw(output, max(256, min(16 * weight[0].numel(), 32768) // len(chunks)), generator)
        moments[operator.weight].add(operator.columns(given, weight, positions))
    return moments


def readings(
    replay: Replay, wanted: Mapping[Node, Contraction], chunks: list[list[Tensor]]
) -> Iterator[tuple[Contraction, Tensor, Tensor]]:
    """For each batch and each of these operators, in program order: the operator, its input and its output."""
    for chunk in chunks:
        for node, environment in replay.visits(chunk):
            if node in wanted:
                source = node.args[0]
                assert isinstance(source, Node)
                yield wanted[node], environment[source], environment[node]


@torch.no_grad()
def variances_of_inputs(graph: Graph, analysis: Analysis, split: Split, samples: int) -> dict[str, Tensor]:
    """For every ungrouped convolution or linear map that reads a group, by its weight's name: the variance of each input channel, [channels].

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        split: calibration inputs.
        samples: at most; fewer, where activations would exceed 1 GiB.
    """
    replay = Replay(graph.module)
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    wanted = {o.node: o for group in analysis.groups.values() for o in readers(replay, group, parameters)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    with evaluating(graph):
        for operator, given, _ in readings(replay, wanted, chunks_of(replay, graph, split, samples)):
            rows = given.movedim(operator.channel_axis(given), -1).flatten(0, -2).double()
            n, total, squares = sums.get(operator.weight, (0, torch.zeros(()), torch.zeros(())))
            sums[operator.weight] = n + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    return {name: (squares / n - (total / n).square()).clamp_min(0) for name, (n, total, squares) in sums.items()}


def chunks_of(replay: Replay, graph: Graph, split: Split, samples: int) -> list[list[Tensor]]:
    """At most so many calibration samples in batches of 64; fewer, where activations would exceed 1 GiB."""
    return in_batches(take(split, affordable(replay, graph, samples)), _CHUNK)


@dataclass(frozen=True)
class Readings:
    """What the readers of all groups read.

    Args:
        readers: group -> names of the weights that contract it along dimension 1 and whose moments are known.
        moments: weight -> moments of its columns.
    """

    readers: Mapping[str, tuple[str, ...]]
    moments: Mapping[str, Moments]


@torch.no_grad()
def inputs_of_readers(graph: Graph, analysis: Analysis, split: Split, samples: int) -> Readings:
    """The moments of what reads each group, over some calibration samples.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        split: calibration inputs.
        samples: at most; fewer, where activations would exceed 1 GiB.
    """
    replay = Replay(graph.module)
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    with evaluating(graph):
        moments = moments_of_readers(replay, analysis, chunks_of(replay, graph, split, samples), _MOST_BYTES)
    known = {
        name: tuple(o.weight for o in readers(replay, group, parameters) if o.weight in moments) for name, group in analysis.groups.items()
    }
    return Readings(known, moments)
