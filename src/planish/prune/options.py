"""Options for pruning: every width of every group and every block, with the loss it would cost alone, measured without labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.graph import Analysis, Graph, Group
from planish.graph.replay import Replay, affordable, evaluating, samples_within, take
from planish.plan import Option
from planish.prune.blocks import block_losses
from planish.prune.contract import Scores
from planish.prune.least_squares import Contraction, Moments, contraction, ridge
from planish.prune.levels import width_levels
from planish.prune.units import indices_of, lowest

_MOMENT_BYTES = 2**29  # of Gram matrices; consumers beyond that are not compensated
_STRENGTH = 1e-3
_CHUNK = 64
_LEAST_SAMPLES = 24
_PASSES_PER_BLOCK = 3.0  # of the whole net: half a run without the block, and the refits behind it


@dataclass
class _Trial:
    """A width on its way to a loss."""

    group: str
    width: int
    first: int
    parameters: dict[str, Tensor]
    shifts: dict[Node, Tensor]
    total: float = 0.0


@torch.no_grad()
def sensitivities(
    graph: Graph,
    analysis: Analysis,
    scores: Scores,
    split: Split,
    multiple: int,
    progress: Callable[[int, int], None] | None = None,
    samples: int = 384,
    kind: str | None = None,
    seconds: float | None = None,
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
        scores: which units go first; where NaNs forbid a level, it is not offered.
        split: calibration inputs.
        multiple: channels, the target's width multiple.
        progress: called with (trials done, trials), where a trial counts once per batch.
        samples: how many samples to use.
        kind: "logits" or "values"; None guesses from the outputs.
        seconds: about what it may take; fewer samples are used where they would take longer, but never fewer than 24.

    Returns:
        Options with finite losses of at least 0; in each group a narrower width never loses less than a wider one.
    """
    replay = Replay(graph.module)
    with evaluating(graph):
        levels = sum(len(width_levels(group, multiple)) - 1 for group in analysis.groups.values())
        passes = 0.5 * levels + _PASSES_PER_BLOCK * len(analysis.blocks) + 2
        count = samples_within(replay, split, affordable(replay, graph, samples), passes, seconds, _LEAST_SAMPLES)
    flat = take(split, count)
    size = min(_CHUNK, -(-count // 3))  # three batches at least, since blocks are repaired on two thirds and judged on the rest
    chunks = [[value[start : start + size] for value in flat] for start in range(0, count, size)]
    with evaluating(graph):
        moments = _moments(replay, analysis, chunks)
        trials = _width_trials(replay, graph, analysis, scores, multiple, moments)
        trials.sort(key=lambda trial: trial.first)
        reference = [replay.run(replay.start(chunk)) for chunk in chunks]
        measure = divergence([torch.cat(values) for values in zip(*reference, strict=True)], kind)
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
        blocks = block_losses(replay, analysis, chunks, reference, measure, tick)
    losses = {(trial.group, trial.width): trial.total / count for trial in trials}
    found = []
    for name, group in analysis.groups.items():
        worst = 0.0
        for width in (width for width in width_levels(group, multiple) if (name, width) in losses):
            worst = max(worst, losses[name, width])
            found.append(Option("width", name, width, worst))
    found += [Option("block", name, 1, max(blocks[name], 0.0)) for name in analysis.blocks]
    return [option for option in found if math.isfinite(option.loss)]


def _readers(replay: Replay, group: Group, parameters: Mapping[str, Tensor]) -> list[Contraction]:
    """Ungrouped convolutions and linear maps whose weight contracts the group, each weight read once."""
    names = {name for (name, dim), role in group.roles.items() if role == "in" and dim == 1}
    found = [operator for node in replay.nodes if (operator := contraction(node, parameters)) is not None]
    return [o for o in found if o.weight in names and o.groups == 1 and sum(o.weight == other.weight for other in found) == 1]


def _moments(replay: Replay, analysis: Analysis, chunks: list[list[Tensor]]) -> dict[str, Moments]:
    """The second moments of the inputs of every operator that reads a group, by its weight's name."""
    parameters = dict(replay.module.named_parameters(remove_duplicate=False))
    readers = {o.node: o for group in analysis.groups.values() for o in _readers(replay, group, parameters)}
    moments: dict[str, Moments] = {}
    budget = _MOMENT_BYTES
    for operator in list(readers.values()):
        columns = parameters[operator.weight][0].numel()
        if 4 * columns**2 > budget:
            del readers[operator.node]
            continue
        budget -= 4 * columns**2
        moments[operator.weight] = Moments(1, columns)
    generator = torch.Generator().manual_seed(0)
    for chunk in chunks:
        environment = replay.start(chunk)
        for node in replay.nodes:
            if node.op not in ("placeholder", "output"):
                environment[node] = replay.value(node, environment)
            if node in readers:
                operator, weight = readers[node], parameters[readers[node].weight]
                source = node.args[0]
                assert isinstance(source, Node)
                rows = max(256, min(16 * weight[0].numel(), 32768) // len(chunks))
                positions = operator.draw(environment[node], rows, generator)
                moments[operator.weight].add(operator.columns(environment[source], weight, positions))
            replay.release(node, environment)
    return moments


def _width_trials(
    replay: Replay, graph: Graph, analysis: Analysis, scores: Scores, multiple: int, moments: dict[str, Moments]
) -> list[_Trial]:
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    trials: list[_Trial] = []
    for name, group in analysis.groups.items():
        readers = {o.weight: o for o in _readers(replay, group, parameters) if o.weight in moments}
        for width in width_levels(group, multiple)[1:]:
            going = lowest(scores[name], group.units - width)
            if len(going) < group.units - width:
                continue
            changed = _zeroed(group, going, parameters)
            shifts: dict[Node, Tensor] = {}
            for weight, operator in readers.items():
                gone = indices_of(group.unit_of[weight, 1], going)
                changed[weight], shift = _refit(changed[weight], parameters[weight], gone, moments[weight])
                shifts[operator.node] = shift.reshape(-1, *[1] * len(operator.stride))
            trials.append(_Trial(name, width, _first(replay, changed), changed, shifts))
    return trials


def _zeroed(group: Group, going: NDArray[np.int64], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins with everything that belongs to the units set to zero."""
    changed: dict[str, Tensor] = {}
    for (name, dim), unit_of in group.unit_of.items():
        if name in parameters:
            value = changed.get(name, parameters[name]).detach().clone()
            changed[name] = value.index_fill_(dim, torch.from_numpy(indices_of(unit_of, going)), 0.0)
    return changed


def _refit(changed: Tensor, weight: Tensor, gone: NDArray[np.int64], moments: Moments) -> tuple[Tensor, Tensor]:
    """The weight refitted to its own output without the input channels `gone`, and the shift of its output that keeps the mean."""
    columns = weight[0].numel()
    each = columns // weight.shape[1]
    keep = torch.ones(weight.shape[1], dtype=torch.bool)
    keep[torch.from_numpy(gone)] = False
    kept = keep.repeat_interleave(each).nonzero()[:, 0]
    gram, _, _ = moments.second(centered=True)
    original = weight.detach().double().reshape(len(weight), columns)
    alive = changed.reshape(len(weight), columns).abs().sum(1) > 0  # rows that the same trial removed (a tied stream) stay zero
    solved = torch.zeros_like(original)
    solved[:, kept] = ridge(gram[:, kept][:, :, kept], (gram[0, kept] @ original.T)[None], original[None][:, :, kept], _STRENGTH)[0]
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
