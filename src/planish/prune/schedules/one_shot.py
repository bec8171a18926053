"""All units leave at once, before any training: what recovery brings back is brought back in the smaller net."""

from __future__ import annotations

from planish.prune.shaping import Shaped, Shaping, cut


class OneShot:
    """See `planish.prune.shaping.Schedule`."""

    def shape(self, shaping: Shaping) -> Shaped:
        """Cut and refitted; nothing is trained."""
        return cut(shaping, shaping.graph, {name: shaping.orders[name].scores for name in shaping.widths})
