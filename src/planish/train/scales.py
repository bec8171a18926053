"""Scales of quantizers that learn: as parameters while a net trains, in steps that are a share of themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from planish.graph.attention import static_attention
from planish.graph.fake_quantize import (
    PER_CHANNEL,
    fake_quantize_per_channel_affine,
    fake_quantize_per_group,
    fake_quantize_per_tensor_affine,
)
from planish.graph.graph import Graph
from planish.graph.interpret import attribute

_LEARNING = (fake_quantize_per_tensor_affine, fake_quantize_per_channel_affine, fake_quantize_per_group, static_attention)


@contextlib.contextmanager
def learning_scales(graph: Graph) -> Iterator[None]:
    """Within, the scales of a graph's quantizers are parameters that training finds; before and after, they are buffers like zero points.

    Quantizers per channel are `aten`'s outside, which gives no gradient for a scale, and ours, which rounds alike, within.

    Args:
        graph: changed in place, and changed back; one whose scales are numbers in the program keeps them.
    """
    module = graph.module
    swapped = [node for node in module.graph.nodes if node.target is PER_CHANNEL and _scale(node) is not None]
    for node in swapped:
        node.target = fake_quantize_per_channel_affine
    names = {str(scale.target) for node in module.graph.nodes if node.target in _LEARNING and (scale := _scale(node)) is not None}
    held = {name: owner for name in sorted(names) if name.rpartition(".")[2] in (owner := _owner(module, name))._buffers}
    for name, owner in held.items():
        leaf = name.rpartition(".")[2]
        values = owner._buffers.pop(leaf)
        assert values is not None
        owner.register_parameter(leaf, nn.Parameter(values))
    module.recompile()
    try:
        yield
    finally:
        for name, owner in held.items():
            leaf = name.rpartition(".")[2]
            values = owner._parameters.pop(leaf)
            assert values is not None
            owner.register_buffer(leaf, values.detach())
        for node in swapped:
            node.target = PER_CHANNEL
        module.recompile()


def _owner(module: GraphModule, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _scale(node: Node) -> Node | None:
    scale = node.kwargs["step"] if node.target is static_attention else node.args[1]
    return scale if isinstance(scale, Node) and scale.op == "get_attr" else None


def activation_bits(graph: Graph) -> int:
    """The fewest bits that an activation of a graph is rounded to; 8 where none is."""
    grids = [node.args[3:5] for node in graph.module.graph.nodes if node.target is fake_quantize_per_tensor_affine]
    return min((int(high - low).bit_length() for low, high in grids), default=8)


def scales_of(graph: Graph) -> list[Tensor]:
    """The scales that are parameters now, each once."""
    found = {}
    for node in graph.module.graph.nodes:
        if node.target in _LEARNING and (scale := _scale(node)) is not None:
            found[str(scale.target)] = attribute(graph.module, str(scale.target))
    return [scale for scale in found.values() if isinstance(scale, nn.Parameter)]


class ScaleSteps(torch.optim.Optimizer):
    """Adam on the logarithms: a step multiplies a scale, which so stays positive and moves as fast whatever its size.

    Args:
        params: scales, of any shape.
        lr: about the share of itself by which a scale changes in a step.
        betas: of the averages of the gradient and of its square.

    Differs: in the paper scales take SGD's steps at the rate of the weights, which may leave them at or below zero.

    References: Kingma and Ba 2015; Jain et al., Trained Quantization Thresholds, 2020 (logarithms).
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of all scales of a group, taken together as one vector: they are many, and small."""
        assert closure is None
        for group in self.param_groups:
            scales = group["params"]
            gradient = torch.cat([(torch.zeros_like(s) if s.grad is None else s.grad * s).flatten() for s in scales])
            state = self.state[scales[0]]
            if not state:
                state.update(steps=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
            state["steps"] += 1
            first, second = group["betas"]
            state["mean"].lerp_(gradient, 1 - first)
            state["square"].lerp_(gradient.square(), 1 - second)
            mean, square = state["mean"] / (1 - first ** state["steps"]), state["square"] / (1 - second ** state["steps"])
            factors = (mean / square.sqrt().clamp(min=_TINY)).mul_(-group["lr"]).exp_()
            for scale, factor in zip(scales, factors.split([s.numel() for s in scales]), strict=True):
                scale.mul_(factor.view(scale.shape))


_TINY = 1e-15
"""Gradients below it count as zero: a channel that is never read has no direction."""
