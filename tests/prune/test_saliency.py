"""Every registered saliency keeps the contract; each has a closed form of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import calibration, captured, material
from torch import nn

import nets
from planish import registry
from planish.errors import DataError
from planish.graph.divergence import divergence
from planish.prune.contract import Material
from planish.prune.readers import inputs_of_readers
from planish.prune.saliency.auto import Automatic
from planish.prune.saliency.flap import Fluctuation
from planish.prune.saliency.fpgm import GeometricMedian
from planish.prune.saliency.labelled import FirstTaylor, Fisher
from planish.prune.saliency.magnitude import L1, Magnitude
from planish.prune.saliency.norm_scale import NormScale
from planish.prune.saliency.obs import SurgeonOrder, exact_scores
from planish.prune.saliency.taylor import Taylor
from planish.testing.saliency import check_saliency


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN["saliency"]))
@pytest.mark.parametrize("net", ["resnet_a", "mobilenet", "lstm", "bert"])
def test_contract(name: str, net: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    check_saliency(registry.get("saliency", name), graph, analysis, material(graph, 16), is_informed=name != "random")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))


def test_magnitude_closed_form() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]))
        model[1].weight.copy_(torch.tensor([[3.0, 0, 0], [0, 0, 0]]))
    graph, analysis = captured(model, (torch.randn(2, 4),))
    # squares issued: 1, 4, 0 (mean 5/3); read: 9, 0, 0 (mean 3)
    expected = np.sqrt(np.array([1 / (5 / 3) + 3, 4 / (5 / 3), 0]) / 2)
    np.testing.assert_allclose(Magnitude().scores(graph, analysis, material(graph, 1), 0)["0"], expected, rtol=1e-6)


def test_magnitude_of_a_weight_that_is_not_finite_is_nan() -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    with torch.no_grad():
        graph.module.get_parameter("0.weight")[1, 2] = float("inf")
    scores = Magnitude().scores(graph, analysis, material(graph, 1), 0)["0"]
    assert np.isnan(scores).tolist() == [False, True, False]


def test_l1_closed_form() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]]))
        model[1].weight.copy_(torch.tensor([[3.0, 0, 0], [1, 0, 0]]))
    graph, analysis = captured(model, (torch.randn(2, 4),))
    expected = np.array([3 / 2 + 4 / (4 / 3), 2 / 2, 1 / 2]) / 2  # sums issued: 3, 2, 1 (mean 2); read: 4, 0, 0
    np.testing.assert_allclose(L1().scores(graph, analysis, material(graph, 1), 0)["0"], expected, rtol=1e-6)


def test_the_geometric_median_goes_first_however_large_it_is() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 0, 0, 0], [10, 0, 0, 0], [11, 3, 0, 0]]))
    graph, analysis = captured(model, (torch.randn(2, 4),))
    scores = GeometricMedian().scores(graph, analysis, material(graph, 1), 0)["0"]
    sums = np.array([1 + 13**0.5, 1 + 10**0.5, 13**0.5 + 10**0.5])
    np.testing.assert_allclose(scores, sums / sums.mean(), rtol=1e-6)


def test_norm_scales_are_what_counts_where_there_are_some() -> None:
    graph, analysis = captured(*nets.resnet())
    scale = graph.module.get_parameter("layer1.0.bn1.weight").detach().abs().double().numpy()
    found = NormScale().scores(graph, analysis, material(graph, 1), 0)
    np.testing.assert_allclose(found["layer1.0.conv1"], scale / scale.mean(), rtol=1e-6)
    linear, its = captured(two_layers(), (torch.randn(2, 4),))
    np.testing.assert_array_equal(
        NormScale().scores(linear, its, material(linear, 1), 0)["0"], Magnitude().scores(linear, its, material(linear, 1), 0)["0"]
    )


def test_fluctuation_is_variance_times_the_weights_that_read_it() -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    given = material(graph, 200)
    x = torch.from_numpy(given.split.inputs[0]).double() @ graph.module.get_parameter("0.weight").detach().double().T
    wanted = x.var(0, unbiased=False) * graph.module.get_parameter("1.weight").detach().double().square().sum(0)
    np.testing.assert_allclose(Fluctuation().scores(graph, analysis, given, 0)["0"], (wanted / wanted.mean()).numpy(), rtol=1e-4)


def test_the_surgeon_s_costs_are_those_of_the_best_refit() -> None:
    """Each step's cost equals what least squares on all survivors leaves, found without any update of an inverse."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Linear(6, 4, bias=False))
    graph, analysis = captured(model, (torch.randn(2, 9),))
    given = material(graph, 256)
    scores = SurgeonOrder().scores(graph, analysis, given, 0)["0"]
    gram = inputs_of_readers(graph, analysis, given.split, 256).moments["1.weight"].second(centered=True)[0][0].numpy()
    gram = gram + np.eye(6) * 1e-3 * gram.diagonal().mean()
    weight = graph.module.get_parameter("1.weight").detach().double().numpy()

    def lost(gone: list[int]) -> float:
        stay = [unit for unit in range(6) if unit not in gone]
        solved = np.linalg.solve(gram[np.ix_(stay, stay)], gram[stay] @ weight.T).T
        away = weight.copy()
        away[:, stay] -= solved
        return float(((away @ gram) * away).sum() / ((weight @ gram) * weight).sum())

    gone: list[int] = []
    highest = 0.0
    for _ in range(5):
        before = lost(gone)
        costs = {unit: lost([*gone, unit]) - before for unit in range(6) if unit not in gone}
        gone.append(min(costs, key=lambda unit: costs[unit]))
        highest = max(highest, costs[gone[-1]])
        np.testing.assert_allclose(scores[gone[-1]], highest, rtol=1e-5)
    assert np.argsort(scores).tolist()[:5] == gone


