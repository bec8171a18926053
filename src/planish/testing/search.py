"""A made-up residual net with losses and kernel times, and the contract that every search method must keep on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from planish.graph.graph import Analysis, Block, Group, Operator, Size
from planish.measure.kernels import Kernel
from planish.plan import Option, Plan
from planish.search.contract import Evidence, Limits, Search
from planish.search.costs import Costs
from planish.search.space import Space

Method = Callable[[Space, Costs, Limits, int], Search]


def kernel_seconds(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    """Made-up seconds: a fixed part, multiply-accumulates (half in int8) and traffic; conversions cost traffic alone."""

    def one(kernel: Kernel) -> float:
        elements = float(np.prod(kernel.output)) + sum(float(np.prod(shape)) for shape in kernel.inputs)
        work = float(np.prod(kernel.output)) * float(np.prod(kernel.weights[0][1:])) if kernel.weights else 0.0
        return 1e-6 + 1e-10 * work * (0.5 if kernel.precision == "int8" else 1.0) + 2e-10 * elements

    return np.asarray([one(kernel) for kernel in kernels])


def residual_net(blocks: int = 3, units: int = 32, space_size: int = 8) -> Analysis:
    """An analysis as of a residual net: a stem, `blocks` branches of two convolutions each, a pool and a linear head.

    The groups are the stream ("stem") and the inside of each branch ("block0.conv1", ...), all of `units` channels.
    """

    def wide(group: str) -> Size:
        return Size(units, 0, (((group,), 1),), ((units,),))

    def image(channels: Size) -> tuple[Size, ...]:
        return (Size(1), channels, Size(space_size), Size(space_size))

    def conv(name: str, inside: Size, outside: Size, reads: tuple[str, ...], fused: tuple[str, ...]) -> Operator:
        weights = ((outside, inside, Size(3), Size(3)), (outside,))
        attributes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        return Operator(name, name, "conv", f"{name}.weight", (image(inside),), image(outside), weights, attributes, fused, reads)

    stream = wide("stem")
    operators = [conv("stem", Size(3), stream, (), ("relu",))]
    found = {}
    for number in range(blocks):
        inside = f"block{number}.conv1"
        before = operators[-1].name
        operators.append(conv(inside, stream, wide(inside), (before,), ("relu",)))
        operators.append(conv(f"block{number}.conv2", wide(inside), stream, (inside, before), ("add", "relu")))
        names = tuple(operator.name for operator in operators[-2:])
        found[f"block{number}"] = Block(f"block{number}", f"add{number}", before, names, tuple(f"{name}.weight" for name in names))
    pooled = (Size(1), stream, Size(1), Size(1))
    reads = (operators[-1].name,)
    operators.append(Operator("pool", "pool", "pool", None, (image(stream),), pooled, (), {"op": "mean"}, (), reads))
    head = ((Size(10), stream), (Size(10),))
    operators.append(Operator("head", "head", "linear", "head.weight", ((Size(1), stream),), (Size(1), Size(10)), head, {}, (), ("pool",)))
    groups = {name: Group(name, units, {}, {}) for name in ["stem", *(f"block{number}.conv1" for number in range(blocks))]}
    return Analysis(groups, found, {operator.name: operator for operator in operators}, {}, {})


def options_of(analysis: Analysis, multiple: int = 8, seed: int = 0) -> list[Option]:
    """Random losses for widths in multiples of `multiple`, for every block, and for int8 in every convolution and linear map."""
    rng = np.random.default_rng(seed)
    out = []
    for group in analysis.groups.values():
        scale = float(rng.exponential())
        for width in range(group.units - multiple, 0, -multiple):
            out.append(Option("width", group.name, width, scale * (1 - width / group.units) ** 2))
    out += [Option("block", name, 1, float(rng.exponential())) for name in analysis.blocks]
    weighted = [operator.name for operator in analysis.operators.values() if operator.weight]
    out += [Option("precision", name, "int8", 0.05 * float(rng.exponential())) for name in weighted]
    return out


def made_up(blocks: int = 3, units: int = 32, seed: int = 0) -> tuple[Space, Costs]:
    """A space over `residual_net` and its costs."""
    analysis = residual_net(blocks, units)
    space = Space(analysis, options_of(analysis, seed=seed), Plan(target="made-up:cpu"))
    return space, Costs(space, kernel_seconds)


def respond(space: Space, costs: Costs, plan: Plan, kind: str = "candidate") -> Evidence:
    """What a made-up machine says of a plan: a loss 1.3 times the predicted, a drop of a tenth of it, 20 % more latency."""
    predicted = costs.predict(space.assignment(plan))
    measured = {"latency": 2e-6 + 1.2 * predicted["latency"], "size": predicted["size"] + 500.0}
    loss = 1.3 * predicted["loss"]
    return Evidence("trial" if kind == "trial" else "candidate", loss, 0.1 * loss, measured if kind == "trial" else {})


def check_search(method: Method) -> None:
    """Raise `AssertionError` where a search method breaks the contract of `planish.search.contract.Search`."""
    space, costs = made_up(blocks=2)
    full = costs.predict(space.identity)["latency"]
    for limits in (Limits({"latency": 0.5 * full}, drop=0.1), Limits({"latency": 0.6 * full, "size": 4e4}, drop=0.1), Limits(drop=0.05)):
        first, second = (_played(method, space, costs, limits) for _ in range(2))
        assert first == second, "the same seed and evidence must give the same plans"
        assert len({plan.digest for plan in first}) == len(first), "no plan may be proposed twice"
        assert not any(plan.is_identity for plan in first), "the plan that changes nothing is never proposed"
        for plan in first:
            predicted = costs.predict(space.assignment(plan))
            assert all(predicted[quantity] <= bound for quantity, bound in limits.costs.items()), "plans must hold the limits"
        assert _resumed(method, space, costs, limits) == first, "a search that was told everything goes on as the one that asked"
    _check_exhaustion(method)
    _check_infeasible(method)


def _played(method: Method, space: Space, costs: Costs, limits: Limits) -> list[Plan]:
    search = method(space, costs, limits, 3)
    out = []
    for _ in range(2):
        for plan in search.ask(2):
            search.tell(plan, respond(space, costs, plan))
            out.append(plan)
            assert (search.expected_drop(plan) or 0.0) > 0, "a plan that was told to lose something is expected to"
    best = search.best(2)
    assert best and set(best) <= set(out), "the best plans are among those told"
    return out


def _resumed(method: Method, space: Space, costs: Costs, limits: Limits) -> list[Plan]:
    """The plans of `_played`, each batch asked from a fresh search that was told what came before."""
    out: list[Plan] = []
    for _ in range(2):
        search = method(space, costs, limits, 3)
        for plan in out:
            search.tell(plan, respond(space, costs, plan))
        out += [*search.ask(1), *search.ask(1)]
    return out


def _check_exhaustion(method: Method) -> None:
    analysis = residual_net(blocks=1, units=16)
    options = [option for option in options_of(analysis) if option.technique != "precision"]
    space = Space(analysis, options, Plan(target="made-up:cpu"))
    costs = Costs(space, kernel_seconds)
    search = method(space, costs, Limits(drop=10.0), 0)
    asked = []
    while batch := search.ask(2):
        for plan in batch:
            search.tell(plan, respond(space, costs, plan))
        asked += batch
    assert {space.assignment(plan) for plan in asked} == set(space.all()) - {space.identity}, "all of a small space is proposed"
    assert search.ask(1) == [], "an exhausted search proposes nothing"


def _check_infeasible(method: Method) -> None:
    space, costs = made_up(blocks=2)
    search = method(space, costs, Limits({"latency": 1e-9}, drop=0.1), 0)
    nearest = search.ask(1)
    assert len(nearest) == 1, "where nothing holds the limits, the nearest plan is proposed"
    cheapest = min(costs.predict(space.assignment(plan))["latency"] for plan in nearest)
    values = costs.problem.values_of(np.asarray(list(space.all())))
    assert np.isclose(cheapest, values[costs.problem.rows.index("latency")].min()), "the nearest plan to a limit is the cheapest"
