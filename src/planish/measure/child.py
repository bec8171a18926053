"""The measuring process: holds one exported model, answers JSON lines on what was its standard output. Started by `probe.py`.

It loads numpy and the runtime, nothing else. Native libraries may print what they like: file descriptor 1 is pointed at standard
error before any of them is loaded, and replies go to a duplicate of the old one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from planish import registry
from planish.errors import PlanishError, RuntimeFailed
from planish.measure.resident import peak_resident_bytes
from planish.runtimes.contract import Array, Session
from planish.signature import Signature
from planish.target import Target

Request = dict[str, Any]

_FEWEST_KEPT, _KEPT_THREADS, _KEPT_BYTES = 16, 800, 2**28
"""How many kernels stay open: each has threads of its own, and its weights once or twice."""


def main() -> None:
    """Answer requests from standard input until it ends or a request says "close"."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    server = _Server()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "close":
            server.close()
            break
        try:
            answer = {"ok": getattr(server, request.pop("do"))(**request)}
        except Exception as err:  # noqa: BLE001 - the child's boundary: whatever a runtime raises goes to the parent as a value
            answer = {"error": _kind(err), "message": _message(err), "traceback": traceback.format_exc()}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    replies.flush()
    os._exit(0)  # some runtimes crash while they are unloaded, when everything is said


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux; elsewhere end of input does it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() == 1 and os.environ.get("PLANISH_PARENT") != "1":
            os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kind(err: Exception) -> str:
    text = str(err).lower()
    if isinstance(err, MemoryError) or "bad_alloc" in text or "can't allocate memory" in text or "failed to allocate memory" in text:
        return "out of memory"
    return err.kind if isinstance(err, RuntimeFailed) else "unsupported"


def _message(err: Exception) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    said = lines[0][:400] if lines else ""
    return said if isinstance(err, PlanishError) else f"{type(err).__name__}: {said}"


