"""An artifact that answers: numpy or torch in, the same out; needs numpy, msgspec and the artifact's runtime, never torch."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from planish.artifact.contents import Artifact, open_artifact
from planish.errors import ArtifactError, DataError, UsageError
from planish.measure.machine import machine
from planish.runtimes.contract import Session, get_runtime

LEAST_SQNR_DB = 30.0


class Deployed:
    """A loaded artifact: call it with what the original took, and it gives what the original gave.

    Attributes:
        artifact: what it was loaded from.
        notes: what differs from where it was made, in sentences; empty when nothing does.
    """

    def __init__(self, artifact: Artifact, session: Session, notes: tuple[str, ...]) -> None:
        self.artifact, self.notes = artifact, notes
        self._session, self._lock = session, threading.Lock()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The outputs for one batch, as the original structures them.

        Args:
            inputs: one tensor, several, a tuple or a dict by name; numpy arrays or torch tensors.
            named: instead, tensors by name.

        Returns:
            torch tensors (on the first input's device) where the first input was one, else numpy arrays.

        Raises:
            DataError: another number of tensors, name, dtype or fixed size than the model takes.
        """
        if inputs and named:
            raise DataError("inputs: give tensors by position or by name, not both")
        flat = self.artifact.signature.flatten(named or (inputs[0] if len(inputs) == 1 else inputs))
        tensor = _torch_tensor(flat)
        arrays = [_to_numpy(value) for value in flat]
        self.artifact.signature.check(arrays)
        with self._lock:
            outputs: list[Any] = list(self._session.run(arrays))
        if tensor is not None:
            torch = sys.modules["torch"]
            outputs = [torch.from_numpy(value if value.flags.writeable else value.copy()).to(tensor.device) for value in outputs]
        return self.artifact.signature.unflatten(outputs)

    def close(self) -> None:
        """Give the runtime's memory back."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Deployed({str(self.artifact.path)!r} on {self.artifact.manifest.target.name})"


def _torch_tensor(flat: list[Any]) -> Any:
    """The first input if it is a torch tensor, else None; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return flat[0] if torch is not None and isinstance(flat[0], torch.Tensor) else None


def _to_numpy(value: Any) -> NDArray[Any]:
    if _torch_tensor([value]) is not None:
        value = value.detach().cpu()
        try:
            value = value.numpy()
        except TypeError as err:
            raise DataError(f"inputs: tensors of {value.dtype} have no numpy counterpart; give float32") from err
    if not isinstance(value, (np.ndarray, np.generic, int, float, list, tuple)):
        raise DataError(f"inputs: numpy arrays or torch tensors are taken; got {type(value).__name__}")
    return np.ascontiguousarray(value)


def sqnr_db(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    """Signal to noise of `got` against `wanted` in decibels; infinite where they are equal, NaN never."""
    if wanted.shape != got.shape:
        return -np.inf
    differ = wanted != got  # equal infinities (masked logits) are equal
    noise = float(np.sum((wanted[differ].astype(np.float64) - got[differ].astype(np.float64)) ** 2))
    signal = float(np.sum(wanted.astype(np.float64, copy=False)[np.isfinite(wanted)] ** 2))
    if noise == 0:
        return np.inf
    if not np.isfinite(noise) or signal == 0:
        return -np.inf
    return 10 * float(np.log10(signal / noise))


def _differences(artifact: Artifact, versions: dict[str, str]) -> list[str]:
    here, made = machine(), artifact.manifest.machine
    notes = [
        f"made with {package} {artifact.manifest.versions[package]}, runs on {version}"
        for package, version in versions.items()
        if artifact.manifest.versions.get(package, version) != version
    ]
    if here.isa != made.isa:
        notes.append(f"made for {made.isa}, runs on {here.isa}")
    return notes


def load(path: str | os.PathLike[str], threads: int | None = None) -> Deployed:
    """The artifact at `path`, ready to be called.

    Every file is checked by hash first. On another runtime version or instruction set than it was made on, the outputs that it
    gave when it was made are computed again: they must agree, and `notes` says what differs. There is no fallback to another
    device or runtime.

    Args:
        path: the directory that `planish optimize` wrote.
        threads: of one call, at most: where fewer were enough when it was made, it has those. As it was made by default.

    Raises:
        MissingFile: nothing is there.
        ArtifactError: it is no artifact, was changed, or computes something else here than where it was made.
        MissingPackage: its runtime is not installed.
        UsageError: `threads` is no positive number.
        RuntimeFailed: the runtime refuses the model.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads: give a whole number of at least 1; got {threads!r}")
    artifact = open_artifact(path)
    target = artifact.manifest.target_with(threads)
    runtime = get_runtime(target.runtime)
    notes = _differences(artifact, runtime.versions())
    session = runtime.open(artifact.model_path, artifact.signature, target)
    if notes and (kept := artifact.check_arrays()) is not None:
        worst = min(sqnr_db(wanted, got) for wanted, got in zip(kept[1], session.run(kept[0]), strict=True))
        if worst < LEAST_SQNR_DB:
            session.close()
            raise ArtifactError(
                f"{artifact.path}: {'; '.join(notes)}, and its outputs agree to {worst:.0f} dB only with those of when it was made "
                f"(at least {LEAST_SQNR_DB:.0f} dB are needed); optimize it again for this machine"
            )
        notes.append(f"its outputs agree to {worst:.0f} dB with those of when it was made; `planish verify` measures it here")
    return Deployed(artifact, session, tuple(notes))
