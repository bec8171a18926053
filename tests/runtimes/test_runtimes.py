"""Each built-in runtime keeps the contract of runtimes, and program files hold nothing but tensors and named operators."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from planish import registry
from planish.errors import MissingPackage, RuntimeFailed, UnknownName
from planish.measure.probe import Probe
from planish.runtimes.contract import get_runtime, installed
from planish.runtimes.program_file import load_program, save_program
from planish.testing.runtimes import CHECKS, Case, make_case

RUNTIMES = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino")), "torch"]


@pytest.fixture(scope="module", params=RUNTIMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if get_runtime(request.param, require=False).missing():
        pytest.skip(f"{request.param} is not installed")
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_contract(check, case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_contract_compiled(check, tmp_path):
    check(make_case("torch-compile", tmp_path))


def test_torch_compile_without_a_compiler_is_unsupported(tmp_path, monkeypatch):
    case = make_case("torch-compile", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeFailed, match="torch-compile: it needs a C\\+\\+ compiler") as caught:
        case.open()
    assert caught.value.kind == "unsupported"


def test_unknown_and_missing_runtimes_are_named(monkeypatch):
    with pytest.raises(UnknownName, match="did you mean 'onnxruntime'"):
        get_runtime("onnxruntimes")
    monkeypatch.setattr(registry.get("runtime", "openvino"), "package", "a_package_that_is_not_there")
    with pytest.raises(MissingPackage, match=r"pip install 'planish\[openvino\]'"):
        get_runtime("openvino")
    assert "openvino" not in installed()
    assert "onnxruntime" in installed()


@pytest.mark.slow
def test_fuzzed_models_never_take_the_parent_along(case):
    whole, rng = case.path.read_bytes(), np.random.default_rng(0)
    endings = []
    for i in range(12):
        content = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, min(len(content), 4000), 1 + 4 * i)  # the structure comes first, then the weights
        content[places] = rng.integers(0, 256, len(places), np.uint8)
        path = case.path.with_name(f"fuzzed{i}{case.path.suffix}")
        path.write_bytes(content.tobytes())
        try:
            with Probe.open(case.target(), path, case.graph.signature, timeout_s=60) as probe:
                probe.outputs(case.inputs(1))
            endings.append("ran")
        except RuntimeFailed as err:
            endings.append(err.kind)
    assert len(endings) == 12
    assert set(endings) & {"unsupported", "crashed", "out of memory", "timed out"}


def _program() -> torch.fx.GraphModule:
    """x -> (x @ w, x @ w tied, size of x), with a constant of every kind that a file can hold."""
    aten = torch.ops.aten
    root = torch.nn.Module()
    root.inner = torch.nn.Module()
    root.inner.w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    root.tied = root.inner.w
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    y = graph.call_function(aten.matmul.default, (x, graph.get_attr("inner.w")))
    y = graph.call_function(aten.clamp.default, (y, float("-inf"), 4.0))
    z = graph.call_function(aten.matmul.default, (x, graph.get_attr("tied")))
    full = graph.call_function(aten.full.default, ([size, 2], True), {"dtype": torch.float64, "device": torch.device("cpu")})
    graph.output((y, z, full))
    return torch.fx.GraphModule(root, graph)


def test_program_file_computes_the_same_for_any_size(tmp_path):
    module = _program()
    save_program(module, tmp_path / "p.safetensors")
    loaded = load_program(tmp_path / "p.safetensors")
    for n in (1, 5):
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(n))
        for expected, actual in zip(module(x), loaded(x), strict=True):
            assert torch.equal(expected, actual)
            assert expected.dtype == actual.dtype
    assert loaded.tied.data_ptr() == loaded.inner.w.data_ptr()


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.relu", "aten.__class__.mro", "operator.attrgetter", "torch.load", "prims.svd.default", ""],
)
def test_program_file_names_only_listed_operators(tmp_path, target):
    nodes = [
        ["placeholder", "x", "x", [], {}],
        ["call_function", "y", target, ["touch /tmp/canary"], {}],
        ["output", "output", "output", [[{"node": "y"}]], {}],
    ]
    path = tmp_path / "p.safetensors"
    save_file({"w": torch.zeros(1)}, str(path), {"program": json.dumps({"nodes": nodes, "alias": {}})})
    with pytest.raises(RuntimeFailed, match="unknown operator"):
        load_program(path)


def test_program_file_refuses_what_it_has_no_word_for(tmp_path):
    graph = torch.fx.Graph()
    graph.output((graph.call_function(torch.relu, (graph.placeholder("x"),)),))
    with pytest.raises(RuntimeFailed, match="no word for the operator"):
        save_program(torch.fx.GraphModule(torch.nn.Module(), graph), Path(tmp_path / "p"))
