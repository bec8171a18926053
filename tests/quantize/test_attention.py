"""Attention in static int8: probabilities on a grid up to their largest, masks of all kinds, both products on int8 kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantizing import VNNI, calibration, captured, outputs, quantized
from torch import Tensor, nn

from planish.graph.attention import static_attention
from planish.measure.machine import facts
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.options import precision_options
from planish.quantize.placement import place
from planish.runtimes.contract import get_runtime
from planish.target import Target

RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))]


class Masked(nn.Module):
    """Four heads; the mask is none, of later words, or of words that are larger than a bound in their first value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = (x[..., 0] < 0.7)[:, None, None]
        mask = {"boolean": seen, "added": torch.where(seen, 0.0, -1e4)}.get(self.kind)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal", scale=0.5 if self.kind == "scaled" else None)
        return self.out(y.transpose(1, 2).flatten(2))


def net(kind: str) -> Masked:
    torch.manual_seed(0)
    model = Masked(kind)
    with torch.no_grad():
        for value in model.parameters():
            nn.init.normal_(value, std=0.3)
    return model


@pytest.mark.parametrize("mask", ["none", "boolean", "causal", "added"])
def test_the_error_is_half_a_step_of_each_probability_at_most(mask: str) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    seen = torch.rand(2, 1, 5, 5) > 0.4
    seen[0, 0, 2] = False
    given = {"none": None, "boolean": seen, "causal": None, "added": torch.randn(5, 5)}[mask]
    exact = F.scaled_dot_product_attention(q, k, v, given, is_causal=mask == "causal")
    found = static_attention(q, k, v, given, is_causal=mask == "causal", step=torch.tensor(1 / 255))
    bound = v.abs().sum(-2, keepdim=True) / 510
    assert bool(((exact - found).abs() <= bound * 1.001 + 1e-6).all()) and not torch.equal(exact, found)
    if mask == "boolean":
        assert not found[0, :, 2].any()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["none", "boolean", "causal", "added", "scaled"])
def test_the_exported_form_computes_what_the_module_does(kind: str, runtime: str, tmp_path: Path) -> None:
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    graph, analysis = captured(net(kind), (torch.randn(2, 9, 32),))
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target)
    assert "scaled_dot_product_attention" in done.operators and not done.skipped
    split = calibration(graph, samples=3, seed=9)
    session = known.open(known.export(done.graph, tmp_path), graph.signature, target)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    proof = session.proof()
    session.close()
    # sums of integers are exact; softmax in two libraries differs by 1e-7, and a probability on the border of two of 255 steps may tip
    assert sqnr_db(outputs(done.graph, split), found) > 45.0
    assert 15.0 < sqnr_db(outputs(graph, split), found) < 60.0
    assert proof.float_kernels == 0, proof
    if runtime == "onnxruntime":
        assert proof.int8_kernels == 6, proof


def test_it_is_an_option_with_its_own_loss() -> None:
    graph, analysis = captured(net("none"), (torch.randn(2, 9, 32),))
    options = precision_options(graph, analysis, get_runtime("onnxruntime"), VNNI, calibration(graph))
    found = {option.subject: option.loss for option in options}
    assert found["scaled_dot_product_attention"] > 0 and len(found) == 5


def test_a_step_of_training_goes_through() -> None:
    graph, analysis = captured(net("none"), (torch.randn(2, 9, 32),))
    done = quantized(graph, analysis, get_runtime("onnxruntime"))
    done.graph.module(torch.randn(2, 9, 32))[0].square().mean().backward()
    assert all(bool(value.grad.abs().max() > 0) for value in done.graph.module.parameters() if value.dim() > 1)


def test_a_query_that_a_mask_lets_see_nothing_gives_zeros() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 4) for _ in range(3))
    mask = torch.zeros(3, 3)
    mask[1] = -torch.inf
    mask[2, 0] = -torch.inf
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    found = static_attention(query, key, value, mask, step=torch.tensor(1 / 255))
    assert torch.equal(found[:, :, 1], torch.zeros(1, 2, 4))
    assert float((found - expected).abs().max()) < 0.02


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attention_that_is_spread_over_many_keys_keeps_its_output(runtime: str, tmp_path: Path) -> None:
    """With steps of 1/255 all of it would be gone: each of 600 keys gets a third of a step."""
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    model = net("none")
    with torch.no_grad():
        for layer in (model.query, model.key):
            layer.weight.mul_(0.1)
    graph, analysis = captured(model, (torch.randn(2, 600, 32),))
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target)
    split = calibration(graph, samples=2, seed=9)
    expected = outputs(graph, split)
    step = done.graph.module.scaled_dot_product_attention_probability_scale
    assert 1 / 600 / 255 < float(step) < 1 / 2550
    assert sqnr_db(expected, outputs(done.graph, split)) > 15.0
    session = known.open(known.export(done.graph, tmp_path), graph.signature, target)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    session.close()
    assert sqnr_db(expected, found) > 15.0
    step.fill_(1 / 255)
    assert sqnr_db(expected, outputs(done.graph, split)) < 3.0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_only_openvino_gets_operands_around_zero(runtime: str, tmp_path: Path) -> None:
    """With zero points OpenVINO would subtract them in kernels of their own, between float and int8, before it multiplies."""
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    graph, analysis = captured(net("none"), (torch.randn(2, 32, 32),))
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target)
    nodes = {node.name: node for node in done.graph.module.graph.nodes}
    read = [done.graph.module.get_buffer(name) for name in dict(done.graph.module.named_buffers()) if name.endswith("zero_point")]
    grids = {node.args[3:5] for node in nodes.values() if str(node.target).find("per_tensor") >= 0}
    assert read and grids == ({(0, 255), (-128, 127)} if runtime == "openvino" else {(0, 255)})
    session = known.open(known.export(done.graph, tmp_path), graph.signature, target)
    found = torch.from_numpy(session.run(list(calibration(graph, samples=2, seed=9).inputs))[0])
    proof = session.proof()
    session.close()
    assert sqnr_db(outputs(done.graph, calibration(graph, samples=2, seed=9)), found) > 40.0
    assert "Subtract" not in proof.kernels


def test_a_value_that_something_else_reads_too_keeps_its_zero_point() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return torch.matmul(torch.matmul(y, y.transpose(1, 2)).softmax(-1), self.second(y))

    graph, analysis = captured(Shared(), (torch.randn(2, 9, 16),))
    runtime = get_runtime("openvino", require=False)
    nodes = {name: operator.node for name, operator in analysis.operators.items() if operator.kind in ("linear", "matmul")}
    found = place(graph.module, nodes, runtime.quantize_inputs_of)
    assert found.signed == {"softmax", "linear_1"} and "linear" in found.activations
    assert not place(graph.module, nodes, get_runtime("onnxruntime").quantize_inputs_of).signed
