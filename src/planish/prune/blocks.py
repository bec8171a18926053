"""The loss of bypassing each residual block alone, after a short local repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from planish.graph.divergence import Divergence
from planish.graph.graph import Analysis
from planish.graph.replay import Environment, Replay
from planish.prune.repair import STRENGTHS, Fit, Repair, find_fits

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
) -> dict[str, float]:
    """The mean divergence from the original of the graph without each block.

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
    """
    fitted = max(1, len(chunks) * 2 // 3)
    held_out = fitted if len(chunks) > 1 else 0
    fits, _ = find_fits(replay, replay)
    values: list[Environment] = [replay.start(chunk) for chunk in chunks]
    reached = 0
    losses: dict[str, float] = {}
    for block in sorted(analysis.blocks.values(), key=lambda block: replay.position[replay.by_name[block.node]]):
        node = replay.by_name[block.node]
        while reached < replay.position[node]:
            for environment in values:
                replay.step(replay.nodes[reached], environment)
            reached += 1
        near = {at: fit for at, fit in fits.items() if replay.position[at] > reached}
        near = dict(list(near.items())[:_REPAIRED])
        repair = Repair(
            replay,
            replay,
            _copies(replay, near),
            {},
            [dict(environment) for environment in values],
            [dict(environment) for environment in values[:fitted]],
            STRENGTHS,
            _ROWS_PER_COLUMN,
            torch.Generator().manual_seed(0),
            reached,
            reached,
        )
        outputs = repair.run(near, redirected={node: replay.by_name[block.skip]})
        totals = [measure.per_sample(new, old) for new, old in zip(outputs[held_out:], reference[held_out:], strict=True)]
        losses[block.name] = float(torch.cat(totals).double().mean())
        done()
    return losses


def _copies(replay: Replay, fits: Mapping[Node, Fit]) -> dict[str, Tensor]:
    """Copies of the parameters and statistics that some fits will write to."""
    operators = [at for fit in fits.values() for at in (fit.operator.node, fit.norm) if at is not None]
    sources = [source for at in operators for source in at.all_input_nodes if source.op == "get_attr"]
    return {str(source.target): replay.value(source, {}).detach().clone() for source in sources}
