"""Concatenations in int8: one grid for all parts, and both runtimes move bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantizing import calibration, captured, outputs, quantized, ran
from torch import Tensor, nn

from planish.measure.machine import facts
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.placement import Placement, Read, place
from planish.runtimes.contract import get_runtime
from planish.target import Target

INT8 = frozenset({"conv", "linear", "matmul", "add", "pool", "cat"})
RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))]


class Dense(nn.Module):
    """Two concatenations that share parts, one of them through a pool; the last may get a part that is not rectified."""

    def __init__(self, is_rectified: bool = True, is_chained: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(24, 8, 3, padding=1)
        self.is_rectified, self.is_chained = is_rectified, is_chained

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.first(x)), F.max_pool2d(F.relu(self.second(x)), 3, 1, 1)
        ab = torch.cat([a, b], 1)
        c = self.third(ab)
        c = F.relu(c) if self.is_rectified else c
        return self.last(torch.cat([c, ab] if self.is_chained else [c, a, b], 1))


def net(**settings: bool) -> Dense:
    torch.manual_seed(0)
    model = Dense(**settings)
    with torch.no_grad():
        model.first.weight.mul_(4.0)  # its range is the widest
    return model


EXAMPLE = (torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(1)),)


def placed(model: nn.Module, inputs: frozenset[str] = INT8) -> Placement:
    graph, analysis = captured(model, EXAMPLE)
    return place(graph.module, {name: o.node for name, o in analysis.operators.items() if o.kind == "conv"}, inputs, frozenset({"conv"}))


def test_all_that_is_concatenated_together_shares_the_quantizer_of_the_last() -> None:
    for model in (net(), net(is_chained=False)):
        found = placed(model)
        assert found.shared == {"cat_1": ("relu", "relu_1", "cat", "relu_2", "cat_1")}
        assert found.repeats == dict.fromkeys(("relu", "relu_1", "cat", "relu_2"), "cat_1")
        assert found.activations["relu_1"] == (Read("max_pool2d", 0),) and Read("cat", 0) in found.activations["relu"]


def test_parts_of_which_only_some_are_rectified_keep_their_own() -> None:
    found = placed(net(is_rectified=False))
    assert found.shared == {"cat": ("relu", "relu_1", "cat")} and {"conv2d_2", "cat_1"} <= set(found.activations)
    assert not {"conv2d_2", "cat_1"} & set(found.repeats)


def test_a_runtime_without_has_none() -> None:
    found = placed(net(), INT8 - {"cat"})
    assert not found.shared and not found.repeats


def test_a_parameter_among_the_parts_leaves_it_in_float() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.token, self.out = nn.Linear(6, 6), nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.inner(x), self.token], 0))

    graph, analysis = captured(Token(), (torch.randn(4, 6),))
    found = place(graph.module, {name: o.node for name, o in analysis.operators.items() if o.kind == "linear"}, INT8)
    assert not found.shared and list(found.activations) == ["x", "cat"]


def test_the_range_in_common_covers_each() -> None:
    graph, analysis = captured(net(is_chained=False), EXAMPLE)
    split = calibration(graph)
    done = quantized(graph, analysis, get_runtime("onnxruntime"), split=split, observer="minmax")
    with torch.no_grad():
        x = torch.from_numpy(split.inputs[0])
        model = net(is_chained=False)
        a, b = F.relu(model.first(x)), F.relu(model.second(x))
        largest = max(float(a.max()), float(b.max()), float(F.relu(model.third(torch.cat([a, F.max_pool2d(b, 3, 1, 1)], 1))).max()))
    assert float(done.graph.module.cat_1_scale) == pytest.approx(largest / 255, rel=1e-3) and int(done.graph.module.cat_1_zero_point) == 0
    shared = [node for node in done.graph.module.graph.nodes if node.op == "call_function" and "cat_1_scale" in str(node.args)]
    assert len(shared) == 5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("settings", [{}, {"is_chained": False}, {"is_rectified": False}], ids=["chained", "apart", "mixed"])
def test_both_runtimes_concatenate_bytes(settings: dict[str, bool], runtime: str, tmp_path: Path) -> None:
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    graph, analysis = captured(net(**settings), EXAMPLE)
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target)
    split = calibration(graph, samples=3, seed=9)
    found, proof = ran(done.graph, known, target, split, tmp_path)
    # the same grids, sums of integers: 120 to 140 dB; a value on the border of two steps that tips would cost about 60
    assert sqnr_db(outputs(done.graph, split), found) > 50.0
    assert sqnr_db(outputs(graph, split), found) > 25.0
    if runtime == "onnxruntime":
        # the last convolution issues the program's output, in float
        assert proof.kernels["QLinearConcat"] == 2 and "Concat" not in proof.kernels and proof.kernels["QLinearConv"] >= 3, proof
    else:
        assert proof.kernels["Concatenation ref_I8"] == 2 and proof.float_kernels == 0 and proof.int8_kernels == 4, proof
