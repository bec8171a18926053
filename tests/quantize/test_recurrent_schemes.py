"""LSTM and GRU in schemes: the module computes what the runtimes do, in ONNX's order of gates, and files are as small as promised."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from quantizing import AVX2, VNNI, calibration, captured, outputs, quantized
from torch import Tensor, nn

import families
from planish import registry
from planish.artifact.deployed import sqnr_db
from planish.errors import PlanError
from planish.graph.divergence import divergence
from planish.graph.fake_quantize import dynamic_lstm, fake_quantize_dynamic
from planish.graph.graph import Analysis, Graph
from planish.plan import Option, Plan
from planish.quantize.options import float_reasons, precision_options
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import Runtime, get_runtime
from planish.search.costs import Costs
from planish.search.space import Space
from planish.target import Target

OPENVINO = pytest.param("openvino", marks=pytest.mark.runtime("openvino"))
FORMS = [("lstm", "int8-dynamic", "onnxruntime")]
FORMS += [(cell, "int8-weights", runtime) for runtime in ("onnxruntime", "openvino") for cell in ("lstm", "gru")]


class Spoken(nn.Module):
    """Features of a sequence to classes, by the last state: linear map, recurrent layers, linear map."""

    def __init__(
        self, cell: str, layers: int = 2, both: bool = False, batch_first: bool = True, bias: bool = True, hidden: int = 24
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.Linear(10, 16)
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        self.rnn = kind(16, hidden, layers, batch_first=batch_first, bidirectional=both, bias=bias)
        self.out = nn.Linear(hidden * (1 + both), 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.inner(x))
        y, state = self.rnn(x if self.batch_first else x.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        return self.out(y), state.transpose(0, 1)


def spoken(cell: str, **settings: Any) -> tuple[Graph, Analysis]:
    """The net, with gates that open and close: weights twice as large as at the start of training, biases that differ among gates."""
    torch.manual_seed(0)
    net = Spoken(cell, **settings)
    with torch.no_grad():
        for name, value in net.rnn.named_parameters():
            value.mul_(2.0)
            if name.startswith("bias"):
                value += torch.linspace(-1.0, 1.0, len(value))
    return captured(net, (torch.randn(2, 9, 10),))


def whole(graph: Graph, analysis: Analysis, scheme: str, kinds: tuple[str, ...] = ("lstm", "gru")) -> dict[str, str]:
    """The operators of these kinds that have a form in a scheme."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    known = registry.get("scheme", scheme)
    return {name: scheme for name, o in analysis.operators.items() if o.kind in kinds and not unsupported(nodes[o.node], known)}


def there(name: str) -> Runtime:
    """A runtime that is installed."""
    runtime = get_runtime(name, require=False)
    if runtime.missing():
        pytest.skip(f"{name} is not installed")
    return runtime


def exported_sqnr(graph: Graph, runtime: Runtime, folder: Path) -> float:
    """The worst agreement between a module and its file in a runtime, one thread, over outputs and batches of 1, 3 and 17."""
    session = runtime.open(runtime.export(graph, folder), graph.signature, Target(runtime.name, threads=1))
    worst = np.inf
    for batch in (1, 3, 17):
        arrays = list(calibration(graph, samples=batch, seed=batch).inputs)
        with torch.no_grad():
            expected = graph.module(*map(torch.from_numpy, arrays))
        for one, found in zip(expected, session.run(arrays), strict=True):
            assert found.shape == one.shape
            worst = min(worst, sqnr_db(one.numpy(), found))
    return worst


