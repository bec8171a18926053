"""How a step is computed fastest here: memory layout and arithmetic, decided by a short timed probe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.graph.graph import Graph
from planish.graph.modes import short_name

_WORTH = 1.15  # bf16 costs accuracy of gradients, so it must save clearly more than noise
_REPEATS = 5


@dataclass(frozen=True)
class Arithmetic:
    """`channels_last`: images with channels innermost. `bf16`: autocast to bfloat16."""

    channels_last: bool = False
    bf16: bool = False

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context that the forward pass runs in."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            yield

    def arrange(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs in the layout that was chosen."""
        return [self._arranged(tensor) for tensor in inputs]

    def _arranged(self, tensor: Tensor) -> Tensor:
        if not self.channels_last or not tensor.is_floating_point():
            return tensor
        if tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor.contiguous(memory_format=torch.channels_last_3d) if tensor.dim() == 5 else tensor

    @torch.no_grad()
    def arrange_parameters_(self, graph: Graph) -> None:
        """Give every parameter the layout that was chosen (or the plain one), in place."""
        for parameter in graph.module.parameters():
            if parameter.dim() in (4, 5):
                parameter.data = self._arranged(parameter.data).contiguous() if not self.channels_last else self._arranged(parameter.data)


def has_convolution(graph: Graph) -> bool:
    """Whether the program convolves images or volumes, for which the layout matters."""
    return any(short_name(node) in ("conv2d", "conv3d", "conv_transpose2d") for node in graph.module.graph.nodes)


def has_fake_quantize(graph: Graph) -> bool:
    """Whether the program trains with quantization in place."""
    return any(short_name(node).startswith("fake_") for node in graph.module.graph.nodes)


def choose(graph: Graph, step: Callable[[Arithmetic], None], is_timed: bool) -> Arithmetic:
    """The arithmetic to train `graph` with.

    Args:
        graph: decides what is eligible: channels last where there are 2-D convolutions, bf16 where nothing is fake-quantized.
        step: one forward and backward pass with some arithmetic; must leave no trace.
        is_timed: whether a probe pays; without it channels last is taken where it is eligible, and bf16 never.

    Measured on ResNet-20, batch 64, per CPU second of an AVX-512 machine with bf16: plain 239 images, channels last 299, bf16 430, both 451.
    """
    plain = Arithmetic()
    if has_convolution(graph):
        try:
            step(Arithmetic(channels_last=True))
            plain = Arithmetic(channels_last=True)
        except RuntimeError:  # a view that only the plain layout allows
            pass
    if not is_timed or has_fake_quantize(graph) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return plain
    fast = Arithmetic(plain.channels_last, bf16=True)
    try:
        step(fast)
    except RuntimeError:  # an operator that has no bf16 kernel
        return plain
    seconds: dict[Arithmetic, list[float]] = {plain: [], fast: []}
    for _ in range(_REPEATS):
        for arithmetic, found in seconds.items():
            began = time.process_time()
            step(arithmetic)
            found.append(time.process_time() - began)
    # the quickest of each: whatever else happens meanwhile only adds
    return fast if min(seconds[plain]) >= _WORTH * min(seconds[fast]) else plain
