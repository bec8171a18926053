"""Fluctuation: a unit that hardly varies can be made up for by a bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material
from planish.prune.readers import variances_of_inputs
from planish.prune.saliency.magnitude import Magnitude
from planish.prune.units import by_unit, finite, relative


class Fluctuation(Magnitude):
    """s_u = the mean over the group's readers of sum over channels j of u of Var(x_j) ||W_:,j||^2, relative to the average unit.

    What is lost with a unit's mean is given back by compensation, which fits an intercept to every operator (FLAP's bias correction), so
    that only its variation counts. Groups that no convolution or linear map reads get `Magnitude`'s scores.

    Args:
        samples: calibration samples.

    References:
        An et al. 2024, Fluctuation-based adaptive structured pruning for large language models, equation 5.
    Differs:
        a convolution's channel has one variance, over space as well; readers are added relative to their mean, and groups are not
        standardised, since the search compares groups by measured losses.
    """

    needs: frozenset[str] = frozenset({"data"})

    def __init__(self, samples: int = 256) -> None:
        self.samples = samples

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit whose activations are not finite gets NaN."""
        result, self.others = super().scores(graph, analysis, material, seed), []
        parameters = dict(graph.module.named_parameters(remove_duplicate=False))
        known = variances_of_inputs(graph, analysis, material.split, self.samples)
        for name, group in analysis.groups.items():
            shares = []
            for weight in (weight for (weight, dim), role in group.roles.items() if role == "in" and dim == 1 and weight in known):
                power = parameters[weight].detach().double().square().movedim(1, 0).flatten(1).sum(1)
                shares.append(relative(by_unit(known[weight] * power, 0, group.unit_of[weight, 1], group.units)))
            if shares:
                result[name] = finite(np.mean(shares, axis=0))
            else:
                self.others = [*self.others, name]
        return result
