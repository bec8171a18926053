"""Attention in static int8: probabilities on a grid up to their largest, masks of all kinds, both products on int8 kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantizing import VNNI, calibration, captured, outputs, quantized, ran
from torch import Tensor, nn

from planish.data import Split
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
    found, proof = ran(done.graph, known, target, split, tmp_path)
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
    patches = nn.Sequential(nn.Flatten(1, 2), model)  # images have a fixed size, and so as many keys each time
    graph, analysis = captured(patches, (torch.randn(2, 20, 30, 32),))
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target)
    split = calibration(graph, samples=2, seed=9)
    expected = outputs(graph, split)
    step = done.graph.module.scaled_dot_product_attention_probability_scale
    assert 1 / 600 / 255 < float(step) < 1 / 2550
    assert sqnr_db(expected, outputs(done.graph, split)) > 15.0
    found, _ = ran(done.graph, known, target, split, tmp_path)
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
    split = calibration(graph, samples=2, seed=9)
    found, proof = ran(done.graph, known, target, split, tmp_path)
    assert sqnr_db(outputs(done.graph, split), found) > 40.0
    assert "Subtract" not in proof.kernels


class Products(nn.Module):
    """A product whose operands are never below zero, are given back, or are read by a linear map as well."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.o = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.a(x), self.b(x)
        if self.kind in ("relu left", "relu both"):
            a = torch.relu(a)
        if self.kind in ("relu right", "relu both"):
            b = torch.relu(b)
        out = (a @ b.transpose(1, 2)).mean(-1)
        return {"given back": (out, b), "read again": (out, self.o(b))}.get(self.kind, (out,))


@pytest.mark.runtime("openvino")
@pytest.mark.parametrize("kind", ["plain", "relu left", "relu right", "relu both", "given back", "read again"])
def test_openvino_multiplies_activations_in_int8_whatever_they_are(kind: str, tmp_path: Path) -> None:
    known = get_runtime("openvino", require=False)
    if known.missing():
        pytest.skip("openvino is not installed")
    torch.manual_seed(0)
    graph, analysis = captured(Products(kind), (torch.randn(2, 32, 32),))
    target = Target("openvino", facts=facts())
    done = quantized(graph, analysis, known, target)
    split = calibration(graph, samples=4, seed=9)
    found, proof = ran(done.graph, known, target, split, tmp_path)
    assert (proof.int8_kernels, proof.float_kernels) == (len(done.operators), 0), proof
    assert sqnr_db(outputs(done.graph, split), found) > 40.0


def test_only_runtimes_that_ask_for_them_get_signed_grids() -> None:
    graph, analysis = captured(Products("relu left"), (torch.randn(2, 9, 32),))
    nodes = {name: operator.node for name, operator in analysis.operators.items() if operator.kind in ("linear", "matmul")}
    found = place(graph.module, nodes, get_runtime("openvino", require=False).quantize_inputs_of)
    assert found.signed == {"relu": False, "linear_1": True}
    assert not place(graph.module, nodes, get_runtime("onnxruntime").quantize_inputs_of).signed


def test_a_query_that_sees_fewer_keys_than_on_calibration_data_is_not_clipped() -> None:
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net("none")

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.inner.query, self.inner.key, self.inner.value))
            return self.inner.out(F.scaled_dot_product_attention(q, k, v, seen[:, None, None] > 0).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    words, seen = torch.randn(8, 64, 32), torch.ones(8, 64, dtype=torch.int64)
    graph, analysis = captured(Seeing(), (words[:2], seen[:2]))
    done = quantized(graph, analysis, get_runtime("onnxruntime"), split=Split([words.numpy(), seen.numpy()], None, 8))
    for few in (64, 8, 4):
        seen[:, few:] = 0
        found = [module(words, seen)[0].detach() for module in (graph.module, done.graph.module)]
        assert sqnr_db(*found) > 12.0, few
    plain, analysis = captured(net("none"), (words[:2],))
    done = quantized(plain, analysis, get_runtime("onnxruntime"), split=Split([words.numpy()], None, 8))
    found = [module(words[:, :4])[0].detach() for module in (plain.module, done.graph.module)]
    assert sqnr_db(*found) > 12.0, "the length of a sentence is not fixed"
