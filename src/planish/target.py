"""A target: a runtime on a device, with its threads, and what that device is good at."""

from __future__ import annotations

import msgspec

from planish.errors import UnknownName, UsageError


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device is good at, read from the machine (or simulated by a test).

    Args:
        isa: "avx2", "avx512", "avx512_vnni", "avx_vnni", "amx", "neon", or "unknown".
        has_int8_dot: whether u8 x s8 products accumulate without saturating in 16 bits (VNNI, AMX, dot product).
        has_bf16: whether bf16 products are executed in hardware.
        width_multiple: channels are cheap in multiples of this many.
        vector_bytes: bytes in a SIMD register.
    """

    isa: str = "unknown"
    has_int8_dot: bool = False
    has_bf16: bool = False
    width_multiple: int = 8
    vector_bytes: int = 16


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the artifact must run.

    Args:
        runtime: a registered runtime ("onnxruntime", "openvino", "torch").
        device: "cpu" (others come with their runtimes).
        threads: threads of one call; at least 1.
        interpreter: the Python that has the runtime; "" is this one.
        facts: what the device is good at.
    """

    runtime: str
    device: str = "cpu"
    threads: int = 1
    interpreter: str = ""
    facts: Facts = Facts()

    @property
    def name(self) -> str:
        """`runtime:device`, as the user writes it."""
        return f"{self.runtime}:{self.device}"

    @property
    def thread_counts(self) -> list[Target]:
        """The same target with one thread, with half of its threads, and as it is: each once, the fewest first."""
        return [msgspec.structs.replace(self, threads=count) for count in sorted({1, max(1, self.threads // 2), self.threads})]

    @property
    def weight_range(self) -> int:
        """The largest magnitude of an int8 weight: 63 where u8 x s8 saturates (no VNNI), else 127."""
        return 127 if self.facts.has_int8_dot else 63


def parse_target(text: str, runtimes: list[str]) -> tuple[str | None, str]:
    """`(runtime, device)` from `"cpu"` (runtime None: all that are installed) or `"openvino:cpu"`.

    Raises:
        UnknownName: a runtime that is not in `runtimes`.
        UsageError: a device that no built-in runtime drives.
    """
    runtime, colon, device = text.strip().rpartition(":")
    if colon and runtime not in runtimes:
        raise UnknownName("runtime", runtime, runtimes)
    if not colon and device in runtimes:
        device, runtime = "cpu", device
    if device != "cpu":
        raise UsageError(
            f"target: {text[:60]!r} asks for the device {device[:40]!r}; this version drives 'cpu': give 'cpu', or "
            + ", ".join(f"'{name}:cpu'" for name in runtimes)
        )
    return runtime or None, device
