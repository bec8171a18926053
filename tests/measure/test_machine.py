"""Machine facts from simulated processor flags, fingerprints, known holes."""

from __future__ import annotations

import importlib.metadata

import pytest

from planish.measure.machine import available_targets, facts_from_flags, holes, machine, usable_cores
from planish.target import Target

AVX2 = "fpu sse2 avx f16c fma avx2 bmi2"
AVX512 = AVX2 + " avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    ("flags", "isa", "dot", "bf16", "multiple", "width", "weights"),
    [
        ("fpu sse2 ssse3", "unknown", False, False, 8, 16, 63),
        (AVX2, "avx2", False, False, 8, 32, 63),
        (AVX2 + " avx_vnni", "avx_vnni", True, False, 8, 32, 127),
        (AVX512, "avx512", False, False, 16, 64, 63),
        (AVX512 + " avx512_vnni", "avx512_vnni", True, False, 16, 64, 127),
        (AVX512 + " avx512_vnni avx512_bf16", "avx512_vnni", True, True, 16, 64, 127),
        (AVX512 + " avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16", "amx", True, True, 16, 64, 127),
        (AVX2 + " avx512_vnni", "avx2", False, False, 8, 32, 63),  # a hypervisor that masks avx512f masks what needs it
        ("fp asimd evtstrm", "neon", False, False, 8, 16, 63),
        ("fp asimd asimddp bf16", "neon", True, True, 8, 16, 127),
    ],
)
def test_facts_from_flags(flags, isa, dot, bf16, multiple, width, weights):
    facts = facts_from_flags(flags)
    assert (facts.isa, facts.has_int8_dot, facts.has_bf16, facts.width_multiple, facts.vector_bytes) == (isa, dot, bf16, multiple, width)
    assert Target("openvino", facts=facts).weight_range == weights


def test_machine_is_the_same_each_time():
    found = machine()
    machine.cache_clear()
    assert machine() == found
    assert int(found.fingerprint, 16) >= 0
    assert found.cores == usable_cores() >= 1
    assert found.memory_bytes > 2**28


def test_available_targets_have_facts_and_threads():
    targets = {target.runtime: target for target in available_targets(threads=1)}
    assert {"onnxruntime", "torch", "torch-compile"} <= set(targets)
    assert all(target.threads == 1 and target.facts == targets["torch"].facts for target in targets.values())
    assert available_targets("abacus") == []


def test_holes_are_named_by_package_and_version():
    versions = {"torch": "2.9.1+cpu", "onnx": "1.20.0"}
    assert [sentence.partition(":")[0] for sentence in holes(versions.__getitem__)] == ["torch 2.9.1+cpu", "onnx 1.20.0"]
    assert all("upgrade to" in sentence for sentence in holes(versions.__getitem__))
    assert holes({"torch": "2.10.0", "onnx": "1.21.0rc1"}.__getitem__) == []

    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    assert holes(none) == []
