"""Masks: as many zeros as asked for and where, errors in the order that theory gives, zeros that survive training and int8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pruning import calibration, captured, outputs, relative_error
from torch import nn

import nets
from planish import registry
from planish.errors import PlanError, UsageError
from planish.graph.graph import Analysis, Graph
from planish.plan import Option
from planish.prune.masks.apply import mask_
from planish.prune.masks.options import mask_options
from planish.prune.masks.pattern import PATTERNS, parse_masking, parse_pattern
from planish.prune.masks.sparsegpt import SparseGpt
from planish.quantize.apply import quantize
from planish.runtimes.contract import get_runtime
from planish.target import Target
from planish.testing.masking import check_masking, correlated, layer_error

METHODS = tuple(registry.names("masking"))


def masked(graph: Graph, analysis: Analysis, masks: dict[str, str], method: str = "sparsegpt") -> Graph:
    copied = graph.copy()
    mask_(copied, analysis, masks, method, calibration(graph, 48))
    return copied


@pytest.mark.parametrize("method", METHODS)
def test_the_contract(method: str) -> None:
    check_masking(registry.get("masking", method), is_informed=method != "magnitude")


@pytest.mark.parametrize("pattern", ["50%", "75%", "2:4"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_looks_at_inputs_errs_less_and_what_updates_least(pattern: str, seed: int) -> None:
    weight, gram = correlated(seed)
    errors = [
        layer_error(weight, registry.get("masking", method)().masked(weight, gram, parse_pattern(pattern)), gram)
        for method in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors[0] < 0.5 * errors[1], "inputs that vary together leave much to be made up for"
    assert errors[1] < 1.05 * errors[2], "of four inputs beside each other, whose norms differ by 2 %, magnitude knows as much"
    if pattern != "2:4":
        assert errors[1] < errors[2]


def test_sparsegpt_of_one_column_is_optimal_brain_surgery() -> None:
    """Closed form: the first of two columns goes, and the second makes up for it by regression; what that costs decides between rows."""
    gram = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.3, 1.0], [4.0, 3.0]], dtype=torch.float64)
    found = SparseGpt().masked(weight, gram, parse_pattern("1:2"))
    damped = gram + 0.01 * 1.5 * torch.eye(2, dtype=torch.float64)
    # of the first row the first weight is cheaper: 0.3^2 / (H^-1)_11 against 1.0^2 H_22 of the last column, which nothing follows
    assert float(found[0, 0]) == 0.0
    assert float(found[0, 1]) == pytest.approx(1.0 + 0.3 * float(damped[0, 1] / damped[1, 1]), rel=1e-9)


def test_equal_inputs_are_one_input() -> None:
    """Two columns that are always the same: SparseGPT moves one's weights onto the other and loses nothing but what damping costs."""
    weight, gram = correlated(rows=6, columns=16)
    order = torch.arange(16).repeat_interleave(2)
    doubled, both = weight[:, order], gram[order][:, order]
    found = SparseGpt().masked(doubled, both, parse_pattern("1:2"))
    assert layer_error(doubled, found, both) < 2e-3 * layer_error(doubled, torch.zeros_like(doubled), both)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", ["resnet_b", "bert"])
def test_a_net_is_masked_where_the_plan_says(net: str, method: str) -> None:
    graph, analysis = captured(*nets.ZOO[net]())
    before = {name: value.clone() for name, value in graph.module.state_dict().items()}
    options = mask_options(graph, analysis, method, ("50%", "2:4"), calibration(graph, 24))
    masks = {option.subject: "2:4" if i % 2 else "50%" for i, option in enumerate(options)}
    changed = masked(graph, analysis, masks, method)
    assert all(torch.equal(value, before[name]) for name, value in graph.module.state_dict().items())
    assert masks
    for name, operator in analysis.operators.items():
        if operator.weight is None:
            continue
        weight, original = changed.module.get_parameter(operator.weight).detach(), before[operator.weight]
        if name not in masks:
            assert torch.equal(weight, original), name
            continue
        flat = weight.reshape(len(weight), weight.shape[1], -1)
        if masks[name] == "2:4":  # of four consecutive input channels, at each position of the kernel
            grouped = flat.movedim(1, 2).reshape(len(weight), -1, 4)
            assert bool(((grouped != 0).sum(-1) <= 2).all()), name
        assert int((weight == 0).sum()) == len(weight) * parse_pattern(masks[name]).gone(weight[0].numel()), name
    assert relative_error(outputs(changed, calibration(graph, 32)), outputs(graph, calibration(graph, 32))) < 1.5


