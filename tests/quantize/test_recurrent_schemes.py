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
from planish.graph.divergence import divergence
from planish.graph.fake_quantize import dynamic_lstm, fake_quantize_dynamic
from planish.graph.graph import Analysis, Graph
from planish.quantize.options import float_reasons, precision_options
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import Runtime, get_runtime
from planish.target import Target

OPENVINO = pytest.param("openvino", marks=pytest.mark.runtime("openvino"))
FORMS = [("lstm", "int8-dynamic", "onnxruntime")]
FORMS += [(cell, "int8-weights", runtime) for runtime in ("onnxruntime", "openvino") for cell in ("lstm", "gru")]


class Spoken(nn.Module):
    """Features of a sequence to classes, by the last state: linear map, recurrent layers, linear map."""

    def __init__(self, cell: str, layers: int = 2, both: bool = False, batch_first: bool = True, bias: bool = True, hidden: int = 24) -> None:
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


@pytest.mark.parametrize(("cell", "scheme", "runtime"), [pytest.param(*f, marks=pytest.mark.runtime("openvino")) if f[2] == "openvino" else f for f in FORMS])
@pytest.mark.parametrize("settings", [{}, {"both": True}, {"batch_first": False, "bias": False, "layers": 1}], ids=["two", "both", "unbiased"])
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
