"""Values of a program between two of its parts: large ones in memory-mapped files, each deleted once it was read for the last time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

_MAPPED_BYTES = 1 << 16


class Values:
    """What lives of one batch's run.

    Args:
        folder: where the files go; empty, its own.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._small: dict[Node, Any] = {}
        self._files: dict[Node, tuple[Path, torch.dtype]] = {}

    def keep(self, node: Node, value: Any) -> None:
        """Keeps the value of a node."""
        if isinstance(value, Tensor) and value.numel() * value.element_size() >= _MAPPED_BYTES:
            path = self._folder / f"{node.name}.npy"
            raw = (value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()  # numpy knows no bfloat16
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=raw.dtype, shape=raw.shape)
            mapped[...] = raw
            mapped.flush()
            self._files[node] = path, value.dtype
        else:
            # a view of something large would keep all of it
            self._small[node] = value.clone() if isinstance(value, Tensor) else value

    def read(self, node: Node) -> Any:
        """The value of a node; a large one is a view of its file."""
        if node in self._files:
            path, dtype = self._files[node]
            return torch.from_numpy(np.lib.format.open_memmap(path, mode="r+")).view(dtype)
        return self._small[node]

    def drop(self, node: Node) -> None:
        """Forgets a value, and deletes its file."""
        if node in self._files:
            self._files.pop(node)[0].unlink()
        else:
            self._small.pop(node, None)
