"""Writing an artifact: beside its place under a temporary name, flushed to disk, then renamed; what was there before stays whole."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
from numpy.typing import NDArray

import planish
from planish.artifact.contents import Artifact, files_in, open_artifact
from planish.artifact.external import check_external_data
from planish.artifact.manifest import (
    CHECK,
    DEPLOY,
    FORMAT,
    MANIFEST,
    MEASUREMENTS,
    PLAN,
    RESULT,
    WEIGHTS,
    Entry,
    Manifest,
    check_name,
    check_regular,
    checksum,
    is_compiled,
    read_manifest,
)
from planish.artifact.scripts import deploy_script
from planish.errors import ArtifactError, OutputExists, UsageError
from planish.measurement import Measurement
from planish.plan import Plan
from planish.signature import Signature
from planish.target import Target

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def default_folder(name: str) -> Path:
    """`NAME.planish` in the working directory, with whatever could leave it replaced."""
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name).strip("._")[:80]
    return Path(f"{plain or 'net'}.planish")


def study_folder(out: str | os.PathLike[str]) -> Path:
    """`NAME.study` beside the artifact `NAME.planish`: where its trials are kept."""
    return beside(out, ".study")


def beside(out: str | os.PathLike[str], ending: str) -> Path:
    """`NAME` with another ending beside the artifact `NAME.planish`; only that is taken off, so `net_0.5` and `net_0.6` stay apart."""
    path = Path(out)
    return path.with_name(path.name.removesuffix(".planish") + ending)


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Refuse a place where `write` could not put an artifact; cheap, so that it comes before the work.

    Raises:
        UsageError: the path cannot be a directory, or its parent cannot be written.
        OutputExists: it is there and `overwrite` is False, or what is there is no artifact and would be lost.
    """
    if "\0" in str(folder) or len(folder.name) > 200 or not folder.name:
        raise UsageError(f"out: {str(folder)[:60]!r} cannot be the name of a directory; give a path such as 'out/net.planish'")
    if folder.is_symlink():
        raise OutputExists(f"out: {folder} is a symbolic link; give the directory itself")
    if folder.exists():
        if not overwrite:
            raise OutputExists(f"out: {folder} is already there; give --overwrite to replace it, or another --out")
        _check_replaceable(folder)
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"out: {parent} cannot be written to; give another --out")


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an artifact or an empty directory: what else is in there would be deleted."""
    if not folder.is_dir():
        raise OutputExists(f"out: {folder} is a file, not an artifact; it is not overwritten: move it away")
    ours = {MANIFEST, PLAN, MEASUREMENTS, WEIGHTS, RESULT, DEPLOY}
    if (folder / MANIFEST).exists():
        try:
            ours |= set(read_manifest(folder).files)
        except ArtifactError:
            ours |= {name for name in files_in(folder) if name.startswith(("model.", f"{CHECK}/"))}
    for name in files_in(folder):
        if name not in ours and not is_compiled(name):
            raise OutputExists(f"out: {folder} holds {name[:80]!r}, which is no part of an artifact; it is not overwritten: move it away")


def write(
    folder: str | os.PathLike[str],
    *,
    name: str,
    model: Path,
    plan: Plan,
    signature: Signature,
    target: Target,
    threads_tried: int = 0,
    measurements: Mapping[str, Measurement],
    weights: Mapping[str, NDArray[np.generic]] | None,
    files: Sequence[Path] = (),
    moves: bool = False,
    result_json: bytes | None = None,
    check: tuple[Sequence[NDArray[np.generic]], Sequence[NDArray[np.generic]]] | None = None,
    test_looks: int = 0,
    notes: Sequence[str] = (),
    job: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool = False,
) -> Artifact:
    """Write an artifact whole, or change nothing.

    Args:
        folder: where it shall be; its parents are made.
        name: the workload's name.
        model: the exported runtime model; it keeps its file name.
        plan: what was done to the net.
        signature: what the model takes and gives.
        target: where it runs.
        threads_tried: how many threads it was measured with at most; the target's by default.
        measurements: "original" and "optimized"; the optimized one's machine and versions become the manifest's.
        weights: parameters and buffers by name; None: the model's own files are all that holds them.
        files: further files that the model needs beside it (external data).
        moves: the model and the files are moved there, not copied, and back if it cannot be written; they must lie on the same disk.
        result_json: the JSON of the result's summary, for the report.
        check: flat inputs of a batch and the model's flat outputs for them, computed again when it is loaded elsewhere.
        test_looks: how often the test split was looked at.
        notes: sentences that a user of the artifact should know.
        job: fingerprint of the job that it was made from; `verify` names what differs in the one that it is given.
        overwrite: replace an artifact that is there, in one step.

    Returns:
        The artifact, opened again from disk with every hash checked.

    Raises:
        OutputExists: it is there and `overwrite` is False.
        ArtifactError: the disk is full, the place cannot be written, or a file to be included is a link or unsafe.
    """
    import safetensors.numpy

    path = Path(folder)
    check_output(path, overwrite)
    made = measurements["optimized"]
    contents: dict[str, bytes] = {
        PLAN: msgspec.json.format(msgspec.json.encode(plan, order="sorted"), indent=1),
        MEASUREMENTS: msgspec.json.format(msgspec.json.encode(dict(measurements)), indent=1),
        DEPLOY: deploy_script(target, model.name, signature, plan.floats).encode(),
    }
    if weights is not None:
        contents[WEIGHTS] = safetensors.numpy.save({key: np.ascontiguousarray(value) for key, value in weights.items()})
    if result_json is not None:
        contents[RESULT] = result_json
    for kind, batch in zip(("input", "output"), check or ((), ()), strict=True):
        contents |= {f"{CHECK}/{kind}_{i}.npy": _npy(array) for i, array in enumerate(batch)}
    for source in (model, *files):
        check_name(source.name, "artifact")
        check_regular(source, str(source))
    if model.suffix == ".onnx":
        check_external_data(model, {source.name: source.stat().st_size for source in files})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as err:
        raise ArtifactError(f"{path} could not be written: {err.strerror}; nothing was changed") from err
    is_there = False
    try:
        for source in (model, *files):
            (os.replace if moves else shutil.copyfile)(source, temporary / source.name)
        for file, data in contents.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_bytes(data)
        manifest = Manifest(
            format=FORMAT,
            checksum="",
            planish=planish.__version__,
            name=name,
            target=target,
            threads_tried=max(threads_tried, target.threads),
            model=model.name,
            signature=signature,
            plan=plan.digest,
            versions=dict(made.versions),
            machine=made.machine,
            test_looks=test_looks,
            files={file: Entry(checksum(temporary / file), (temporary / file).stat().st_size) for file in sorted(files_in(temporary))},
            notes=tuple(notes),
            job=dict(job),
        )
        (temporary / MANIFEST).write_bytes(manifest.encode())
        temporary.chmod(0o755 & ~_umask())
        for file in files_in(temporary):
            _flush(temporary / file)
        for directory in (temporary / CHECK, temporary):
            if directory.exists():
                _flush(directory)
        _put(temporary, path, overwrite)
        is_there = True
        _flush(path.parent)
    except OSError as err:
        raise ArtifactError(f"{path} could not be written: {err.strerror or err}; what was there before is unchanged") from err
    finally:
        if moves and not is_there:
            for source in (model, *files):
                if (temporary / source.name).exists():
                    os.replace(temporary / source.name, source)
        shutil.rmtree(temporary, ignore_errors=True)
    return open_artifact(path)


def _npy(array: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _flush(path: Path) -> None:
    """Force a file or a directory's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(temporary: Path, path: Path, overwrite: bool) -> None:
    """Rename `temporary` to `path`; afterwards `temporary` is gone or holds what `path` was."""
    if not path.exists():
        os.rename(temporary, path)
        return
    if not overwrite:
        raise OutputExists(f"out: {path} appeared while it was being made; give --overwrite to replace it, or another --out")
    if _exchange(temporary, path):
        return
    old = temporary.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    os.rename(old, temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot (only Linux can)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(number, os.strerror(number))
