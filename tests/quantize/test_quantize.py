"""Precision plans carried out: what changes, what does not, what is refused, and that the result trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from quantizing import AVX2, VNNI, calibration, captured, declares, fake_quantizers, outputs, quantized
from torch import Tensor, nn

import nets
from planish.data import Split
from planish.errors import DataError, PlanError, UnknownName
from planish.graph.groups import analyse
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.bias import static_biases


class Net(nn.Module):
    """Grouped, depthwise and one-dimensional convolutions, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.line = nn.Conv1d(8, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep(F.relu(self.wide(x)))).flatten(2)
        return self.head(F.relu(self.line(x)).mean(-1))


def net(seed: int = 0) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(seed)
    return Net(), (torch.randn(2, 4, 6, 6),)


@pytest.mark.parametrize("target", [AVX2, VNNI], ids=["63", "127"])
def test_weights_stay_float_and_are_rounded_in_the_range_of_the_instruction_set(target) -> None:  # type: ignore[no-untyped-def]
    graph, analysis = captured(*net())
    done = quantized(graph, analysis, target=target, observer="minmax")
    assert done.operators == ("wide", "deep", "line", "head") and not done.skipped
    module, largest = done.graph.module, target.weight_range
    grids = {node.args[-2:] for node in fake_quantizers(done.graph) if "channel" in str(node.target)}
    assert grids == {(-largest, largest)}
    scale = next(v for n, v in module.named_buffers() if n.startswith("wide") and n.endswith("_scale"))
    expected = module.get_parameter("wide.weight").detach().flatten(1).abs().amax(1) / largest
    torch.testing.assert_close(scale, expected)
    assert module.get_parameter("wide.weight").dtype == torch.float32


def test_graph_of_the_caller_is_untouched() -> None:
    model, example = nets.resnet()
    graph, analysis = captured(model, example)
    before, code, random_state = copy.deepcopy(graph.module.state_dict()), graph.module.code, torch.random.get_rng_state()
    done = quantized(graph, analysis)
    after = graph.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert graph.module.code == code and torch.equal(torch.random.get_rng_state(), random_state)
    assert done.graph.module is not graph.module
    again = quantized(graph, analysis)
    split = calibration(graph)
    assert torch.equal(outputs(done.graph, split), outputs(again.graph, split))


@pytest.mark.parametrize("name", ["resnet_a", "resnet_b", "mobilenet", "densenet", "bert", "two_inputs", "lstm"])
def test_int8_is_close_to_float_on_the_zoo(name: str) -> None:
    model, example = nets.ZOO[name]()
    graph, analysis = captured(nets.randomise_norms(model), example)
    split = calibration(graph)
    done = quantized(graph, analysis, split=split, runtime=declares(outputs="conv linear"))
    assert set(done.operators) | set(done.skipped) >= {n for n, o in analysis.operators.items() if o.kind in ("conv", "linear")}
    assert done.operators
    # an 8-bit grid over k sigma has 6.02 * 8 + 4.8 - 20 log10(k) dB, 40 dB at k = 6; a few dozen such errors in a row leave 20 dB
    assert sqnr_db(outputs(graph, split), outputs(done.graph, split)) > 20.0
    worse = quantized(graph, analysis, split=split, runtime=declares(outputs="conv linear"), target=AVX2)
    assert sqnr_db(outputs(graph, split), outputs(worse.graph, split)) > 16.0


def test_empty_plan_only_folds_batch_norm() -> None:
    graph, analysis = captured(*nets.resnet())
    done = quantized(graph, analysis, precisions={"conv1": "fp32"})
    assert not fake_quantizers(done.graph) and not done.operators
    split = calibration(graph)
    torch.testing.assert_close(outputs(done.graph, split), outputs(graph, split), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_weight_and_a_step_changes_the_outputs() -> None:
    graph, analysis = captured(*nets.resnet())
    done = quantized(graph, analysis)
    module = done.graph.module
    split = calibration(graph)
    before = outputs(done.graph, split)
    flat = [torch.from_numpy(array) for array in split.inputs]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    module(*flat)[0].square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) and float(parameter.grad.abs().sum()) > 0, name
    optimizer.step()
    assert outputs(done.graph, split).square().mean() < before.square().mean()


def test_result_can_be_copied_and_its_state_loaded() -> None:
    graph, analysis = captured(*net())
    done = quantized(graph, analysis)
    clone = done.graph.copy()
    split = calibration(graph)
    assert torch.equal(outputs(clone, split), outputs(done.graph, split))
    state = {name: value * 0 if name.endswith("bias") else value for name, value in done.graph.module.state_dict().items()}
    clone.module.load_state_dict(state)
    assert not torch.equal(outputs(clone, split), outputs(done.graph, split))


