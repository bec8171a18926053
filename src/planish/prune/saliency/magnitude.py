"""L2 magnitude: how large the weights are that make a unit and that read it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planish.data import Split
from planish.graph.graph import Analysis, Graph
from planish.prune.units import by_unit, unit_mean


class Magnitude:
    """The root of a unit's mean squared norm over the parameters that it spans, each relative to that parameter's average unit.

    With P the group's parameters (every weight and bias that issues its units, the norm parameters that scale them, and every weight
    that contracts them) and ||p_u|| the L2 norm of the slice of p that belongs to unit u:

        s_u = sqrt( mean over p in P of ||p_u||^2 / (mean over units v of ||p_v||^2) )

    The mean over units of s_u^2 is 1 in every group, so that groups compare, and a wide layer does not outvote a narrow one.

    References:
        Fang et al. 2023, DepGraph: Towards any structural pruning, equation 7 (L2 norms aggregated over a group's coupled parameters).
    Differs:
        each parameter is normalised by its own mean before the aggregation, not the group's sum by its maximum.
    """

    needs: frozenset[str] = frozenset()
    kind: str | None = None

    def scores(self, graph: Graph, analysis: Analysis, split: Split, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit with a weight that is not finite gets NaN."""
        parameters = dict(graph.module.named_parameters())
        result: dict[str, NDArray[np.float64]] = {}
        for name, group in analysis.groups.items():
            shares = []
            for key, unit_of in group.unit_of.items():
                if key[0] in parameters:
                    squares = by_unit(parameters[key[0]].detach().double().square(), key[1], unit_of, group.units)
                    average = unit_mean(squares)
                    shares.append(squares / average if average > 0 else squares)
            mean = np.mean(shares, axis=0) if shares else np.full(group.units, np.nan)
            result[name] = np.sqrt(np.where(np.isfinite(mean), mean, np.nan))
        return result
