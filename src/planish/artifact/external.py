"""External data of an ONNX file: found by walking the protobuf itself, so that no runtime is asked to open a path that is not ours.

Only lengths are followed; weights are skipped, so a file of any size costs its structure and no more. Needs no onnx package.
References: onnx.proto (ModelProto, GraphProto, TensorProto.external_data), protobuf encoding specification.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from planish.errors import ArtifactError

_DEEPEST = 64
_LONGEST_ENTRY = 4096
_KEYS = frozenset({"location", "offset", "length", "checksum"})
# message -> field number -> message, of every way that leads from a model to a tensor
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError("a number runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, number, start, end) of one message, in order; a field is a number, or bytes from start to end."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        value, start = 0, at
        if wire == 0:
            value, at = _varint(data, at, end)
            start = at
        elif wire == 2:
            length, start = _varint(data, at, end)
            at = start + length
        elif wire in (1, 5):
            at = start + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire} does not occur in ONNX")
        if at > end:
            raise ValueError("a field runs past the end")
        yield number, value, start, at


def _external(data: mmap.mmap, at: int, end: int, message: str, depth: int = 0) -> Iterator[dict[str, str]]:
    """The external-data keys of every tensor below one message that lives outside the file."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested more than {_DEEPEST} deep")
    entries: dict[str, str] = {}
    for number, value, start, stop in _fields(data, at, end):
        if message == "tensor":
            if number == 13:
                if stop - start > _LONGEST_ENTRY:
                    raise ValueError(f"an external-data entry of {stop - start} bytes")
                pair = {field: data[a:b].decode() for field, _, a, b in _fields(data, start, stop)}
                entries[pair.get(1, "")] = pair.get(2, "")
            elif number == 14 and value == 1:
                entries.setdefault("location", "")
        elif number in _WAYS[message] and stop > start:
            yield from _external(data, start, stop, _WAYS[message][number], depth + 1)
    if entries:
        yield entries


def check_external_data(path: Path, files: Mapping[str, int]) -> None:
    """Refuse an ONNX file that keeps tensors in a file which is not listed beside it, or past that file's end.

    Args:
        path: the ONNX file.
        files: relative path within the artifact -> size in bytes, of every listed file.

    Raises:
        ArtifactError: not an ONNX file, or external data that is unlisted, outside, or out of bounds.
    """
    if path.stat().st_size == 0:
        raise ArtifactError(f"{path} is empty; a runtime model is expected")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            found = list(_external(mapped, 0, len(mapped), "model"))
        except (ValueError, UnicodeDecodeError) as err:
            raise ArtifactError(f"{path} is not an ONNX file: {err}") from err
    for entries in found:
        location = entries.get("location", "")
        if unknown := sorted(set(entries) - _KEYS):
            raise ArtifactError(f"{path}: external data with the key {unknown[0][:60]!r}; known: {', '.join(sorted(_KEYS))}")
        if location not in files or len(PurePosixPath(location).parts) != 1:
            raise ArtifactError(f"{path}: external data at {location[:120]!r}, which is not a listed file beside the model")
        numbers = [entries.get(key, "0") for key in ("offset", "length")]
        if not all(number.isascii() and number.isdigit() and len(number) < 19 for number in numbers):
            raise ArtifactError(f"{path}: external data at {location!r} needs offset and length in bytes; got {numbers!s:.80}")
        if sum(map(int, numbers)) > files[location]:
            raise ArtifactError(f"{path}: external data at {location!r} ends past the file's {files[location]} bytes")
