"""Files that hold zeros as bits: smaller by what the arithmetic says, and the same net in every runtime that reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import nets
from planish.artifact.external import check_external_data
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.graph.groups import analyse
from planish.measure.machine import facts
from planish.measure.memory import size_bytes
from planish.measure.probe import Probe
from planish.prune.masks.apply import mask_
from planish.quantize.apply import quantize
from planish.runtimes import to_onnx as export
from planish.runtimes.contract import get_runtime
from planish.runtimes.storage import is_worth_packing, packed_bytes
from planish.target import Target

RUNTIMES = ("onnxruntime", "openvino")


def zeroed(graph: Graph, share: float, seed: int = 0) -> Graph:
    """A copy with that share of all matrices and kernels zero, at random."""
    copied, generator = graph.copy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.module.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand(parameter.shape, generator=generator) < share, 0.0)
    return copied


def sizes_and_outputs(
    graph: Graph, runtime: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[int, list[np.ndarray], object]]:
    """Bytes, outputs and proof of a graph's file as it is written, and of one that keeps every zero."""
    found = {}
    flat = [value.numpy() for value in graph.example]
    for name in ("packed", "plain"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(export, "pack_zeros", lambda model: None)
            (folder / name).mkdir(parents=True)
            path = get_runtime(runtime).export(graph, folder / name)
        check_external_data(path, {})
        with Probe.open(Target(runtime, threads=1, facts=facts()), path, graph.signature, 300) as probe:
            found[name] = size_bytes(path), [np.array(value) for value in probe.outputs(flat)], probe.proof()
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_packed_file_is_the_same_net(runtime: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense weights are made while the runtime loads: the same kernels run, and give the same bits."""
    pytest.importorskip(runtime)
    graph = zeroed(capture(*nets.resnet(width=16)), share)
    found = sizes_and_outputs(graph, runtime, tmp_path, monkeypatch)
    (packed, outputs, proof), (plain, wanted, same) = found["packed"], found["plain"]
    assert proof == same
    for got, want in zip(outputs, wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    weights = [value for value in graph.module.parameters() if value.dim() > 1]
    saved = sum(
        4 * w.numel() - packed_bytes(w.numel(), int(w.count_nonzero()), 4)
        for w in weights
        if is_worth_packing(w.numel(), int(w.count_nonzero()), 4)
    )
    assert saved > 0.4 * 4 * sum(w.numel() for w in weights)
    # what the bits are turned into weights by: some nodes, and a shape for each weight
    assert plain - saved <= packed <= plain - saved + 2500 + 200 * len(weights)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_packed_file_in_int8_is_the_same_net_and_smaller(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(runtime)
    graph = zeroed(capture(*nets.resnet(width=32)), 0.75)
    analysis, flat = analyse(graph), nets.resized(tuple(graph.example), 24, seed=3)
    split = Split([value.numpy() for value in flat], None, 24)
    precisions = {name: "int8" for name, operator in analysis.operators.items() if operator.kind in ("conv", "linear")}
    final = quantize(graph, analysis, precisions, get_runtime(runtime), Target(runtime, facts=facts()), split).graph
    found = sizes_and_outputs(final, runtime, tmp_path, monkeypatch)
    (packed, outputs, proof), (plain, wanted, same) = found["packed"], found["plain"]
    assert proof == same and proof.int8_kernels > 0
    for got, want in zip(outputs, wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    count = sum(value.numel() for value in final.module.parameters() if value.dim() > 1)
    assert plain - packed > 0.5 * count, "a quarter of the bytes and a bit each remain, of the int8 weights"


def test_a_net_without_zeros_is_written_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(*nets.resnet(width=16))
    get_runtime("onnxruntime").export(graph, tmp_path)
    written = (tmp_path / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "pack_zeros", lambda model: None)
    get_runtime("onnxruntime").export(graph, tmp_path)
    assert written == (tmp_path / "model.onnx").read_bytes()


def test_what_is_read_twice_or_given_out_stays_right(tmp_path: Path) -> None:
    """A weight that two operators read is packed once; one that the program gives out, or that is all zero, is left as it is."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.empty = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.zeros(64, 64))
            with torch.no_grad():
                self.weight[torch.rand(64, 64) < 0.8] = 0.0

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight) + x @ self.empty, self.weight + 0

    torch.manual_seed(0)
    graph = capture(Shared().eval(), (torch.randn(3, 64),))
    path = get_runtime("onnxruntime").export(graph, tmp_path)
    x = torch.randn(5, 64)
    with torch.no_grad():
        wanted = graph.module(x)
    with Probe.open(Target("onnxruntime", threads=1, facts=facts()), path, graph.signature, 300) as probe:
        for got, want in zip(probe.outputs([x.numpy()]), wanted, strict=True):
            np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_masks_of_a_real_method_survive_the_export(tmp_path: Path) -> None:
    """The weights that a runtime makes of a packed file are those of the module, zero for zero."""
    graph = capture(*nets.resnet(width=16))
    flat = nets.resized(tuple(graph.example), 24, seed=3)
    mask_(graph, analyse(graph), {"layer1.0.conv1": "90%"}, "sparsegpt", Split([value.numpy() for value in flat], None, 24))
    path = get_runtime("onnxruntime").export(graph, tmp_path)
    names = [tensor.name for tensor in onnx.load(str(path)).graph.initializer]
    assert any(name.startswith("packed0") for name in names)
    weight = graph.module.get_parameter("layer1.0.conv1.weight")
    assert int((weight == 0).sum()) == len(weight) * int(0.9 * weight[0].numel())


@pytest.mark.parametrize(
    ("share", "each", "is_worth"), [(0.5, 4, True), (0.25, 4, False), (0.5, 1, True), (0.35, 1, False), (0.99, 1, True)]
)
def test_packing_is_worth_a_quarter(share: float, each: int, is_worth: bool) -> None:
    count = 10_000
    assert is_worth_packing(count, (1 - share) * count, each) == is_worth
    assert packed_bytes(count, (1 - share) * count, each) == (count / 8 + (1 - share) * count * each if is_worth else count * each)
