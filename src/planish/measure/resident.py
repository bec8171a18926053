"""What this process holds of the machine's memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Now, on Linux; elsewhere the most so far."""
    return _status("VmRSS:") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most so far. On Linux of this program alone: `ru_maxrss` remembers what was there before it was started."""
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    """A line of Linux's account of the process, in bytes; 0 where there is none."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
