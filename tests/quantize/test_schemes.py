"""Schemes without static activations: what is rounded where, the exported form equal to the module, and what each refuses."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from quantizing import AVX2, VNNI, calibration, captured, declares, fake_quantizers, outputs, quantized
from torch import Tensor, nn

import families
import nets
from planish import registry
from planish.artifact.deployed import sqnr_db
from planish.graph.divergence import divergence
from planish.graph.fake_quantize import fake_quantize_dynamic, fake_quantize_per_group
from planish.graph.graph import Analysis, Graph
from planish.quantize.arithmetic import Grid
from planish.quantize.contract import group_size
from planish.quantize.local import GroupQuantizer, group_quantizer
from planish.quantize.observers.minmax import MinMax
from planish.quantize.options import precision_options
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import get_runtime
from planish.target import Target

NETS = {
    "bert": nets.bert,
    "gpt2": families.gpt2,
    "mlp": lambda: (nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 8, bias=False)), (torch.randn(2, 40),)),
}
LOCAL = ("int8-dynamic", "int8-weights", "int4-weights")


def whole(analysis: Analysis, graph: Graph, scheme: str) -> dict[str, str]:
    """Every operator that has a form in a scheme."""
    return everywhere(graph, analysis, registry.get("scheme", scheme))


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
@pytest.mark.parametrize("scheme", LOCAL)
@pytest.mark.parametrize("net", NETS)
def test_the_exported_form_computes_what_the_module_does(net: str, scheme: str, runtime: str, tmp_path: Path) -> None:
    there = get_runtime(runtime, require=False)
    if there.missing():
        pytest.skip(f"{runtime} is not installed")
    if scheme not in there.schemes:
        pytest.skip(f"{runtime} does not execute {scheme}")
    torch.manual_seed(0)
    graph, analysis = captured(*NETS[net]())
    wanted = whole(analysis, graph, scheme)
    done = quantized(graph, analysis, there, VNNI, precisions=wanted)
    assert set(done.operators) == set(wanted) and not done.skipped
    path = there.export(done.graph, tmp_path)
    session = there.open(path, graph.signature, Target(runtime))
    for batch in (1, 3, 17):
        split = calibration(graph, samples=batch, seed=batch)
        with torch.no_grad():
            expected = list(done.graph.module(*(torch.from_numpy(array) for array in split.inputs)))
        for one, found in zip(expected, session.run(list(split.inputs)), strict=True):
            # OpenVINO sums over groups in another order; a value of a dynamic range that falls on the border of two steps may tip (60 dB)
            assert sqnr_db(one.numpy(), found) > 55.0
    kinds = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    held = [name for name in wanted if analysis.operators[name].kind != "embedding"]
    assert kinds["MatMulInteger" if scheme == "int8-dynamic" else "MatMulNBits"] == len(held)
    assert not kinds["Gemm"]
    assert sqnr_db(outputs(graph, split).numpy(), expected[0].numpy()) > (40.0 if scheme.startswith("int8") else 12.0)


@pytest.mark.parametrize(("scheme", "most"), [("int8-weights", 0.34), ("int4-weights", 0.24)])
def test_files_are_as_small_as_the_scheme_says(scheme: str, most: float, tmp_path: Path) -> None:
    graph, analysis = captured(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), (torch.randn(2, 512),))
    runtime = get_runtime("onnxruntime")
    sizes = []
    for precisions in ({}, whole(analysis, graph, scheme)):
        folder = tmp_path / str(len(precisions))
        folder.mkdir()
        sizes.append(runtime.export(quantized(graph, analysis, runtime, VNNI, precisions=precisions).graph, folder).stat().st_size)
    promised = registry.get("scheme", scheme).weight_bytes / 4
    assert sizes[1] / sizes[0] == pytest.approx(promised, abs=0.02) and promised < most


def test_dynamic_rounding_is_that_of_the_standard() -> None:
    """The worked example of ONNX's DynamicQuantizeLinear: 0, 2, -3, -2.5, 1.34, 0.5 -> scale 0.0196, zero point 153."""
    x = torch.tensor([0.0, 2.0, -3.0, -2.5, 1.34, 0.5])
    scale, zero_point = 5.0 / 255, 153
    expected = (torch.tensor([153.0, 255, 0, 26, 221, 179]) - zero_point) * scale
    torch.testing.assert_close(fake_quantize_dynamic(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(fake_quantize_dynamic(torch.zeros(3)), torch.zeros(3))


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(4, 40, requires_grad=True)
    fake_quantize_dynamic(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 40))  # type: ignore[arg-type]
    w = torch.randn(3, 40, requires_grad=True)
    found = group_quantizer(w.detach(), Grid(0, 15), 16, MinMax)
    fake_quantize_per_group(w, found.scale, found.zero_point, 16, 0, 15).sum().backward()
    assert float(w.grad.mean()) > 0.9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("columns", "wanted", "size"), [(384, 128, 128), (384, 32, 32), (48, 32, 16), (40, 32, 32), (33, 128, 128), (16, 128, 16)]
)
def test_groups_divide_the_inputs_where_a_power_of_two_does(columns: int, wanted: int, size: int) -> None:
    assert group_size(wanted, columns) == size


