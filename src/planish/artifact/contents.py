"""An artifact that was opened: every file checked against the manifest, its plan and measurements parsed, nothing unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from planish.artifact.external import check_external_data
from planish.artifact.manifest import (
    CHECK,
    MANIFEST,
    MEASUREMENTS,
    MOST_FILES,
    PLAN,
    RESULT,
    WEIGHTS,
    Manifest,
    check_regular,
    checksum,
    is_compiled,
    read_manifest,
    read_small,
)
from planish.errors import ArtifactError
from planish.measurement import Measurement
from planish.plan import Plan
from planish.signature import Signature

T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, as it was when it was opened.

    Args:
        path: the directory.
        manifest: what it consists of and what made it.
        plan: what was done to the net.
        measurements: "original" and "optimized" (and other runtimes by name), as measured when it was made.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    measurements: dict[str, Measurement]

    @property
    def signature(self) -> Signature:
        """What goes in and comes out."""
        return self.manifest.signature

    @property
    def model_path(self) -> Path:
        """The file that the runtime opens."""
        return self.path / self.manifest.model

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """The compressed net's parameters and buffers by name, read from safetensors (which holds numbers and nothing else).

        Raises:
            ArtifactError: the file is not safetensors, or the model alone holds them (`planish shrink` keeps them once).
        """
        import safetensors
        import safetensors.numpy

        path = self.path / WEIGHTS
        if WEIGHTS not in self.manifest.files:
            raise ArtifactError(f"{self.path} keeps its weights in {self.manifest.model} alone, as its runtime reads them")
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as err:
            raise ArtifactError(f"{path} is not a safetensors file: {err}") from err

    def result_json(self) -> bytes | None:
        """The JSON of the `Result` that the run ended with, for the report; None where it was not kept."""
        return read_small(self.path / RESULT) if RESULT in self.manifest.files else None

    def check_arrays(self) -> tuple[list[NDArray[np.generic]], list[NDArray[np.generic]]] | None:
        """Flat inputs, and the flat outputs that the artifact gave for them when it was made; None where they were not kept."""
        names = [f"{CHECK}/input_{i}.npy" for i in range(len(self.signature.inputs))]
        outputs = [f"{CHECK}/output_{i}.npy" for i in range(len(self.signature.outputs))]
        if not all(name in self.manifest.files for name in (*names, *outputs)):
            return None
        return [_array(self.path / name) for name in names], [_array(self.path / name) for name in outputs]


def _array(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as err:
        raise ArtifactError(f"{path} is not a plain .npy array: {err}") from err
    return array


def files_in(folder: Path) -> Iterator[str]:
    """The relative POSIX path of everything below `folder` that is no directory; a link is not followed.

    Raises:
        ArtifactError: more than a thousand entries, or a link to a directory.
    """
    seen = 0
    for root, directories, names in os.walk(folder, followlinks=False):
        for name in directories:
            if (Path(root) / name).is_symlink():
                raise ArtifactError(f"{Path(root) / name} is a symbolic link; an artifact holds regular files only")
        for name in names:
            seen += 1
            if seen > MOST_FILES:
                raise ArtifactError(f"{folder} holds more than {MOST_FILES} files; no artifact does")
            yield (Path(root) / name).relative_to(folder).as_posix()


def _parse(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(read_small(path), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise ArtifactError(f"{path} cannot be read: {err}") from err


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """The artifact at `path`, after every file in it was checked against the manifest.

    Raises:
        MissingFile: nothing is there.
        ArtifactError: it is no artifact; a file is missing, unknown, a link, or has another checksum than the manifest says.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name in files_in(folder):
        if name != MANIFEST and name not in manifest.files and not is_compiled(name):
            raise ArtifactError(f"{folder / name!s:.300} is not in the manifest; an artifact holds nothing else: remove it")
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.exists() and not file.is_symlink():
            raise ArtifactError(f"{file} is missing; the manifest lists it with SHA-256 {entry.sha256}")
        check_regular(file, str(file))
        if (size := file.stat().st_size) != entry.size_bytes:
            raise ArtifactError(f"{file} has {size} bytes; the manifest says {entry.size_bytes} with SHA-256 {entry.sha256}")
        if (found := checksum(file)) != entry.sha256:
            raise ArtifactError(f"{file} was changed: its SHA-256 is {found}; the manifest says {entry.sha256}")
    for name in (PLAN, MEASUREMENTS):
        if name not in manifest.files:
            raise ArtifactError(f"{folder / MANIFEST} does not list {name}, so it is no artifact")
    if manifest.model.endswith(".onnx"):
        check_external_data(folder / manifest.model, {name: entry.size_bytes for name, entry in manifest.files.items()})
    plan = _parse(folder / PLAN, Plan)
    if plan.digest != manifest.plan:
        raise ArtifactError(f"{folder / PLAN} is the plan {plan.digest}; the manifest says {manifest.plan}")
    return Artifact(folder, manifest, plan, _parse(folder / MEASUREMENTS, dict[str, Measurement]))
