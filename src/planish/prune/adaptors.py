"""Adaptors: linear maps of a residual stream in the place of a block that goes, fitted by least squares, whole or through few channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.data import Split
from planish.graph.blocks import narrow_adaptor
from planish.graph.contraction import contraction
from planish.graph.graph import Block, Graph
from planish.graph.moments import Moments
from planish.graph.replay import Replay, evaluating
from planish.plan import WHOLE_MAP, rank_of
from planish.prune.least_squares import fit
from planish.prune.readers import chunks_of, readings
from planish.prune.repair import STRENGTHS

_NARROWEST, _SHARE, _SAMPLES = 64, 4, 256


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
    axis = block.axis
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
    by_weight = {f"{name}.adaptor.weight": name for name in wanted}
    operators = [o for node in replay.nodes if (o := contraction(node, parameters)) is not None and o.weight in by_weight]
    moments = {o.weight: Moments(1, parameters[o.weight].shape[1]) for o in operators}
    with evaluating(graph):
        for operator, given, _ in readings(replay, {o.node: o for o in operators}, chunks_of(replay, graph, split, _SAMPLES)):
            moments[operator.weight].add(given.movedim(operator.channel_axis(given), -1).flatten(0, -2)[None])
    for operator in operators:
        name, seen = by_weight[operator.weight], moments[operator.weight]
        weight = parameters[operator.weight].detach().double().flatten(1)
        rank = min(wanted[name], len(weight))
        if rank < len(weight):
            down, up = narrowed(weight, seen.second(centered=True)[0][0], rank)
            narrow_adaptor(graph.module, name, operator.node, down, up, (weight - up @ down) @ (seen.sum_x[0] / seen.rows))
