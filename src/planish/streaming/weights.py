"""Weights in safetensors files, read one tensor at a time: nothing is mapped, so that a tensor costs memory only while it is held."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planish.errors import DataError, UsageError

_MOST_HEADER_BYTES = 100_000_000  # what the format itself allows
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: file, first byte in it, and what it is."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors of a safetensors file, or of a folder with several, by name.

    Args:
        path: a file; or a folder: the files that its `model.safetensors.index.json` names, else all that end in ".safetensors".

    Raises:
        UsageError: nothing is there.
        DataError: a file that is not safetensors: a header that is too long, no JSON, or does not fit the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._places: dict[str, _Place] = {}
        self.unread: dict[str, str] = {}
        """Tensors of types that are not read -> the type."""
        for file in _files(self.path):
            for name, place in _header(file).items():
                if isinstance(place, str):
                    self.unread[name] = place
                    continue
                if name in self._places:
                    raise DataError(f"weights: {name!r} is in {self._places[name].file.name} and in {file.name}; it must be in one of them")
                self._places[name] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Any:
        return iter(self._places)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as they are stored."""
        return sum(math.prod(place.shape) * place.dtype.itemsize for place in self._places.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor."""
        return self._places[name].shape

    def check_shape(self, name: str, shape: torch.Size) -> None:
        """Refuse a tensor that the model has in another shape.

        Raises:
            UsageError: it has.
        """
        if self.shape(name) != tuple(shape):
            raise UsageError(f"weights: {name!r} must have shape {list(shape)}, as in the model; it has {list(self.shape(name))}")

    def read(self, name: str) -> Tensor:
        """A tensor, in float32 if it is floating-point.

        Raises:
            DataError: it holds NaN or Inf.
        """
        place = self._places[name]
        count = math.prod(place.shape)
        # read as integers of that width, since numpy knows no bfloat16
        raw = np.fromfile(place.file, dtype=f"<i{place.dtype.itemsize}", count=count, offset=place.offset)
        found = torch.from_numpy(raw).view(place.dtype).view(place.shape)
        if not place.dtype.is_floating_point:
            return found
        found = found.float()
        if not bool(found.isfinite().all()):
            raise DataError(f"weights: {name!r} in {place.file.name} must be finite; it holds NaN or Inf")
        return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (index := path / _INDEX).is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"weights: {index} must map tensors to files under 'weight_map'; {error!r}") from error
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise DataError(f"weights: {index} must name files beside it; got {str(wrong[0])[:80]!r}")
        found = [path / name for name in sorted(names)]
        if missing := [file.name for file in found if not file.is_file()]:
            raise DataError(
                f"weights: {index} names {missing[0]}, which is not there; {len(found) - len(missing)} of {len(found)} files are"
            )
        return found
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise UsageError(f"weights: {path} must be a safetensors file or a folder with some; there are none")
    return found


def _header(file: Path) -> dict[str, _Place | str]:
    """What a file says that it holds; of tensors of other types than these the type."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
            raise DataError(f"weights: {file} is not a safetensors file: it has {size} bytes, and its header would take {length}")
        try:
            entries = json.loads(opened.read(length))
            return {name: _place(file, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"weights: {file} is not a safetensors file: {error!r}") from error


def _place(file: Path, start: int, entry: dict[str, Any]) -> _Place | str:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if not 0 <= begin <= end <= file.stat().st_size - start:
        raise ValueError(f"bytes {begin} to {end} are not in it; it may be cut off")
    if dtype is None:
        return str(entry["dtype"])
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{end - begin} bytes are no {entry['dtype']} of shape {list(shape)}")
    return _Place(file, start + begin, dtype, shape)
