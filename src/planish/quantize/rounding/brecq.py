"""Rounding up or down learned for all layers of a residual branch together, on what they give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.quantize.contract import Layer, Outputs, Rounded
from planish.quantize.rounding.adaround import AdaRound
from planish.quantize.rounding.soft import Soft, learn

_MOST_WORK = 2e11
"""Multiplications of one branch: a minute of a slow core, whatever its size."""
_FEWEST_STEPS = 50


class Brecq:
    """Weights of a branch go to the grid points below or above them, so that its sum with the skip has the least squared error.

    Args:
        steps: of the optimizer, each on one batch, at most; large branches take fewer.
        rate: its learning rate.
        pull: what a weight between two points costs, against 1 for its share of the error when all are rounded to nearest.

    References: Li et al., BRECQ, 2021, algorithm 1.
    Differs: all output values count alike, not by their Fisher information. The target is what the branch in float makes of the inputs that
        it has in the rounded program. A layer in no branch is rounded by `AdaRound`. A branch that nearest rounding serves better
        takes that.
    """

    needs: frozenset[str] = frozenset({"moments", "blocks"})

    def __init__(self, steps: int = 300, rate: float = 0.1, pull: float = 10.0) -> None:
        self.steps, self.rate, self.pull = steps, rate, pull

    def rounded(self, layers: Sequence[Layer], outputs: Outputs | None, generator: torch.Generator) -> list[Rounded]:
        if outputs is None:
            return AdaRound(self.steps, self.rate, self.pull).rounded(layers, None, generator)
        nearest = [Rounded(layer.quantizer.rounded(layer.weight), layer.quantizer) for layer in layers]
        targets = [outputs(batch, None) for batch in range(outputs.batches)]
        before = _error(outputs, targets, nearest)
        if before <= 0:
            return nearest
        softs = [Soft(layer) for layer in layers]
        unit = sum(layer.weight.numel() for layer in layers) * outputs.batches / before

        def loss() -> Tensor:
            batch = int(torch.randint(outputs.batches, (1,), generator=generator))
            found = outputs(batch, [soft.at(soft.shares()) for soft in softs])
            return (found - targets[batch]).square().sum() * unit

        positions = targets[0].numel() / len(layers[-1].weight)
        work = 3 * positions * sum(layer.weight.numel() for layer in layers)  # forwards, and twice as much backwards
        learn(softs, loss, int(min(self.steps, max(_FEWEST_STEPS, _MOST_WORK / work))), self.rate, self.pull)
        found = [soft.rounded() for soft in softs]
        return found if _error(outputs, targets, found) < before else nearest


def _error(outputs: Outputs, targets: Sequence[Tensor], found: Sequence[Rounded]) -> float:
    weights = [layer.weight for layer in found]
    return sum(float((outputs(batch, weights) - target).double().square().sum()) for batch, target in enumerate(targets))
