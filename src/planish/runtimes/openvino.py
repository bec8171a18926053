"""OpenVINO on the CPU: often the quicker of the two on convolutions. The package is imported here alone, without its telemetry."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.errors import RuntimeFailed
from planish.measurement import Proof
from planish.runtimes.contract import Array
from planish.runtimes.storage import FLOATS
from planish.signature import Signature
from planish.target import Target

if TYPE_CHECKING:
    from planish.graph.graph import Graph

_COMPUTE = {"Convolution", "Deconvolution", "MatMul", "FullyConnected", "RNNSeq", "RNNCell", "ScaledDotProductAttention", "MHA"}
_BOOKKEEPING = {"Input", "Output", "Const", "Reshape"}


class OpenVino:
    """Intel's OpenVINO, CPU plug-in, in fp32 where a model is not quantized.

    On a machine with bf16 units OpenVINO would round an fp32 model to bf16 unasked; planish pins f32, unless the model asks for
    bf16, and reads back what ran. It is a matter of the whole net: operators that are not in int8 take it or leave it together.
    Additions are fused into the convolution before them only if both of their inputs are quantized: else each is a kernel of its
    own, which cost 1 to 6 % of the CPU time of int8 residual nets. Pools pass int8 on only if it is quantized before them. Attention is fused into
    one kernel in int8 only if nothing has to be subtracted from its operands: their grids are signed (see decision 023).
    """

    name = "openvino"
    package = "openvino"
    extra = "openvino"
    devices = ("cpu",)
    model_file = "model.onnx"
    schemes = ("fp32", "int8", "int8-weights", "int4-weights", "w4a8", "w4a4", "codebook", "codebook-mixture", "bf16")
    quantize_inputs_of = frozenset({"conv", "conv_transpose", "linear", "matmul", "attention", "signed", "sum", "pool", "cat"})
    quantize_outputs_of: frozenset[str] = frozenset()
    short_convolution = 0
    stores_sparse = True

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return "the package 'openvino' is not installed; pip install 'planish[openvino]'"
        return None

    def versions(self) -> dict[str, str]:
        return {} if self.missing() else {"openvino": importlib.metadata.version("openvino")}

    def export(self, graph: Graph, folder: Path) -> Path:
        from planish.runtimes.to_onnx import to_onnx

        path = folder / self.model_file
        to_onnx(graph, path)
        return path

    def open(self, path: Path, signature: Signature, target: Target) -> OpenVinoSession:
        return OpenVinoSession(path, signature, target)


def _import() -> Any:
    """The module `openvino`, whose first import would send an event if it found its telemetry package."""
    if "openvino" not in sys.modules:
        hidden = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            importlib.import_module("openvino")
        finally:
            del sys.modules["openvino_telemetry"]
            if hidden is not None:
                sys.modules["openvino_telemetry"] = hidden
    return importlib.import_module("openvino")


@functools.cache
def _get_core() -> Any:
    return _import().Core()


class OpenVinoSession:
    """A model in OpenVINO. The shapes that come first get a program of their own, which is about 6 % quicker on small nets than
    the program for any shape; shapes that come later share the latter, unless they are bound.
    """

    def __init__(self, path: Path, signature: Signature, target: Target) -> None:
        self._signature, self._threads, self._file = signature, target.threads, path.name
        self._dynamic: _Request | None = None
        self._static: tuple[tuple[tuple[int, ...], ...], _Request] | None = None
        try:
            self._model = _get_core().read_model(str(path))
        except RuntimeError as err:
            raise RuntimeFailed("unsupported", f"openvino refuses {path.name}: {_last_line(err)}") from err
        key = ["framework", FLOATS]
        self._floats = str(self._model.get_rt_info(key).value) if self._model.has_rt_info(key) else "f32"
        named = {name: i for i, port in enumerate(self._model.inputs) for name in port.get_names()}
        given = {name: i for i, port in enumerate(self._model.outputs) for name in port.get_names()}
        wanted, gives = [s.name for s in signature.inputs], [s.name for s in signature.outputs]
        if not set(wanted) <= set(named) or not set(gives) <= set(given) or len(self._model.inputs) != len(wanted):
            raise RuntimeFailed(
                "unsupported", f"{path.name}: its inputs and outputs are {set(named)} and {set(given)}, not its signature's"
            )
        self._ports = [named[name] for name in wanted]
        self._results = [given[name] for name in gives]
        if all(port.partial_shape.is_static for port in self._model.inputs):
            self._dynamic = _Request(self._compile(None), self._ports, self._results)

    def _compile(self, shapes: tuple[tuple[int, ...], ...] | None) -> Any:
        """An infer request for `shapes` of the flat inputs, or for any shape."""
        model = self._model
        try:
            if shapes is not None:
                model = model.clone()
                model.reshape({port: list(shape) for port, shape in zip(self._ports, shapes, strict=True)})
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": str(self._threads),
                "INFERENCE_PRECISION_HINT": self._floats,
            }
            return _get_core().compile_model(model, "CPU", settings).create_infer_request()
        except RuntimeError as err:
            raise RuntimeFailed("unsupported", f"openvino refuses {self._file}: {_last_line(err)}") from err

    def _request(self, flat: list[Array], own: bool) -> _Request:
        """The request that takes `flat`; `own`: one for exactly these shapes."""
        shapes = tuple([array.shape for array in flat])
        if self._static is not None and self._static[0] == shapes:
            return self._static[1]
        is_dynamic = any(not port.partial_shape.is_static for port in self._model.inputs)
        if is_dynamic and (own or self._static is None):
            self._static = shapes, _Request(self._compile(shapes), self._ports, self._results)
            return self._static[1]
        if self._dynamic is None:
            self._dynamic = _Request(self._compile(None), self._ports, self._results)
        return self._dynamic

    def run(self, flat: list[Array]) -> list[Array]:
        return self._request(flat, own=False).run(flat)

    def bind(self, flat: list[Array]) -> Callable[[], object]:
        request = self._request(flat, own=True)
        request.run(flat)
        call: Callable[[], object] = request.infer
        return call

    def proof(self) -> Proof:
        """Layer types and executed precisions from the runtime model of the program that runs."""
        request = self._static[1] if self._static is not None else self._dynamic
        if request is None:
            request = self._dynamic = _Request(self._compile(None), self._ports, self._results)
        kernels: Counter[str] = Counter()
        precisions: Counter[str] = Counter()
        int8 = floating = 0
        for operator in request.raw.get_compiled_model().get_runtime_model().get_ordered_ops():
            facts = {key: str(getattr(value, "value", value)) for key, value in operator.get_rt_info().items()}
            layer, primitive = facts.get("layerType", ""), facts.get("primitiveType", "")
            if layer in _BOOKKEEPING:
                continue
            kernels[f"{layer} {primitive}"] += 1
            executed = primitive.rpartition("_")[2].lower() or facts.get("runtimePrecision", "").lower()
            executed = "i8" if executed in ("i8", "u8") else executed
            precisions[executed] += 1
            if layer in _COMPUTE:
                int8 += executed == "i8"
                floating += executed != "i8"
        return Proof("CPU", dict(sorted(kernels.items())), dict(precisions), int8, floating)

    def close(self) -> None:
        self._static = self._dynamic = self._model = None


class _Request:
    """An infer request that keeps its input and output memory: what comes in is copied there.

    A tensor that is set anew makes the plug-in prepare its program again, which costs 10 µs a call; a copy of an image costs 1.
    """

    def __init__(self, raw: Any, ports: list[int], results: list[int]) -> None:
        self.raw, self.infer = raw, raw.infer
        self._ports, self._results = ports, results
        self._inputs: list[Array] = []

    def run(self, flat: list[Array]) -> list[Array]:
        if [kept.shape for kept in self._inputs] != [array.shape for array in flat]:
            self._allocate(flat)
        for kept, array in zip(self._inputs, flat, strict=True):
            kept[...] = array
        self.infer()
        return [self.raw.get_output_tensor(index).data.copy() for index in self._results]

    def _allocate(self, flat: list[Array]) -> None:
        openvino = _import()
        self._inputs = [np.empty_like(array, order="C") for array in flat]
        for port, kept in zip(self._ports, self._inputs, strict=True):
            self.raw.set_input_tensor(port, openvino.Tensor(kept, shared_memory=True))


def _last_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(err).__name__)[:300]
