"""Options for pruning: every width of every group and every block, with the loss it would cost alone, measured without labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish.data import Split
from planish.graph.divergence import Divergence, divergence
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.moments import Moments
from planish.graph.replay import Replay, affordable, evaluating, in_batches, samples_within, take
from planish.graph.surgery import prune
from planish.plan import Option
from planish.prune.blocks import block_losses
from planish.prune.least_squares import ridge
from planish.prune.levels import width_levels
from planish.prune.order import Going, Order, merge_
from planish.prune.readers import moments_of_readers, readers
from planish.prune.units import indices_of

_STRENGTH = 1e-3
_CHUNK = 64
_LEAST_SAMPLES = 24
_COMPARED, _ALIKE = 8, 1e-3
"""Samples on which a masked net is compared with one that lacks the units, and how alike both must be."""
_PASSES_PER_BLOCK = 3.0  # of the whole net: half a run without the block, and the refits behind it


@dataclass
class _Trial:
    """A width on its way to a loss."""

    group: str
    width: int
    first: int
    parameters: dict[str, Tensor]
    shifts: dict[Node, Tensor]
    gone: list[int]
    total: float = 0.0


@torch.no_grad()
def sensitivities(
    graph: Graph,
    analysis: Analysis,
    orders: Mapping[str, Order],
    split: Split,
    multiple: int,
    progress: Callable[[int, int], None] | None = None,
    samples: int = 384,
    kind: str | None = None,
    seconds: float | None = None,
    is_adapted: bool = False,
) -> list[Option]:
    """The loss of each width below full of each group, and of each bypassed block, alone.

    The loss is the divergence of the changed graph's outputs from the original's on calibration samples (`Divergence`). A width is
    tried by zeroing the units with the lowest scores; the convolutions and linear maps that read the group are refitted by ridge
    regression to what they gave before, as compensation will do, which is cheap because every level needs only sub-blocks of one
    Gram matrix. Each trial re-runs only the nodes behind the first that it changes, on values that are computed once per batch.
    Blocks: see `block_losses`.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        orders: which units of each group go first; where some must stay, the levels below are not offered.
        split: calibration inputs.
        multiple: channels, the target's width multiple.
        progress: called with (trials done, trials), where a trial counts once per batch.
        samples: how many samples to use.
        kind: "logits" or "values"; None guesses from the outputs.
        seconds: about what it may take; fewer samples are used where they would take longer, but never fewer than 24.
        is_adapted: whether blocks that go may also leave an adaptor.

    Returns:
        Options with finite losses of at least 0; in each group a narrower width never loses less than a wider one.
    """
    replay = Replay(graph.module)
    with evaluating(graph):
        levels = sum(len(width_levels(group, multiple)) - 1 for group in analysis.groups.values())
        passes = 0.5 * levels + _PASSES_PER_BLOCK * (3 if is_adapted else 1) * len(analysis.blocks) + 2
        count = samples_within(replay, split, affordable(replay, graph, samples), passes, seconds, _LEAST_SAMPLES)
    flat = take(split, count)
    size = min(_CHUNK, -(-count // 3))  # three batches at least, since blocks are repaired on two thirds and judged on the rest
    chunks = in_batches(flat, size)
    with evaluating(graph):
        moments = moments_of_readers(replay, analysis, chunks)
        trials = _width_trials(replay, graph, analysis, orders, multiple, moments)
        trials.sort(key=lambda trial: trial.first)
        reference = [replay.run(replay.start(chunk)) for chunk in chunks]
        measure = divergence([torch.cat(values) for values in zip(*reference, strict=True)], kind)
        by_surgery = {name for name, group in analysis.groups.items() if group.routed} | _not_masked(
            replay, graph, analysis, trials, chunks[0]
        )
        trials = [trial for trial in trials if trial.group not in by_surgery]
        ticks = itertools.count(1)
        total = len(trials) * len(chunks) + len(analysis.blocks)

        def tick() -> None:
            if progress is not None:
                progress(next(ticks), total)

        for chunk, outputs in zip(chunks, reference, strict=True):
            environment, reached = replay.start(chunk), 0
            for trial in trials:
                while reached < trial.first:
                    replay.step(replay.nodes[reached], environment)
                    reached += 1
                changed = replay.run(dict(environment), reached, trial.parameters, trial.shifts)
                trial.total += float(measure.per_sample(changed, outputs).double().sum())
                tick()
        cut = _losses_of_surgery(graph, analysis, orders, by_surgery, multiple, chunks, reference, measure)
        blocks = block_losses(replay, analysis, chunks, reference, measure, tick, is_adapted)
    losses = {(trial.group, trial.width): trial.total / count for trial in trials} | cut
    found = []
    for name, group in analysis.groups.items():
        worst = 0.0
        for width in (width for width in width_levels(group, multiple) if (name, width) in losses):
            worst = max(worst, losses[name, width])
            found.append(Option("width", name, width, worst))
    found += [Option("block", name, way, max(loss, 0.0)) for (name, way), loss in blocks.items()]
    return [option for option in found if math.isfinite(option.loss)]


def _width_trials(
    replay: Replay, graph: Graph, analysis: Analysis, orders: Mapping[str, Order], multiple: int, moments: dict[str, Moments]
) -> list[_Trial]:
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    trials: list[_Trial] = []
    for name, group in analysis.groups.items():
        if group.routed:
            continue
        reading = {o.weight: o for o in readers(replay, group, parameters) if o.weight in moments}
        for width in width_levels(group, multiple)[1:]:
            going = orders[name].going(group.units - width)
            if len(going.units) < group.units - width:
                continue
            changed = _without(group, going, parameters)
            shifts: dict[Node, Tensor] = {}
            for weight, operator in reading.items():
                gone = indices_of(group.unit_of[weight, 1], going.units)
                changed[weight], shift = _refit(changed[weight], parameters[weight], gone, moments[weight])
                shifts[operator.node] = shift.reshape(-1, *[1] * len(operator.stride))
            trials.append(_Trial(name, width, _first(replay, changed), changed, shifts, going.units.tolist()))
    return trials


def _not_masked(replay: Replay, graph: Graph, analysis: Analysis, trials: Sequence[_Trial], chunk: list[Tensor]) -> set[str]:
    """Groups that only products read, and whose units give something even where all their weights are zero (`elu(x) + 1` in linear attention)."""
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    few, found = [value[:_COMPARED] for value in chunk], set[str]()
    for name, trial in {trial.group: trial for trial in trials}.items():
        if analysis.groups[name].exact and not readers(replay, analysis.groups[name], parameters):
            masked = replay.run(dict(replay.start(few)), 0, trial.parameters, trial.shifts)
            without = list(prune(graph, analysis, {name: trial.gone}).graph.module(*few))
            if not all(torch.allclose(a, b, rtol=_ALIKE, atol=_ALIKE * float(b.abs().max())) for a, b in zip(masked, without, strict=True)):
                found.add(name)
    return found


def _losses_of_surgery(
    graph: Graph,
    analysis: Analysis,
    orders: Mapping[str, Order],
    names: Collection[str],
    multiple: int,
    chunks: list[list[Tensor]],
    reference: list[list[Tensor]],
    measure: Divergence,
) -> dict[tuple[str, int], float]:
    """(group, width) -> the loss without the units that go first, by nets that lack them: zeros in a router are scores like any other."""
    found = {}
    for name in names:
        group = analysis.groups[name]
        for width in width_levels(group, multiple)[1:]:
            going = orders[name].going(group.units - width)
            if len(going.units) == group.units - width:
                module = prune(graph, analysis, {name: going.units.tolist()}).graph.module
                losses = [measure.per_sample(list(module(*chunk)), old) for chunk, old in zip(chunks, reference, strict=True)]
                found[name, width] = float(torch.cat(losses).double().mean())
    return found


def _without(group: Group, going: Going, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins in which the units that go are merged into those that take over, and everything that belongs to them is zero."""
    changed = {name: parameters[name].detach().clone() for name, _ in group.unit_of if name in parameters}
    merge_(changed, group, going)
    for (name, dim), unit_of in group.unit_of.items():
        if name in parameters:
            changed[name].index_fill_(dim, torch.from_numpy(indices_of(unit_of, going.units)), 0.0)
    return changed


