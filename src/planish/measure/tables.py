"""Latency tables: seconds of a `Kernel` in a target, measured in sandwiches, filled when asked for, cached on disk.

What a kernel is, with the shapes and attributes of each kind, is said in `kernels.py`; how its time is isolated, in
`kernel_models.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from planish.errors import RuntimeFailed, UsageError
from planish.measure import cache
from planish.measure.kernel_models import as_product, build, recipe
from planish.measure.kernels import Kernel
from planish.measure.machine import machine
from planish.measure.plausible import SMOOTH, excess
from planish.measure.probe import Process
from planish.runtimes.contract import get_runtime
from planish.target import Target

__all__ = ["Kernel", "Table"]

FORMAT = 4
"""Part of the cache's file name: raise it whenever `kernel_models.py` builds other models for the same kernel."""
_SECONDS, _CALLS, _TIMEOUT_S, _SAVE_EVERY_S = 0.012, 15, 60.0, 5.0
_PERCENTILE = 15
_VISITS, _MOST_VISITS = 2, 7
_AGREE = 1.06
"""Two visits that differ by less agree on what a kernel takes on a quiet machine."""
_EXCESS = 1.12
"""Above what other kernels of its kind suggest by this factor, a figure is doubted."""
_SMOOTH_EXCESS, _DISTURBED = 1.05, 2.0
"""Models that only move numbers take what their sizes say, and the base is taken off every kernel of its shape: one that stays above what its
kind suggests by more than the first factor counts as so much. Above the second it is no disturbance, but what this runtime does with that size."""


