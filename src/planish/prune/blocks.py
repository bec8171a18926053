"""The loss of bypassing each residual block alone, or of leaving an adaptor in its place, after a short local repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from planish.graph.divergence import Divergence
from planish.graph.graph import Analysis
from planish.graph.replay import Environment, Replay
from planish.prune.adaptors import Map, fitted, kinds_of
from planish.prune.repair import STRENGTHS, Fit, Redirection, Repair, find_fits

_REPAIRED = 4
_ROWS_PER_COLUMN = 8


@torch.no_grad()
def block_losses(
    replay: Replay,
    analysis: Analysis,
    chunks: list[list[Tensor]],
    reference: list[list[Tensor]],
    measure: Divergence,
    done: Callable[[], None],
    is_adapted: bool = False,
) -> dict[tuple[str, int | str], float]:
    """(block, 1 or the adaptor that it leaves) -> the mean divergence from the original of the graph without it.

    A residual stream that lacks a block is off by much more than what cannot be repaired, and ranks blocks wrongly. So the next few
    convolutions or linear maps behind the block are refitted as `compensate` does on two thirds of the batches, and the loss is what
    remains on the others.

    Args:
        replay: of the original, in evaluation mode.
        analysis: of the original.
        chunks: batches of flat inputs; all are held at once.
        reference: the original's flat outputs for each.
        measure: of outputs against the reference.
        done: called after each block.
        is_adapted: whether adaptors are tried too.
    """
    fitted_on = max(1, len(chunks) * 2 // 3)
    held_out = fitted_on if len(chunks) > 1 else 0
    fits, _ = find_fits(replay, replay)
    values: list[Environment] = [replay.start(chunk) for chunk in chunks]
    reached = 0
    losses: dict[tuple[str, int | str], float] = {}
    for block in sorted(analysis.blocks.values(), key=lambda block: replay.position[replay.by_name[block.node]]):
        node, skip = replay.by_name[block.node], replay.by_name[block.skip]
        while reached < replay.position[node]:
            for environment in values:
                replay.step(replay.nodes[reached], environment)
            reached += 1
        near = {at: fit for at, fit in fits.items() if replay.position[at] > reached}
        near = dict(list(near.items())[:_REPAIRED])
        ways: dict[int | str, Redirection] = {1: _bypassed(skip)}
        for kind in kinds_of(block) if is_adapted else ():
            skips = [environment[skip] for environment in values[:fitted_on]]
            sums = [replay.value(node, environment) for environment in values[:fitted_on]]
            ways[kind] = _adapted(fitted(block, skips, sums, kind), skip)
        for way, redirection in ways.items():
            repair = Repair(
                replay,
                replay,
                _copies(replay, near),
                {},
                [dict(environment) for environment in values],
                [dict(environment) for environment in values[:fitted_on]],
                STRENGTHS,
                _ROWS_PER_COLUMN,
                torch.Generator().manual_seed(0),
                reached,
                reached,
            )
            outputs = repair.run(near, redirected={node: redirection})
            totals = [measure.per_sample(new, old) for new, old in zip(outputs[held_out:], reference[held_out:], strict=True)]
            losses[block.name, way] = float(torch.cat(totals).double().mean())
        done()
    return losses


def _adapted(adaptor: Map, skip: Node) -> Redirection:
    def redirection(environment: Environment) -> Tensor:
        value: Tensor = environment[skip]
        return value + adaptor(value)

    return redirection


def _bypassed(skip: Node) -> Redirection:
    def redirection(environment: Environment) -> Tensor:
        value: Tensor = environment[skip]
        return value

    return redirection


def _copies(replay: Replay, fits: Mapping[Node, Fit]) -> dict[str, Tensor]:
    """Copies of the parameters and statistics that some fits will write to."""
    operators = [at for fit in fits.values() for at in (fit.operator.node, fit.norm) if at is not None]
    sources = [source for at in operators for source in at.all_input_nodes if source.op == "get_attr"]
    return {str(source.target): replay.value(source, {}).detach().clone() for source in sources}
