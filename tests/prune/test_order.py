"""Orders: units go by score, by several scores, or are merged into those that do the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import calibration, captured, material, outputs, relative_error
from torch import nn

import nets
from planish import registry
from planish.errors import UnknownName
from planish.graph.graph import Analysis, Graph
from planish.plan import Plan
from planish.prune.apply import apply
from planish.prune.contract import Material
from planish.prune.options import sensitivities
from planish.prune.order import Order, orders, remarks
from planish.prune.units import members
from planish.testing.saliency import check_redundancy

CLUSTERINGS = sorted(registry.BUILT_IN["redundancy"])


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_contract(name: str) -> None:
    check_redundancy(registry.get("redundancy", name))


def twins(scale: float = 1.0) -> tuple[Graph, Analysis]:
    """A layer of eight units of which the last four do what the first four do, `scale` times; both halves are read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[4:] = scale * model[0].weight[:4]
        model[0].bias[4:] = scale * model[0].bias[:4]
    return captured(model, (torch.randn(2, 6),))


@pytest.mark.parametrize("of", ["weights", "activations"])
@pytest.mark.parametrize("name", CLUSTERINGS)
def test_twins_are_merged_and_nothing_is_lost(name: str, of: str) -> None:
    graph, analysis = twins()
    split = calibration(graph, 64)
    order = orders(f"{name}:{of}", graph, analysis, Material(split), 0)
    going = order["0"].going(4)
    assert sorted((going.units % 4).tolist()) == [0, 1, 2, 3] and (going.into % 4 == going.units % 4).all()
    left = apply(graph, analysis, Plan("cpu", widths={"0": 4}), order)
    torch.testing.assert_close(outputs(left.graph, split), outputs(graph, split), atol=1e-5, rtol=1e-5)
    dropped = apply(graph, analysis, Plan("cpu", widths={"0": 4}), {"0": Order(order["0"].scores)})
    assert relative_error(outputs(dropped.graph, split), outputs(graph, split)) > 0.1


