"""Int8 everywhere, for each kind of operator in each runtime: what is quantized, what the runtime executes, and that both compute the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantizing import captured
from torch import Tensor, nn

from planish import registry
from planish.data import Split
from planish.measure.machine import facts
from planish.quantize.apply import Quantized, quantize
from planish.quantize.arithmetic import sqnr_db
from planish.quantize.subjects import everywhere
from planish.runtimes.contract import get_runtime
from planish.target import Target


class Product(nn.Module):
    """A product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) @ self.right(x).transpose(1, 2)


class Residual(nn.Module):
    """An addition between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.left(x) + self.right(x)))


class Joined(Residual):
    """A concatenation between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))


class Recurrent(nn.Module):
    """A recurrent layer and a linear map."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Attending(nn.Module):
    """Attention of four heads, as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """An embedding whose table is the last linear map's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.inner(self.table(x))))


@dataclass(frozen=True)
class Case:
    """A net, and for each runtime the operators that stay in float and what is executed.

    Args:
        net: makes it.
        shape: of one sample.
        ort, ov: the least number of int8 kernels that multiply in ONNX Runtime and in OpenVINO.
        ort_float, ov_float: operators that have no form in int8 there.
        ort_runs, ov_runs: a kernel that is executed, as the runtime names it.
        agreement_db: against the module; sums of integers are exact, so that 120 dB and more are usual.
    """

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ort: int
    ov: int
    ort_float: tuple[str, ...] = ()
    ov_float: tuple[str, ...] = ()
    ort_runs: str = ""
    ov_runs: str = ""
    agreement_db: float = 60.0


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


# ONNX Runtime leaves what issues the program's output, here always the last convolution or `Gemm`, in float.
CASES = {
    "conv1d": Case(chain(nn.Conv1d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 8, 3)), (8, 20), 1, 2),
    "conv2d": Case(chain(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)), (8, 12, 12), 1, 2),
    "conv3d": Case(chain(nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 8, 3)), (8, 6, 6, 6), 1, 2),
    "grouped": Case(chain(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=4)), (8, 12, 12), 1, 2),
    "depthwise": Case(
        chain(nn.Conv2d(8, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU6(), nn.Conv2d(16, 8, 1)), (8, 12, 12), 2, 3
    ),
    "transposed1d": Case(
        chain(nn.Conv1d(8, 16, 3), nn.ReLU(), nn.ConvTranspose1d(16, 8, 4, 2, 1), nn.ReLU(), nn.Conv1d(8, 8, 3)),
        (8, 20),
        1,
        3,
        ort_float=("2",),
        ov_runs="Deconvolution brgconv_avx512_I8",
        agreement_db=40.0,  # a transposed convolution in float between two in int8: values on the border of two steps tip
    ),
    "transposed2d": Case(
        chain(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        (8, 12, 12),
        1,
        3,
        ort_float=("2",),
        ov_runs="Deconvolution brgconv_avx512_I8",
        agreement_db=35.0,
    ),
    "linear": Case(chain(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (16,), 1, 0),  # in OpenVINO one kernel that tells no precision
    "linear of tokens": Case(chain(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (7, 16), 2, 2),
    "matmul": Case(Product, (7, 16), 3, 2, agreement_db=50.0),  # OpenVINO computes so small a product of two activations in float
    "addition": Case(Residual, (8, 12, 12), 2, 3, ort_runs="QLinearAdd", agreement_db=100.0),
    "concatenation": Case(Joined, (8, 12, 12), 2, 3, ort_runs="QLinearConcat", ov_runs="Concatenation ref_I8"),
    "embedding": Case(Tied, (9,), 1, 1, ort_float=("out",), ov_float=("out",)),
    "lstm": Case(lambda: Recurrent(nn.LSTM), (9, 16), 1, 1, ort_float=("rnn.l0",), ov_float=("rnn.l0",)),
    "gru": Case(lambda: Recurrent(nn.GRU), (9, 16), 1, 1, ort_float=("rnn.l0",), ov_float=("rnn.l0",)),
    "attention": Case(Attending, (9, 32), 6, 4, ort_runs="MatMulIntegerToFloat"),
}


def inputs(case: Case, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.net is Tied:
        return torch.randint(0, 50, (samples, *case.shape), generator=generator)
    return torch.randn(samples, *case.shape, generator=generator)


def int8(case: Case, runtime: str) -> tuple[Quantized, nn.Module, set[str]]:
    """The net in int8 wherever there is a form, the net, and the names of its operators that multiply or look up."""
    torch.manual_seed(0)
    model = case.net()
    with torch.no_grad():
        for value in model.parameters():
            nn.init.normal_(value, std=0.2)
    graph, analysis = captured(model, (inputs(case, 2, 1),))
    precisions = everywhere(graph, analysis, registry.get("scheme", "int8"))
    split = Split([inputs(case, 32, 5).numpy()], None, 32)
    done = quantize(graph, analysis, precisions, get_runtime(runtime), Target(runtime, facts=facts()), split)
    kinds = ("conv", "linear", "matmul", "attention", "embedding", "lstm", "gru")
    return done, model, {name for name, found in analysis.operators.items() if found.kind in kinds}


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.runtime("openvino"))])
@pytest.mark.parametrize("name", CASES)
def test_int8_everywhere(name: str, runtime: str, tmp_path: Path) -> None:
    known = get_runtime(runtime, require=False)
    if known.missing():
        pytest.skip(f"{runtime} is not installed")
    case = CASES[name]
    done, model, every = int8(case, runtime)
    least, floats, runs = (case.ort, case.ort_float, case.ort_runs) if runtime == "onnxruntime" else (case.ov, case.ov_float, case.ov_runs)
    assert set(done.operators) == every - set(floats)
    x = inputs(case, 3, 9)
    session = known.open(known.export(done.graph, tmp_path), done.graph.signature, Target(runtime, facts=facts()))
    found = torch.from_numpy(np.asarray(session.run([x.numpy()])[0]))
    proof = session.proof()
    session.close()
    with torch.no_grad():
        module, original = done.graph.module(x)[0], model(x)
    assert sqnr_db(module, found) > case.agreement_db
    assert 20.0 < sqnr_db(original, found) < 70.0  # rounded, and not much else
    assert proof.int8_kernels >= least, proof
    if "avx512" not in runs or facts().vector_bytes == 64:
        assert not runs or proof.kernels.get(runs), proof
