"""The bytes of an artifact's tensors, appended to one file as they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

_ALIGNED = 64  # bytes, as safetensors has it
_TYPES = {torch.float32: ir.DataType.FLOAT, torch.uint8: ir.DataType.UINT8, torch.int8: ir.DataType.INT8}


@dataclass(frozen=True)
class _Piece:
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Pieces:
    """A growing file of tensors, and where each of them lies.

    Args:
        path: of the file, which is not there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces: dict[str, _Piece] = {}
        self._end = 0
        path.touch(exist_ok=False)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor."""
        offset = -(-self._end // _ALIGNED) * _ALIGNED
        raw = tensor.contiguous().numpy()
        with self.path.open("r+b") as file:
            file.seek(offset)
            raw.tofile(file)
        self._pieces[name] = _Piece(offset, raw.nbytes, tensor.dtype, tuple(tensor.shape))
        self._end = offset + raw.nbytes

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor that is there."""
        return self._pieces[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor that is there."""
        return self._pieces[name].dtype

    def external(self, name: str) -> ir.ExternalTensor:
        """A tensor as ONNX refers to it, for a model beside the file."""
        piece = self._pieces[name]
        return ir.ExternalTensor(
            self.path.name,
            piece.offset,
            piece.nbytes,
            _TYPES[piece.dtype],
            shape=ir.Shape(piece.shape),
            name=name,
            base_dir=self.path.parent,
        )
