"""Magnitude, L2 and L1: how large the weights are that make a unit and that read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material
from planish.prune.units import by_unit, finite, relative


class Magnitude:
    """The mean norm of a unit over the parameters that it spans, each relative to that parameter's average unit.

    With P the group's parameters (every weight and bias that issues its units, the norm parameters that scale them, and every weight
    that contracts them), ||p_u|| the norm of the slice of p that belongs to unit u, and k = 2 (or 1, see `L1`):

        s_u = ( mean over p in P of ||p_u||^k / (mean over units v of ||p_v||^k) )^(1/k)

    The mean over units of s_u^k is 1 in every group, so that groups compare, and a wide layer does not outvote a narrow one.

    References:
        Fang et al. 2023, DepGraph: Towards any structural pruning, equation 7 (L2 norms aggregated over a group's coupled parameters).
    Differs:
        each parameter is normalised by its own mean before the aggregation, not the group's sum by its maximum.
    """

    needs: frozenset[str] = frozenset()
    others: Sequence[str] = ()
    power = 2

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit with a weight that is not finite gets NaN."""
        parameters = dict(graph.module.named_parameters())
        result: dict[str, NDArray[np.float64]] = {}
        for name, group in analysis.groups.items():
            shares = [
                relative(by_unit(parameters[key[0]].detach().double().abs() ** self.power, key[1], unit_of, group.units))
                for key, unit_of in group.unit_of.items()
                if key[0] in parameters
            ]
            mean = np.mean(shares, axis=0) if shares else np.full(group.units, np.nan)
            result[name] = finite(mean) ** (1 / self.power)
        return result


class L1(Magnitude):
    """The same with sums of absolute values.

    References:
        Li et al. 2017, Pruning filters for efficient ConvNets (the L1 norm of a filter).
    """

    power = 1
