"""The roofline: the least time that a machine's arithmetic and memory allow, from peaks that are measured once and cached.

References: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model" (2009).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from planish.errors import RuntimeFailed
from planish.measure import cache
from planish.measure.machine import facts, machine
from planish.measure.probe import Process
from planish.target import Target

_SIZES = (128 << 10, 2 << 20, 16 << 20, 256 << 20)


class Peaks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What this machine reached at best.

    Args:
        macs_per_s: fp32 multiply-accumulates per second of all threads (a large matrix product).
        bytes_per_s: pairs of a working set in bytes and the bytes per second that were read from it, sizes ascending: caches are quicker.
    """

    macs_per_s: float
    bytes_per_s: tuple[tuple[int, float], ...]


def peaks(threads: int = 1, folder: Path | None = None, seconds: float = 1.5) -> Peaks:
    """The peaks of this machine at `threads` threads: measured in a child process at the first call, then from the cache.

    Raises:
        RuntimeFailed: the measuring process failed.
    """
    path = (folder or cache.cache_folder()) / f"peaks-{machine().fingerprint}-{threads}-1.json"
    try:
        return msgspec.convert(cache.read(path), Peaks)
    except msgspec.ValidationError:
        pass
    process = Process(Target("onnxruntime", threads=threads, facts=facts()), "roofline")
    try:
        found = msgspec.convert(process.ask("peaks", 60 + 4 * seconds, seconds=seconds, threads=threads), Peaks)
    finally:
        process.close()
    cache.write(path, msgspec.to_builtins(found))
    return found


def int8_speed(target: Target) -> float:
    """How many int8 multiply-accumulates stand for one in fp32: 4 with a dot product instruction (four to a lane), else 2."""
    return 4.0 if target.facts.has_int8_dot else 2.0


def roofline_s(target: Target, macs: float, bytes_moved: float, int8_macs: float = 0.0, best: Peaks | None = None) -> float | None:
    """The least seconds for a call: the larger of arithmetic at its peak and of memory at the bandwidth of its working set.

    Args:
        macs: multiply-accumulates in fp32.
        bytes_moved: weights, inputs and outputs, each once; intermediate values may stay in registers, so they are no lower bound.
        int8_macs: multiply-accumulates in int8, on top of `macs`.
        best: measured peaks; by default this machine's at the target's threads.

    Returns:
        Seconds, or None where the peaks cannot be measured.
    """
    if best is None:
        try:
            best = peaks(target.threads)
        except RuntimeFailed:
            return None
    bandwidth = max(speed for size, speed in best.bytes_per_s if size >= bytes_moved or size == best.bytes_per_s[-1][0])
    return max((macs + int8_macs / int8_speed(target)) / best.macs_per_s, bytes_moved / bandwidth)


def measure_peaks(seconds: float, threads: int) -> dict[str, Any]:
    """`Peaks` as JSON, measured in this process, whose BLAS must have been limited to `threads` threads before numpy was loaded."""
    n = 1024
    a, b = (np.random.default_rng(0).standard_normal((n, n)).astype(np.float32) for _ in range(2))
    product = np.empty_like(a)
    best = _best(lambda: np.matmul(a, b, out=product), seconds)
    speeds = []
    with ThreadPoolExecutor(threads) as pool:
        for size in _SIZES:
            parts = [np.ones(max(size // threads // 4, 1), np.float32) for _ in range(threads)]
            repeats = max(1, (4 << 20) // size)

            def read(part: Any, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    part.max()

            took = _best(lambda parts=parts, read=read: list(pool.map(read, parts)), seconds / 4)
            speeds.append((size, size * repeats / took))
    return {"macs_per_s": n**3 / best, "bytes_per_s": speeds}


def _best(call: Any, seconds: float) -> float:
    """Seconds of the quickest call of those that fit into `seconds`, at least 3."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
