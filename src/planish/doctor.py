"""What this machine can run: processor, runtimes with their versions, and known holes in what is installed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import msgspec

import planish
from planish import registry
from planish.measure.machine import facts, holes, machine
from planish.runtimes.contract import get_runtime

PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino", "optuna")


def examine() -> dict[str, Any]:
    """Plain data: "planish", "machine", "facts", "packages" (None: not installed), "runtimes" (each with "missing") and "holes"."""
    runtimes = []
    for name in registry.names("runtime"):
        runtime = get_runtime(name, require=False)
        runtimes.append(
            {
                "targets": [f"{name}:{device}" for device in runtime.devices],
                "precisions": list(runtime.schemes),
                "versions": runtime.versions(),
                "missing": runtime.missing(),
            }
        )
    return {
        "planish": planish.__version__,
        "machine": msgspec.to_builtins(machine()),
        "facts": msgspec.to_builtins(facts()),
        "packages": {name: _version(name) for name in PACKAGES},
        "runtimes": runtimes,
        "holes": list(holes()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
