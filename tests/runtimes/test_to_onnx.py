"""The ONNX file equals the graph in ONNX Runtime, is the same each time, quiet, and small when quantized."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nets
from planish.errors import UsageError
from planish.graph.capture import capture
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.interpret import attribute, observe
from planish.graph.modes import set_mode, short_name
from planish.graph.qdq import is_quantized, to_qdq
from planish.runtimes.to_onnx import to_onnx

aten = torch.ops.aten


def sqnr_db(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Signal to noise in decibels; infinite where equal."""
    noise = np.square(wanted.astype(np.float64) - got).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise)) if noise else float("inf")


def session(path: Path, level: str = "ORT_ENABLE_ALL", optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(opened: onnxruntime.InferenceSession, graph: Graph, flat: list[Tensor]) -> list[np.ndarray[Any, Any]]:
    names = [spec.name for spec in graph.signature.inputs]
    present = {one.name for one in opened.get_inputs()}
    return opened.run(None, {name: tensor.numpy() for name, tensor in zip(names, flat, strict=True) if name in present})


def kinds(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


FAMILIES = {
    **nets.ZOO,
    "bigru": lambda: nets.gru(bidirectional=True, batch_first=False),
    "lstm_one": lambda: nets.lstm(layers=1, batch_first=False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_file_equals_module_at_batch_1_3_17_and_another_length(name: str, tmp_path: Path) -> None:
    """At least 80 dB: float32 rounds at 2^-24 = 144 dB, a sum of n products in another order loses about 10 log10(n) dB, and a
    chain of L layers 10 log10(L) more: 144 - 10 log10(1e5) - 10 log10(10) = 84 dB for the largest net here; a wrong gate, axis, mask
    or epsilon gives less than 40 dB."""
    model, example = FAMILIES[name]()
    graph = capture(model, example)
    path = tmp_path / "net.onnx"
    to_onnx(graph, path)
    opened = session(path)
    for batch in (1, 3, 17):
        for length in (None, 9, 21) if name in nets.SEQUENCE else (None,):
            flat = graph.signature.flatten(nets.resized(example, batch, length))
            with torch.no_grad():
                expected = graph.module(*flat)
            for wanted, got in zip(expected, run(opened, graph, flat), strict=True):
                assert got.shape == tuple(wanted.shape)
                assert sqnr_db(wanted.numpy(), got) > 80


def test_names_axes_and_nothing_of_this_machine(tmp_path: Path) -> None:
    model, example = nets.bert()
    graph = capture(model, example)
    to_onnx(graph, tmp_path / "net.onnx")
    loaded = onnx.load(tmp_path / "net.onnx")

    def described(values: Any) -> dict[str, list[str | int]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert described(loaded.graph.input) == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert described(loaded.graph.output) == {"logits": ["batch", 3]}
    text = (tmp_path / "net.onnx").read_bytes()
    assert str(Path(nets.__file__).parent).encode() not in text and b"site-packages" not in text
    assert loaded.producer_name == "planish"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]


def test_same_graph_same_bytes_and_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model, example = nets.lstm()
    graph = capture(model, example)
    levels = [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]
    caplog.set_level(logging.INFO)
    caplog.clear()
    to_onnx(graph, tmp_path / "one.onnx")
    to_onnx(capture(model, example), tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith(("torch.onnx", "onnx"))]
    assert levels == [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]


def test_graph_is_not_changed_and_train_mode_is_exported_as_eval(tmp_path: Path) -> None:
    model, example = nets.mobilenet()
    graph = capture(model, example)
    with torch.no_grad():
        expected = graph.module(*example)[0].numpy()
    set_mode(graph, training=True)
    before = graph.module.code
    to_onnx(graph, tmp_path / "net.onnx")
    assert graph.module.code == before and graph.module.training
    assert sqnr_db(expected, run(session(tmp_path / "net.onnx"), graph, list(example))[0]) > 80


def test_batch_norm_folds_and_recurrent_layers_are_onnxs_own(tmp_path: Path) -> None:
    to_onnx(capture(*nets.resnet()), tmp_path / "resnet.onnx")
    assert kinds(tmp_path / "resnet.onnx")["BatchNormalization"] == 0
    to_onnx(capture(*nets.lstm(bidirectional=True)), tmp_path / "lstm.onnx")
    assert kinds(tmp_path / "lstm.onnx")["LSTM"] == 4
    to_onnx(capture(*nets.gru()), tmp_path / "gru.onnx")
    assert kinds(tmp_path / "gru.onnx")["GRU"] == 2


def test_unused_inputs_and_passed_through_outputs(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, idle: Tensor) -> dict[str, Tensor]:
            y = x * 2
            return {"x": x, "y": y, "again": y}

    graph = capture(Odd(), (torch.randn(2, 4), torch.zeros(2, 3, dtype=torch.long)))
    to_onnx(graph, tmp_path / "net.onnx")
    opened = session(tmp_path / "net.onnx")
    assert [one.name for one in opened.get_inputs()] == ["x", "idle"]
    assert [one.name for one in opened.get_outputs()] == ["x_out", "y", "again"]
    x = torch.randn(5, 4)
    got = run(opened, graph, [x, torch.zeros(5, 3, dtype=torch.long)])
    for wanted, value in zip((x, 2 * x, 2 * x), got, strict=True):
        np.testing.assert_array_equal(value, wanted.numpy())


def test_attention_rows_that_see_nothing_give_zeros_as_in_torch(tmp_path: Path) -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask[:, None, None, :])

    x, mask = torch.randn(2, 3, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    mask[1] = False
    graph = capture(Attends(), (x, mask))
    to_onnx(graph, tmp_path / "net.onnx")
    got = run(session(tmp_path / "net.onnx"), graph, [x, mask])[0]
    assert np.abs(got[1]).max() == 0
    assert sqnr_db(graph((x, mask)).numpy(), got) > 100


@pytest.mark.parametrize("causal", [False, True])
def test_other_attentions_go_through_the_exporter(causal: bool, tmp_path: Path) -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            if causal:
                return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, bias, scale=0.3)

    flat = [torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 5)]
    graph = capture(Attends(), tuple(flat))
    to_onnx(graph, tmp_path / "net.onnx")
    assert sqnr_db(graph(tuple(flat)).numpy(), run(session(tmp_path / "net.onnx"), graph, flat)[0]) > 100


def test_an_operator_that_onnx_has_not_is_one_sentence(tmp_path: Path) -> None:
    class Special(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(UsageError, match=r"to_onnx: every operator must have an ONNX form; .*bessel_j0"):
        to_onnx(capture(Special(), torch.randn(2, 3)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def fake_quantized(graph: Graph, largest: int = 63, as_tensors: bool = False) -> Graph:
    """Batch norm folded; 8-bit weights per channel; activations of convolutions, linear maps, additions and pools quantized."""
    folded = fold_batch_norm(graph)
    module, results, done = folded.module, {}, set()
    with torch.no_grad():
        observe(folded, folded.example, [node.name for node in module.graph.nodes], lambda name, _, out: results.update({name: out}))

    def quantize(node: torch.fx.Node) -> None:
        if node in done:
            return
        low, high = min(0.0, float(results[node.name].min())), max(0.0, float(results[node.name].max()))
        scale = max(high - low, 1e-6) / 255
        zero = round(-low / scale)
        with module.graph.inserting_after(node):
            target = aten.fake_quantize_per_tensor_affine
            result = module.graph.call_function(target.tensor_qparams if as_tensors else target.default, ())
        node.replace_all_uses_with(result)
        arguments: list[Any] = [scale, zero]
        if as_tensors:
            module.register_buffer(f"{node.name}_scale", torch.tensor([scale]))
            module.register_buffer(f"{node.name}_zero", torch.tensor([zero], dtype=torch.int32))
            with module.graph.inserting_before(result):
                arguments = [module.graph.get_attr(f"{node.name}_scale"), module.graph.get_attr(f"{node.name}_zero")]
        result.args = (node, *arguments, 0, 255)
        done.update((node, result))

    for node in list(module.graph.nodes):
        if short_name(node) in ("conv2d", "linear"):
            weight = attribute(module, node.args[1].target).detach()
            module.register_buffer(f"{node.name}_scales", weight.abs().flatten(1).amax(1).clamp_min(1e-8) / largest)
            module.register_buffer(f"{node.name}_zeros", torch.zeros(len(weight), dtype=torch.int32))
            with module.graph.inserting_before(node):
                reads = [module.graph.get_attr(f"{node.name}_{what}") for what in ("scales", "zeros")]
                fake = module.graph.call_function(
                    aten.fake_quantize_per_channel_affine.default, (node.args[1], *reads, 0, -largest, largest)
                )
            node.args = (node.args[0], fake, *node.args[2:])
        if short_name(node) in ("conv2d", "linear", "add", "adaptive_avg_pool2d"):
            for argument in node.args[: 2 if short_name(node) == "add" else 1]:
                quantize(argument)
    module.graph.lint()
    module.recompile()
    return folded


@pytest.mark.parametrize("as_tensors", [False, True], ids=["literals", "buffers"])
@pytest.mark.parametrize("option", ["A", "B"])
def test_int8_file_is_faithful_runs_integer_kernels_and_is_small(option: str, as_tensors: bool, tmp_path: Path) -> None:
    """Without optimization the file computes what the fake-quantized module does, but for values that lie on a rounding boundary
    (torch multiplies by 1/scale, ONNX divides): each moves one activation by one of 255 steps, 48 dB below full scale, and few do."""
    model, example = nets.resnet(2, option, 32)
    graph = capture(model, example)
    quantized = fake_quantized(graph, as_tensors=as_tensors)
    assert is_quantized(quantized) and not is_quantized(graph)
    to_onnx(graph, tmp_path / "fp32.onnx")
    to_onnx(quantized, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.35 * (tmp_path / "fp32.onnx").stat().st_size
    flat = list(nets.resized(example, 5))
    with torch.no_grad():
        wanted = quantized.module(*flat)[0].numpy()
    plain = session(tmp_path / "int8.onnx", "ORT_DISABLE_ALL")
    assert sqnr_db(wanted, run(plain, quantized, flat)[0]) > 55
    fast = session(tmp_path / "int8.onnx", optimized=tmp_path / "optimized.onnx")
    counted = kinds(tmp_path / "optimized.onnx")
    convolutions = sum(short_name(node) == "conv2d" for node in graph.module.graph.nodes)
    assert counted["QLinearConv"] == convolutions and counted["Conv"] == 0 and counted["QLinearAdd"] == 6
    assert sqnr_db(wanted, run(fast, quantized, flat)[0]) > 40  # integer sums round once more, at every convolution's output


def test_weights_are_stored_as_int8_and_activations_stay_exact(tmp_path: Path) -> None:
    """One linear map with scales that are powers of two: every product and sum is exact, so the bytes must be equal."""
    torch.manual_seed(0)
    graph = capture(nn.Linear(4, 3), torch.randn(2, 4))
    module = graph.module
    module.register_buffer("scales", torch.full((3,), 2.0**-7))
    module.register_buffer("zeros", torch.zeros(3, dtype=torch.int32))
    with torch.no_grad():
        module.bias.copy_((module.bias * 2**10).round() / 2**10)
    node = next(node for node in module.graph.nodes if short_name(node) == "linear")
    with module.graph.inserting_before(node):
        reads = [module.graph.get_attr("scales"), module.graph.get_attr("zeros")]
        weight = module.graph.call_function(aten.fake_quantize_per_channel_affine.default, (node.args[1], *reads, 0, -63, 63))
        x = module.graph.call_function(aten.fake_quantize_per_tensor_affine.default, (node.args[0], 2.0**-5, 100, 10, 200))
    node.args = (x, weight, node.args[2])
    module.recompile()
    flat = [4 * torch.randn(50, 4)]
    with torch.no_grad():
        wanted, swapped = module(*flat)[0], to_qdq(graph).module(*flat)[0]
    assert torch.equal(swapped, wanted)
    to_onnx(graph, tmp_path / "net.onnx")
    np.testing.assert_array_equal(run(session(tmp_path / "net.onnx", "ORT_DISABLE_ALL"), graph, flat)[0], wanted.numpy())
    stored = [tensor for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer if tensor.dims == [3, 4]]
    assert [tensor.data_type for tensor in stored] == [onnx.TensorProto.INT8]
    assert np.abs(onnx.numpy_helper.to_array(stored[0])).max() <= 63
