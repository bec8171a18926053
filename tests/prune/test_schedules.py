"""Schedules: every one under the contract, and what each promises beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pruning
import pytest
import torch
from torch import Tensor, nn

from planish import registry
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.plan import Option, Plan
from planish.prune.compensate import compensate
from planish.prune.levels import width_levels
from planish.prune.order import Order, orders
from planish.prune.schedules.augmented_lagrangian import AugmentedLagrangian
from planish.prune.schedules.growth import Growth
from planish.prune.schedules.lasso import GroupLasso
from planish.prune.shaping import Kept, Shaping, Units, gated
from planish.search.costs import Costs
from planish.search.soft import soft_price
from planish.search.space import Space
from planish.testing.schedules import check_schedule, trainer


class Twice(nn.Module):
    """Two hidden layers; the first units of each give what the others do not."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, hidden), nn.BatchNorm1d(hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


def shaping(steps: int = 60, seed: int = 0, **changes: object) -> Shaping:
    """Half of both hidden layers shall leave; prices are MACs."""
    torch.manual_seed(seed)
    graph, analysis = pruning.captured(Twice().eval(), (torch.randn(4, 6),))
    return replace(halved(graph, analysis, steps), **changes)  # type: ignore[arg-type]


def halved(graph: Graph, analysis: Analysis, steps: int = 60) -> Shaping:
    """Half of every group shall leave, or what may."""
    split = pruning.calibration(graph, 64)
    inputs = [torch.from_numpy(array) for array in split.inputs]
    levels = {name: width_levels(group, 2) for name, group in analysis.groups.items()}
    options = [Option("width", name, width, 0.1) for name, widths in levels.items() for width in widths[1:]]
    costs = Costs(Space(analysis, options, Plan("onnxruntime:cpu")), None)
    return Shaping(
        graph,
        analysis,
        {name: max(group.least, group.units // 2) for name, group in analysis.groups.items()},
        orders("taylor", graph, analysis, pruning.material(graph, 64), 0),
        levels,
        soft_price(costs, Plan("onnxruntime:cpu")),
        lambda graph, analysis: orders("taylor", graph, analysis, pruning.material(graph, 64), 0),
        _refit(graph, split),
        trainer(graph, inputs, steps),
        lambda said: None,
    )


def _refit(original: Graph, split: Split) -> Callable[[Graph, Kept], None]:
    def refit(pruned: Graph, kept: Kept) -> None:
        compensate(pruned, original, kept, split)

    return refit


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_the_contract(name: str) -> None:
    given = shaping()
    shaped = check_schedule(registry.get("schedule", name), given)
    if name != "augmented-lagrangian":
        assert shaped.widths == given.widths


class Stepped(nn.Module):
    """A cell that the caller steps, behind two recurrent layers that no convolution or linear map reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.cell, self.head = nn.GRU(6, 16, 2, batch_first=True), nn.GRUCell(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(self.layers(x)[0][:, -1], h)
        return self.head(h), h


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_the_contract_with_a_state_and_cells_that_have_no_gates(name: str) -> None:
    torch.manual_seed(0)
    graph = capture(Stepped().eval(), {"x": torch.randn(4, 5, 6), "h": torch.randn(4, 16)}, {"h": "output_1"})
    check_schedule(registry.get("schedule", name), halved(graph, analyse(graph)))


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_the_contract_with_inputs_that_carry_nothing(name: str) -> None:
    """However a schedule scores them, only channels that never vary go."""
    torch.manual_seed(0)
    graph, _ = pruning.captured(Twice().eval(), (torch.randn(4, 6),))
    graph.idle = {"x": (1, (1, 4))}
    analysis = analyse(graph)
    shaped = check_schedule(registry.get("schedule", name), halved(graph, analysis, steps=200))
    assert set(range(6)) - set(shaped.kept.get(("first.weight", 1), np.arange(6)).tolist()) <= {1, 4}


class Attending(nn.Module):
    """One attention layer of four heads of six places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.q, self.k, self.v, self.out = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).view(x.shape[0], -1, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(torch.relu(x + self.out(y)).mean(1))


def attending(widths: dict[str, int]) -> Shaping:
    torch.manual_seed(0)
    given = halved(*pruning.captured(Attending().eval(), (torch.randn(4, 5, 6),)), steps=20)
    return replace(given, widths=widths)


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_the_contract_where_heads_and_places_both_leave(name: str) -> None:
    given = attending({"embed": 8, "q": 2, "q.size": 4, "v.size": 3})
    shaped = check_schedule(registry.get("schedule", name), given)
    if name != "augmented-lagrangian":
        assert shaped.widths == given.widths
        assert tuple(shaped.graph.module.get_parameter("v.weight").shape) == (2 * 3, 8)


def test_rounds_follow_a_group_whatever_it_is_called_by_then() -> None:
    """With one head left there is no view to read in two ways: the places give the group its name."""
    given = attending({"q": 1, "q.size": 2, "v.size": 3})
    shaped = check_schedule(registry.get("schedule", "iterative"), given)
    assert shaped.widths == given.widths
    shapes = [tuple(shaped.graph.module.get_parameter(f"{name}.weight").shape) for name in ("q", "k", "v", "out")]
    assert shapes == [(2, 12), (2, 12), (3, 12), (12, 3)]


@pytest.mark.parametrize("name", ["group-lasso", "l1", "growing-l2"])
def test_sparse_training_leaves_little_of_what_is_cut(name: str) -> None:
    """So little that the outputs of the trained net hardly change when its units go: a sixth of what leaves at once changes."""
    seen: dict[str, Graph] = {}
    given = shaping(steps=300)

    def fit(graph: Graph, *arguments: object, **more: object) -> None:
        given.fit(graph, *arguments, **more)  # type: ignore[arg-type]
        seen["trained"] = graph

    kept = replace(given, fit=fit, refit=lambda pruned, kept: None)
    shaped = registry.get("schedule", name)().shape(kept)
    split = pruning.calibration(given.graph, 64)
    at_once = registry.get("schedule", "one-shot")().shape(kept)
    lost = pruning.relative_error(pruning.outputs(shaped.graph, split), pruning.outputs(seen["trained"], split))
    assert lost < pruning.relative_error(pruning.outputs(at_once.graph, split), pruning.outputs(given.graph, split)) / 6


def test_the_strength_follows_the_units_that_are_due() -> None:
    shaped = GroupLasso().shape(shaping(steps=300))
    gone = [step["gone"] for step in shaped.history]
    assert gone[-1] >= 12 and gone == sorted(gone)


def test_a_unit_that_was_gated_off_wrongly_returns() -> None:
    """The order is upside down: what the net needs most goes first. Growth must end closer to the original than a cut by that order."""
    given = shaping(steps=200)
    wrong = {name: Order(-order.scores + np.nanmax(order.scores), order.multiple) for name, order in given.orders.items()}
    upside_down = replace(given, orders=wrong, refit=lambda pruned, kept: None)
    shaped = Growth().shape(upside_down)
    assert sum(step["returned"] for step in shaped.history) > 0
    stayed = shaped.kept["first.weight", 0]
    by_order = np.sort(np.setdiff1d(np.arange(12), wrong["first"].going(6).units))
    assert stayed.tolist() != by_order.tolist()


def test_gates_scale_what_readers_read() -> None:
    """A gate at zero is the unit masked; a gate of one changes nothing."""
    given = shaping()
    net = gated(given.graph, given.analysis, ["first"])
    split = pruning.calibration(given.graph, 16)
    torch.testing.assert_close(pruning.outputs(net.graph, split), pruning.outputs(given.graph, split))
    with torch.no_grad():
        net.gates["first"][3] = 0.0
    masked = given.graph.copy()
    with torch.no_grad():
        dict(masked.module.named_parameters())["second.weight"][:, 3] = 0.0
    torch.testing.assert_close(pruning.outputs(net.graph, split), pruning.outputs(masked, split))


def test_norms_of_units_are_relative_and_scaled_together() -> None:
    given = shaping()
    units = Units(given.graph.copy(), given.analysis.groups["first"])
    assert float(units.norms().square().mean()) == pytest.approx(1.0, rel=1e-5)
    before = units.norms()
    factors = torch.ones(12)
    factors[2], factors[5] = 0.5, 0.0
    units.scale_(factors)
    torch.testing.assert_close(units.norms(), before * factors)


class Planted:
    """A `Fit` without a net: the loss of the gates is `sum of worth * (1 - gate)^2 / 2`, whose minimum under a linear price is known."""

    def __init__(self, worth: Tensor, steps: int) -> None:
        self.worth, self.steps = worth, steps

    def __call__(
        self, graph: Graph, share: float, name: str, penalty: object = None, after_step: Callable[..., None] | None = None
    ) -> None:
        gates = [value for key, value in graph.module.named_buffers() if key.startswith("gates_") and value.requires_grad]
        assert after_step is not None
        for step in range(self.steps):
            start = 0
            for gate in gates:
                gate.grad = -self.worth[start : start + len(gate)] * (1 - gate.detach())
                start += len(gate)
            after_step(0.02, (step + 1) / self.steps)


def test_constrained_training_finds_the_multiplier_and_keeps_what_is_worth_most() -> None:
    """Half of all gates may stay, at equal prices: of both groups those that are worth most, wherever they are."""
    worth = torch.cat([torch.linspace(0.1, 1.2, 12), torch.linspace(2.0, 9.0, 12)])  # the second group's are all worth more

    def price(units: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.double() for value in units.values()]).sum()

    given = shaping(
        fit=Planted(worth, 3000),
        price=price,
        refit=lambda pruned, kept: None,
        levels={"first": range(12, 0, -1), "second": range(12, 0, -1)},
    )
    shaped = AugmentedLagrangian().shape(given)
    assert sum(shaped.widths.get(name, 12) for name in ("first", "second")) <= 12
    assert shaped.widths.get("second", 12) > shaped.widths["first"]
    last = shaped.history[-1]
    assert last["multiplier"] > 0 and last["violation"] < 0.01
    assert last["kkt"] < max(step["kkt"] for step in shaped.history) / 10


def test_a_price_between_levels_is_linear_and_has_a_slope() -> None:
    given = shaping()
    at = {name: torch.tensor(8.0, requires_grad=True) for name in ("first", "second")}
    found = given.price(at)
    # MACs of a batch of 4: 6 * first + first * second + 3 * second
    assert found.item() == 4 * (6 * 8 + 8 * 8 + 3 * 8)
    found.backward()
    assert given.price({"first": torch.tensor(9.0), "second": torch.tensor(8.0)}).item() == 4 * (6 * 9 + 9 * 8 + 3 * 8)
    slope = at["first"].grad
    assert slope is not None and slope.item() == 4 * (6 + 8)


def test_what_may_be_spent_is_what_the_budget_limits() -> None:
    """With tables for latency a limit on MACs is still one on MACs."""
    torch.manual_seed(0)
    _, analysis = pruning.captured(Twice().eval(), (torch.randn(4, 6),))
    options = [Option("width", name, 6, 0.1) for name in analysis.groups]
    plan = Plan("onnxruntime:cpu")
    costs = Costs(Space(analysis, options, plan), lambda kernels: np.full(len(kernels), 1e-6))
    at = {name: torch.tensor(6.0) for name in analysis.groups}
    assert soft_price(costs, plan, "macs")(at).item() == 4 * (6 * 6 + 6 * 6 + 3 * 6)
    assert soft_price(costs, plan)(at).item() == pytest.approx(1e-6 * len(costs.factors["latency"]), rel=0.5)


class Picked(nn.Module):
    """Every second channel is read: once some are gone, what is picked is named one by one, which nothing narrows again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x))[:, ::2])))


def test_rounds_take_what_cannot_be_narrowed_again_at_once() -> None:
    torch.manual_seed(0)
    graph, analysis = pruning.captured(Picked().eval(), (torch.randn(4, 6),))
    given = halved(graph, analysis)
    assert {"first", "second"} <= analysis.groups.keys()
    shaped = check_schedule(registry.get("schedule", "iterative"), given)
    assert shaped.widths == given.widths