def test_a_mask_that_costs_nothing_is_predicted_to_cost_nothing() -> None:
    """A layer half of whose inputs are always zero loses nothing at 50 %, and much at 90 %; every method that sees the inputs knows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    with torch.no_grad():
        net[0].weight[::2], net[0].bias[::2] = 0.0, -1.0
    graph, analysis = captured(net, (torch.randn(2, 8),))
    split = calibration(graph, 256)
    for method in ("sparsegpt", "wanda"):
        loss = {(o.subject, o.value): o.loss for o in mask_options(graph, analysis, method, PATTERNS, split, kind="values")}
        assert loss["2", "50%"] < 1e-9 < 1e-3 * loss["2", "90%"]


def test_options_are_what_the_plan_will_do() -> None:
    """One masked operator without anything behind that adapts: prediction and truth are the same arithmetic on the same samples."""
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), (torch.randn(2, 32),))
    split = calibration(graph, 256)
    options = mask_options(graph, analysis, "wanda", ("75%",), split, kind="values")
    found = next(option for option in options if option.subject == "0")
    copied = graph.copy()
    mask_(copied, analysis, {"0": "75%"}, "wanda", split)
    want, got = outputs(graph, split), outputs(copied, split)
    scale = float((want - want.mean(0)).square().sum(1).mean())
    assert found.loss == pytest.approx(float((want - got).square().sum(1).mean()) / scale, rel=1e-3)


def test_what_is_offered() -> None:
    graph, analysis = captured(*nets.resnet(width=16))
    split = calibration(graph, 16)

    def offered(patterns: tuple[str, ...], keep: tuple[str, ...] = ()) -> dict[str, list[int | str]]:
        found: dict[str, list[int | str]] = {}
        for option in mask_options(graph, analysis, "magnitude", patterns, split, keep):
            found.setdefault(option.subject, []).append(option.value)
        return found

    every = offered(("75%", "50%", "2:4"))
    assert every["layer1.0.conv1"] == ["50%", "2:4", "75%"]
    assert "conv1" not in every, "432 weights are too few for a file to be smaller"
    assert "layer1.0.conv1" not in offered(("50%",), keep=("layer1.0.*",))
    assert not offered(("10%",)), "a bit for every weight takes more than 10 % of zeros save"


def test_losses_rise_and_are_the_same_again() -> None:
    graph, analysis = captured(*nets.resnet())
    split, ticks = calibration(graph, 30), []
    options = mask_options(graph, analysis, "sparsegpt", PATTERNS, split, progress=lambda done, total: ticks.append((done, total)))
    assert [done for done, _ in ticks] == list(range(1, ticks[0][1] + 1))
    by_operator: dict[str, list[Option]] = {}
    for option in options:
        by_operator.setdefault(option.subject, []).append(option)
    for name, own in by_operator.items():
        assert [option.value for option in own] == list(PATTERNS)
        assert [option.loss for option in own] == sorted(option.loss for option in own), name
    assert options == mask_options(graph, analysis, "sparsegpt", PATTERNS, split)


def test_operators_that_cannot_be_masked_are_refused_by_name() -> None:
    graph, analysis = captured(*nets.resnet())
    with pytest.raises(PlanError, match="no operator that can be masked named"):
        mask_(graph, analysis, {next(n for n, o in analysis.operators.items() if o.weight is None): "50%"}, "wanda", calibration(graph, 8))
    with torch.no_grad():
        graph.module.get_parameter("layer1.0.conv1.weight")[0] = math.nan
    with pytest.raises(PlanError, match=r"named 'layer1.0.conv1'"):
        mask_(graph, analysis, {"layer1.0.conv1": "50%"}, "wanda", calibration(graph, 8))


@pytest.mark.parametrize("text", ["wanda:", "wanda:0%", "wanda:100%", "wanda:4:2", "wanda:2:2", "wanda:half", "wanda:0:4"])
def test_patterns_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"a pattern is a share of zeros, as 75%, or N:M with N below M, as 2:4; got"):
        parse_masking(text)


def test_zeros_are_exact_in_int8() -> None:
    """Symmetric weights: zero is a point of the grid, so that what is masked is zero in what is exported too."""
    graph, analysis = captured(*nets.resnet(width=16))
    split = calibration(graph, 32)
    changed = masked(graph, analysis, {"layer1.0.conv1": "75%", "layer2.0.conv2": "2:4"})
    runtime, target = get_runtime("onnxruntime"), Target("onnxruntime")
    precisions = {name: "int8" for name, operator in analysis.operators.items() if operator.kind == "conv"}
    final = quantize(changed, analysis, precisions, runtime, target, split).graph
    nodes = {str(node.target): node for node in final.module.graph.nodes if node.op == "get_attr"}
    for name in ("layer1.0.conv1.weight", "layer2.0.conv2.weight"):
        weight = final.module.get_parameter(name)
        (quantizer,) = nodes[name].users
        scale, zero_point = (final.module.get_buffer(str(argument.target)) for argument in quantizer.args[1:3])
        rounded = quantizer.target(weight, scale, zero_point, *quantizer.args[3:])
        assert bool((rounded[weight == 0] == 0).all())
        assert np.count_nonzero(weight.detach().numpy()) <= 0.51 * weight.numel()
