"""The teacher: the original's outputs and hints on a split, each computed when it is first asked for and kept in a memory-mapped file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish.data import Split
from planish.distill.hints import Hint, shared_hints, with_hints
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.modes import set_mode
from planish.train.precision import Arithmetic, has_convolution

_BATCH = 128
_SHARE = 4  # of the room for the cache: what hints may take of it
_HIGHEST = float(np.finfo(np.float16).max)


class Teacher:
    """The original graph and what it says about `split`: its flat outputs, and after them the hints that it was told to give.

    Args:
        graph: copied, with its batch norms folded; later changes to it do not matter.
        split: the samples that are trained on.
        folder: where the cache goes (sparse files: what was not asked for takes no space); None: nothing is cached.
        largest_bytes: outputs that would take more than this, or than half of the free disk, are computed anew each time.
    """

    def __init__(self, graph: Graph, split: Split, folder: Path | None = None, largest_bytes: int = 4 * 2**30) -> None:
        self.plain = fold_batch_norm(graph)
        set_mode(self.plain, False)
        self.graph = self.plain
        self.hints: tuple[Hint, ...] = ()
        self.split = split
        self.folder = folder
        self._room = largest_bytes
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._room = min(largest_bytes, shutil.disk_usage(folder).free // 2)
        self.computed = 0
        self._arithmetic = Arithmetic(channels_last=has_convolution(graph))
        self._known = np.zeros(split.n, np.bool_)
        self._cache: list[NDArray[np.floating]] | None = None
        self._is_cached = folder is not None
        self._kept: list[tuple[Split, Split, tuple[Tensor, ...]]] = []

    def show(self, student: Graph | None) -> tuple[Hint, ...]:
        """Give the hints that `student` can follow (None: none) after the outputs from now on; what was kept with others is forgotten."""
        hints: tuple[Hint, ...] = ()
        if student is not None:
            ((inputs, _),) = self.split.take(np.arange(1)).batches(1)
            room = self._room // _SHARE // (2 * self.split.n)
            hints = shared_hints(self.plain, student, [torch.from_numpy(array) for array in inputs], room)
        if hints != self.hints:
            self.hints, self.graph = hints, with_hints(self.plain, hints)
            self._known[:] = False
            self._cache, self._is_cached = None, self.folder is not None
            self._kept.clear()
        return hints

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Flat outputs and hints for flat inputs (an augmented batch, say), [batch, ...], without gradients."""
        with torch.inference_mode():
            try:
                outputs = self.graph.module(*self._arithmetic.arrange(inputs))
            except RuntimeError:
                if not self._arithmetic.channels_last:
                    raise
                self._arithmetic = Arithmetic()  # a view that only the plain layout allows
                outputs = self.graph.module(*inputs)
        self.computed += len(inputs[0])
        return tuple(out.clone() for out in outputs)  # a clone made outside inference mode is an ordinary tensor

    def outputs(self, rows: NDArray[np.int64], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Flat outputs and hints for the samples `rows` of the split, from the cache where they are known.

        Args:
            rows: [batch].
            inputs: the same samples, as the split holds them.
        """
        unknown = np.flatnonzero(~self._known[rows]) if self._is_cached else np.arange(len(rows))
        if len(unknown):
            found = self.run([tensor[torch.from_numpy(unknown)] for tensor in inputs] if len(unknown) < len(rows) else inputs)
            if self._is_cached and self._cache is None:
                self._open(found)
            if self._cache is None:
                return found
            for column, out in zip(self._cache, found, strict=True):
                kept = out.float().clamp(-_HIGHEST, _HIGHEST) if column.dtype == np.float16 else out.float()
                column[rows[unknown]] = kept.numpy()
            self._known[rows[unknown]] = True
            if len(unknown) == len(rows):
                return found
        assert self._cache is not None
        return tuple(torch.from_numpy(np.asarray(column[rows], np.float32)) for column in self._cache)

    def on(self, split: Split, samples: int) -> tuple[Split, tuple[Tensor, ...]]:
        """At most `samples` evenly spaced samples of another split, and the flat outputs and hints on them, kept in memory."""
        for known, chosen, outputs in self._kept:
            if known is split and chosen.n == min(samples, split.n):
                return chosen, outputs
        chosen = split.take(np.unique(np.linspace(0, split.n - 1, min(samples, split.n)).astype(np.int64)))
        parts = [self.run([torch.from_numpy(array) for array in inputs]) for inputs, _ in chosen.batches(_BATCH)]
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        self._kept.append((split, chosen, outputs))
        return chosen, outputs

    def _open(self, outputs: tuple[Tensor, ...]) -> None:
        assert self.folder is not None
        types = [np.float32] * (len(outputs) - len(self.hints)) + [np.float16] * len(self.hints)
        for old in self.folder.glob("teacher.output*.npy"):
            old.unlink()  # another teacher may have it mapped
        needed = sum(np.dtype(kind).itemsize * self.split.n * out[0].numel() for kind, out in zip(types, outputs, strict=True))
        if needed > self._room:
            self._is_cached = False
            return
        self._cache = []
        for i, (kind, out) in enumerate(zip(types, outputs, strict=True)):
            path = self.folder / f"teacher.output{i}.npy"
            shape = (self.split.n, *out.shape[1:])
            self._cache.append(np.lib.format.open_memmap(path, "w+", kind, shape))
