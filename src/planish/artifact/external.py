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


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number runs past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, number or bytes) of one message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire in (1, 5):
            width = 8 if wire == 1 else 4
            value, at = data[at : at + width], at + width
        else:
            raise ValueError(f"wire type {wire} does not occur in ONNX")
        if at > len(data):
            raise ValueError("a field runs past the end")
        yield number, value


def _entry(data: memoryview) -> tuple[str, str]:
    pair = {number: bytes(value).decode() for number, value in _fields(data) if isinstance(value, memoryview)}
    return pair.get(1, ""), pair.get(2, "")


def _external(data: memoryview, message: str, depth: int = 0) -> Iterator[dict[str, str]]:
    """The external-data keys of every tensor below one message that lives outside the file."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested more than {_DEEPEST} deep")
    entries: dict[str, str] = {}
    for number, value in _fields(data):
        if message == "tensor":
            if number == 13 and isinstance(value, memoryview):
                key, text = _entry(value)
                entries[key] = text
            elif number == 14 and value == 1:
                entries.setdefault("location", "")
        elif isinstance(value, memoryview) and number in _WAYS[message]:
            yield from _external(value, _WAYS[message][number], depth + 1)
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
        data = memoryview(mapped)
        try:
            found = list(_external(data, "model"))
        except (ValueError, UnicodeDecodeError) as err:
            raise ArtifactError(f"{path} is not an ONNX file: {err}") from err
        finally:
            data.release()
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
