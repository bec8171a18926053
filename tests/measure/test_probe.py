"""A measuring process may crash, hang, print, run out of memory: its parent gets one sentence and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from planish.errors import DataError, MissingFile, RuntimeFailed
from planish.measure import probe as probe_module
from planish.measure.probe import Probe
from planish.signature import Signature, TensorSpec
from planish.target import Target

FAULTY = Target("faulty")


def signature(*shape: int | str, dtype: str = "float32") -> Signature:
    return Signature((TensorSpec("x", dtype, shape),), (TensorSpec("y", dtype, shape),), "tensor", "tensor")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that opens a probe whose model has the given faults."""
    monkeypatch.setattr(probe_module, "CHILD", "planish.testing.faulty")

    def start(faults: dict, timeout_s: float = 60.0, shape: tuple = ("batch", 2), **options) -> Probe:
        path = tmp_path / "faulty.json"
        path.write_text(json.dumps(faults))
        return Probe.open(FAULTY, path, signature(*shape), timeout_s, **options)

    return start


def x(n: int) -> list[np.ndarray]:
    return [np.arange(2 * n, dtype=np.float32).reshape(n, 2)]


def use(start, at: str, fault: str, timeout_s: float = 60.0) -> None:
    """Open a probe whose model has a fault, and make the request that meets it."""
    with start({at: fault}, timeout_s) as probe:
        assert at != "open", "it must fail to open"
        if at == "run":
            probe.outputs(x(1))
        elif at == "proof":
            probe.proof()
        else:
            probe.time(x(1), 0.001)


@pytest.mark.parametrize("at", ["open", "run", "bind", "call", "proof"])
@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("segfault", "crashed", "crashed with SIGSEGV"),
        ("abort", "crashed", "crashed with SIGABRT"),
        ("exit", "crashed", "ended with exit code 3"),
        ("kill", "out of memory", "was killed"),
        ("memory", "out of memory", "MemoryError"),
        ("refuse", "unsupported", "no operator 'Gargle'"),
    ],
)
def test_a_fault_is_one_sentence(start, at, fault, kind, says):
    with pytest.raises(RuntimeFailed) as caught:
        use(start, at, fault)
    assert caught.value.kind == kind
    assert says in str(caught.value)
    assert "faulty:cpu, " in str(caught.value) and "/faulty.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", ["open", "call"])
def test_a_hang_ends_in_time(start, at):
    begin = time.monotonic()
    with pytest.raises(RuntimeFailed, match=r"no answer to '(open|time)' within 3 s") as caught:
        use(start, at, "hang", timeout_s=3.0)
    assert caught.value.kind == "timed out"
    assert time.monotonic() - begin < 20


def test_after_a_crash_every_request_says_so_and_nothing_is_left(start):
    probe = start({"run": "segfault"})
    folder, pid = probe._process.folder, probe.pid
    for _ in range(2):
        with pytest.raises(RuntimeFailed, match="crashed with SIGSEGV"):
            probe.outputs(x(1))
    probe.close()
    assert not folder.exists()
    assert not psutil.pid_exists(pid)


def test_a_refused_request_leaves_the_process_usable(start):
    with start({"run": "refuse"}) as probe:
        with pytest.raises(RuntimeFailed, match="Gargle"):
            probe.outputs(x(1))
        assert probe.proof().kernels == {"Identity": 1}


def test_native_prints_do_not_reach_the_protocol(start):
    with start({"open": "noise", "run": "noise", "call": "noise"}) as probe:
        assert np.array_equal(probe.outputs(x(3))[0], x(3)[0])
        assert len(probe.time(x(1), 0.0, min_calls=4).wall) == 4


def test_a_memory_limit_ends_in_out_of_memory(start):
    with pytest.raises(RuntimeFailed) as caught, start({"run": ["allocate", 2**33]}, memory_limit_bytes=2**32) as probe:
        probe.outputs(x(1))
    assert caught.value.kind == "out of memory"


def test_outputs_in_batches(start, tmp_path):
    with start({}) as probe:
        for n, batch in ((1, None), (7, None), (7, 3), (6, 3), (2, 100)):
            assert np.array_equal(probe.outputs(x(n), batch)[0], x(n)[0])
        kept = probe.outputs(x(5))[0]
        np.save(tmp_path / "x.npy", x(9)[0])
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert probe._file_of(mapped) == str(tmp_path / "x.npy"), "a whole map is handed over by name"
        assert np.array_equal(probe.outputs([mapped], 4)[0], mapped)
        assert np.array_equal(probe.outputs([mapped[2:5]], 2)[0], mapped[2:5]), "a part of a map is not the map"
        with pytest.raises(DataError, match="'x' must be float32"):
            probe.outputs([np.zeros((1, 2))])
    assert np.array_equal(kept, x(5)[0]), "outputs outlive the probe"


def test_a_fixed_batch_is_filled_up(start):
    with start({}, shape=(4, 2)) as probe:
        probe.signature = signature("batch", 2)  # what the parent checks; the child knows that the axis is fixed
        assert np.array_equal(probe.outputs(x(7))[0], x(7)[0])


def test_time_counts_calls_and_seconds(start):
    with start({"call": ["spin", 0.002]}) as probe:
        sample = probe.time(x(1), 0.02, min_calls=3)
        assert len(sample.wall) == len(sample.cpu) >= 3
        # A call spins for 2 ms by the clock: never less; a disturbed machine may add to some calls, but not to all of them.
        assert min(sample.wall) >= 0.002
        assert min(sample.cpu) < min(sample.wall) + 0.002
        assert len(probe.time(x(1), 0.0, min_calls=5).wall) == 5
        assert len(probe.time(x(1), 5.0, max_calls=2).wall) == 2


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(MissingFile, match=r"no model file at .*gone\.onnx"):
        Probe.open(FAULTY, tmp_path / "gone.onnx", signature("batch", 2))


def test_an_interpreter_that_is_not_there(tmp_path):
    (tmp_path / "m").write_text("{}")
    with pytest.raises(RuntimeFailed, match="cannot be started"):
        Probe.open(Target("faulty", interpreter=str(tmp_path / "python")), tmp_path / "m", signature("batch", 2))


PARENT = """
import sys, time
from pathlib import Path
from planish.measure import probe
from planish.signature import Signature, TensorSpec
from planish.target import Target
probe.CHILD = "planish.testing.faulty"
spec = Signature((TensorSpec("x", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch", 2)),), "tensor", "tensor")
child = probe.Probe.open(Target("faulty"), Path(sys.argv[1]), spec)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_child_does_not_outlive_its_parent(tmp_path, how):
    (tmp_path / "m").write_text("{}")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "m")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, how)
        parent.wait(20)
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone or child.status() == psutil.STATUS_ZOMBIE


def test_the_child_loads_numpy_and_nothing_heavy():
    heavy = "torch onnx onnxruntime openvino scipy sklearn sqlalchemy pandas click rich"
    code = f"import sys, planish.measure.child; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_of_the_caller_is_not_searched_for_modules(start, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the user was imported')")
    monkeypatch.chdir(tmp_path)
    with start({}) as probe:
        assert Path(probe._process.folder).is_dir()
