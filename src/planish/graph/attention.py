"""Attention in static int8: two products of rounded operands, with probabilities on a grid that is fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from planish.graph.fake_quantize import fake_quantize_per_tensor_affine

_decomposed = torch.ops.quantized_decomposed
PROBABILITY = 1 / 255
"""The step of the probabilities' grid: softmax gives 0 to 1 whatever comes in, so that nothing is calibrated and nothing clipped.
A query that looks at many keys alike loses by it: where each gets less than half a step nothing is left (attention spread evenly over 512 keys)."""
_HIDDEN = -3.0e38


def _on_grid(weights: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=weights.device)
    return fake_quantize_per_tensor_affine(weights, weights.new_tensor(PROBABILITY), zero, 0, 255)


def static_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rounded: Callable[[Tensor], Tensor] = _on_grid,
) -> Tensor:
    """`scaled_dot_product_attention` with rounded probabilities; softmax itself is in float.

    Args:
        query, key, value: rounded already; [..., queries or keys, width].
        attn_mask: boolean, True where a query sees a key, or added to the scores, or None. A query that one lets see nothing gives zeros, as
            in torch.
        dropout_p: not looked at.
        is_causal: whether queries see no later keys.
        scale: of the products; None for one over the root of the width.
        enable_gqa: False.
        rounded: what rounds the probabilities.
    """
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return torch.matmul(rounded(scores.softmax(-1)), value)
    if attn_mask.dtype == torch.bool:
        is_seen, added = attn_mask, torch.where(attn_mask, 0.0, _HIDDEN)
    else:
        is_seen, added = attn_mask > -math.inf, attn_mask.clamp_min(_HIDDEN)
    return torch.matmul(rounded((scores + added).softmax(-1)), value) * is_seen.any(-1, keepdim=True)


def exported_attention(*arguments: Any, **options: Any) -> Tensor:
    """The same with a quantize / dequantize pair, as it is traced for export."""

    def rounded(weights: Tensor) -> Tensor:
        grid = PROBABILITY, 0, 0, 255, torch.uint8
        found: Tensor = _decomposed.dequantize_per_tensor(_decomposed.quantize_per_tensor(weights, *grid), *grid)
        return found

    return static_attention(*arguments, **options, rounded=rounded)


def trace_attention(module: fx.GraphModule) -> None:
    """Put what is exported in the place of `static_attention`, in place."""
    for node in module.graph.nodes:
        if node.target is static_attention:
            node.target = exported_attention
