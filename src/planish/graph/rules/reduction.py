"""Reductions: the reduced dimensions vanish without a tie; means and extrema over a pruned dimension make its group inexact."""

from __future__ import annotations

from planish.graph.ids import Val
from planish.graph.program import Result, Step, rule
from planish.graph.rules.elementwise import pointwise

EXACT = frozenset({"sum", "norm", "linalg_vector_norm", "count_nonzero"})
FIXING = frozenset({"prod", "all", "any", "argmin"})


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "count_nonzero",
    "prod",
    "all",
    "any",
    "argmin",
)
def reduction(step: Step) -> Result | None:
    """Zeros count for nothing in sums and norms; other statistics change; products and positions need every index."""
    if "other" in step.arguments:
        return pointwise(step)
    x = step.tensor("self")
    given = step.value("dim") if "dim" in step.arguments else None
    if given is None or given == []:
        dims = set(range(x.rank))
    else:
        dims = {d % x.rank for d in ([given] if isinstance(given, int) else given)} if x.rank else set()
    several = len(step.shapes) > 1
    for d in dims & x.ids.keys():
        if step.name in FIXING or several:
            step.ids.fix(x.ids[d], f"{step.why} needs all of it")
        elif step.name not in EXACT:
            step.ids.mark_inexact(x.ids[d])
    keeps = len(step.shape) == x.rank and x.rank > 0
    kept = [d for d in range(x.rank) if d not in dims]
    place = {d: d if keeps else j for j, d in enumerate(kept)}
    outs: list[Val | None] = [
        Val(step.shape, {place[d]: x.ids[d] for d in kept if d in x.ids}, {place[d] for d in kept if d in x.weak}) for _ in step.shapes
    ]
    return outs if several else outs[0]