class _Server:
    """The requests that `main` answers, one method each; arguments and results are JSON."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._signature: Signature | None = None
        self._call: Callable[[], object] | None = None
        self._kernels: dict[str, tuple[Session, Callable[[], object], int]] = {}

    def open(self, target: dict[str, Any], path: str, signature: dict[str, Any], memory_limit_bytes: int | None) -> None:
        if memory_limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
        self._signature = msgspec.convert(signature, Signature)
        self._session = _open(msgspec.convert(target, Target), path, self._signature)

    def run(self, inputs: list[str], batch: int | None, outputs: list[str]) -> None:
        """Run samples in batches; inputs are .npy files with the sample axis first, outputs are written as .npy files."""
        assert self._session is not None and self._signature is not None
        run_batches(self._session, self._signature, [np.load(path, mmap_mode="r") for path in inputs], batch, outputs)

    def bind(self, inputs: list[str]) -> None:
        assert self._session is not None
        self._call = self._session.bind([np.load(path) for path in inputs])
        gc.freeze()  # a collection before each block would take 15 ms, with torch 80

    def time(self, min_seconds: float, min_calls: int, max_calls: int) -> dict[str, list[float]]:
        assert self._call is not None, "bind comes before time"
        wall, cpu = timed(self._call, min_seconds, min_calls, max_calls)
        return {"wall": wall, "cpu": cpu}

    def kernel(
        self, target: dict[str, Any], path: str, signature: dict[str, Any], min_seconds: float, min_calls: int
    ) -> dict[str, list[float]]:
        """Time one small model of fixed shapes on inputs of its own. It stays open: opening takes longer than a visit."""
        place = msgspec.convert(target, Target)
        if path not in self._kernels:
            size, most = os.path.getsize(path), max(_FEWEST_KEPT, _KEPT_THREADS // place.threads)
            while self._kernels and (len(self._kernels) >= most or size + sum(kept[2] for kept in self._kernels.values()) > _KEPT_BYTES):
                self._kernels.pop(next(iter(self._kernels)))[0].close()
            spec = msgspec.convert(signature, Signature)
            session = _open(place, path, spec)
            self._kernels[path] = session, session.bind(example(spec)), size
        call = self._kernels[path][1]
        gc.freeze()
        for _ in range(3):
            call()
        wall, cpu = timed(call, min_seconds, min_calls, 100_000)
        return {"wall": wall, "cpu": cpu}

    def peaks(self, seconds: float, threads: int) -> dict[str, Any]:
        from planish.measure.roofline import measure_peaks

        return measure_peaks(seconds, threads)

    def proof(self) -> Any:
        assert self._session is not None
        return msgspec.to_builtins(self._session.proof())

    def memory(self) -> int:
        """Peak resident bytes of this process so far."""
        return peak_resident_bytes()

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def _open(target: Target, path: str, signature: Signature) -> Session:
    runtime = registry.get("runtime", target.runtime)()
    missing = runtime.missing()
    if missing is not None:
        raise RuntimeFailed("unsupported", f"{target.runtime}: {missing}")
    session: Session = runtime.open(Path(path), signature, target)
    return session


def timed(call: Callable[[], object], min_seconds: float, min_calls: int, max_calls: int) -> tuple[list[float], list[float]]:
    """Wall and process CPU seconds of each of the calls that fit into `min_seconds`, at least `min_calls`, at most `max_calls`."""
    wall: list[float] = []
    cpu: list[float] = []
    clock, used = time.perf_counter_ns, time.process_time_ns
    with _no_collection():
        end = clock() + int(min_seconds * 1e9)
        spent = used()
        while len(wall) < max_calls:
            begin = clock()
            call()
            now = clock()
            spent, before = used(), spent
            wall.append((now - begin) * 1e-9)
            cpu.append((spent - before) * 1e-9)
            if now >= end and len(wall) >= min_calls:
                break
    return wall, cpu


@contextlib.contextmanager
def _no_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def example(signature: Signature) -> list[Array]:
    """Inputs for a signature of fixed shapes: normal floats, and zeros for integers and booleans."""
    rng = np.random.default_rng(0)
    flat = []
    for spec in signature.inputs:
        shape = [1 if isinstance(size, str) else size for size in spec.shape]
        is_float = np.issubdtype(np.dtype(spec.dtype), np.floating)
        flat.append(rng.standard_normal(shape).astype(spec.dtype) if is_float else np.zeros(shape, spec.dtype))
    return flat


def run_batches(session: Session, signature: Signature, flat: list[Array], batch: int | None, outputs: list[str]) -> None:
    """Run `flat` (sample axis first) through a session and write each output to a .npy file.

    Args:
        flat: arrays with the same number of samples n along axis 0.
        batch: samples of a call; None: all in one call. Where an input's batch axis is fixed, that size is taken instead.
        outputs: one path for each output of the signature.

    A last batch that is too short for a fixed axis is filled up with its last sample, and the surplus outputs are dropped.
    """
    n = len(flat[0]) if flat and flat[0].ndim else 1
    fixed = next((spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], int)), None)
    size = min(n, batch) if batch is not None else n
    size = fixed if isinstance(fixed, int) else size
    if size == n:
        for path, result in zip(outputs, session.run([np.array(a) for a in flat]), strict=True):
            np.save(path, result)
        return
    files: list[Array] = []
    for start in range(0, n, size):
        rows = min(size, n - start)
        part = [np.array(a[start : start + rows]) for a in flat]
        if fixed is not None and rows < size:
            part = [np.concatenate([a, np.repeat(a[-1:], size - rows, axis=0)]) for a in part]
        results = session.run(part)
        if not files:
            for path, result, spec in zip(outputs, results, signature.outputs, strict=True):
                if result.ndim == 0 or len(result) != len(part[0]):
                    raise RuntimeFailed("unsupported", f"output {spec.name!r} has no sample axis: it cannot be run in batches of {size}")
                files.append(np.lib.format.open_memmap(path, "w+", result.dtype, (n, *result.shape[1:])))
        for file, result in zip(files, results, strict=True):
            file[start : start + rows] = result[:rows]
    for file in files:
        file.flush()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