@pytest.mark.parametrize(
    ("cell", "scheme", "runtime"), [pytest.param(*f, marks=pytest.mark.runtime("openvino")) if f[2] == "openvino" else f for f in FORMS]
)
@pytest.mark.parametrize(
    "settings", [{}, {"both": True}, {"batch_first": False, "bias": False, "layers": 1}], ids=["two", "both", "unbiased"]
)
def test_the_exported_form_computes_what_the_module_does(
    cell: str, scheme: str, runtime: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    known = there(runtime)
    graph, analysis = spoken(cell, **settings)
    wanted = whole(graph, analysis, scheme)
    done = quantized(graph, analysis, known, VNNI, precisions=wanted)
    assert set(done.operators) == set(wanted) and len(wanted) == settings.get("layers", 2) * (1 + settings.get("both", False))
    # weights alone: sums in another order; dynamic: a value on the border of two of 256 steps may tip, and its error passes through later steps
    assert exported_sqnr(done.graph, known, tmp_path) > (100.0 if scheme == "int8-weights" else 60.0)
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / known.model_file).graph.node)
    assert kinds["DynamicQuantizeLSTM" if scheme == "int8-dynamic" else cell.upper()] == len(wanted)
    split = calibration(graph, samples=16)
    assert 25.0 < sqnr_db(outputs(graph, split).numpy(), outputs(done.graph, split).numpy()) < 70.0  # rounded, and not much else


