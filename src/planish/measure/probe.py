"""A probe: one exported model in a measuring process of its own, which may crash or hang without taking its parent along."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import msgspec
import numpy as np

import planish
from planish.errors import MissingFile, RuntimeFailed
from planish.measurement import Proof
from planish.runtimes.contract import Array
from planish.signature import Signature
from planish.target import Target

CHILD = "planish.measure.child"
"""The module whose `main` the child runs; tests put `planish.testing.faulty` here, which also has runtimes that crash."""

_open_processes: weakref.WeakSet[Process] = weakref.WeakSet()


class Sample(NamedTuple):
    """Seconds of consecutive calls: `wall` by the clock, `cpu` of the whole process (all threads)."""

    wall: list[float]
    cpu: list[float]


class Process:
    """A measuring process and the requests to it. Anything it does that is no answer becomes a `RuntimeFailed`.

    The process dies with the thread that made this object, and when the object is closed.

    Args:
        target: its interpreter runs the child; its threads bound the thread pools of numerical libraries.
        what: names the model in messages.
    """

    def __init__(self, target: Target, what: str) -> None:
        self.what = what
        self.folder = Path(tempfile.mkdtemp(prefix="planish-"))
        self._said = (self.folder / "stderr").open("w+b")
        self._buffer = b""
        self._failure: RuntimeFailed | None = None
        root = str(Path(planish.__file__).parents[1])
        code = f"import sys; sys.path.append({root!r}); from {CHILD} import main; main()"
        threads = str(target.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PLANISH_PARENT": str(os.getpid()),
        }
        try:
            self._process = subprocess.Popen(
                [target.interpreter or sys.executable, "-P", "-X", "faulthandler", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=environment,
                start_new_session=True,
            )
        except OSError as err:
            self._said.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RuntimeFailed("unsupported", f"{what}: the interpreter {target.interpreter!r} cannot be started: {err}") from err
        self.pid = self._process.pid
        _open_processes.add(self)

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> Any:
        """The child's answer to one request.

        Raises:
            RuntimeFailed: "crashed", "timed out", "out of memory" or "unsupported". After the first two the child is gone.
        """
        self.require_alive(do)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(time.monotonic() + timeout_s)
        except BrokenPipeError:
            raise self._died(do) from None
        except TimeoutError:
            self.close()
            said = f"{self.what}: no answer to {do!r} within {timeout_s:.3g} s; the measuring process was ended"
            self._failure = RuntimeFailed("timed out", said)
            raise self._failure from None
        if line is None:
            raise self._died(do)
        answer = json.loads(line)
        if "error" in answer:
            failure = RuntimeFailed(answer["error"], f"{self.what}: {answer['message']}")
            failure.add_note(answer["traceback"])
            raise failure
        return answer["ok"]

    def require_alive(self, do: str) -> None:
        """Raise what ended the process, if it has ended."""
        if self._failure is not None:
            raise RuntimeFailed(self._failure.kind, str(self._failure))
        if self._process.poll() is not None:
            raise self._died(do)

    def _read_line(self, deadline: float) -> bytes | None:
        """The next line from the child, or None at the end of its output."""
        stream: IO[bytes] | None = self._process.stdout
        assert stream is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(stream.fileno(), 1 << 20)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, do: str) -> RuntimeFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        self._said.seek(0)
        said = self._said.read()[-4000:].decode(errors="replace")
        self.close()
        if code is not None and code == -signal.SIGKILL:
            kind, how = "out of memory", "was killed (SIGKILL), most likely for lack of memory"
        elif code is not None and code < 0:
            kind, how = "crashed", f"crashed with {signal.Signals(-code).name}"
        else:
            kind, how = "crashed", f"ended with exit code {code}"
        if "bad_alloc" in said or "MemoryError" in said:
            kind = "out of memory"
        failure = RuntimeFailed(kind, f"{self.what}: the measuring process {how} at {do!r}")
        failure.add_note(said)
        self._failure = failure
        return failure

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs and can be asked."""
        return self._process.poll() is None and self._process.stdin is not None and not self._process.stdin.closed

    def close(self) -> None:
        """End the process and everything that it started; may be called twice."""
        _open_processes.discard(self)
        self._failure = self._failure or RuntimeFailed("crashed", f"{self.what}: the measuring process was closed")
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdin, process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@atexit.register
def _close_all() -> None:
    for process in list(_open_processes):
        process.close()


