"""Calibration data that is too little, constant or broken, targets that lack a scheme, and instruction sets: refused or named, never silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantizing import calibration, captured, fake_quantizers, outputs, quantized, ran
from torch import Tensor, nn

from planish.data import Split
from planish.errors import PlanError
from planish.graph.graph import Analysis, Graph
from planish.measure.machine import facts, facts_from_flags
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.ranges import calibration_warnings
from planish.runtimes.contract import get_runtime
from planish.target import Target

RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))]
AVX2 = "avx2 fma"
AVX512 = AVX2 + " avx512f avx512bw avx512vl"


def chain() -> tuple[Graph, Analysis]:
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), (torch.randn(2, 8),))


def data(values: Tensor) -> Split:
    return Split([values.numpy()], None, len(values))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_calibration_data_leaves_what_reads_it_in_float(broken: float) -> None:
    graph, analysis = chain()
    values = torch.randn(32, 8)
    values[5, 3] = broken
    done = quantized(graph, analysis, split=data(values))
    assert done.skipped["0"].endswith("is not finite on the calibration data") and "0" not in done.operators
    for name, value in done.graph.module.named_buffers():
        assert bool(torch.isfinite(value).all()), name


@pytest.mark.parametrize("samples", [1, 8], ids=["one sample", "constant"])
def test_little_calibration_data_is_used_and_named(samples: int) -> None:
    graph, analysis = chain()
    split = data(torch.full((samples, 8), 0.5))
    done = quantized(graph, analysis, split=split)
    assert set(done.operators) == {"0", "2"} and bool(torch.isfinite(outputs(done.graph, split)).all())
    assert sqnr_db(outputs(graph, split), outputs(done.graph, split)) > 30.0
    said = " ".join(calibration_warnings(split, {}, ["x"]))
    assert ("one sample only" if samples == 1 else "the same value in all 8 samples: 0.5") in said


def test_zeros_alone_have_no_range() -> None:
    graph, analysis = chain()
    done = quantized(graph, analysis, split=data(torch.zeros(8, 8)))
    assert done.skipped["0"].endswith("is zero on all of the calibration data")


@pytest.mark.parametrize(
    ("runtime", "scheme", "message"),
    [
        ("openvino", "int8-dynamic", "'int8-dynamic' of '0' cannot run in openvino: it executes fp32, int8, "),
        ("onnxruntime", "bf16", "'bf16' of '0' cannot run in onnxruntime: it executes fp32, int8, "),
        ("onnxruntime", "fp8", "'fp8' of '0' cannot run in onnxruntime: no processor multiplies 8-bit floats"),
        ("torch", "int8", "'int8' of '0' cannot run in torch: it executes fp32"),
    ],
)
def test_what_a_target_cannot_execute_is_refused_before_anything_is_done(runtime: str, scheme: str, message: str) -> None:
    graph, analysis = chain()
    with pytest.raises(PlanError, match=message):
        quantized(graph, analysis, get_runtime(runtime, require=False), Target(runtime), precisions={"0": scheme})


@pytest.mark.parametrize("inputs", [30, 47])
def test_groups_that_do_not_divide_the_inputs_are_exported(inputs: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph, analysis = captured(nn.Sequential(nn.Linear(inputs, 20)), (torch.randn(2, inputs),))
    known = get_runtime("onnxruntime")
    done = quantized(graph, analysis, known, precisions={"0": "int4-weights"})
    split = calibration(graph, samples=3, seed=9)
    found, _ = ran(done.graph, known, Target("onnxruntime"), split, tmp_path)
    assert done.operators == ("0",) and sqnr_db(outputs(done.graph, split), found) > 100.0


@pytest.mark.parametrize(
    ("flags", "largest"),
    [
        (AVX2, 63),
        (AVX512, 63),
        (AVX2 + " avx_vnni", 127),
        (AVX512 + " avx512_vnni", 127),
        (AVX512 + " avx512_vnni amx_tile amx_int8", 127),
        ("asimd", 63),
        ("asimd asimddp", 127),
    ],
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_have_seven_bits_where_products_saturate(flags: str, largest: int, runtime: str) -> None:
    """Two products of 255 * 63 stay below 2 ** 15, and of 255 * 127 do not: `vpmaddubsw` adds pairs in 16 bits."""
    graph, analysis = chain()
    target = Target(runtime, facts=facts_from_flags(flags))
    done = quantized(graph, analysis, get_runtime(runtime, require=False), target)
    grids = {node.args[-2:] for node in fake_quantizers(done.graph) if "channel" in str(node.target)}
    assert grids == {(-largest, largest)} and (2 * 255 * largest < 2**15) == (largest == 63)


def extremes(layer: nn.Module) -> nn.Module:
    """Weights at the ends of their range, neighbors of one sign, so that every pair of products is as large as it can be."""
    with torch.no_grad():
        weight = layer.weight.flatten(1)  # type: ignore[operator]
        signs = torch.tensor([1.0, 1.0, -1.0, 1.0]).repeat_interleave(2).repeat(weight.shape[1] // 8 + 1)[: weight.shape[1]]
        weight.copy_(signs * torch.linspace(0.5, 1.0, len(weight))[:, None])
    return layer


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_nothing_saturates_on_this_machine(kind: str, runtime: str, tmp_path: Path) -> None:
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    torch.manual_seed(0)
    if kind == "linear":
        layers, shape = (extremes(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 8)), (5, 64)
    else:
        layers, shape = (extremes(nn.Conv2d(16, 32, 3)), nn.ReLU(), nn.Conv2d(32, 8, 1)), (16, 8, 8)
    graph, analysis = captured(nn.Sequential(*layers), (torch.rand(2, *shape),))
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, known, target, split=data(torch.rand(32, *shape)), observer="minmax", equalization="none")
    x = np.ones((3, *shape), np.float32)
    session = known.open(known.export(done.graph, tmp_path), graph.signature, target)
    found = torch.from_numpy(session.run([x])[0])
    proof = session.proof()
    session.close()
    with torch.no_grad():
        expected = done.graph.module(torch.from_numpy(x))[0]
    # with pairs that saturate 22 dB were seen; sums of integers are exact, and a value on the border of two steps may tip
    assert proof.int8_kernels >= 1 and sqnr_db(expected, found) > 45.0
