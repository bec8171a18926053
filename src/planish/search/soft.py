"""Predicted cost of widths in between: what the tables say, linear from level to level, so that training can follow its slope."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from planish.plan import Plan
from planish.search.costs import Costs


def soft_price(costs: Costs, plan: Plan, quantity: str | None = None) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """Units that stay by group, [] each, fractions allowed -> the predicted cost, a scalar.

    Between the levels of the search it is multilinear; beyond the narrowest it stays what it is there. Groups that are not given, blocks and
    precisions are as the plan has them.

    Args:
        costs: of the space that the plan is of.
        plan: what is not given.
        quantity: "latency" (seconds), "macs" or "size" (bytes); by default latency, or MACs where the target has no tables.
    """
    space = costs.space
    chosen = space.assignment(plan)
    tables = [(scope, torch.from_numpy(table.copy())) for scope, table in costs.factors[quantity or costs.effort]]
    number = {variable.subject: v for v, variable in enumerate(space.variables) if variable.technique == "width"}
    values = {v: torch.tensor([float(value) for value in space.variables[v].values], dtype=torch.float64) for v in number.values()}

    def price(units: Mapping[str, Tensor]) -> Tensor:
        weights = {number[name]: _weights(values[number[name]], width.double()) for name, width in units.items() if name in number}
        total = torch.zeros((), dtype=torch.float64)
        for scope, table in tables:
            total = total + _reduced(table, scope, weights, chosen)
        return total

    return price


def _weights(values: Tensor, width: Tensor) -> Tensor:
    """What each level counts for a width between them, [levels]; levels fall."""
    inside = width.clamp(values[-1].item(), values[0].item())
    lower = int((values > inside.detach()).sum())  # the first level that is not above it
    lower = min(max(lower, 1), len(values) - 1)
    share = (inside - values[lower]) / (values[lower - 1] - values[lower])
    found = torch.zeros(len(values), dtype=torch.float64)
    return found.index_add(0, torch.tensor([lower - 1, lower]), torch.stack([share, 1 - share]))


def _reduced(table: Tensor, scope: Sequence[int], weights: Mapping[int, Tensor], chosen: Sequence[int]) -> Tensor:
    for v in scope:  # the first axis that is left is always v's
        table = torch.tensordot(weights[v], table, 1) if v in weights else table[chosen[v]]
    return table
