"""What the tests of quantization share: captured nets, calibration data, runtimes that declare what a test wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import nets
from planish.data import Split
from planish.graph.capture import capture
from planish.graph.graph import Analysis, Graph
from planish.graph.groups import analyse
from planish.measurement import Proof
from planish.quantize.apply import Quantized, quantize
from planish.runtimes.contract import Runtime
from planish.target import Facts, Target

VNNI = Target("onnxruntime", facts=Facts(isa="avx512_vnni", has_int8_dot=True))
AVX2 = Target("onnxruntime", facts=Facts(isa="avx2"))


@dataclass(frozen=True)
class Declares:
    """A runtime as far as placement asks it."""

    quantize_inputs_of: frozenset[str]
    quantize_outputs_of: frozenset[str] = frozenset()
    name: str = "declared"
    schemes: tuple[str, ...] = ("fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights", "w4a8", "w4a4", "codebook")


def declares(inputs: str = "conv linear matmul add pool", outputs: str = "") -> Runtime:
    """A runtime that wants quantizers at these kinds of operators."""
    return cast(Runtime, Declares(frozenset(inputs.split()), frozenset(outputs.split())))


def captured(model: nn.Module, example: Any) -> tuple[Graph, Analysis]:
    """The graph of a model and its analysis."""
    graph = capture(model.eval(), example)
    return graph, analyse(graph)


def calibration(graph: Graph, samples: int = 32, seed: int = 5) -> Split:
    """Random inputs of the graph's kind."""
    flat = nets.resized(tuple(graph.example), samples, seed=seed)
    return Split([np.ascontiguousarray(value.numpy()) for value in flat], None, samples)


def everything(analysis: Analysis) -> dict[str, str]:
    """A precision plan that wants all that multiplies in int8."""
    return {name: "int8" for name, found in analysis.operators.items() if found.kind in ("conv", "linear", "matmul", "attention")}


def quantized(graph: Graph, analysis: Analysis, runtime: Runtime | None = None, target: Target = VNNI, **options: Any) -> Quantized:
    """The graph with all that multiplies in int8."""
    precisions: Mapping[str, str] = options.pop("precisions", everything(analysis))
    split = options.pop("split", None) or calibration(graph)
    return quantize(graph, analysis, precisions, runtime or declares(), target, split, **options)


def outputs(graph: Graph, split: Split) -> Tensor:
    """The first flat output for all samples of a split."""
    with torch.no_grad():
        value = graph.module(*(torch.from_numpy(array) for array in split.inputs))[0]
    assert isinstance(value, Tensor)
    return value


def ran(graph: Graph, runtime: Runtime, target: Target, split: Split, folder: Path) -> tuple[Tensor, Proof]:
    """The first output of a graph that was exported to a runtime, for all samples of a split, and what the runtime executed."""
    session = runtime.open(runtime.export(graph, folder), graph.signature, target)
    found = torch.from_numpy(session.run(list(split.inputs))[0])
    proof = session.proof()
    session.close()
    return found, proof


def fake_quantizers(graph: Graph) -> list[torch.fx.Node]:
    """The program's fake-quantized activations and weights."""
    return [node for node in graph.module.graph.nodes if node.op == "call_function" and "fake_quantize" in str(node.target)]


def reads(graph: Graph, name: str) -> list[str]:
    """Names of the nodes that read a node's value."""
    (node,) = (node for node in graph.module.graph.nodes if node.name == name)
    return sorted(user.name for user in node.users)
