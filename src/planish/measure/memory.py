"""Memory and size: what a model takes on disk, and in a fresh process besides its runtime."""

from __future__ import annotations

import functools
import glob
import tempfile
from pathlib import Path

import numpy as np

from planish.measure.kernel_models import build
from planish.measure.kernels import Kernel
from planish.measure.probe import Probe
from planish.runtimes.contract import Array, get_runtime
from planish.signature import Signature, TensorSpec
from planish.target import Target

_CALLS = 3


def size_bytes(path: Path) -> int:
    """Bytes on disk of a model: the file with what it keeps in files beside it (`NAME.data`), or everything in the folder."""
    files = [path, *path.parent.glob(f"{glob.escape(path.name)}.*")] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def peak_memory_bytes(target: Target, path: Path, signature: Signature, flat: list[Array], timeout_s: float = 300.0) -> int:
    """Peak resident bytes of a fresh process that loads the model and runs `flat`, less what a model of one operator takes there.

    Raises:
        RuntimeFailed: the runtime crashed, hung or refused the model.
    """
    return max(0, _peak(target, path, signature, flat, timeout_s) - _bare(target, timeout_s))


def _peak(target: Target, path: Path, signature: Signature, flat: list[Array], timeout_s: float) -> int:
    with Probe.open(target, path, signature, timeout_s) as probe:
        probe.time(flat, 0.0, min_calls=_CALLS)
        return probe.peak_memory_bytes


@functools.cache
def _bare(target: Target, timeout_s: float) -> int:
    """The median of three, since a process's own peak varies by a megabyte."""
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        path = Path(folder) / get_runtime(target.runtime).model_file
        flat = [np.zeros((1, 8), np.float32)]
        if path.suffix == ".onnx":
            blob, signature = build(Kernel("linear", ((1, 8),), (1, 8), ((8, 8), (8,)), (("from_input", 1),)))
            path.write_bytes(blob)
        else:
            signature = _write_torch(path)
        return sorted(_peak(target, path, signature, flat, timeout_s) for _ in range(3))[1]


def _write_torch(path: Path) -> Signature:
    import torch

    from planish.runtimes.program_file import save_program

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.relu.default, (x,)),))
    save_program(torch.fx.GraphModule(torch.nn.Module(), graph), path)
    return Signature((TensorSpec("x", "float32", (1, 8)),), (TensorSpec("y", "float32", (1, 8)),), "tensor", "tensor")
