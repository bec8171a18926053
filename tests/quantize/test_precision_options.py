"""int8 options: one for each operator that can be quantized, equal to what a graph with only that operator in int8 loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantizing import AVX2, VNNI, calibration, captured, declares, outputs, quantized
from torch import nn

import nets
from planish.graph.divergence import divergence
from planish.quantize.options import float_reasons, precision_options


def test_loss_equals_that_of_a_graph_with_that_operator_alone_in_int8() -> None:
    graph, analysis = captured(*nets.resnet())
    split = calibration(graph, samples=70)
    options = precision_options(graph, analysis, declares("conv linear"), AVX2, split)
    assert [option.subject for option in options] == [n for n, o in analysis.operators.items() if o.kind in ("conv", "linear")]
    assert all(option.technique == "precision" and option.value == "int8" for option in options)
    original = outputs(graph, split)
    for option in options[::3]:
        alone = quantized(
            graph, analysis, declares("conv linear"), AVX2, precisions={option.subject: "int8"}, split=split, bias_correction=False
        )
        expected = float(divergence([original]).per_sample([outputs(alone.graph, split)], [original]).double().mean())
        assert option.loss == pytest.approx(expected, rel=0.02, abs=1e-7)  # batches of other sizes sum in another order


def test_coarser_weights_lose_more_and_nothing_is_changed() -> None:
    graph, analysis = captured(*nets.resnet())
    split = calibration(graph)
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    calls: list[tuple[int, int]] = []
    fine = precision_options(graph, analysis, declares(), VNNI, split, progress=lambda done, of: calls.append((done, of)))
    coarse = precision_options(graph, analysis, declares(), AVX2, split)
    assert sum(option.loss for option in coarse) > sum(option.loss for option in fine) > 0
    assert calls == [(index + 1, len(fine)) for index in range(len(fine))]
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())
    assert fine == precision_options(graph, analysis, declares(), VNNI, split)


def test_a_planted_outlier_makes_its_operator_the_most_sensitive() -> None:
    model, example = nets.resnet(blocks=2)
    block = model.get_submodule("layer2.0")
    with torch.no_grad():
        block.bn1.weight[0], block.bn1.bias[0] = 0.0, -1.0  # a channel that is always zero
        block.conv2.weight[:, 0] = 50.0  # reads it: changes nothing, but spends the grid of every channel
    graph, analysis = captured(model, example)
    options = precision_options(graph, analysis, declares(), AVX2, calibration(graph), observer="minmax")
    assert max(options, key=lambda option: option.loss).subject == "layer2.0.conv2"


def test_what_is_not_offered_has_a_reason() -> None:
    model, example = nets.bert()
    graph, analysis = captured(model, example)
    split = calibration(graph)
    offered = {option.subject for option in precision_options(graph, analysis, declares(), VNNI, split)}
    reasons = float_reasons(graph, analysis, declares(), VNNI, split)
    contractions = {n for n, o in analysis.operators.items() if o.kind in ("conv", "linear", "matmul", "attention")}
    assert offered | set(reasons) == contractions and not offered & set(reasons)
    assert any("executes no attention in int8" in reason for reason in reasons.values())
    assert float_reasons(graph, analysis, declares("conv"), VNNI, split).keys() == contractions


def test_a_dead_operator_is_not_offered() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    graph, analysis = captured(model, (torch.randn(2, 4),))
    split = calibration(graph)
    assert precision_options(graph, analysis, declares(), VNNI, split) == []
    reasons = float_reasons(graph, analysis, declares(), VNNI, split)
    assert reasons == {"0": "its weight is zero", "2": "its input relu is zero on all of the calibration data"}
    assert np.isfinite([option.loss for option in precision_options(graph, analysis, declares(), VNNI, split)]).all()
