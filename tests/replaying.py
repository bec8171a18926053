"""A measurer that replays: latency is a function of the exported model's bytes, so that a run's choices depend on its seed alone.

`install` puts it in place of the clock wherever the flow looks at one. Models are still exported, opened in their measuring
processes and run; only times, memory and peaks of the machine are made up.
"""

from __future__ import annotations

import math
import os
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planish import conclude, offers, pursuit, trial, trials, workbench
from planish.measure.kernels import Kernel
from planish.measure.latency import Timing
from planish.measure.probe import Probe
from planish.measurement import Estimate
from planish.study.store import Study
from planish.target import Target

LARGER_IS_QUICKER = "larger is quicker"
NOISY = "noisy"
_ROUNDS = 8
_opened: weakref.WeakKeyDictionary[Probe, Path] = weakref.WeakKeyDictionary()
_FACTORS = {"onnxruntime": 1.0, "openvino": 1.3, "torch": 2.5, "torch-compile": 2.0}


def seconds_of(path: Path, runtime: str, behaviour: str = "") -> float:
    """The made-up latency of a model: proportional to its size; with `LARGER_IS_QUICKER` whatever is smaller takes longer."""
    size = path.stat().st_size
    return _FACTORS[runtime] * (1e3 / size if behaviour == LARGER_IS_QUICKER else 1e-8 * size)


def timings(probes: Mapping[str, Any], behaviour: str = "") -> dict[str, Timing]:
    """What `planish.measure.latency.interleaved` would return."""
    out = {}
    for i, (name, probe) in enumerate(probes.items()):
        s = seconds_of(_opened[probe], probe.target.runtime, behaviour)
        spread = 0.9 if behaviour == NOISY else 0.01
        found = Estimate(s, s * (1 - spread), s * (1 + spread), _ROUNDS, behaviour != NOISY)
        scatter = [1 + spread * math.sin(3 * k + i) if behaviour == NOISY else 1.0 for k in range(_ROUNDS)]
        out[name] = Timing(found, found, 3, tuple(s * share for share in scatter), (s,) * _ROUNDS)
    return out


class ReplayingTable:
    """Kernels whose seconds follow their weights, as the models' do."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def seconds(self, kernels: Sequence[Kernel], progress: Any = None, deadline: float | None = None) -> np.ndarray:
        """Four bytes a weight, one in int8."""
        sizes = [sum(math.prod(shape) for shape in kernel.weights) * (1 if kernel.precision == "int8" else 4) for kernel in kernels]
        return 1e-8 * np.array(sizes, dtype=np.float64) + 1e-9


def install(put: Callable[[Any, str, Any], object] = setattr, behaviour: str = "") -> None:
    """Replace every clock of the flow, with `setattr` or a `MonkeyPatch.setattr`."""

    def interleaved(probes: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Timing]:
        return timings(probes, behaviour)

    real_open = Probe.open

    def opened(target: Target, path: Path, *arguments: Any, **named: Any) -> Probe:
        probe = real_open(target, path, *arguments, **named)
        _opened[probe] = Path(path)
        return probe

    put(Probe, "open", opened)
    for module in (workbench, trial, conclude):
        put(module, "interleaved", interleaved)
    put(offers, "Table", ReplayingTable)
    for module in (pursuit, trials, conclude):
        put(module, "peak_memory_bytes", lambda target, path, *_: 1_000_000 + path.stat().st_size)
    put(conclude, "roofline_s", lambda *_: 1e-6)
    put(workbench, "_EAGER", ())
    put(conclude, "_PAUSE_S", 0.0)


def die_after(number: int, how: int = signal.SIGKILL, put: Callable[[Any, str, Any], object] = setattr) -> None:
    """Send this process a signal as soon as its study holds `number` finished trials of its own, each counted once."""
    before, done = Study.record, 0

    def record(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal done
        answer = before(self, *arguments, **named)
        done += not named.get("again", False)  # another visit to a trial is no further one
        if done == number:
            os.kill(os.getpid(), how)
        return answer

    put(Study, "record", record)


def path_of(probe: Probe) -> Path:
    """The model that a probe was opened with."""
    return _opened[probe]