def test_bias_correction_removes_the_mean_error_of_each_channel() -> None:
    graph, analysis = captured(*net())
    split = calibration(graph, samples=64)
    means = []
    for correct in (False, True):
        done = quantized(graph, analysis, target=AVX2, split=split, bias_correction=correct)
        means.append(float((outputs(done.graph, split) - outputs(graph, split)).mean(0).abs().max()))
    # what is left is the rounding of the last bias: half a unit, and float32's own
    *_, (_, read, weight) = static_biases(done.graph.module).values()
    half_a_unit = 0.5 * float((read * weight).max())
    assert half_a_unit < 1e-4 and means[1] < half_a_unit + 1e-5 < means[0]


@pytest.mark.parametrize("fault", ["nan weight", "zero weight", "zero input", "nan input", "dead channel"])
def test_what_cannot_be_quantized_is_left_alone_and_named(fault: str) -> None:
    model, example = net()
    assert isinstance(model, Net)
    with torch.no_grad():
        if fault == "nan weight":
            model.head.weight[0, 0] = float("nan")
        elif fault == "zero weight":
            model.head.weight.zero_()
        elif fault == "zero input":
            model.line.weight.zero_()
            model.line.bias.fill_(-1.0)  # type: ignore[union-attr]
        elif fault == "nan input":
            model.line.bias[2] = float("inf")  # type: ignore[index]
        else:
            model.line.weight[1].zero_()
    graph, analysis = captured(model, example)
    done = quantized(graph, analysis)
    reason = {
        "nan weight": "its weight is not finite",
        "zero weight": "its weight is zero",
        "zero input": "its input mean is zero on all of the calibration data",
        "nan input": "its input mean is not finite on the calibration data",
        "dead channel": "",
    }[fault]
    assert done.skipped.get("head", "") == reason
    assert "wide" in done.operators and "deep" in done.operators
    assert done.skipped.get("line", "") == (
        "its bias is not finite" if fault == "nan input" else "its weight is zero" if fault == "zero input" else ""
    )
    for name, value in done.graph.module.named_buffers():
        assert bool(torch.isfinite(value).all()), name
    if fault in ("zero weight", "zero input", "dead channel"):
        assert bool(torch.isfinite(outputs(done.graph, calibration(graph))).all())


def test_a_tiny_channel_with_an_ordinary_bias_does_not_overflow_an_int32_bias() -> None:
    model, example = net()
    assert isinstance(model, Net)
    with torch.no_grad():
        model.line.weight[1] *= 1e-12
        model.line.bias[1] = 3.0  # type: ignore[index]
    graph, analysis = captured(model, example)
    module = quantized(graph, analysis, bias_correction=False).graph.module
    buffers = dict(module.named_buffers())
    weight_scale = next(v for n, v in buffers.items() if n.startswith("line") and n.endswith("_scale"))
    input_scale = next(v for n, v in buffers.items() if n.startswith("relu_1") and n.endswith("_scale"))
    assert float(3.0 / (input_scale * weight_scale[1])) <= 2.0**30 * 1.001


def test_unusable_requests_are_refused() -> None:
    graph, analysis = captured(*net())
    with pytest.raises(UnknownName, match="no operator named 'wid'; did you mean 'wide'"):
        quantized(graph, analysis, precisions={"wid": "int8"})
    with pytest.raises(PlanError, match=r"the scheme of 'wide' must be one of fp32, bf16, .+; got 'int4'"):
        quantized(graph, analysis, precisions={"wide": "int4"})
    with pytest.raises(PlanError, match="'fp8' of 'wide' cannot run in declared: no processor multiplies 8-bit floats"):
        quantized(graph, analysis, precisions={"wide": "fp8"})
    with pytest.raises(UnknownName, match="no observer named 'entropie'"):
        quantized(graph, analysis, observer="entropie")
    empty = Split([calibration(graph).inputs[0][:0]], None, 0)
    with pytest.raises(DataError, match="calibration"):
        quantized(graph, analysis, split=empty)


def test_one_calibration_sample_is_enough() -> None:
    graph, analysis = captured(*net())
    assert len(quantized(graph, analysis, split=calibration(graph, samples=1)).operators) == 4


def test_train_mode_of_the_caller_does_not_matter() -> None:
    from planish.graph.modes import set_mode

    graph, analysis = captured(*nets.resnet())
    expected = quantized(graph, analysis)
    set_mode(graph, True)
    done = quantized(graph, analysis)
    split = calibration(graph)
    assert graph.module.training and torch.equal(outputs(done.graph, split), outputs(expected.graph, split))


def test_a_quantized_graph_can_still_be_analysed() -> None:
    graph, analysis = captured(*nets.resnet())
    found = analyse(quantized(graph, analysis).graph)
    assert {n for n, o in analysis.operators.items() if o.weight} <= set(found.operators)
