"""Adaptors: linear maps of a residual stream in the place of a block that goes, fitted by least squares, whole or through few channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.data import Split
from planish.graph.blocks import narrow_adaptor
from planish.graph.graph import Block, Graph
from planish.graph.replay import Replay, affordable, evaluating, in_batches, take
from planish.plan import WHOLE_MAP, rank_of
from planish.prune.least_squares import Moments, fit
from planish.prune.repair import STRENGTHS

_NARROWEST, _SHARE, _CHUNK, _SAMPLES = 64, 4, 64, 256


def kinds_of(block: Block) -> tuple[str, ...]:
    """The adaptors that a block may leave: none, the whole map, and for wide streams one through a quarter of the channels."""
    if not block.adaptor:
        return ()
    return (WHOLE_MAP, f"rank-{block.channels // _SHARE}") if block.channels >= _NARROWEST else (WHOLE_MAP,)


@dataclass(frozen=True)
class Map:
    """A linear map of one axis: `weight @ x + bias`.

    Args:
        weight: [channels, channels].
        bias: [channels].
        axis: of the channels.
    """

    weight: Tensor
    bias: Tensor
    axis: int

    def __call__(self, x: Tensor) -> Tensor:
        """The map of a value, in its shape."""
        rows = x.movedim(self.axis, -1)
        return (rows @ self.weight.T.to(x.dtype) + self.bias.to(x.dtype)).movedim(-1, self.axis)


def axis_of(block: Block) -> int:
    """The axis of the channels of what goes past a block."""
    return 1 if block.adaptor == "conv" else len(block.stream) - 1


def fitted(block: Block, skips: Sequence[Tensor], sums: Sequence[Tensor], kind: str) -> Map:
    """The map of the skip that comes closest to the block's branch.

    Args:
        block: whose.
        skips: what goes past the block, one value for each batch.
        sums: what its addition gave.
        kind: "1x1" or "rank-R".

    References:
        Izenman 1975 (reduced-rank regression): the first R principal directions of what the whole map gives.
    """
    axis = axis_of(block)
    moments = []
    for skip, total in zip(skips, sums, strict=True):
        x, y = (value.movedim(axis, -1).flatten(0, -2) for value in (skip, total - skip))
        moments.append(Moments(1, x.shape[1], y.shape[1]))
        moments[-1].add(x[None], y)
    train, held_out = sum(moments[1:-1], moments[0]), moments[-1] if len(moments) > 1 else None
    nothing = torch.zeros(1, *train.cross.transpose(1, 2).shape[1:], dtype=torch.float64)
    solved = fit(train, held_out, nothing, STRENGTHS, centered=True)
    everything = train if held_out is None else train + held_out
    weight = solved[0]
    rank = rank_of(kind)
    if rank is not None:
        down, up = narrowed(weight, everything.second(centered=True)[0][0], rank)
        weight = up @ down
    return Map(weight, everything.offset(weight[None]), axis)


def narrowed(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """([rank, in], [out, rank]) whose product gives what a weight gives on inputs with these moments, as nearly as that rank can.

    Args:
        weight: [out, in].
        gram: [in, in], second moments of what it reads.
        rank: at least 1.
    """
    _, directions = torch.linalg.eigh(weight @ gram.to(weight.dtype) @ weight.T)
    up = directions[:, -rank:]
    return up.T @ weight, up


@torch.no_grad()
def narrow_adaptors_(graph: Graph, adaptors: Mapping[str, str], split: Split) -> None:
    """Splits every adaptor that goes through few channels in two, in place, by what it reads on calibration samples.

    Args:
        graph: holds the adaptors of these blocks, fitted.
        adaptors: block -> its kind.
        split: calibration inputs.
    """
    wanted = {name: rank for name, kind in adaptors.items() if (rank := rank_of(kind)) is not None}
    if not wanted:
        return
    replay = Replay(graph.module)
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    readers = {
        node: name
        for node in replay.nodes
        for name in wanted
        if node.op == "call_function" and any(str(source.target) == f"{name}.adaptor.weight" for source in node.all_input_nodes)
    }
    moments: dict[str, Moments] = {}
    with evaluating(graph):
        for chunk in in_batches(take(split, affordable(replay, graph, _SAMPLES)), _CHUNK):
            environment = replay.start(chunk)
            for node in replay.nodes:
                if node in readers:
                    value = environment[node.args[0]]
                    rows = value.movedim(1 if parameters[f"{readers[node]}.adaptor.weight"].dim() > 2 else -1, -1).flatten(0, -2)
                    moments.setdefault(readers[node], Moments(1, rows.shape[1])).add(rows[None])
                replay.step(node, environment)
    for name in readers.values():
        weight = parameters[f"{name}.adaptor.weight"].detach().double().flatten(1)
        rank = min(wanted[name], len(weight))
        if rank < len(weight):
            down, up = narrowed(weight, moments[name].second(centered=True)[0][0], rank)
            mean = moments[name].sum_x[0] / moments[name].rows
            narrow_adaptor(graph.module, name, down, up, (weight - up @ down) @ mean)
