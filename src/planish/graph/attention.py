"""Attention in static int8: two products of rounded operands, with probabilities on a grid from zero to one, or to the largest that calibration data gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from planish.graph.fake_quantize import fake_quantize_per_tensor_affine
from planish.graph.interpret import attribute

_decomposed = torch.ops.quantized_decomposed
LEVELS = 255


def has_fixed_keys(node: fx.Node) -> bool:
    """Whether a query always sees the same number of keys, as far as the node says: no mask, no later keys hidden. Each probability then has a
    bound that data can tell; else a query that sees few keys gives each of them more than any that sees many."""
    masked = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    return masked is None and not causal


_HIDDEN = -3.0e38


def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What each query gives each key, [..., queries, keys], and which queries a mask lets see something, or None where all do.

    Args:
        query, key, value: [..., queries or keys, width]; `value` is not looked at, nor is `dropout_p`.
        attn_mask: boolean, True where a query sees a key, or added to the scores, or None.
        is_causal: whether queries see no later keys.
        scale: of the products; None for one over the root of the width.
        enable_gqa: False.
    """
    scores = torch.matmul(query, key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores.softmax(-1), None
    if attn_mask.dtype == torch.bool:
        is_seen, added = attn_mask, torch.where(attn_mask, 0.0, _HIDDEN)
    else:
        is_seen, added = attn_mask > -math.inf, attn_mask.clamp_min(_HIDDEN)
    return (scores + added).softmax(-1), is_seen.any(-1, keepdim=True)


def _on_grid(weights: Tensor, step: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=weights.device)
    return fake_quantize_per_tensor_affine(weights, step, zero, 0, LEVELS)


def static_attention(*arguments: Any, step: Tensor | float, rounded: Callable[[Tensor, Any], Tensor] = _on_grid, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` with rounded probabilities; softmax itself is in float.

    Args:
        arguments, options: those of `probabilities`; query, key and value are rounded already. A query that a mask lets see nothing
            gives zeros, as in torch.
        step: of the probabilities' grid. What gives each of many keys less than half of it gives them nothing.
        rounded: what rounds the probabilities.
    """
    weights, sees = probabilities(*arguments, **options)
    found = torch.matmul(rounded(weights, step), arguments[2])
    return found if sees is None else found * sees


def exported_attention(*arguments: Any, step: float, **options: Any) -> Tensor:
    """The same with a quantize / dequantize pair, as it is traced for export."""

    def rounded(weights: Tensor, step: float) -> Tensor:
        grid = step, 0, 0, LEVELS, torch.uint8
        found: Tensor = _decomposed.dequantize_per_tensor(_decomposed.quantize_per_tensor(weights, *grid), *grid)
        return found

    return static_attention(*arguments, **options, step=step, rounded=rounded)


def trace_attention(module: fx.GraphModule) -> None:
    """Put what is exported in the place of `static_attention`, in place."""
    for node in module.graph.nodes:
        if node.target is static_attention:
            node.target = exported_attention
            node.update_kwarg("step", float(attribute(module, str(node.kwargs["step"].target))))