def in_integers(graph: Graph, x: np.ndarray[Any, Any], saturates: bool) -> np.ndarray[Any, Any]:
    """The outputs of a quantized `nn.LSTM` of one layer, in integers as a processor without int8 dot products computes them.

    Args:
        x: [batch, steps, inputs].
        saturates: whether sums of two products are held within int16, as `vpmaddubsw` does.
    """
    (node,) = (node for node in graph.module.graph.nodes if node.target is dynamic_lstm)
    roundings = node.args[2][:2]
    scales = [graph.module.get_buffer(str(rounding.args[1].target)).numpy() for rounding in roundings]
    floats = [graph.module.get_parameter(str(rounding.args[0].target)).detach().numpy() for rounding in roundings]
    matrices = [
        np.round(w / s[:, None]).clip(*rounding.args[4:]).astype(np.int64) for w, s, rounding in zip(floats, scales, roundings, strict=True)
    ]
    bias = sum(graph.module.get_parameter(str(b.target)).detach().numpy() for b in node.args[2][2:])

    def product(values: np.ndarray[Any, Any], number: int) -> np.ndarray[Any, Any]:
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        integers = (np.round(values / scale) + zero).clip(0, 255).astype(np.int64)
        pairs = (integers[..., None, :] * matrices[number]).reshape(*integers.shape[:-1], len(matrices[number]), -1, 2).sum(-1)
        pairs = pairs.clip(-(2**15), 2**15 - 1) if saturates else pairs
        return (pairs.sum(-1) - zero * matrices[number].sum(-1)) * scale * scales[number]

    def sigmoid(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return 1 / (1 + np.exp(-values))

    given, hidden = product(x, 0) + bias, matrices[1].shape[1]
    h = c = np.zeros((len(x), hidden))
    outputs = []
    for step in range(x.shape[1]):
        i, f, g, o = np.split(given[:, step] + product(h, 1), 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


class Layer(nn.Module):
    """An LSTM alone."""

    def __init__(self, inputs: int = 20, hidden: int = 16) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("target", [VNNI, AVX2], ids=["dot", "avx2"])
def test_the_module_computes_in_integers_which_do_not_saturate_without_dot_products(target: Target) -> None:
    """Every input at its largest, and weights of one sign in pairs: 2 * 255 * 63 stays below 2^15, and 2 * 255 * 127 does not."""
    torch.manual_seed(0)
    net = Layer()
    with torch.no_grad():
        for value in (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0):
            value.copy_(value.abs() * torch.tensor([1.0, -1.0]).repeat_interleave(2).repeat(len(value), value.shape[1] // 4))
    graph, analysis = captured(net, (torch.randn(2, 9, 20),))
    x = torch.rand(3, 9, 20, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.9
    done = quantized(graph, analysis, target=target, precisions=whole(graph, analysis, "int8-dynamic"), observer="minmax")
    with torch.no_grad():
        module = done.graph.module(x)[0].numpy()
    assert sqnr_db(in_integers(done.graph, x.numpy(), saturates=False), module) > 90.0  # a value may tip to the next of 256 steps
    saturated = sqnr_db(in_integers(done.graph, x.numpy(), saturates=True), module)
    assert saturated > 90.0 if target is AVX2 else saturated < 30.0


def test_gradients_pass_through_the_rounding_of_every_step() -> None:
    graph, analysis = spoken("lstm", both=True)
    done = quantized(graph, analysis, precisions=whole(graph, analysis, "int8-dynamic"))
    x = torch.randn(4, 9, 10, generator=torch.Generator().manual_seed(2))
    found = []
    for each in (graph, done.graph):
        each.module(x)[0].square().sum().backward()
        found.append({name: value.grad for name, value in each.module.named_parameters()})
        assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in found[-1].values())
    for name, grad in found[0].items():
        assert float(torch.cosine_similarity(grad.flatten(), found[1][name].flatten(), 0)) > 0.98, name


def test_each_step_has_a_range_of_its_own() -> None:
    """A first state a hundred times as large as what follows spoils one step, not the sequence."""
    torch.manual_seed(0)
    weights = [torch.randn(16, 3), torch.randn(16, 4), torch.zeros(16), torch.zeros(16)]
    x, c = 0.1 * torch.randn(2, 30, 3), torch.zeros(1, 2, 4)
    h = torch.full((1, 2, 4), 100.0)
    rest = (True, 1, 0.0, False, False, True)
    exact = torch.ops.aten.lstm.input(x, [fake_quantize_dynamic(h), c], weights, *rest)[0]
    assert sqnr_db(exact[:, 10:].numpy(), dynamic_lstm(x, [h, c], weights, *rest)[0][:, 10:].numpy()) > 30.0


@pytest.mark.parametrize(("cell", "scheme"), [("lstm", "int8-dynamic"), ("lstm", "int8-weights"), ("gru", "int8-weights")])
def test_files_are_as_small_as_the_search_counts(cell: str, scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, analysis = captured(Spoken(cell, hidden=128, layers=1), (torch.randn(2, 9, 10),))
    runtime = get_runtime("onnxruntime")
    wanted = whole(graph, analysis, scheme)
    (name,) = wanted
    costs = Costs(Space(analysis, [Option("precision", name, scheme, 0.1)], Plan("onnxruntime:cpu")), None)
    for number, precisions in enumerate(({}, wanted)):
        folder = tmp_path / str(number)
        folder.mkdir()
        size = runtime.export(quantized(graph, analysis, runtime, precisions=precisions).graph, folder).stat().st_size
        # besides, a name of an operator, of a value, a scale for each row: 2 to 4 KB
        assert costs.predict((number,))["size"] <= size <= costs.predict((number,))["size"] + 8000


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_small_layers_stay_int8_in_the_file(cell: str, tmp_path: Path) -> None:
    """The exporter computes what is constant, up to 8,192 values: what becomes float there is float in the file."""
    graph, analysis = spoken(cell, layers=1)
    runtime = get_runtime("onnxruntime")
    done = quantized(graph, analysis, runtime, precisions=whole(graph, analysis, "int8-weights"))
    path = runtime.export(done.graph, tmp_path)
    assert sum(value.data_type == onnx.TensorProto.INT8 for value in onnx.load(path).graph.initializer) == 2
    kernels = runtime.open(path, graph.signature, Target("onnxruntime")).proof().kernels
    assert kernels[cell.upper()] == 1 and not {"DequantizeLinear", "Cast", "Mul"} & set(kernels)  # nothing is left for the calls


@pytest.mark.parametrize("runtime", ["onnxruntime", OPENVINO])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_alone_stand_beside_static_int8(cell: str, runtime: str, tmp_path: Path) -> None:
    """In a model that holds static int8 OpenVINO keeps conversions of int8 weights for later, and has no recurrent kernel behind one."""
    known = there(runtime)
    graph, analysis = spoken(cell, layers=1)
    precisions = {**whole(graph, analysis, "int8", ("linear",)), **whole(graph, analysis, "int8-weights")}
    done = quantized(graph, analysis, known, VNNI, precisions=precisions)
    assert len(done.operators) == 3
    session = known.open(known.export(done.graph, tmp_path), graph.signature, Target(runtime))
    arrays = list(calibration(graph, samples=5, seed=3).inputs)
    expected = outputs(done.graph, calibration(graph, samples=5, seed=3)).numpy()
    assert sqnr_db(expected, session.run(arrays)[0]) > 40.0


def test_a_linear_map_and_an_lstm_share_a_rounded_input(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return self.rnn(x)[0] + self.fc(x)

    torch.manual_seed(0)
    graph, analysis = captured(Both(), (torch.randn(2, 5, 8),))
    runtime = get_runtime("onnxruntime")
    done = quantized(graph, analysis, runtime, precisions=whole(graph, analysis, "int8-dynamic", ("lstm", "linear")))
    assert len(done.operators) == 2 and sum(node.target is fake_quantize_dynamic for node in done.graph.module.graph.nodes) == 1
    assert exported_sqnr(done.graph, runtime, tmp_path) > 60.0


@torch.no_grad()
def test_options_say_what_a_layer_loses_alone() -> None:
    for cell, schemes in (("lstm", ("int8-dynamic", "int8-weights")), ("gru", ("int8-weights",))):
        graph, analysis = spoken(cell)
        split = calibration(graph, samples=48)
        found = precision_options(graph, analysis, get_runtime("onnxruntime"), AVX2, split, ("int8", "int8-dynamic", "int8-weights"))
        losses = {(o.subject, o.value): o.loss for o in found if analysis.operators[o.subject].kind == cell}
        assert set(losses) == {(name, scheme) for scheme in schemes for name in whole(graph, analysis, scheme)}
        flat = [torch.from_numpy(array) for array in split.inputs]
        original = list(graph.module(*flat))
        for (name, scheme), loss in losses.items():
            alone = quantized(graph, analysis, target=AVX2, precisions={name: str(scheme)}, split=split, bias_correction=False)
            expected = float(divergence(original).per_sample(list(alone.graph.module(*flat)), original).double().mean())
            assert loss == pytest.approx(expected, rel=0.1) and loss > 0


def test_what_has_no_form_says_why() -> None:
    runtime = get_runtime("onnxruntime")
    for cell, reason in (("lstm", "take int8-dynamic or int8-weights"), ("gru", "no runtime has an int8 kernel of torch's GRU")):
        graph, analysis = spoken(cell)
        reasons = float_reasons(graph, analysis, runtime, VNNI, calibration(graph))
        assert [reason in reasons[name] for name, o in analysis.operators.items() if o.kind == cell] == [True, True]
    (name, *_) = whole(graph, analysis, "int8-weights")
    done = quantized(graph, analysis, runtime, precisions={name: "int8-dynamic"})
    assert not done.operators and "no runtime has an int8 kernel" in done.skipped[name]
    with pytest.raises(PlanError, match="cannot run in openvino"):
        quantized(graph, analysis, get_runtime("openvino", require=False), precisions={name: "int8-dynamic"})


def test_a_layer_that_cannot_be_rounded_stays_and_is_named() -> None:
    for wrong, reason in ((float("nan"), "weight is not finite"), (0.0, "weight is zero")):
        net = Spoken("lstm", layers=1).eval()
        with torch.no_grad():
            net.rnn.weight_hh_l0.fill_(wrong)
        graph, analysis = captured(net, (torch.randn(2, 9, 10),))
        done = quantized(graph, analysis, precisions=whole(graph, analysis, "int8-dynamic"), bias_correction=False)
        assert not done.operators and reason in next(iter(done.skipped.values()))


@pytest.mark.parametrize("family", ["policy", "stepped"])
def test_cells_that_the_caller_steps_take_part_as_linear_maps(family: str) -> None:
    graph, analysis = captured(*families.FAMILIES[family]())
    found = precision_options(
        graph, analysis, get_runtime("onnxruntime"), VNNI, calibration(graph), ("int8", "int8-dynamic", "int8-weights")
    )
    cell = [name for name, o in analysis.operators.items() if o.kind == "linear" and name.startswith(("core", "cell"))]
    assert len(cell) == 2  # of the input and of the hidden state
    offered = {(option.subject, option.value) for option in found}
    assert {(name, scheme) for name in cell for scheme in ("int8", "int8-dynamic", "int8-weights")} <= offered
