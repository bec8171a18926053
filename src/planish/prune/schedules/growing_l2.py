"""Units that shall leave fade under a decay that grows, so that the others can take over bit by bit."""

from __future__ import annotations

import torch

from planish.prune.shaping import Shaped, Shaping, Step, Units, cut

_MOST, _EVERY = 0.05, 20
"""Of what is left of a unit, what one step takes at the end."""


class GrowingL2:
    """See `planish.prune.shaping.Schedule`.

    The units are chosen at the start, by the plan's criterion. What belongs to them decays by a share that grows from 0 to 5 % a step.

    References:
        Wang et al. 2021 (Neural pruning via growing regularization), algorithm GReg-1.
    Differs:
        the decay is its own step and not part of the gradient, so that it acts alike under every optimizer.
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained while they fade; then they are cut."""
        graph = shaping.graph.copy()
        fading = {}
        for name in shaping.widths:
            group = shaping.analysis.groups[name]
            leaves = torch.zeros(group.units)
            leaves[torch.from_numpy(shaping.orders[name].going(shaping.leaving(name)).units)] = 1.0
            fading[name] = (Units(graph, group), leaves)
        history: list[Step] = []
        steps = 0

        def after_step(rate: float, progress: float) -> None:
            nonlocal steps
            steps += 1
            share = _MOST * progress
            for units, leaves in fading.values():
                units.scale_(1 - share * leaves)
            if steps % _EVERY == 0:
                left = [float((units.norms() * leaves).sum() / leaves.sum().clamp(min=1)) for units, leaves in fading.values()]
                history.append({"step": float(steps), "decay": share, "left": sum(left) / max(1, len(left))})

        shaping.fit(graph, 1.0, "growing-l2", after_step=after_step)
        found = cut(shaping, graph, {name: (1 - leaves).double().numpy() for name, (_, leaves) in fading.items()})
        return Shaped(found.graph, found.kept, found.widths, tuple(history))
