"""Roofline and memory: closed forms, and orders of magnitude that no machine misses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from planish.measure import cache
from planish.measure.machine import facts_from_flags, machine
from planish.measure.memory import peak_memory_bytes, size_bytes
from planish.measure.roofline import Peaks, peaks, roofline_s
from planish.signature import Signature, TensorSpec
from planish.target import Target

PEAKS = Peaks(1e9, ((1_000, 8e9), (1_000_000, 1e9)))


def test_roofline_is_the_larger_of_arithmetic_and_memory():
    plain = Target("onnxruntime", facts=facts_from_flags("avx2"))
    dot = Target("onnxruntime", facts=facts_from_flags("avx2 avx_vnni"))
    assert roofline_s(plain, 1e9, 10, best=PEAKS) == pytest.approx(1.0)
    assert roofline_s(plain, 0, 4e9, best=PEAKS) == pytest.approx(4.0)
    assert roofline_s(plain, 0, 800, best=PEAKS) == pytest.approx(1e-7), "what fits into a cache is read at its speed"
    assert roofline_s(plain, 0, 1e9, int8_macs=1e9, best=PEAKS) == pytest.approx(1.0)
    assert roofline_s(plain, 1e9, 0, int8_macs=1e9, best=PEAKS) == pytest.approx(1.5)
    assert roofline_s(dot, 1e9, 0, int8_macs=1e9, best=PEAKS) == pytest.approx(1.25)


def test_peaks_are_measured_once_and_again_if_the_cache_is_corrupted(tmp_path, monkeypatch):
    cache.write(tmp_path / f"peaks-{machine().fingerprint}-1-1.json", {"macs_per_s": "fast"})
    found = peaks(1, tmp_path, seconds=0.01)
    assert 1e8 < found.macs_per_s < 1e13
    assert all(1e8 < speed < 1e13 for _, speed in found.bytes_per_s)
    monkeypatch.setattr("planish.measure.roofline.Process", None)
    assert peaks(1, tmp_path) == found


def _wide_net(path, width: int) -> Signature:
    """x [1, 64] -> linear maps 64 -> width -> 64."""
    rng = np.random.default_rng(0)
    a, b = (numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in (("a", (64, width)), ("b", (width, 64))))
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [a, b])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return Signature((TensorSpec("x", "float32", (1, 64)),), (TensorSpec("y", "float32", (1, 64)),), "tensor", "tensor")


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
def test_memory_is_the_models_and_not_the_runtimes(tmp_path, runtime):
    pytest.importorskip(runtime)
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    spec = _wide_net(small, 64)
    _wide_net(large, 2**16)
    flat = [np.zeros((1, 64), np.float32)]
    weights = 2 * 64 * 2**16 * 4
    assert size_bytes(large) == pytest.approx(weights, rel=0.01)
    # Weights are held at least once, and a runtime may hold a file, its copy and a packed form of it.
    assert weights <= peak_memory_bytes(Target(runtime), large, spec, flat) < 6 * weights
    assert peak_memory_bytes(Target(runtime), small, spec, flat) < 16e6


def test_size_counts_the_weights_beside_the_model(tmp_path):
    for name, size in (("model[1].onnx", 10), ("model[1].onnx.data", 1000), ("model1.onnx.data", 7), ("weights.safetensors", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert size_bytes(tmp_path / "model[1].onnx") == 1010


def test_size_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"123")
    assert size_bytes(tmp_path) == 8