def _refit(changed: Tensor, weight: Tensor, gone: NDArray[np.int64], moments: Moments) -> tuple[Tensor, Tensor]:
    """The weight refitted to its own output without the input channels `gone`, and the shift of its output that keeps the mean."""
    columns = weight[0].numel()
    each = columns // weight.shape[1]
    keep = torch.ones(weight.shape[1], dtype=torch.bool)
    keep[torch.from_numpy(gone)] = False
    kept = keep.repeat_interleave(each).nonzero()[:, 0]
    gram, _, _ = moments.second(centered=True)
    original, merged = (value.detach().double().reshape(len(weight), columns) for value in (weight, changed))
    alive = changed.reshape(len(weight), columns).abs().sum(1) > 0  # rows that the same trial removed (a tied stream) stay zero
    solved = torch.zeros_like(original)
    solved[:, kept] = ridge(gram[:, kept][:, :, kept], (gram[0, kept] @ original.T)[None], merged[None][:, :, kept], _STRENGTH)[0]
    solved[~alive] = 0
    shift = (original - solved) @ (moments.sum_x[0] / moments.rows)
    shift[~alive] = 0
    return solved.to(weight.dtype).reshape(weight.shape), shift.to(weight.dtype)


def _first(replay: Replay, changed: dict[str, Tensor]) -> int:
    """The position of the first node that reads any of these parameters."""
    return min(
        (replay.position[user] for node in replay.nodes if node.op == "get_attr" and str(node.target) in changed for user in node.users),
        default=0,
    )
