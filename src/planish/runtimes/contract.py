"""What planish asks of a runtime: `Runtime` in the parent (export, placement of quantizers) and in the measuring child (`open`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from planish import registry
from planish.errors import MissingPackage
from planish.measurement import Proof
from planish.signature import Signature
from planish.target import Target

if TYPE_CHECKING:
    from planish.graph.graph import Graph

Array = np.ndarray[Any, Any]


class Session(Protocol):
    """One exported model, loaded in a runtime. Made by `Runtime.open`; used by one thread at a time."""

    def run(self, flat: list[Array]) -> list[Array]:
        """The flat outputs for flat inputs, in the signature's order; neither list is kept, the inputs are not changed."""
        ...

    def bind(self, flat: list[Array]) -> Callable[[], object]:
        """A call without arguments that runs the model once on `flat`, with nothing to copy or to look up: what is timed.

        It is valid until the next `bind`, `run` or `close`; `flat` must not change meanwhile.
        """
        ...

    def proof(self) -> Proof:
        """What the runtime executes, read back from it. May be asked for before or after running."""
        ...

    def close(self) -> None:
        """Free the model; the session is not used afterwards."""
        ...


class Runtime(Protocol):
    """A runtime on this machine: a stateless class without arguments, registered under `name`.

    The parent process calls `missing`, `versions` and `export`; the measuring child and a loaded artifact call `open`.
    """

    name: str
    """As the user writes it before the colon of a target."""
    package: str
    """What is imported to run a model."""
    extra: str
    """The extra of planish that brings `package`, or "" where planish itself depends on it."""
    devices: tuple[str, ...]
    model_file: str
    """The file name of an exported model: "model.onnx" or "model.safetensors"."""
    schemes: tuple[str, ...]
    """Precisions of an operator that it executes: always "fp32", and names of the registry's kind "scheme", each for all kinds of operators that
    have a form in it (a static one for those of `quantize_inputs_of`)."""
    quantize_inputs_of: frozenset[str]
    """Operator kinds (and "add", "sum", "pool", "cat") whose activation inputs want a quantizer around an int8 operator; empty without
    "int8". "add" is an addition of its own; "sum" one that is computed in the operator which issues one of its inputs, before that is rounded.
    With "signed", what products of two activations read gets a grid with zero in its middle."""
    quantize_outputs_of: frozenset[str]
    """Operator kinds that run in int8 only when their output is quantized too, whoever reads it (after a fused activation); "gemm" is a
    linear map of a matrix, of two axes."""
    short_convolution: int
    """A convolution along one axis with at most so many positions of output is exported as a matrix product; 0: none is."""
    stores_sparse: bool
    """Whether an exported model keeps bits and values of a weight that holds many zeros (`planish.runtimes.storage`), not every zero."""

    def missing(self) -> str | None:
        """None if it can run here, else one clause that says what to install ("the package 'openvino' is not installed; ...")."""
        ...

    def versions(self) -> dict[str, str]:
        """Package -> version that a figure depends on; empty where it is missing. Imports nothing heavy."""
        ...

    def export(self, graph: Graph, folder: Path) -> Path:
        """Write `graph` as `folder / model_file` and return that path; the graph is not changed. Parent only; may import torch.

        Raises:
            RuntimeFailed: "unsupported", for a graph that cannot be expressed.
        """
        ...

    def open(self, path: Path, signature: Signature, target: Target) -> Session:
        """Load a model for `target` (its threads). Child side: no torch, unless it is the runtime.

        Raises:
            RuntimeFailed: "unsupported", where the runtime refuses the file.
        """
        ...


def get_runtime(name: str, *, require: bool = True) -> Runtime:
    """The runtime registered as `name`.

    Args:
        name: "onnxruntime", "openvino", "torch", "torch-compile", or one that another package registers.
        require: whether it must be usable here.

    Raises:
        UnknownName: nobody registered it.
        MissingPackage: it is known, but its package is not installed and `require` is True.
    """
    runtime: Runtime = registry.get("runtime", name)()
    if require and runtime.missing() is not None:
        raise MissingPackage(runtime.package, runtime.extra or "test", f"the runtime {name!r}")
    return runtime


def installed(names: list[str] | None = None) -> list[str]:
    """Names of the registered runtimes that can run here, sorted."""
    return [name for name in (names or registry.names("runtime")) if get_runtime(name, require=False).missing() is None]
