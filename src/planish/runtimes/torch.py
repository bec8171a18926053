"""PyTorch itself on the CPU, eager and compiled: what the user has today, so both stand in every table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
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

_COMPUTE = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "scaled_dot_product", "lstm", "gru")


class Torch:
    """Eager PyTorch: the captured program, operator by operator. See `program_file.py` for what loading its model executes."""

    name = "torch"
    package = "torch"
    extra = ""
    devices = ("cpu",)
    model_file = "model.safetensors"
    schemes = ("fp32",)
    quantize_inputs_of: frozenset[str] = frozenset()
    quantize_outputs_of: frozenset[str] = frozenset()
    short_convolution = 0
    stores_sparse = False

    def missing(self) -> str | None:
        return _missing()

    def versions(self) -> dict[str, str]:
        return _versions()

    def export(self, graph: Graph, folder: Path) -> Path:
        return _export(graph, folder / self.model_file)

    def open(self, path: Path, signature: Signature, target: Target) -> TorchSession:
        return TorchSession(path, target, compiled=False)


class TorchCompile:
    """`torch.compile` with its default backend (inductor); it compiles in the measuring process, at the first call of each shape."""

    name = "torch-compile"
    package = "torch"
    extra = ""
    devices = ("cpu",)
    model_file = "model.safetensors"
    schemes = ("fp32",)
    quantize_inputs_of: frozenset[str] = frozenset()
    quantize_outputs_of: frozenset[str] = frozenset()
    short_convolution = 0
    stores_sparse = False

    def missing(self) -> str | None:
        return _missing()

    def versions(self) -> dict[str, str]:
        return _versions()

    def export(self, graph: Graph, folder: Path) -> Path:
        return _export(graph, folder / self.model_file)

    def open(self, path: Path, signature: Signature, target: Target) -> TorchSession:
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
        if not any(shutil.which(compiler) for compiler in compilers):
            raise RuntimeFailed(
                "unsupported", f"torch-compile: it needs a C++ compiler, and none is installed (tried {', '.join(compilers)})"
            )
        return TorchSession(path, target, compiled=True)


def _missing() -> str | None:
    return None if importlib.util.find_spec("torch") else "the package 'torch' is not installed; pip install torch"


def _versions() -> dict[str, str]:
    return {} if _missing() else {"torch": importlib.metadata.version("torch")}


def _export(graph: Graph, path: Path) -> Path:
    from planish.graph.modes import set_mode
    from planish.runtimes.program_file import save_program

    copy = graph.copy()
    set_mode(copy, training=False)
    save_program(copy.module, path)
    return path


class TorchSession:
    """A captured program in PyTorch, in inference mode."""

    def __init__(self, path: Path, target: Target, *, compiled: bool) -> None:
        import torch

        from planish.runtimes.program_file import load_program

        torch.set_num_threads(target.threads)
        self._compiled = compiled
        self._module = load_program(path)
        self._call: Callable[..., Any] = torch.compile(self._module) if compiled else self._module

    def run(self, flat: list[Array]) -> list[Array]:
        import torch

        with torch.inference_mode():
            return [output.contiguous().numpy() for output in self._call(*_tensors(flat))]

    def bind(self, flat: list[Array]) -> Callable[[], object]:
        import torch

        call, given = self._call, _tensors(flat)

        @torch.inference_mode()
        def once() -> object:
            return call(*given)

        once()
        return once

    def proof(self) -> Proof:
        """The program's operators; what inductor fuses them into is not read back."""
        functions = [str(node.target) for node in self._module.graph.nodes if node.op == "call_function"]
        kernels = Counter(name for name in functions if name.startswith("aten.") and "sym_size" not in name)
        compute = sum(n for name, n in kernels.items() if name.split(".")[1].startswith(_COMPUTE))
        named = {f"inductor {name}" if self._compiled else name: n for name, n in sorted(kernels.items())}
        return Proof("CPU", named, {"f32": sum(kernels.values())}, 0, compute)

    def close(self) -> None:
        self._call = self._module.forward


def _tensors(flat: list[Array]) -> list[Any]:
    import torch

    return [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in flat]