def test_every_group_has_the_grid_of_its_own_values() -> None:
    """A row of two groups and a rest: each is exact to half a step of its own range, the rest's among them."""
    matrix = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01] * 16 + [3.0] * 16 + [0.2] * 8)
    found = group_quantizer(matrix, Grid(0, 15), 16, MinMax)
    assert isinstance(found, GroupQuantizer) and found.scale.shape == (5, 3)
    error = (found.rounded(matrix) - matrix).abs()
    for number, columns in enumerate((slice(0, 16), slice(16, 32), slice(32, 40))):
        assert float((error[:, columns] / found.scale[:, number, None]).max()) <= 0.5 + 1e-4
        part = matrix[:, columns]
        expected = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / 15
        torch.testing.assert_close(found.scale[:, number], expected)


class Tied(nn.Module):
    """An embedding whose table is also the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 32)
        self.out = nn.Linear(32, 128, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(tokens)))


def test_a_weight_that_several_read_is_rounded_once_for_each_form() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(32, 32)
    graph, analysis = captured(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), shared), (torch.randn(2, 32),))
    done = quantized(graph, analysis, declares(), VNNI, precisions=whole(analysis, graph, "int4-weights"))
    assert len(done.operators) == 3 and len(fake_quantizers(done.graph)) == 1
    tied, found = captured(Tied(), (torch.randint(0, 64, (2, 7)),))
    done = quantized(tied, found, declares(), VNNI, precisions=whole(found, tied, "int8-weights"))
    assert len(done.operators) == 2 and len(fake_quantizers(done.graph)) == 2  # rows for one, groups for the other


def test_options_say_what_each_scheme_loses_alone() -> None:
    graph, analysis = captured(*nets.bert())
    split = calibration(graph, samples=48)
    options = precision_options(graph, analysis, declares(), AVX2, split, ("int8", *LOCAL))
    losses = {(option.subject, option.value): option.loss for option in options}
    original = outputs(graph, split)
    for subject, scheme in [*losses][::5]:
        alone = quantized(graph, analysis, declares(), AVX2, precisions={subject: str(scheme)}, split=split, bias_correction=False)
        expected = float(divergence([original]).per_sample([outputs(alone.graph, split)], [original]).double().mean())
        assert losses[subject, scheme] == pytest.approx(expected, rel=0.05, abs=1e-7)
    total = collections.Counter[str]()
    for (_, scheme), loss in losses.items():
        total[str(scheme)] += loss
    assert total["int4-weights"] > total["int8-weights"] > 0


def test_what_cannot_be_rounded_stays_and_is_named() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.Conv1d(2, 2, 1))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")  # type: ignore[index, operator]
        net[2].weight.zero_()  # type: ignore[operator, union-attr]
    graph, analysis = captured(net, (torch.zeros(3, 2, 8),))
    wanted = dict.fromkeys(analysis.operators, "int8-weights")
    done = quantized(graph, analysis, declares(), VNNI, precisions=wanted, bias_correction=False)
    assert done.operators == ("4",)
    assert "not finite" in done.skipped["0"] and "zero" in done.skipped["2"] and "no form in int8-weights" in done.skipped["5"]


def test_schemes_mix_in_one_net(tmp_path: Path) -> None:
    """Static, dynamic and grouped operators side by side, a value among them that is read in two ways."""
    torch.manual_seed(0)
    graph, analysis = captured(*nets.bert())
    names = list(whole(analysis, graph, "int8-dynamic"))
    kinds = ("int8", "int8-dynamic", "int8-weights", "int4-weights")
    precisions = {name: kinds[index % 4] for index, name in enumerate(names)}
    runtime = get_runtime("onnxruntime")
    done = quantized(graph, analysis, runtime, VNNI, precisions=precisions)
    assert set(done.operators) == set(names)
    session = runtime.open(runtime.export(done.graph, tmp_path), graph.signature, Target("onnxruntime"))
    split = calibration(graph, samples=3, seed=1)
    assert sqnr_db(outputs(done.graph, split).numpy(), session.run([np.ascontiguousarray(a) for a in split.inputs])[0]) > 40.0
    assert session.proof().int8_kernels >= sum(scheme in kinds[:2] for scheme in precisions.values()) - 2
