"""Units leave behind gates, and return where the net misses them: their weights are kept until the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planish.prune.shaping import Shaped, Shaping, Step, cut, gated

_UNTIL, _EVERY, _FIRST_SHARE, _MEMORY = 0.75, 20, 0.3, 0.9
"""Share of training during which units may return; steps from one exchange to the next; of the units that are gone, how many may be exchanged at
first; and how much of the older gradients a score remembers."""


class Growth:
    """See `planish.prune.shaping.Schedule`.

    The units that would go first are gated off. While the net trains, the gradient of the loss by each gate says what a unit is worth: one that
    is off comes back for one that is on and worth less. Fewer are exchanged as training goes on.

    References:
        Evci et al. 2020 (RigL), for the exchange and its cosine decay. Molchanov et al. 2019, equation 8, for squared gradients of gates.
    Differs:
        units instead of weights; what is off keeps its weights, so that it comes back as it was.
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained with gates; then those that are off are cut."""
        net = gated(shaping.graph, shaping.analysis, list(shaping.widths))
        scores = {name: torch.from_numpy(shaping.orders[name].scores.copy()) for name in shaping.widths}
        worth = {name: torch.zeros(len(gate)) for name, gate in net.gates.items()}
        history: list[Step] = []
        steps = 0
        with torch.no_grad():
            for name, gate in net.gates.items():
                gate[torch.from_numpy(shaping.orders[name].going(shaping.leaving(name)).units)] = 0.0

        @torch.no_grad()
        def after_step(rate: float, progress: float) -> None:
            nonlocal steps
            steps += 1
            for name, gate in net.gates.items():
                if gate.grad is not None:
                    worth[name].mul_(_MEMORY).add_(gate.grad.square(), alpha=1 - _MEMORY)
                    gate.grad = None
            if steps % _EVERY == 0 and progress < _UNTIL:
                share = _FIRST_SHARE / 2 * (1 + math.cos(math.pi * progress / _UNTIL))
                back = sum(
                    _exchange_(gate, worth[name], torch.isnan(scores[name]), share, shaping.analysis.groups[name].multiple)
                    for name, gate in net.gates.items()
                )
                history.append({"step": float(steps), "returned": float(back)})

        shaping.fit(net.graph, 1.0, "growth", after_step=after_step)
        for name, gate in net.gates.items():
            # what is off goes, whatever it scores
            scores[name] = torch.where(gate.detach() > 0, 1.0 + worth[name].double(), 0.0)
        shaping.say(f"growth: {sum(int(step['returned']) for step in history)} units came back in place of others")
        found = cut(shaping, net.graph, {name: value.numpy() for name, value in scores.items()})
        return Shaped(found.graph, found.kept, found.widths, tuple(history))


def _exchange_(gate: Tensor, worth: Tensor, must_stay: Tensor, share: float, multiple: int) -> int:
    """Lets units that are off take the place of units that are on and worth less, in place; how many came back."""
    off, on = (gate == 0).nonzero()[:, 0], ((gate > 0) & ~must_stay).nonzero()[:, 0]
    most = min(len(on), math.ceil(share * len(off)))
    best, worst = off[worth[off].argsort(descending=True)][:most], on[worth[on].argsort()][:most]
    better = int((worth[best] > worth[worst]).sum()) // multiple * multiple
    gate[best[:better]], gate[worst[:better]] = 1.0, 0.0
    return better
