"""Units leave in several rounds, with recovery and a new look at what stays in between."""

from __future__ import annotations

import numpy as np

from planish.graph.groups import analyse
from planish.graph.surgery import prune
from planish.prune.shaping import Kept, Shaped, Shaping, Step, again, entrances, followed

_ROUNDS = 4


class Iterative:
    """See `planish.prune.shaping.Schedule`.

    Each round takes the same part of the units that leave; those that go next are chosen in the net as it is then.

    References:
        Han et al. 2015, section 3.
    Differs:
        units instead of weights; every round ends with a refit to the original.
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """Trained in between; the last round's recovery is the run's own."""
        graph, analysis, orders = shaping.graph, shaping.analysis, shaping.orders
        at_once = entrances(analysis) | _only_once(shaping)
        left = {name: analysis.groups[name].units for name in shaping.widths}
        names = {name: name for name in shaping.widths}
        total: Kept = {}
        history: list[Step] = []
        for number in range(1, _ROUNDS + 1):
            removed = {}
            for name in shaping.widths:
                if name not in names:
                    continue
                now = analysis.groups[names[name]]
                wanted = now.units - (shaping.widths[name] if name in at_once else _width(shaping, name, number, now.multiple))
                removed[now.name] = orders[now.name].going(wanted).units.tolist() if wanted > 0 else []
                left[name] -= len(removed[now.name])
            pruned = prune(graph, analysis, {name: units for name, units in removed.items() if units})
            total = composed(total, pruned.kept)
            graph = pruned.graph
            shaping.refit(graph, total)
            history.append({"round": float(number), "units": float(sum(len(units) for units in removed.values()))})
            if number < _ROUNDS:
                shaping.fit(graph, 1 / (_ROUNDS - 1), f"round-{number}")
                analysis, orders = again(graph, shaping)
                names = followed(shaping.analysis, analysis, total)
        return Shaped(graph, total, left, tuple(history))


def _only_once(shaping: Shaping) -> set[str]:
    """Groups that cannot be narrowed again once units have left: surgery selects what stays one by one somewhere."""
    analysis = shaping.analysis
    goals = {name: _width(shaping, name, 1, analysis.groups[name].multiple) for name in shaping.widths}
    going = {name: shaping.orders[name].going(analysis.groups[name].units - goal).units.tolist() for name, goal in goals.items()}
    pruned = prune(shaping.graph, analysis, {name: units for name, units in going.items() if units})
    return shaping.widths.keys() - followed(analysis, analyse(pruned.graph), pruned.kept).keys()


def _width(shaping: Shaping, name: str, number: int, multiple: int) -> int:
    """The width of a group after so many rounds."""
    goal, units = shaping.widths[name], shaping.analysis.groups[name].units
    if number == _ROUNDS:
        return goal
    return goal + -(-(units - goal) * (_ROUNDS - number) // (_ROUNDS * multiple)) * multiple


def composed(first: Kept, second: Kept) -> Kept:
    """What is kept of the original by one surgery after another."""
    both = dict(first)
    for key, indices in second.items():
        both[key] = first[key][indices] if key in first else np.asarray(indices)
    return both
