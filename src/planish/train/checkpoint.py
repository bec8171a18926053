"""Checkpoints of training: what a killed run goes on from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Saved:
    """How far training had come.

    Args:
        samples: seen.
        progress: of the schedule, in [0, 1]; 1 once training has ended.
        state: the tensors, in the order in which they were given.
    """

    samples: int
    progress: float
    state: list[Tensor] = field(repr=False)


class Checkpoint:
    """One training's file. It is replaced whole; a kill in between leaves the one before.

    Args:
        path: of the file; its folder is made when something is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, samples: int, progress: float, state: Sequence[Tensor]) -> None:
        """Replace what was saved before; where the disk is full, what was saved before stays, and training goes on."""
        fresh = self.path.with_suffix(".new")
        about = {"samples": str(samples), "progress": repr(progress)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({f"{i:06d}": tensor.contiguous() for i, tensor in enumerate(state)}, fresh, metadata=about)
            os.replace(fresh, self.path)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def load(self, like: Sequence[Tensor]) -> Saved | None:
        """What was saved, where it fits tensors like these; None where there is nothing, or it belongs to something else."""
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
                state = [file.get_tensor(name) for name in sorted(file.keys())]
        except (OSError, SafetensorError):
            return None
        if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in like]:
            return None
        return Saved(int(about["samples"]), float(about["progress"]), state)
