"""The machine that figures belong to: processor, instruction sets, cores, memory; which targets it has; known holes in what it runs."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from planish.measurement import Machine
from planish.runtimes.contract import get_runtime, installed
from planish.target import Facts, Target


def facts_from_flags(flags: str) -> Facts:
    """What a processor is good at, from its flags (x86: /proc/cpuinfo "flags"; ARM: "Features"). Nothing is read from this machine.

    The width multiple is the number of 32-bit lanes of a register (runtimes block channels by it), and 8 for NEON, whose kernels
    work on two registers at a time.
    """
    has = set(flags.split())
    is_wide = {"avx512f", "avx512bw", "avx512vl"} <= has
    has_amx = {"amx_tile", "amx_int8"} <= has
    has_vnni = "avx512_vnni" in has and is_wide
    if has_amx:
        isa = "amx"
    elif has_vnni:
        isa = "avx512_vnni"
    elif is_wide:
        isa = "avx512"
    elif "avx_vnni" in has:
        isa = "avx_vnni"
    elif "avx2" in has:
        isa = "avx2"
    elif "asimd" in has or "neon" in has:
        isa = "neon"
    else:
        isa = "unknown"
    return Facts(
        isa=isa,
        has_int8_dot=has_amx or has_vnni or "avx_vnni" in has or "asimddp" in has,
        has_bf16="amx_bf16" in has or "avx512_bf16" in has or "bf16" in has,
        width_multiple=16 if is_wide else 8,
        vector_bytes=64 if is_wide else 32 if "avx2" in has else 16,
    )


@functools.cache
def facts() -> Facts:
    """What this machine's processor is good at."""
    return facts_from_flags(_field("flags") or _field("Features"))


@functools.cache
def machine() -> Machine:
    """This machine. Two with the same fingerprint have the same processor model, instruction set, usable cores and memory class
    (its size to the nearest power of two), so that their figures may be compared.
    """
    processor = _field("model name") or platform.processor() or platform.machine()
    cores = usable_cores()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory_class = round(memory / 2**30).bit_length()
    stepping = "/".join(_field(name) for name in ("cpu family", "model", "stepping"))
    key = "|".join((processor, stepping, platform.machine(), facts().isa, str(cores), str(memory_class), platform.system()))
    return Machine(
        processor=re.sub(r"\s+", " ", processor).strip(),
        isa=facts().isa,
        cores=cores,
        memory_bytes=memory,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
    )


def usable_cores() -> int:
    """Cores that this process may run on, at least 1; a container's share of processor time counts as whole cores, rounded down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, _, period = limit.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


def available_targets(device: str = "cpu", threads: int | None = None) -> list[Target]:
    """A target for each installed runtime that drives `device`, on this machine.

    Args:
        device: "cpu".
        threads: of one call; None: all usable cores.
    """
    return [
        Target(name, device, threads or usable_cores(), facts=facts())
        for name in installed()
        if device in get_runtime(name, require=False).devices
    ]


def holes(version_of: Callable[[str], str] | None = None) -> list[str]:
    """One sentence for each installed package whose version has a hole that is known and closed in a later one.

    Args:
        version_of: gives a package's version or raises `PackageNotFoundError`; by default what is installed.
    """
    version_of = version_of or importlib.metadata.version
    known = {
        "torch": ((2, 10), "loading weights can run code that is hidden in them"),
        "onnx": ((1, 21), "external data of a model can point outside its folder"),
    }
    found = []
    for package, (closed_in, hole) in known.items():
        try:
            version = version_of(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:2])
        if numbers < closed_in:
            found.append(f"{package} {version}: {hole}; upgrade to {'.'.join(map(str, closed_in))} or later")
    return found


def _field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo, or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
