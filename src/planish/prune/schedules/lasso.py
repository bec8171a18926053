"""Sparse training by proximal steps: norms of units (group lasso) or scales of norms (L1) shrink until as many are zero as shall leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from planish.graph.graph import Graph, Group
from planish.prune.shaping import Shaped, Shaping, Step, Units, cut

_READY, _DEAD = 0.8, 0.02
"""Share of training after which all that leave should be gone; and of the usual norm, what counts as gone."""
_FIRST_STRENGTH, _PACE, _WEAKEST, _STRONGEST = 0.05, 1.05, 1e-4, 20.0
_EVERY = 20
_ROLES = ("out", "in", "affine")


class GroupLasso:
    """See `planish.prune.shaping.Schedule`.

    After every step the norm of each unit, over all parameters that belong to it, shrinks by `rate * strength`, and is zero where it would
    become negative: the proximal step of `strength * sum of norms`. Each group's strength rises while fewer of its units are gone than
    should be by now, and falls while more are: nobody has to find it.

    References:
        Yuan and Lin 2006 (group lasso); Parikh and Boyd 2014, section 6.5.4 (its proximal operator); Fang et al. 2023 (DepGraph), for norms
        over all coupled parameters.
    Differs:
        the strength follows the number of units that shall leave.

    Args:
        preferred: roles of the dimensions that count, where a group has any.
    """

    def __init__(self, preferred: tuple[str, ...] = _ROLES) -> None:
        self.preferred = preferred

    def _norms_of(self, graph: Graph, group: Group) -> Units:
        """What shrinks: the dimensions of the preferred roles; all of them, where the group has none."""
        return Units(graph, group, self.preferred if set(self.preferred) & set(group.roles.values()) else _ROLES)

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained towards zeros; then the lowest norms are cut."""
        graph = shaping.graph.copy()
        units = {name: self._norms_of(graph, shaping.analysis.groups[name]) for name in shaping.widths}
        stays = {name: torch.from_numpy(np.isnan(shaping.orders[name].scores)) for name in shaping.widths}
        strengths = dict.fromkeys(units, _FIRST_STRENGTH)
        history: list[Step] = []
        steps = 0

        def after_step(rate: float, progress: float) -> None:
            nonlocal steps
            steps += 1
            gone = 0
            for name, its in units.items():
                norms = its.norms()
                dead = int((norms < _DEAD).sum())
                gone += dead
                due = shaping.leaving(name) * min(1.0, progress / _READY)
                strengths[name] *= _PACE if dead < due else 1 / _PACE
                strengths[name] = min(max(strengths[name], _WEAKEST), _STRONGEST)
                shrunk = (1 - rate * strengths[name] / norms.clamp(min=1e-12)).clamp(min=0.0)
                its.scale_(torch.where(stays[name], 1.0, shrunk))
            if steps % _EVERY == 0:
                history.append({"step": float(steps), "gone": float(gone), "strength": _mean(strengths)})

        shaping.fit(graph, 1.0, "lasso", after_step=after_step)
        scores = {name: its.norms().double().numpy() for name, its in units.items()}
        left = sum(sorted(values)[shaping.leaving(name) - 1] for name, values in scores.items() if shaping.leaving(name)) / max(
            1, len(scores)
        )
        shaping.say(f"sparse training: the last unit that leaves each group has {left:.2g} of the usual norm")
        found = cut(shaping, graph, scores)
        return Shaped(found.graph, found.kept, found.widths, tuple(history))


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / max(1, len(values))