def test_what_is_merged_is_scaled_to_what_it_replaces() -> None:
    graph, analysis = twins(scale=3.0)
    split = calibration(graph, 64)
    order = orders("kmeans:activations", graph, analysis, Material(split), 0)
    going = order["0"].going(4)
    wanted = np.where(going.units < 4, 1 / 3, 3.0)
    np.testing.assert_allclose(going.factors, wanted, rtol=1e-4)
    left = apply(graph, analysis, Plan("cpu", widths={"0": 4}), order)
    torch.testing.assert_close(outputs(left.graph, split), outputs(graph, split), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("of", ["weights", "activations"])
@pytest.mark.parametrize("name", CLUSTERINGS)
def test_biases_that_are_next_to_nothing_do_not_outvote_the_weights(name: str, of: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[4:] = model[0].weight[:4]
        model[0].bias.copy_(1e-7 * torch.randn(8))
    graph, analysis = captured(model, (torch.randn(2, 6),))
    going = orders(f"{name}:{of}", graph, analysis, Material(calibration(graph, 64)), 0)["0"].going(4)
    assert (going.into % 4 == going.units % 4).all()


def test_twins_that_a_recurrent_layer_reads_are_scaled_by_their_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8, bias=False)
            self.rnn = nn.GRU(8, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(torch.relu(self.first(x)))[0]

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.first.weight[4:] = 3 * model.first.weight[:4]
    graph, analysis = captured(model, (torch.randn(2, 5, 6),))
    split = calibration(graph, 8)
    order = orders("kmeans:activations", graph, analysis, Material(split), 0)
    assert order["first"].remark == "by weights"
    assert any("ordered by weights" in note and "first" in note for note in remarks(order))
    twin = np.arange(8).reshape(2, 4)
    merged = Order(order["first"].scores, clusters=lambda count: np.tile(np.arange(4), 2), shares=order["first"].shares)
    left = apply(graph, analysis, Plan("cpu", widths={"first": 4}), {"first": merged})
    assert len(left.removed["first"]) == len(twin[0])
    torch.testing.assert_close(outputs(left.graph, split), outputs(graph, split), atol=1e-5, rtol=1e-5)


def test_units_that_hardly_vary_are_not_blown_up() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight[4:] *= 1e-5
        model[0].bias[4:] = 20.0
    graph, analysis = captured(model, (torch.randn(2, 6),))
    order = orders("kmeans", graph, analysis, Material(calibration(graph, 256)), 0)["0"]
    assert order.shares is not None and np.abs(order.shares[:, 4:]).max() == 0.0


def test_activations_that_are_not_finite_keep_their_units() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nan_to_num(self.last(torch.exp(self.first(x))), posinf=1.0, neginf=-1.0)

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.first.bias[2] = 200.0
    graph, analysis = captured(model, (torch.randn(2, 6),))
    for name in ("kmeans", "kmeans:activations", "obs", "flap"):
        order = orders(name, graph, analysis, Material(calibration(graph, 32)), 0)["first"]
        assert np.isnan(order.scores[2])
        assert np.isfinite(order.going(4).factors).all()


def test_what_no_convolution_reads_is_said_to_be_ordered_by_magnitude() -> None:
    graph, analysis = captured(*nets.ZOO["lstm"]())
    for name in ("obs", "flap"):
        order = orders(name, graph, analysis, material(graph, 16), 0)
        assert order["rnn.l1"].remark == "" and order["rnn.l0"].remark == "by magnitude"
        assert not np.allclose(order["rnn.l1"].scores, orders("magnitude", graph, analysis, material(graph, 16), 0)["rnn.l1"].scores)


def test_the_original_is_left_as_it_is_when_units_are_merged() -> None:
    graph, analysis = twins()
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    order = orders("kmeans", graph, analysis, Material(calibration(graph, 32)), 0)
    apply(graph, analysis, Plan("cpu", widths={"0": 4}), order)
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())


@pytest.mark.parametrize("net", ["resnet_a", "lstm", "bert"])
@pytest.mark.parametrize("name", [*CLUSTERINGS, "kmeans:activations"])
def test_every_group_of_real_nets_is_ordered(net: str, name: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    order = orders(name, graph, analysis, material(graph, 16), 0)
    for group, its in analysis.groups.items():
        for count in (1, its.units // 2, its.units - 1):
            going = order[group].going(count)
            assert len(np.unique(going.units)) == count
            assert not np.isin(going.into, going.units).any()
            assert np.isfinite(going.factors).all()


def test_twins_cost_nothing_in_the_options() -> None:
    graph, analysis = twins()
    split = calibration(graph, 96)
    (option,) = [o for o in sensitivities(graph, analysis, orders("kmeans", graph, analysis, Material(split), 0), split, 4) if o.value == 4]
    assert option.loss < 1e-6


def test_one_cluster_keeps_the_dearest_of_it() -> None:
    order = Order(np.array([3.0, 1.0, 4.0, 2.0]), clusters=lambda count: np.zeros(4, np.int64))
    going = order.going(2)
    assert going.units.tolist() == [1, 3] and going.into.tolist() == [2, 2]


def test_more_clusters_than_may_stay_lose_the_cheapest() -> None:
    order = Order(np.array([3.0, 1.0, 4.0, 2.0]), clusters=lambda count: np.arange(4))
    going = order.going(3)
    assert going.units.tolist() == [1, 3, 0] and going.into.tolist() == [-1, -1, -1] and going.factors.tolist() == [1, 1, 1]


def test_units_that_remarks_are_nobody_s() -> None:
    order = Order(np.array([np.nan, 1.0, np.nan, 2.0]), clusters=lambda count: np.zeros(4, np.int64))
    assert order.going(3).units.tolist() == [1, 3]
    assert remarks({"a": order, "b": Order(np.ones(3))}) == ["saliency: units whose score is not finite are kept: a (2 of 4)."]
    assert remarks({"b": Order(np.ones(3))}) == []


@pytest.mark.parametrize(("finite", "left"), [(5, 4), (4, 4), (3, 8), (2, 8)])
def test_what_stays_is_a_multiple_even_where_some_must(finite: int, left: int) -> None:
    scores = np.where(np.arange(8) < finite, np.arange(8.0), np.nan)
    assert 8 - len(Order(scores, multiple=4).going(7).units) == left


def test_scores_are_added_relative_to_their_mean() -> None:
    graph, analysis = captured(*nets.resnet())
    given = material(graph, 8)
    both = orders("magnitude+l1", graph, analysis, given, 0)["conv1"].scores
    parts = [orders(name, graph, analysis, given, 0)["conv1"].scores for name in ("magnitude", "l1")]
    np.testing.assert_allclose(both, sum(part / part.mean() for part in parts) / 2)


@pytest.mark.parametrize(
    ("name", "message"), [("tailor", "taylor"), ("taylor+flop", "flap"), ("kmean:activations", "kmeans"), ("kmeans:biases", "kmeans")]
)
def test_a_name_that_nobody_has(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        registry.check("saliency", name)


def test_members_are_the_indices_of_each_unit() -> None:
    assert members(np.array([1, 0, -1, 1, 0, -1]), 2).tolist() == [[1, 4], [0, 3]]
