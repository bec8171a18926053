"""ONNX Runtime on the CPU: the default target. Nothing but its CPU provider is ever asked for, so nothing falls back."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.errors import RuntimeFailed
from planish.measurement import Proof
from planish.runtimes.contract import Array
from planish.signature import Signature
from planish.target import Target

if TYPE_CHECKING:
    from planish.graph.graph import Graph

_COMPUTE = ("Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Attention", "Einsum")


class OnnxRuntime:
    """Microsoft's ONNX Runtime, CPU provider.

    An int8 convolution is fused (`QLinearConv`) only when its output is quantized too; then additions and pools between
    convolutions must be quantized as well, or each pays for two conversions. Unsigned activations, or little is fused. A linear map
    of a matrix (rank 2) becomes `Gemm`, which falls back to fp32 (3 times slower than the fp32 model) unless its output is
    quantized as well. On more axes it runs as `MatMulIntegerToFloat`, which does without: 5 % quicker and 9 dB cleaner on a
    feed-forward block.

    A convolution along one axis with few positions is exported as a matrix product, which is quicker here (`graph/windows.py`).
    """

    name = "onnxruntime"
    package = "onnxruntime"
    extra = ""
    devices = ("cpu",)
    model_file = "model.onnx"
    schemes = ("fp32", "int8", "int8-dynamic", "int8-weights", "int4-weights", "w4a8", "w4a4", "codebook", "codebook-mixture")
    quantize_inputs_of = frozenset({"conv", "linear", "matmul", "attention", "add", "pool", "cat"})
    quantize_outputs_of = frozenset({"conv", "gemm", "cat"})
    short_convolution = 8
    stores_sparse = True

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.package) is None:
            return "the package 'onnxruntime' is not installed; pip install onnxruntime"
        return None

    def versions(self) -> dict[str, str]:
        return {} if self.missing() else {"onnxruntime": importlib.metadata.version("onnxruntime")}

    def export(self, graph: Graph, folder: Path) -> Path:
        from planish.graph.windows import short_convolutions
        from planish.runtimes.to_onnx import to_onnx

        path = folder / self.model_file
        to_onnx(graph, path, lambda graph: short_convolutions(graph, self.short_convolution))
        return path

    def open(self, path: Path, signature: Signature, target: Target) -> OnnxSession:
        return OnnxSession(path, signature, target)


class OnnxSession:
    """A model in ONNX Runtime, with one pool of `target.threads` threads that is idle between calls."""

    def __init__(self, path: Path, signature: Signature, target: Target) -> None:
        self._path, self._signature, self._threads = path, signature, target.threads
        self._session = self._load()
        self._outputs = [spec.name for spec in signature.outputs]
        given = {spec.name for spec in signature.inputs}, set(self._outputs)
        has = {i.name for i in self._session.get_inputs()}, {o.name for o in self._session.get_outputs()}
        if given[0] != has[0] or not given[1] <= has[1]:
            raise RuntimeFailed("unsupported", f"{path.name}: its inputs and outputs are {has[0]} and {has[1]}, not those of its signature")

    def _load(self, optimized: Path | None = None) -> Any:
        ort = importlib.import_module("onnxruntime")
        raised = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Workers would spin for 40 ms after a call, which another process's timing would see; calls are as quick without.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        refusals = (
            raised.Fail,
            raised.InvalidArgument,
            raised.InvalidGraph,
            raised.InvalidProtobuf,
            raised.NoModel,
            raised.NoSuchFile,
            raised.NotImplemented,
            raised.RuntimeException,
        )
        try:
            return ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except refusals as err:
            raise RuntimeFailed("unsupported", f"onnxruntime refuses {self._path.name}: {_first_line(err)}") from err

    def run(self, flat: list[Array]) -> list[Array]:
        feed = {spec.name: array for spec, array in zip(self._signature.inputs, flat, strict=True)}
        outputs: list[Array] = self._session.run(self._outputs, feed)
        return outputs

    def bind(self, flat: list[Array]) -> Callable[[], object]:
        ort = importlib.import_module("onnxruntime")
        binding = self._session.io_binding()
        for spec, array in zip(self._signature.inputs, flat, strict=True):
            binding.bind_ortvalue_input(spec.name, ort.OrtValue.ortvalue_from_numpy(array))
        for name in self._outputs:
            binding.bind_output(name)
        session = self._session
        return lambda: session.run_with_iobinding(binding)

    def proof(self) -> Proof:
        """The nodes of the graph that ONNX Runtime really runs: loaded once more, with the optimized model written to a file."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="planish-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            self._load(optimized)
            model = onnx.load(str(optimized), load_external_data=False)
        kernels = Counter(node.op_type for node in model.graph.node if node.op_type != "Constant")
        precisions: Counter[str] = Counter()
        int8 = floating = 0
        for kernel, count in kernels.items():
            is_int8 = kernel.startswith(("QLinear", "QGemm", "QAttention", "DynamicQuantize")) or "Integer" in kernel
            precisions["i8" if is_int8 else "f32"] += count
            if any(word in kernel for word in _COMPUTE) or kernel == "QGemm":
                int8 += count * is_int8
                floating += count * (not is_int8)
        return Proof("CPU", dict(sorted(kernels.items())), dict(precisions), int8, floating)

    def close(self) -> None:
        self._session = None


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300]
