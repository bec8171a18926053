"""How many threads torch computes with: fewer where other processes keep the cores busy, since OpenMP's barriers wait by spinning.

With one other busy process on two cores a convolutional net takes four to seven times as long on two threads as on one: at every
barrier one thread spins through its time slice while the other waits for a core. The number that is quickest right now is found by
trying, in a few milliseconds, and tried again from time to time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_AGAIN_S = 10.0
_PASSES = 6
_WORTH = 1.1  # what more threads must gain over one to be taken


class Threads:
    """The number of torch's threads, chosen anew at most every ten seconds; a context manager that puts it back.

    Args:
        most: threads at most; by default as many as torch has.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most or torch.get_num_threads()
        self._before = torch.get_num_threads()
        self._tried = -_AGAIN_S

    def settle(self) -> None:
        """Choose again, where the last choice is old."""
        if self.most == 1 or time.monotonic() - self._tried < _AGAIN_S:
            return
        one, many = seconds_with(1), seconds_with(self.most)
        torch.set_num_threads(self.most if one > _WORTH * many else 1)
        self._tried = time.monotonic()

    def restore(self) -> None:
        """As many threads as there were in the beginning."""
        torch.set_num_threads(self._before)


@contextmanager
def settled_threads() -> Iterator[Threads]:
    """As many threads as are quickest now; `settle` may be called again inside; put back at the end."""
    threads = Threads()
    threads.settle()
    try:
        yield threads
    finally:
        threads.restore()


def seconds_with(count: int) -> float:
    """Wall seconds of a small convolution on `count` threads: the median of a few passes."""
    torch.set_num_threads(count)
    weight = torch.ones(32, 32, 3, 3)
    images = torch.ones(16, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    taken = []
    with torch.inference_mode():
        for _ in range(_PASSES):
            began = time.perf_counter()
            torch.relu(torch.conv2d(images, weight, padding=1))
            taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]
