"""Every registered saliency keeps the contract; each has a closed form of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import calibration, captured
from torch import nn

import nets
from planish import registry
from planish.errors import DataError
from planish.graph.divergence import divergence
from planish.prune.saliency.magnitude import Magnitude
from planish.prune.saliency.taylor import Taylor
from planish.testing.saliency import check_saliency


@pytest.mark.parametrize("name", ["magnitude", "taylor"])
@pytest.mark.parametrize("net", ["resnet_a", "mobilenet", "lstm", "bert"])
def test_contract(name: str, net: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    check_saliency(registry.get("saliency", name), graph, analysis, calibration(graph, 16))


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
    np.testing.assert_allclose(Magnitude().scores(graph, analysis, calibration(graph, 1), 0)["0"], expected, rtol=1e-6)


def test_magnitude_of_a_weight_that_is_not_finite_is_nan() -> None:
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    with torch.no_grad():
        graph.module.get_parameter("0.weight")[1, 2] = float("inf")
    scores = Magnitude().scores(graph, analysis, calibration(graph, 1), 0)["0"]
    assert np.isnan(scores).tolist() == [False, True, False]


def test_taylor_of_a_linear_net_is_the_share_of_the_output_that_a_unit_makes() -> None:
    # y = B A x is linear in each mask, so that s_u = E|B_u (A x)_u|^2 / (total variance of y), exactly in expectation over probes.
    graph, analysis = captured(two_layers(), (torch.randn(2, 4),))
    split = calibration(graph, 2000)
    scores = Taylor(samples=2000, micro_batch=1, kind="values").scores(graph, analysis, split, 0)["0"]
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
        Taylor().scores(graph, analysis, calibration(graph, 4), 0)
