"""Rounding up or down learned for each layer, on the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.quantize.contract import Layer, Outputs, Rounded
from planish.quantize.rounding.soft import Soft, learn

_MOST_WORK = 5e11
"""Multiplications of one layer: a minute of a slow core, whatever its size."""
_FEWEST_STEPS = 50


class AdaRound:
    """Each weight goes to the grid point below or above it, so that the layer's squared error is least.

    Args:
        steps: of the optimizer, at most; large layers take fewer.
        rate: its learning rate.
        pull: what a weight between two points costs, against 1 for its error when all are rounded to nearest.

    References: Nagel et al., Up or Down?, 2020, eq. 21 to 24.
    Differs: the error is that of the linear output, without the activation behind it, so that it follows from the inputs' second moments: each
        step sees all samples. It is measured in units of nearest rounding's, and the pull is stronger than it: with 0.05 many weights end
        undecided (0.65 of nearest's error on inputs that vary together), with 10 few do (0.24), with 30 it is the same. Ten times the
        learning rate for a thirtieth of the steps. A row that nearest rounding serves better takes that.
    """

    needs: frozenset[str] = frozenset({"moments"})

    def __init__(self, steps: int = 300, rate: float = 0.1, pull: float = 10.0) -> None:
        self.steps, self.rate, self.pull = steps, rate, pull

    def rounded(self, layers: Sequence[Layer], outputs: Outputs | None, generator: torch.Generator) -> list[Rounded]:
        return [self._rounded(layer) for layer in layers]

    def _rounded(self, layer: Layer) -> Rounded:
        assert layer.gram is not None
        nearest = layer.quantizer.rounded(layer.weight)
        before = layer.errors(nearest)
        if float(before.sum()) <= 0:
            return Rounded(nearest, layer.quantizer)
        soft = Soft(layer)
        gram = (layer.gram * (layer.weight.numel() / before.sum())).float()

        def loss() -> Tensor:
            gone = (soft.at(soft.shares()) - layer.weight).view(len(gram), -1, gram.shape[1])
            return ((gone @ gram) * gone).sum()

        steps = int(min(self.steps, max(_FEWEST_STEPS, _MOST_WORK / (2 * layer.weight.numel() * gram.shape[1]))))
        learn([soft], loss, steps, self.rate, self.pull)
        found = soft.rounded()
        is_better = layer.errors(found.weight) < before
        return Rounded(torch.where(is_better[:, None], found.weight, nearest), layer.quantizer)