class Table:
    """Seconds of kernels in one target, on this machine. Figures that are not in the cache are measured in one child process.

    With one thread a figure is CPU time, so that other processes disturb it less; with more it is wall time, since idle workers burn
    CPU too. A kernel is visited at least twice, with all others in between, and up to seven times until its two lowest figures agree; a
    visit's figure is a low percentile of at least 15 calls. The lowest counts: what the kernel takes when nothing comes between. One that
    is slower than others of its kind suggest is visited again even so.
    Virtual machines have slow states that last for seconds: figures of one visit were up to 1.8 times too high in a quarter of cases.

    Args:
        target: an ONNX runtime; its threads count.
        cache_dir: where figures are kept; by default the user's.
        floats: what floating-point operators are computed in: "fp32", or "bf16" where the runtime executes it.
        is_sized: whether no axis of the program's inputs but the batch may vary: only then may the runtime get convolutions as products.

    Raises:
        UsageError: a target that runs no ONNX models.
    """

    def __init__(self, target: Target, cache_dir: Path | None = None, is_sized: bool = False, floats: str = "fp32") -> None:
        runtime = get_runtime(target.runtime)
        if runtime.model_file != "model.onnx":
            raise UsageError(f"latency table: {target.name} runs no ONNX models, so its kernels cannot be measured alone; use MACs")
        self._target, self._floats = target, floats
        self._most_positions = runtime.short_convolution if is_sized else 0
        self._placement = runtime.quantize_inputs_of, runtime.quantize_outputs_of
        suffix = "" if floats == "fp32" else f"-{floats}"
        versions = "-".join(runtime.versions().values())
        name = f"{machine().fingerprint}-{target.runtime}-{versions}-{target.device}-{target.threads}-{target.weight_range}{suffix}-{FORMAT}.json"
        self.path = (cache_dir or cache.cache_folder()) / "tables" / name
        self._known: dict[str, float] = {}
        self._models: dict[str, Kernel] = {}
        self._visits: dict[str, list[float]] = {}
        self._failed: dict[str, str] = {}
        self._process: Process | None = None
        self._merge()

    def _merge(self) -> None:
        """Take over what the cache holds, also from processes that wrote meanwhile."""
        for key, value in cache.read(self.path).items():
            if key in self._known or not (isinstance(value, float) and math.isfinite(value)):
                continue
            with contextlib.suppress(msgspec.MsgspecError):  # what is no kernel, or one of another version, has no use
                self._models[key] = msgspec.json.decode(key, type=Kernel)
                self._known[key] = value

    def seconds(
        self, kernels: Sequence[Kernel], progress: Callable[[float], None] | None = None, deadline: float | None = None
    ) -> NDArray[np.float64]:
        """Seconds of each kernel, at least 0; NaN where it cannot be measured (`failures` says why).

        Args:
            kernels: any; those that are not known yet are measured, about 0.3 s each.
            progress: called now and then with the share that is done.
            deadline: `time.monotonic()` seconds after which nothing more is measured; what is then unknown is NaN.
        """
        recipes = [self._recipe(kernel) for kernel in kernels]
        wanted = {key: model for terms in recipes for _, key, model in terms if key not in self._known and key not in self._failed}
        if wanted:
            try:
                self._visit_all(wanted, progress or (lambda share: None), math.inf if deadline is None else deadline)
            finally:
                if self._process is not None:
                    self._process.close()
                    self._process = None
                self._save()
        known = self._believed({key: model for terms in recipes for _, key, model in terms})
        figures = [sum(f * known.get(key, math.nan) for f, key, _ in terms) if terms else math.nan for terms in recipes]
        return np.maximum(np.array(figures, dtype=np.float64), 0.0)

    def _visit_all(self, wanted: Mapping[str, Kernel], progress: Callable[[float], None], deadline: float) -> None:
        """Visit after visit in a new order each, the first to all kernels: where time runs out, some of every kind are known."""
        generator = np.random.default_rng(0)
        self._visits |= {key: [] for key in wanted}
        done, saved = 0, time.monotonic()
        self._models |= wanted
        while waiting := [key for key in self._waiting() if key in wanted]:
            for key in generator.permutation(np.array(waiting, dtype=object)):
                if time.monotonic() > deadline:
                    return
                figure = self._measure(key, wanted[key])
                if figure is not None:
                    self._visits[key].append(figure)
                    self._known[key] = min(self._visits[key])
                done += 1
                progress(min(1.0, done / (_VISITS * len(wanted))))
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()

    def _waiting(self) -> list[str]:
        """Kernels that must be visited again: visits disagree, or others of their kind suggest less (they may have been disturbed twice)."""
        above = self._excess({key: self._models[key] for key in self._known})
        doubted = {key for key in above if above[key] > (_SMOOTH_EXCESS if self._models[key].kind in SMOOTH else _EXCESS)}
        return [
            key
            for key, figures in self._visits.items()
            if key not in self._failed and len(figures) < _MOST_VISITS and (not _is_settled(figures) or key in doubted)
        ]

    def _believed(self, wanted: Mapping[str, Kernel]) -> dict[str, float]:
        """What is known of these models, without what a smooth kind's figures are above their suggestion: visits may all have been disturbed.

        The suggestion is that of these models alone, so that what others put into the cache changes nothing.
        """
        known = {key: self._known[key] for key in wanted if key in self._known}
        for key, above in self._excess({key: wanted[key] for key in known if wanted[key].kind in SMOOTH}).items():
            if _SMOOTH_EXCESS < above <= _DISTURBED:
                known[key] *= _SMOOTH_EXCESS / above
        return known

    def _excess(self, models: Mapping[str, Kernel]) -> dict[str, float]:
        """See `excess`: of these models, all of which are known."""
        found = excess(list(models.values()), np.array([self._known[key] for key in models]))
        return dict(zip(models, found.tolist(), strict=True))

    def failures(self) -> dict[str, str]:
        """Kernel (as JSON) -> why it could not be measured in this process's life."""
        return dict(self._failed)

    def _recipe(self, kernel: Kernel) -> list[tuple[int, str, Kernel]]:
        try:
            return [(factor, _key(model), model) for factor, model in recipe(as_product(kernel, self._most_positions))]
        except UsageError as err:
            self._failed[_key(kernel)] = str(err)
            return []

    def _measure(self, key: str, model: Kernel) -> float | None:
        """Seconds of one visit; None, and told in `failures`, where there can be none."""
        try:
            blob, signature = build(model, *self._placement, self._target.weight_range, self._floats)
        except (UsageError, ValueError, IndexError) as err:
            self._failed[key] = f"{model.kind}: no model can be built for it ({err})"
            return None
        process = self._process = self._process or Process(self._target, f"latency table of {self._target.name}")
        path = process.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.onnx"
        try:
            path.write_bytes(blob)
            times = process.ask(
                "kernel",
                _TIMEOUT_S,
                target=msgspec.to_builtins(self._target),
                path=str(path),
                signature=msgspec.to_builtins(signature),
                min_seconds=_SECONDS,
                min_calls=_CALLS,
            )
            path.unlink()
        except RuntimeFailed as err:
            self._failed[key] = str(err)
            if err.kind != "unsupported":
                process.close()
                self._process = None
            return None
        counted: Any = times["cpu"] if self._target.threads == 1 else times["wall"]
        return float(np.percentile(counted, _PERCENTILE))

    def _save(self) -> None:
        """Write what is final: a figure that time left with one visit, or that is doubted, must not outlive this run."""
        self._merge()
        open_ones = {*self._waiting(), *(key for key in self._failed if not _is_settled(self._visits.get(key, [])))}
        cache.write(self.path, {key: value for key, value in self._known.items() if key not in open_ones})


def _is_settled(figures: Sequence[float]) -> bool:
    lowest = sorted(figures)[:2]
    return len(figures) >= _VISITS and lowest[1] <= _AGREE * lowest[0]


def _key(kernel: Kernel) -> str:
    return msgspec.json.encode(kernel).decode()
