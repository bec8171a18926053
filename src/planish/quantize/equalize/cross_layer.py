"""Cross-layer equalization: what a channel weighs in two operators is shared out evenly between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.modes import short_name
from planish.graph.parts import Parts, bias_of, known_parts, parts_of
from planish.quantize.equalize.channels import (
    POINTWISE,
    input_ranges,
    is_read_by,
    output_ranges,
    scale_inputs_,
    scale_outputs_,
    weight_node,
)

HOMOGENEOUS = POINTWISE | {"max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"}
"""Operators with f(s x) = s f(x) for every s > 0 and every channel."""
SWEEPS = 20
SETTLED = 1e-3  # a sweep that changes no channel by more than this share is the last


@torch.no_grad()
def equalize_layers(module: GraphModule) -> list[tuple[str, str]]:
    """Scales the channels between pairs of operators so that both weights have the same range in each; the outputs stay the same.

    A pair are two convolutions, or two linear maps, between which nothing but positively homogeneous operators stand and nobody else
    reads. Channel i of the first is divided by s_i and that of the second multiplied, s_i = sqrt(range_1 / range_2); pairs that share
    an operator pull at each other, hence the sweeps. A channel that either does not use is left as it is.

    Args:
        module: changed in place; its batch norm is folded, in eval mode.

    Returns:
        fx names of the pairs, in the order of the program.

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.1, equation 11.
    """
    pairs = [(first, second) for second in module.graph.nodes if (first := _partner(module, second)) is not None]
    for _ in range(SWEEPS):
        change = max((_equalize(module, first, second) for first, second in pairs), default=0.0)
        if change <= SETTLED:
            break
    return [(first.name, second.name) for first, second in pairs]


def _partner(module: GraphModule, second: Node) -> Node | None:
    """The operator whose output channels are the input channels of `second` and of nothing else."""
    if not _is_whole(module, second):
        return None
    parts = known_parts(second)
    value = second.args[parts.activations[0]]
    while isinstance(value, Node) and len(value.users) == 1:
        found = parts_of(value)
        if isinstance(found, Parts):
            is_pair = _is_whole(module, value) and (found.kind == "conv") == (parts.kind == "conv")
            return value if is_pair and len(output_ranges(module, value)) == len(input_ranges(module, second)) else None
        if short_name(value) not in HOMOGENEOUS:
            return None
        value = value.args[0]
    return None


def _is_whole(module: GraphModule, node: Node) -> bool:
    """Whether an operator has a weight and perhaps a bias of its own, all finite."""
    weight = weight_node(node)
    if weight is None or any(not is_read_by(module, own, {node}) for own in (weight, bias_of(node)) if own is not None):
        return False
    return bool(torch.isfinite(output_ranges(module, node)).all())


def _equalize(module: GraphModule, first: Node, second: Node) -> float:
    """Equalizes one pair; the largest relative change of a channel."""
    before, after = output_ranges(module, first), input_ranges(module, second)
    factors = torch.where((before > 0) & (after > 0), (before / after).sqrt(), torch.ones_like(before))
    factors = torch.where(torch.isfinite(factors) & (factors > 0), factors, torch.ones_like(factors))
    scale_outputs_(module, first, factors.reciprocal())
    scale_inputs_(module, second, factors)
    return _largest_change(factors)


def _largest_change(factors: Tensor) -> float:
    return float((factors - 1).abs().max())
