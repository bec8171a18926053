"""What every runtime must keep, as checks that a plug-in's author runs too.

    case = make_case("myruntime", tmp_path)                      # once
    for check in CHECKS.values():                                # or pytest.mark.parametrize
        check(case)

Each check raises `AssertionError` with what was expected and what came.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from planish.artifact.deployed import sqnr_db
from planish.errors import RuntimeFailed
from planish.graph.capture import capture
from planish.graph.graph import Graph
from planish.measure.machine import facts
from planish.measure.memory import size_bytes
from planish.measure.probe import Probe
from planish.runtimes.contract import Array, Runtime, get_runtime
from planish.target import Target

FLOAT_DB = 60.0
"""Signal to noise of an fp32 export against the module; sums in another order cost about 1e-7 each, which is 130 dB."""


@dataclass(frozen=True)
class Case:
    """A small net, exported for one runtime: two convolutions, a residual sum, a pool and a linear map; two inputs, two outputs."""

    runtime: Runtime
    graph: Graph
    before: dict[str, torch.Tensor]
    path: Path

    def target(self, threads: int = 1) -> Target:
        return Target(self.runtime.name, threads=threads, facts=facts())

    def open(self, threads: int = 1) -> Probe:
        return Probe.open(self.target(threads), self.path, self.graph.signature, timeout_s=300)

    def inputs(self, batch: int) -> list[Array]:
        rng = np.random.default_rng(batch)
        return [rng.standard_normal((batch, *tensor.shape[1:])).astype(np.float32) for tensor in self.graph.example]

    def expected(self, flat: list[Array]) -> list[Array]:
        with torch.no_grad():
            return [output.numpy() for output in self.graph.module(*(torch.from_numpy(array) for array in flat))]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 + 4, 5)

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.first(image))
        x = torch.relu(self.second(x) + x)
        pooled = x.mean((2, 3))
        return self.head(torch.cat([pooled, extra], 1)), pooled


def make_case(name: str, folder: Path) -> Case:
    """The net, captured and exported for the runtime `name` into `folder`."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    net = _Net().eval()
    example = (torch.randn(2, 3, 16, 16), torch.randn(2, 4))
    torch.random.set_rng_state(state)
    graph = capture(net, example)
    before = {key: value.clone() for key, value in graph.module.state_dict().items()}
    runtime = get_runtime(name)
    return Case(runtime, graph, before, runtime.export(graph, folder))


def says_what_it_is(case: Case) -> None:
    """It is installed, has a version, and exported under its own file name."""
    assert case.runtime.missing() is None
    assert case.runtime.versions()
    assert "fp32" in case.runtime.schemes
    assert "cpu" in case.runtime.devices
    assert case.path.name == case.runtime.model_file
    assert ("int8" in case.runtime.schemes) == bool(case.runtime.quantize_inputs_of)


def export_leaves_the_graph_alone(case: Case) -> None:
    """Parameters and buffers are the same after exporting."""
    after = case.graph.module.state_dict()
    assert after.keys() == case.before.keys()
    assert all(torch.equal(after[key], value) for key, value in case.before.items())


def equals_the_module(case: Case) -> None:
    """Outputs in order, equal to the module's, at batch 1, 3 and 17, at once and in batches with a short last one."""
    with case.open() as probe:
        for n, batch in ((3, None), (1, None), (17, None), (17, 5)):
            flat = case.inputs(n)
            outputs = probe.outputs(flat, batch)
            for expected, actual in zip(case.expected(flat), outputs, strict=True):
                assert actual.shape == expected.shape, (n, batch, actual.shape, expected.shape)
                assert actual.dtype == expected.dtype
                found = sqnr_db(expected, actual)
                assert found > FLOAT_DB, f"{found:.0f} dB at {n} samples in batches of {batch}"


def keeps_zeros_as_it_says(case: Case) -> None:
    """A net nine tenths of whose second convolution are zero: the same outputs as the module, in a smaller file where the runtime says so."""
    masked = case.graph.copy()
    weight = masked.module.get_parameter("second.weight")
    with torch.no_grad():
        weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.9, 0.0)
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        path = case.runtime.export(masked, Path(folder))
        saved = size_bytes(case.path) - size_bytes(path)
        assert (saved > 2000) == case.runtime.stores_sparse, f"{saved} bytes of {4 * weight.numel()} saved"
        flat = case.inputs(3)
        with Probe.open(case.target(), path, masked.signature, timeout_s=300) as probe, torch.no_grad():
            expected = masked.module(*(torch.from_numpy(array) for array in flat))
            for want, got in zip(expected, probe.outputs(flat), strict=True):
                assert sqnr_db(want.numpy(), got) > FLOAT_DB


def repeats_itself(case: Case) -> None:
    """The same inputs give the same bits, before and after other inputs and timing, and inputs are not written to."""
    with case.open() as probe:
        flat = case.inputs(3)
        kept = [array.copy() for array in flat]
        first = [np.array(output) for output in probe.outputs(flat)]
        probe.outputs(case.inputs(2))
        probe.time(case.inputs(1), 0.01)
        second = probe.outputs(flat)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(flat, kept, strict=True))


def proves_what_ran(case: Case) -> None:
    """Two convolutions and a linear map, in floating point, on the device that was asked for."""
    with case.open() as probe:
        probe.time(case.inputs(1), 0.0, min_calls=2)
        proof = probe.proof()
    assert proof.device.lower() == "cpu"
    assert proof.int8_kernels == 0
    assert proof.float_kernels == 3, proof
    assert set(proof.precisions) == {"f32"} or "bf16" not in proof.precisions, proof
    assert proof.kernels


def is_idle_between_calls(case: Case) -> None:
    """Its threads stop spinning soon after a call: less than a fifth of a core in the half second that follows."""
    with case.open(threads=2) as probe:
        probe.time(case.inputs(1), 0.05)
        process = psutil.Process(probe.pid)
        begin = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        used = sum(process.cpu_times()[:2]) - begin
    assert used < 0.1, f"{used:.2f} s of CPU time while idle for 0.5 s"


def refuses_what_is_no_model(case: Case) -> None:
    """An HTML page, an empty file, and half a model end in an error of the measuring process, not of the parent."""
    whole = case.path.read_bytes()
    contents = {"page": b"<!DOCTYPE html><html><body>404</body></html>", "empty": b"", "half": whole[: len(whole) // 2]}
    for name, content in contents.items():
        broken = case.path.with_name(f"{name}{case.path.suffix}")
        broken.write_bytes(content)
        refused = _refusal(case, broken)
        assert refused is not None, f"{case.runtime.name} opened {broken.name}, which is no model"
        assert broken.name in str(refused), refused
        assert refused.kind in ("unsupported", "crashed", "out of memory"), refused.kind


def _refusal(case: Case, path: Path) -> RuntimeFailed | None:
    try:
        Probe.open(case.target(), path, case.graph.signature, timeout_s=60).close()
    except RuntimeFailed as err:
        return err
    return None


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        says_what_it_is,
        export_leaves_the_graph_alone,
        equals_the_module,
        keeps_zeros_as_it_says,
        repeats_itself,
        proves_what_ran,
        is_idle_between_calls,
        refuses_what_is_no_model,
    )
}
