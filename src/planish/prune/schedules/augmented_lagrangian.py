"""Constrained training: gates of units and the net are trained together under the budget, whose multiplier says what a unit must be worth."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from planish.prune.shaping import Shaped, Shaping, Step, cut, gated

_EVERY, _STEP, _READY = 5, 0.02, 0.8
"""Steps from one update of the multiplier to the next; how far a gate moves in a step at most, about; and the share of training after which the
budget should hold."""
_PENALTY, _FASTER, _ENOUGH, _STRONGEST = 10.0, 1.3, 0.9, 30.0
"""The penalty at first; what it is multiplied with where the budget is missed by more than this share of what it was missed by before; and the
most that it becomes."""
_MEMORY = 0.9


class AugmentedLagrangian:
    """See `planish.prune.shaping.Schedule`.

    Minimises over weights w and gates m in [0, 1]

        loss(w, m)   subject to   c(m) = price(units on) / price(all) - budget <= 0

    by descent on `loss + (penalty / 2) * (max(0, c + multiplier / penalty)^2 - (multiplier / penalty)^2)`, gates projected onto [0, 1] after
    every step, and `multiplier <- max(0, multiplier + penalty * c)` every few steps. The widths come out of it: unlike other schedules it
    spends what the plan's widths cost where it serves best. The budget of the first steps is what the net costs, and falls to its own.

    The history holds the multiplier, the violation max(0, c), and the KKT residual: the largest of the norm of the projected gradient by the
    gates (per gate, relative to the gradient's own), the violation, and |multiplier * c|.

    References:
        Nocedal and Wright 2006, algorithm 17.4 and section 17.4 (bounds by projection), equations 12.34 (KKT).
    Differs:
        weights and gates take one stochastic step between updates of the multiplier, not a minimisation; a gate's step is relative to the
        gradient of the loss by all gates.
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained under the budget; then the widths that hold it are taken, and the lowest gates are cut."""
        net = gated(shaping.graph, shaping.analysis, [name for name in shaping.levels if name in shaping.analysis.groups])
        if not net.gates:
            shaping.say("augmented Lagrangian: nothing that narrows is read by a convolution or linear map; units leave at once")
            return cut(shaping, shaping.graph, {})
        stays = {name: torch.from_numpy(np.isnan(shaping.orders[name].scores)) for name in net.gates}
        everything = shaping.price({name: torch.tensor(float(len(gate))) for name, gate in net.gates.items()}).item()
        wanted = shaping.price({name: torch.tensor(float(width)) for name, width in shaping.widths.items()}).item() / everything
        multiplier, penalty, before = 0.0, _PENALTY, 0.0
        scale: Tensor | None = None
        history: list[Step] = []
        steps, progressed = 0, 0.0

        def violation() -> Tensor:
            budget = 1 - (1 - wanted) * min(1.0, progressed / _READY)
            return shaping.price({name: gate.sum() for name, gate in net.gates.items()}) / everything - budget

        def after_step(rate: float, progress: float) -> None:
            nonlocal multiplier, penalty, before, scale, steps, progressed
            steps, progressed = steps + 1, progress
            gates, must_stay = list(net.gates.values()), list(stays.values())
            slopes = [torch.zeros_like(gate) if gate.grad is None else gate.grad.clone() for gate in gates]
            for gate in gates:
                gate.grad = None
            with torch.enable_grad():
                c = violation()
                prices = torch.autograd.grad(c, gates, allow_unused=True)
            level = torch.cat(slopes).square().mean()
            scale = level if scale is None else _MEMORY * scale + (1 - _MEMORY) * level
            unit = scale.sqrt().clamp(min=1e-12)
            pull = max(0.0, multiplier + penalty * c.item())
            number = sum(len(gate) for gate in gates)
            residual = 0.0
            with torch.no_grad():
                for gate, slope, price, kept in zip(gates, slopes, prices, must_stay, strict=True):
                    # prices are shares of the whole: times the number of gates they are of the size of a relative slope
                    gradient = slope / unit + pull * number * (torch.zeros_like(gate) if price is None else price)
                    moved = torch.where(kept, 1.0, (gate - _STEP * gradient.clamp(-2, 2)).clamp(0.0, 1.0))
                    residual += float(torch.where(kept, 0.0, gate - (gate - gradient).clamp(0.0, 1.0)).square().sum())
                    gate.copy_(moved)
            if steps % _EVERY == 0:
                value = c.item()
                multiplier = max(0.0, multiplier + penalty * value)
                if value > 0 and value > _ENOUGH * before > 0:
                    penalty = min(penalty * _FASTER, _STRONGEST)
                before = value
                stationarity = (residual / max(1, number)) ** 0.5
                history.append(
                    {
                        "step": float(steps),
                        "multiplier": multiplier,
                        "penalty": penalty,
                        "violation": max(0.0, value),
                        "price": value + 1 - (1 - wanted) * min(1.0, progressed / _READY),
                        "kkt": max(stationarity, 0.0, value, abs(multiplier * value)),
                    }
                )

        shaping.fit(net.graph, 1.0, "augmented-lagrangian", after_step=after_step)
        mass = {name: gate.detach().double() for name, gate in net.gates.items()}
        least = {name: max(shaping.analysis.groups[name].least, int(kept.sum())) for name, kept in stays.items()}
        widths = _rounded(shaping, mass, least, wanted * everything)
        if history:
            last = history[-1]
            spent = shaping.price({name: torch.tensor(float(widths.get(name, len(gate)))) for name, gate in net.gates.items()}).item()
            shaping.say(
                f"augmented Lagrangian: of what all units cost {wanted:.3f} may be spent, gates cost {last['price']:.3f} and the widths near them "
                f"{spent / everything:.3f}; multiplier {last['multiplier']:.3g}, KKT residual {last['kkt']:.3g}"
            )
        found = cut(shaping, net.graph, {name: value.numpy() for name, value in mass.items()}, widths)
        return Shaped(found.graph, found.kept, found.widths, tuple(history))


def _rounded(shaping: Shaping, mass: dict[str, Tensor], least: dict[str, int], budget: float) -> dict[str, int]:
    """Widths among those that may be chosen, near to what the gates add up to, that cost no more than `budget`.

    From the nearest widths: while they cost too much, the step down that loses least of the gates per price; then every step up that fits, the
    one that brings most first.
    """
    levels = {name: sorted({*(w for w in shaping.levels[name] if w >= least[name]), len(gates)}) for name, gates in mass.items()}
    at = {name: min(range(len(levels[name])), key=lambda i: abs(levels[name][i] - float(gates.sum()))) for name, gates in mass.items()}
    ranked = {name: gates.sort(descending=True).values for name, gates in mass.items()}

    def price(places: dict[str, int]) -> float:
        return shaping.price({name: torch.tensor(float(levels[name][place])) for name, place in places.items()}).item()

    def moved(name: str, by: int) -> tuple[float, float]:
        """How much of the gates one step brings, and what it costs."""
        there = {**at, name: at[name] + by}
        low, high = sorted((levels[name][at[name]], levels[name][there[name]]))
        return float(ranked[name][low:high].sum()), abs(price(there) - price(at))

    while price(at) > budget * (1 + 1e-9):
        steps = {name: moved(name, -1) for name in at if at[name] > 0}
        if not steps:
            break
        at[min(steps, key=lambda name: steps[name][0] / max(steps[name][1], 1e-12))] -= 1
    while True:
        fitting = {
            name: moved(name, 1)
            for name in at
            if at[name] + 1 < len(levels[name]) and price({**at, name: at[name] + 1}) <= budget * (1 + 1e-9)
        }
        if not fitting:
            return {name: levels[name][place] for name, place in at.items() if levels[name][place] < len(mass[name])}
        at[max(fitting, key=lambda name: fitting[name][0] / max(fitting[name][1], 1e-12))] += 1
