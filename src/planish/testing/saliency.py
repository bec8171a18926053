"""The contract that every saliency keeps; authors of plug-ins run it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Graph
from planish.prune.contract import Material, Redundancy, Saliency
from planish.prune.units import indices_of


def check_saliency(make: Callable[[], Saliency], graph: Graph, analysis: Analysis, material: Material, is_informed: bool = True) -> None:
    """Asserts what `Saliency` promises: shapes and signs, the same seed the same scores, nothing changed, a dead unit goes first.

    Args:
        make: gives a fresh saliency.
        graph: any captured graph; left as it is.
        analysis: of that graph.
        material: some calibration samples, with labels where it needs them.
        is_informed: whether it looks at the net at all: a random one cannot know what is dead.
    """
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in graph.module.named_parameters()}
    mode, random_state = graph.module.training, torch.random.get_rng_state()
    scores = make().scores(graph, analysis, material, seed=0)
    for name, value in graph.module.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    assert flags == {name: (parameter.requires_grad, parameter.grad) for name, parameter in graph.module.named_parameters()}
    assert graph.module.training == mode and torch.equal(torch.random.get_rng_state(), random_state)

    assert set(scores) == set(analysis.groups)
    for name, group in analysis.groups.items():
        assert scores[name].shape == (group.units,), name
        assert np.isnan(scores[name]).all() or np.nanmin(scores[name]) >= 0, name
    again = make().scores(graph, analysis, material, seed=0)
    for name, value in scores.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)

    for name, group in analysis.groups.items() if is_informed else ():
        victim = group.units // 2
        dead = plant_dead(graph, analysis, {name: np.array([victim])})
        found = make().scores(dead, analysis, material, seed=0)[name]
        assert found[victim] <= np.nanmin(found), f"{name}: unit {victim} is dead, but unit {int(np.nanargmin(found))} would go first"


def check_redundancy(make: Callable[[], Redundancy]) -> None:
    """Asserts what `Redundancy` promises: at most as many clusters as wanted, the same seed the same, twins together, few features."""
    generator = np.random.default_rng(0)
    centres = 10 * generator.normal(size=(4, 6))
    features = centres[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] + 0.01 * generator.normal(size=(10, 6))
    for count in (1, 2, 4, 9):
        found = make().clusters(features, count, 0)
        assert found.shape == (10,) and 1 <= len(np.unique(found)) <= count, count
        np.testing.assert_array_equal(found, make().clusters(features, count, 0))
    four = make().clusters(features, 4, 0)
    together = {frozenset(np.flatnonzero(four == label).tolist()) for label in np.unique(four)}
    assert together == {frozenset({0, 4, 8}), frozenset({1, 5, 9}), frozenset({2, 6}), frozenset({3, 7})}
    assert len(np.unique(make().clusters(np.zeros((6, 3)), 4, 0))) <= 4
    assert len(np.unique(make().clusters(features[:2], 1, 0))) == 1


def plant_dead(graph: Graph, analysis: Analysis, units: Mapping[str, NDArray[np.int64]]) -> Graph:
    """A copy in which the given units of each group give nothing: all that issues or scales them is zero, what reads them is not."""
    copied = graph.copy()
    parameters = dict(copied.module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dead in units.items():
            group = analysis.groups[name]
            for (parameter, dim), role in group.roles.items():
                if role != "in" and parameter in parameters:
                    gone = torch.from_numpy(indices_of(group.unit_of[parameter, dim], dead))
                    parameters[parameter].index_fill_(dim, gone, 0.0)
    return copied
