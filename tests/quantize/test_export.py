"""What the runtimes make of fake quantization: the same numbers, and int8 kernels for every convolution and linear map."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from quantizing import calibration, captured, outputs, quantized
from torch import Tensor, nn

import nets
from planish.graph.graph import Graph
from planish.graph.modes import short_name
from planish.measure.machine import facts
from planish.quantize.arithmetic import sqnr_db
from planish.runtimes.contract import get_runtime
from planish.target import Target

NETS = {
    "resnet_a": lambda: nets.resnet(1, "A"),
    "resnet_b": lambda: nets.resnet(1, "B"),
    "mobilenet": nets.mobilenet,
    "mlp": lambda: (nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)), (torch.randn(2, 12),)),
}


def exported(name: str, runtime: str, folder: Path) -> tuple[Graph, Path, Target]:
    torch.manual_seed(0)
    model, example = NETS[name]()
    graph, analysis = captured(nets.randomise_norms(model), example)
    target = Target(runtime, facts=facts())
    done = quantized(graph, analysis, get_runtime(runtime), target)
    assert not done.skipped
    return done.graph, get_runtime(runtime).export(done.graph, folder), target


def run(path: Path, values: np.ndarray, level: str) -> tuple[Tensor, collections.Counter[str]]:  # type: ignore[type-arg]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: values})[0]
    kinds = collections.Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return torch.from_numpy(found), kinds


@pytest.mark.parametrize("name", NETS)
def test_onnx_runtime_computes_the_fake_quantized_module(name: str, tmp_path: Path) -> None:
    graph, path, _ = exported(name, "onnxruntime", tmp_path)
    split = calibration(graph, samples=3, seed=9)
    expected = outputs(graph, split)
    plain, _ = run(path, split.inputs[0], "ORT_DISABLE_ALL")
    # the same float operations on the same grids, in another order: the 24 bits of float32 are 144 dB, and 135 to 145 were seen. (A value
    # on the border of two steps that such a difference tips would cost about 60 dB; none of these three samples has one.)
    assert sqnr_db(expected, plain) > 100.0
    fast, kinds = run(path, split.inputs[0], "ORT_ENABLE_ALL")
    # int8 kernels add the bias as int32 and rescale in fewer operations, which tips some values: 58 dB and more were seen
    assert sqnr_db(expected, fast) > 40.0
    assert not kinds["Conv"] and not kinds["FusedConv"] and not kinds["MatMul"], kinds
    linears = sum(short_name(node) == "linear" for node in graph.module.graph.nodes)
    assert kinds["QGemm"] + kinds["QLinearMatMul"] + kinds["MatMulIntegerToFloat"] + kinds["Gemm"] == linears
    # a linear map whose output is the program's has no quantizer behind it
    assert kinds["Gemm"] <= 1


@pytest.mark.parametrize("name", NETS)
def test_openvino_computes_the_fake_quantized_module_on_int8_kernels(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    graph, path, target = exported(name, "openvino", tmp_path)
    split = calibration(graph, samples=3, seed=9)
    session = get_runtime("openvino").open(path, graph.signature, target)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    # 139 to 148 dB were seen: an addition is computed in the convolution before it, and no value is rounded that the module does not round
    assert sqnr_db(outputs(graph, split), found) > 100.0
    proof = session.proof()
    session.close()
    assert proof.float_kernels == 0, proof
    # a perceptron becomes one kernel of OpenVINO's own making, whose inside it does not report
    wanted = sum(short_name(node) in ("conv2d", "linear") for node in graph.module.graph.nodes)
    assert proof.int8_kernels == (0 if name == "mlp" else wanted), proof
