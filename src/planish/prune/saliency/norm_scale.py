"""Norm scale: a channel that its norm scales by little says little."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planish.graph.facts import arguments, rule_name
from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material
from planish.prune.saliency.magnitude import Magnitude
from planish.prune.units import by_unit, finite, relative

_NORMS = ("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm")


class NormScale(Magnitude):
    """s_u = the mean over the norms that a unit runs through of |scale_u|, relative to the average unit; `Magnitude` where there is none.

    References:
        Liu et al. 2017, Learning efficient convolutional networks through network slimming, section 3.
    Differs:
        any norm with a scale counts, not batch norm alone; no training with a penalty on scales is asked for before it.
    """

    def scores(self, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, NDArray[np.float64]]:
        """See `planish.prune.contract.Saliency`; a unit with a scale that is not finite gets NaN."""
        scales = set()
        for node in graph.module.graph.nodes:
            if node.op == "call_function" and rule_name(node.target) in _NORMS:
                scale = arguments(node).get("weight")
                scales.add(str(scale.target) if scale is not None and scale.op == "get_attr" else "")
        parameters = dict(graph.module.named_parameters())
        result = super().scores(graph, analysis, material, seed)
        for name, group in analysis.groups.items():
            keys = [key for key in group.unit_of if key[0] in scales and key[0] in parameters]
            found = [relative(by_unit(parameters[key[0]].detach().abs(), key[1], group.unit_of[key], group.units)) for key in keys]
            if found:
                result[name] = finite(np.mean(found, axis=0))
        return result
