"""A plan becomes the net that it describes; a plan that does not fit is refused by name."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest
import torch
from pruning import calibration, captured, outputs

import nets
from planish.errors import PlanError
from planish.graph.groups import analyse
from planish.graph.surgery import masked_reference
from planish.plan import Plan
from planish.prune.apply import apply
from planish.prune.contract import Material
from planish.prune.levels import width_levels
from planish.prune.order import Order, orders
from planish.testing.saliency import plant_dead


@pytest.mark.parametrize("net", ["resnet_a", "mobilenet", "bert", "lstm"])
def test_widths_are_reached_and_nothing_else_changes(net: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    widths = {name: width_levels(group, 2)[-1] for name, group in analysis.groups.items()}
    plan = msgspec.json.decode(msgspec.json.encode(Plan("cpu", widths=widths)), type=Plan)
    split = calibration(graph, 6)
    left = apply(graph, analysis, plan, orders("magnitude", graph, analysis, Material(split), 0))
    shapes = {name: value.shape for name, value in left.graph.module.named_parameters(remove_duplicate=False)}
    for name, group in analysis.groups.items():
        assert len(left.removed.get(name, ())) == group.units - widths[name]
        for (parameter, dim), unit_of in group.unit_of.items():
            if parameter in shapes and (unit_of >= 0).all():
                there = [
                    other for other in analysis.groups.values() if (parameter, dim) in other.unit_of
                ]  # it, and what crosses it everywhere
                if all((other.unit_of[parameter, dim] >= 0).all() for other in there):
                    shares = [Fraction(widths[other.name], other.units) for other in there]
                    assert shapes[parameter][dim] == len(unit_of) * math.prod(shares)
    assert not left.spared
    flat = [torch.from_numpy(array) for array in split.inputs]
    expected = masked_reference(graph, analysis, left.removed, flat)
    torch.testing.assert_close(outputs(left.graph, split), expected[0], atol=1e-4, rtol=1e-4)


def test_dead_units_go_first_and_cost_nothing() -> None:
    graph, analysis = captured(*nets.resnet(width=16))
    dead = plant_dead(graph, analysis, {"layer1.0.conv1": np.arange(0, 16, 2)})
    split = calibration(graph, 4)
    left = apply(dead, analysis, Plan("cpu", widths={"layer1.0.conv1": 8}), orders("magnitude", dead, analysis, Material(split), 0))
    assert sorted(left.removed["layer1.0.conv1"]) == list(range(0, 16, 2))
    assert left.kept["layer1.0.conv1.weight", 0].tolist() == list(range(1, 16, 2))
    torch.testing.assert_close(outputs(left.graph, split), outputs(dead, split), atol=1e-5, rtol=1e-5)


def test_blocks_and_widths_together() -> None:
    graph, analysis = captured(*nets.resnet(blocks=2))
    blocks = ("layer1.0", "layer2.0")  # layer2.0 names the channels that its stage adds to the residual stream
    widths = {"conv1": 6, "layer1.0.conv1": 4, "layer1.1.conv1": 4, "layer2.0.conv2": 4, "layer3.0.conv1": 16}
    order = orders("magnitude", graph, analysis, Material(calibration(graph, 2)), 0)
    left = apply(graph, analysis, Plan("cpu", widths=widths, blocks=blocks), order)
    parameters = {name: tuple(value.shape) for name, value in left.graph.module.named_parameters()}
    assert not any(name.startswith(("layer1.0.", "layer2.0.")) for name in parameters)
    assert parameters["layer1.1.conv1.weight"] == (4, 6, 3, 3)
    assert parameters["layer2.1.conv2.weight"] == (6 + 4, 16, 3, 3)  # 6 of the 8 first channels, 4 of the 8 that the stage added
    assert left.kept["layer1.1.conv1.weight", 1].tolist() == sorted(set(range(8)) - set(left.removed["conv1"].tolist()))
    stem = analysis.groups["conv1"].unit_of["layer2.1.conv2.weight", 0]
    added = analysis.groups["layer2.0.conv2"].unit_of["layer2.1.conv2.weight", 0]
    gone = np.isin(stem, left.removed["conv1"]) | np.isin(added, left.removed["layer2.0.conv2"])
    assert left.kept["layer2.1.conv2.weight", 0].tolist() == np.flatnonzero(~gone).tolist()


def test_units_without_a_score_stay_and_are_counted() -> None:
    graph, analysis = captured(*nets.resnet())
    order = dict(orders("magnitude", graph, analysis, Material(calibration(graph, 2)), 0))
    order["layer1.0.conv1"] = Order(np.array([np.nan, 1, np.nan, 2, np.nan, np.nan, np.nan, 3]))
    left = apply(graph, analysis, Plan("cpu", widths={"layer1.0.conv1": 4}), order)
    assert left.removed["layer1.0.conv1"].tolist() == [1, 3, 7]
    assert left.spared == {"layer1.0.conv1": 1}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("cpu", widths={"layer1.0.conv9": 4}), r"plan: there is no group named 'layer1.0.conv9'; did you mean 'layer1.0.conv1'"),
        (Plan("cpu", blocks=("layer9.0",)), r"plan: there is no block named 'layer9.0'; did you mean 'layer"),
        (Plan("cpu", widths={"layer1.0.conv1": 9}), r"width of 'layer1.0.conv1' must be in \[1, 8\]; got 9"),
        (Plan("cpu", widths={"layer1.0.conv1": 0}), r"width of 'layer1.0.conv1' must be in \[1, 8\]; got 0"),
        (Plan("cpu", widths={"layer2.0.conv1": 8}), r"width of 'layer2.0.conv1' must stay 16 \(keep=layer2.0.conv1"),
    ],
)
def test_a_plan_that_does_not_fit(plan: Plan, message: str) -> None:
    graph, _ = captured(*nets.resnet())
    analysis = analyse(graph, keep=("layer2.0.conv1.*",))
    with pytest.raises(PlanError, match=message):
        apply(graph, analysis, plan, orders("magnitude", graph, analysis, Material(calibration(graph, 2)), 0))


def test_scores_that_are_missing() -> None:
    graph, analysis = captured(*nets.resnet())
    with pytest.raises(PlanError, match=r"must give 8 scores for group 'layer1\.0\.conv1'"):
        apply(graph, analysis, Plan("cpu", widths={"layer1.0.conv1": 4}), {})


def test_heads_and_places_go_together_also_where_a_block_does() -> None:
    graph, analysis = captured(*nets.bert(2))
    layer = "bert.encoder.layer.1.attention.self"
    widths = {f"{layer}.query": 3, f"{layer}.query.size": 8, f"{layer}.value.size": 6, "bert.embeddings.word_embeddings": 24}
    gone = "bert.encoder.layer.0.attention"
    assert gone in analysis.blocks
    split = calibration(graph, 4)
    plan = Plan("cpu", widths=widths, blocks=(gone,))
    left = apply(graph, analysis, plan, orders("magnitude", graph, analysis, Material(split), 0))
    parameters = {name: tuple(value.shape) for name, value in left.graph.module.named_parameters()}
    assert not any(name.startswith(f"{gone}.") and "LayerNorm" not in name for name in parameters)
    assert parameters[f"{layer}.query.weight"] == parameters[f"{layer}.key.weight"] == (3 * 8, 24)
    assert parameters[f"{layer}.value.weight"] == (3 * 6, 24)
    assert parameters["bert.encoder.layer.1.attention.output.dense.weight"] == (24, 3 * 6)
    stay = left.kept[f"{layer}.key.weight", 0]
    assert set(stay // 12) == set(range(4)) - set(left.removed[f"{layer}.query"].tolist())
    assert set(stay % 12) == set(range(12)) - set(left.removed[f"{layer}.query.size"].tolist())
    assert outputs(left.graph, split).isfinite().all()


def test_merging_heads_and_places_is_merging_one_after_the_other() -> None:
    """A column that reads a place of a head gets what read that place in the merged head, the merged place in it, and both in both."""
    graph, analysis = captured(*nets.bert(1))
    layer = "bert.encoder.layer.0.attention"
    heads, places = f"{layer}.self.query", f"{layer}.self.value.size"

    def order(units: int, going: int, into: int, share: float) -> Order:
        scores = np.where(np.arange(units) == going, 0.0, 1.0)
        shares = np.full((units, units), share, np.float32)
        labels = np.where(np.arange(units) == going, into, np.arange(units))
        return Order(scores, clusters=lambda count: labels, shares=shares)

    plan = Plan("cpu", widths={heads: 3, places: 11})
    left = apply(graph, analysis, plan, {heads: order(4, 1, 2, 0.5), places: order(12, 3, 7, 0.25)})
    before = graph.module.get_parameter(f"{layer}.output.dense.weight").detach().view(-1, 4, 12)
    merged = before[:, 2].clone() + 0.5 * before[:, 1]
    merged[:, 7] += 0.25 * merged[:, 3]
    merged = merged[:, [n for n in range(12) if n != 3]]
    torch.testing.assert_close(left.graph.module.get_parameter(f"{layer}.output.dense.weight").view(-1, 3, 11)[:, 1], merged)