def test_saliencies_with_labels_are_the_slopes_of_the_labelled_loss() -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    given = material(graph, 12)
    assert given.labelled is not None and given.labelled.targets is not None
    x, y = torch.from_numpy(given.split.inputs[0]), torch.from_numpy(given.labelled.targets)
    a, b = graph.module.get_parameter("0.weight").detach(), graph.module.get_parameter("1.weight").detach()

    def slopes(rows: slice) -> torch.Tensor:
        masks = torch.ones(3, requires_grad=True)
        loss = torch.nn.functional.cross_entropy((x[rows] @ a.T) * masks @ b.T, y[rows])
        return torch.autograd.grad(loss, masks)[0]

    single = torch.stack([slopes(slice(i, i + 1)) for i in range(12)])
    np.testing.assert_allclose(Fisher().scores(graph, analysis, given, 0)["0"], 0.5 * single.square().mean(0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(FirstTaylor().scores(graph, analysis, given, 0)["0"], single.abs().mean(0).numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["fisher", "taylor-first"])
def test_a_saliency_that_needs_labels_says_so(name: str) -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    with pytest.raises(DataError, match="needs samples with labels that fit the outputs; this job has none"):
        registry.get("saliency", name)().scores(graph, analysis, Material(calibration(graph, 4)), 0)


def test_taylor_of_a_linear_net_is_the_share_of_the_output_that_a_unit_makes() -> None:
    # y = B A x is linear in each mask, so that s_u = E|B_u (A x)_u|^2 / (total variance of y), exactly in expectation over probes.
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    split = calibration(graph, 2000)
    scores = Taylor(samples=2000, micro_batch=1).scores(graph, analysis, Material(split, kind="values"), 0)["0"]
    x = torch.from_numpy(split.inputs[0])
    a, b = graph.module.get_parameter("0.weight").detach(), graph.module.get_parameter("1.weight").detach()
    made = (x @ a.T).square().mean(0) * b.square().sum(0)
    total = (x @ a.T @ b.T)[:64].var(0, unbiased=False).sum()
    # chi-squared with one degree of freedom over 2,000 samples, times E z^4 = 3: relative error sqrt((9 - 1) / 2000) = 6 %
    np.testing.assert_allclose(scores, (made / total).numpy(), rtol=0.25)


def test_curvature_probe_has_the_hessian_of_the_divergence() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float32, requires_grad=True)
    measure = divergence([logits.detach()])
    assert measure.kinds == ("logits",)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.cat([torch.autograd.grad(measure.curvature_probe([logits], generator), logits)[0] for _ in range(20000)])
    p = logits.detach().softmax(-1)[0]
    expected = torch.diag(p) - torch.outer(p, p)
    # each entry is a mean of 20,000 products with a standard deviation below 0.4: 5 sigma is 0.015
    torch.testing.assert_close(gradients.T @ gradients / len(gradients), expected, atol=0.015, rtol=0)
    hessian = torch.autograd.functional.hessian(lambda z: measure.per_sample([z[None]], [logits.detach()]).sum(), logits.detach()[0])
    torch.testing.assert_close(hessian, expected, atol=1e-5, rtol=1e-5)


def test_values_are_told_from_logits() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert divergence([rows]).kinds == ("logits",)
    assert divergence([rows / rows.norm(dim=1, keepdim=True)]).kinds == ("values",)
    assert divergence([rows[:, :1]]).kinds == ("values",)
    assert divergence([rows, rows.argmax(1)]).kinds == ("logits", "")
    # predicting the mean everywhere loses all of the variance
    assert float(divergence([rows], "values").per_sample([rows.mean(0).expand_as(rows)], [rows]).mean()) == pytest.approx(1, rel=1e-4)


def test_outputs_that_are_not_finite_are_refused() -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    with torch.no_grad():
        graph.module.get_parameter("0.weight")[1, 2] = float("nan")
    with pytest.raises(DataError, match="outputs must be finite"):
        Taylor().scores(graph, analysis, material(graph, 4), 0)


def test_the_default_is_exact_where_that_is_cheap_and_taylor_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, analysis = captured(*nets.ZOO["bert"]())
    given = material(graph, 64)
    surgeon = SurgeonOrder()
    exact, slopes = surgeon.scores(graph, analysis, given, 0), Taylor().scores(graph, analysis, given, 0)
    assert 0 < len(surgeon.others) < len(analysis.groups), "the places of queries and keys, which no weight reads"
    found = Automatic().scores(graph, analysis, given, 0)
    assert found.keys() == analysis.groups.keys()
    for name in analysis.groups:
        np.testing.assert_array_equal(found[name], slopes[name] if name in surgeon.others else exact[name])

    monkeypatch.setattr("planish.prune.saliency.auto._MOST_WORK", 0)
    for name, scores in Automatic().scores(graph, analysis, given, 0).items():
        np.testing.assert_array_equal(scores, slopes[name])


def test_of_exact_orders_the_cheapest_are_made_where_not_all_can_be() -> None:
    graph, analysis = captured(*nets.ZOO["bert"]())
    given = material(graph, 64)
    every = exact_scores(graph, analysis, given, 64)
    seen = inputs_of_readers(graph, analysis, given.split, 64)
    columns = {name: max(graph.module.get_parameter(weight).shape[1] for weight in seen.readers[name]) for name in every}
    few = exact_scores(graph, analysis, given, 64, 4 * min(columns.values()) ** 3)
    assert 0 < len(few) < len(every)
    assert max(columns[name] for name in few) <= min(columns[name] for name in every.keys() - few.keys())
