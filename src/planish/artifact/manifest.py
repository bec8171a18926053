"""The manifest: what an artifact consists of, what made it, and the checksums that everything in it must have."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path, PurePosixPath

import msgspec

from planish.errors import ArtifactError, MissingFile
from planish.measurement import Machine
from planish.signature import Signature
from planish.target import Target

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
MEASUREMENTS = "measurements.json"
WEIGHTS = "weights.safetensors"
RESULT = "result.json"
SHRUNK = "shrunk.json"
DEPLOY = "deploy.py"
CHECK = "check"
LARGEST_JSON = 64 * 2**20
MOST_FILES = 1000
_ZEROS = "0" * 64
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,120}")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of an artifact: its SHA-256 in hexadecimal and its size in bytes."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an artifact consists of and what made it.

    Args:
        format: version of this layout; a reader refuses one that it does not know.
        checksum: SHA-256 of this very file with these 64 digits as zeros.
        planish: the version of planish that wrote it.
        name: the workload's name.
        target: where it runs; `weight_range` and placement were chosen for these facts.
        threads_tried: with one, half of this many and this many threads it was measured; those of the target were enough (see decision 013).
        model: the file that the runtime opens.
        signature: what goes in and comes out; an axis that is a number here is static.
        plan: the plan's digest.
        versions: package -> version that was used for export and measuring.
        machine: where it was made and measured.
        test_looks: how often the test split was looked at on the way to this artifact.
        files: relative path -> checksum and size of everything else in the directory.
        notes: sentences that a user of the artifact should know.
        job: fingerprint of the job that it was made from, in parts ("parameters", "data", ...); empty: not known.
    """

    format: int
    checksum: str
    planish: str
    name: str
    target: Target
    model: str
    signature: Signature
    plan: str
    versions: dict[str, str]
    machine: Machine
    test_looks: int
    files: dict[str, Entry]
    notes: tuple[str, ...] = ()
    job: dict[str, str] = {}
    threads_tried: int = 0

    def target_with(self, threads: int | None) -> Target:
        """The target with at most `threads` where that many were tried (None: as it was measured), else with exactly so many."""
        if threads is None:
            return self.target
        return msgspec.structs.replace(self.target, threads=min(threads, self.target.threads) if threads <= self.threads_tried else threads)

    def encode(self) -> bytes:
        """The bytes of `manifest.json`, with its own checksum filled in."""
        blank = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(self, checksum=_ZEROS)), indent=1) + b"\n"
        return blank.replace(_ZEROS.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_name(name: str, where: str) -> None:
    """Refuse a file name that could leave the directory or confuse a shell, a terminal or another system.

    Raises:
        ArtifactError: absolute, with `..`, a backslash, NUL or anything but letters, digits and `_ . + -`.
    """
    parts = name.split("/")
    if len(parts) > 4 or any(not _PART.fullmatch(part) for part in parts) or PurePosixPath(name).is_absolute():
        raise ArtifactError(f"{where}: file names are letters, digits and _ . + - below the artifact; got {name[:80]!r}")


def is_compiled(name: str) -> bool:
    """Whether a file is what Python leaves behind where `deploy.py` was imported: no part of an artifact, and harmless in it."""
    return re.fullmatch(r"__pycache__/deploy\.[A-Za-z0-9_.-]+\.pyc", name) is not None


def check_regular(path: Path, where: str) -> None:
    """Refuse anything but a regular file with a single name: its contents could be changed, or be read, from elsewhere.

    Raises:
        ArtifactError: a symbolic link, a hard link, a device, a pipe or a directory.
    """
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        raise ArtifactError(f"{where} is a symbolic link; an artifact holds regular files only: copy it with `cp -rL`")
    if not stat.S_ISREG(facts.st_mode):
        raise ArtifactError(f"{where} is no regular file; an artifact holds nothing else")
    if facts.st_nlink > 1:
        raise ArtifactError(f"{where} is a hard link to a file elsewhere; an artifact owns its files: copy it with `cp -r`")


def read_small(path: Path) -> bytes:
    """The bytes of a JSON file, refused before anything is allocated when it is larger than 64 MB."""
    check_regular(path, str(path))
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ArtifactError(f"{path} has {size} bytes; at most {LARGEST_JSON} are read")
    return path.read_bytes()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; its own checksum, format and file names hold, the other files are not looked at.

    Raises:
        MissingFile: nothing is there.
        ArtifactError: it is no artifact, or its manifest was changed.
    """
    if not folder.exists():
        raise MissingFile(f"{folder} does not exist; give the directory that `planish optimize` wrote")
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; an artifact is the directory that `planish optimize` wrote")
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} has no {MANIFEST}, so it is no artifact; give the directory that `planish optimize` wrote")
    raw = read_small(path)
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format")
        if version is not None and (number := msgspec.json.decode(version, type=int)) != FORMAT:
            raise ArtifactError(f"{path} has format {number}; this version of planish reads {FORMAT}: install the one that wrote it")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise ArtifactError(f"{path} is not the manifest of an artifact: {err}") from err
    blank = raw.replace(manifest.checksum.encode(), _ZEROS.encode(), 1)
    if (found := hashlib.sha256(blank).hexdigest()) != manifest.checksum:
        raise ArtifactError(f"{path} was changed since it was written: its SHA-256 is {found}, and it says {manifest.checksum[:64]}")
    for name in (*manifest.files, manifest.model):
        check_name(name, str(path))
    if manifest.model not in manifest.files:
        raise ArtifactError(f"{path} names the model {manifest.model!r}, which is not among its files")
    return manifest
