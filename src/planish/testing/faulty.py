"""A runtime that fails on demand, for tests of whoever must survive one: put this module's name into `planish.measure.probe.CHILD`.

Its model is a JSON file that says what to do at which request: `{"open": "segfault"}`, `{"bind": ["spin", 0.001]}`. Requests are
"open", "run", "bind", "call" (each timed call), "proof" and "close"; faults are the functions of `FAULTS`. Where it has nothing
to do it is the identity: the outputs are the inputs, in order.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planish import registry
from planish.errors import RuntimeFailed
from planish.measure import child
from planish.measurement import Proof
from planish.runtimes.contract import Array
from planish.signature import Signature
from planish.target import Target


def _refuse() -> None:
    raise RuntimeFailed("unsupported", "this runtime has no operator 'Gargle'")


def _exhaust() -> None:
    raise MemoryError


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _noise() -> None:
    os.write(1, b'{"ok": "printed by native code"}\n')
    sys.stdout.write('{"ok": "printed by Python"}\n')
    sys.stdout.flush()


FAULTS: dict[str, Callable[..., Any]] = {
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "hang": lambda: time.sleep(3600),
    "sleep": time.sleep,
    "spin": _spin,
    "memory": _exhaust,
    "allocate": bytearray,
    "refuse": _refuse,
    "noise": _noise,
}


class Faulty:
    """The runtime "faulty", known in the child only."""

    name = "faulty"

    def missing(self) -> str | None:
        return None

    def open(self, path: Path, signature: Signature, target: Target) -> FaultySession:
        return FaultySession(json.loads(path.read_text()))


class FaultySession:
    """The identity, with the faults that its model asks for."""

    def __init__(self, faults: dict[str, Any]) -> None:
        self._faults = faults
        self._at("open")

    def _at(self, request: str) -> None:
        fault = self._faults.get(request)
        if fault is not None:
            name, *arguments = [fault] if isinstance(fault, str) else fault
            FAULTS[name](*arguments)

    def run(self, flat: list[Array]) -> list[Array]:
        self._at("run")
        return flat

    def bind(self, flat: list[Array]) -> Callable[[], object]:
        self._at("bind")
        return lambda: self._at("call")

    def proof(self) -> Proof:
        self._at("proof")
        return Proof("CPU", {"Identity": 1}, {"f32": 1}, 0, 1)

    def close(self) -> None:
        self._at("close")


def main() -> None:
    """The measuring process, with one more runtime."""
    registry.BUILT_IN["runtime"]["faulty"] = "planish.testing.faulty:Faulty"
    child.main()