class Probe:
    """One exported model in a measuring process. A context manager; made by `Probe.open`."""

    def __init__(self, process: Process, target: Target, signature: Signature, timeout_s: float) -> None:
        self.target, self.signature = target, signature
        self._process, self._timeout_s = process, timeout_s
        self._bound: list[Array] | None = None
        self._files = 0

    @classmethod
    def open(
        cls, target: Target, path: Path | str, signature: Signature, timeout_s: float = 120.0, memory_limit_bytes: int | None = None
    ) -> Probe:
        """Start a process for `target` and load the model at `path` in it.

        Args:
            timeout_s: seconds that any one request may take; a compiling runtime needs minutes.
            memory_limit_bytes: address space of the process; None: no limit of ours.

        Raises:
            MissingFile: there is no file at `path`.
            RuntimeFailed: the runtime crashed, hung or refused the model.
        """
        if not Path(path).is_file():
            raise MissingFile(f"measure: there is no model file at {str(path)!r}")
        process = Process(target, f"{target.name}, {'/'.join(Path(path).parts[-3:])}")
        try:
            process.ask(
                "open",
                timeout_s,
                target=msgspec.to_builtins(target),
                path=str(Path(path).resolve()),
                signature=msgspec.to_builtins(signature),
                memory_limit_bytes=memory_limit_bytes,
            )
        except BaseException:
            process.close()
            raise
        return cls(process, target, signature, timeout_s)

    @property
    def pid(self) -> int:
        """Process id of the measuring process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the measuring process still runs."""
        return self._process.is_alive

    def outputs(self, flat: list[Array], batch: int | None = None, timeout_s: float | None = None) -> list[Array]:
        """The model's outputs for all samples, as memory-mapped arrays with the sample axis first.

        Args:
            flat: inputs in the signature's order, the same number of samples along axis 0; memory maps are handed over by name.
            batch: samples in one call; None: all at once.
            timeout_s: seconds that the whole may take; by default the probe's.
        """
        self._process.require_alive("run")
        self.signature.check(flat)
        self._bound = None
        outputs = [self._new_file() for _ in self.signature.outputs]
        names = [self._file_of(array) for array in flat]
        self._process.ask("run", timeout_s or self._timeout_s, inputs=names, batch=batch, outputs=outputs)
        results = [np.load(path, mmap_mode="c") for path in outputs]
        for path in (*outputs, *(n for n in names if n.startswith(str(self._process.folder)))):
            os.unlink(path)  # the maps keep the outputs
        return results

    def time(self, flat: list[Array], min_seconds: float, min_calls: int = 1, max_calls: int = 1_000_000) -> Sample:
        """Seconds of consecutive calls on `flat`: as many as fit into `min_seconds`, at least `min_calls`, at most `max_calls`.

        The inputs are handed over at the first call and again whenever another list comes.
        """
        if self._bound is not flat:
            self._process.require_alive("bind")
            self.signature.check(flat)
            names = [self._file_of(array) for array in flat]
            self._process.ask("bind", self._timeout_s, inputs=names)
            self._bound = flat
        answer = self._process.ask("time", self._timeout_s + min_seconds, min_seconds=min_seconds, min_calls=min_calls, max_calls=max_calls)
        return Sample(answer["wall"], answer["cpu"])

    def proof(self) -> Proof:
        """What the runtime executes, read back from it."""
        return msgspec.convert(self._process.ask("proof", self._timeout_s), Proof)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident bytes of the measuring process so far, the interpreter and the runtime included."""
        return int(self._process.ask("memory", self._timeout_s))

    def close(self) -> None:
        """End the measuring process; may be called twice."""
        self._process.close()

    def _new_file(self) -> str:
        self._files += 1
        return str(self._process.folder / f"{self._files}.npy")

    def _file_of(self, array: Array) -> str:
        """A .npy file with `array`: the one that it maps as a whole, or a new one."""
        if isinstance(array, np.memmap) and array.filename is not None and array.flags.c_contiguous:
            path = str(array.filename)
            if path.endswith(".npy") and os.path.isfile(path):
                whole = np.load(path, mmap_mode="r")
                if whole.shape == array.shape and whole.dtype == array.dtype and whole.offset == array.offset:
                    return os.path.abspath(path)
        path = self._new_file()
        np.save(path, np.ascontiguousarray(array))
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
