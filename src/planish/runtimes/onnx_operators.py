"""ONNX forms of the operators that torch's exporter has none for, or a slower one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from torch import Tensor, fx

from planish.graph.modes import short_name

aten = torch.ops.aten
op: Any = opset18  # its annotations ask for tensors where it takes its own symbolic values


@torch.library.custom_op("planish::onnx_lstm", mutates_args=())
def _onnx_lstm(x: Tensor, h0: Tensor, c0: Tensor, w: Tensor, r: Tensor, b: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("this operator exists only to be exported")


@_onnx_lstm.register_fake
def _(x: Tensor, h0: Tensor, c0: Tensor, w: Tensor, r: Tensor, b: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], r.shape[2]), torch.empty_like(h0), torch.empty_like(c0)


@torch.library.custom_op("planish::onnx_gru", mutates_args=())
def _onnx_gru(x: Tensor, h0: Tensor, w: Tensor, r: Tensor, b: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("this operator exists only to be exported")


@_onnx_gru.register_fake
def _(x: Tensor, h0: Tensor, w: Tensor, r: Tensor, b: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], r.shape[2]), torch.empty_like(h0)


def _lstm(x: Any, h0: Any, c0: Any, w: Any, r: Any, b: Any, batch_first: bool) -> Any:
    steps = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    y, h, c = op.LSTM(steps, w, r, b, None, h0, c0, hidden_size=int(r.shape[2]))
    y = op.Squeeze(y, op.Constant(value_ints=[1]))
    return (op.Transpose(y, perm=[1, 0, 2]) if batch_first else y), h, c


def _gru(x: Any, h0: Any, w: Any, r: Any, b: Any, batch_first: bool) -> Any:
    steps = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    y, h = op.GRU(steps, w, r, b, None, h0, hidden_size=int(r.shape[2]), linear_before_reset=1)
    y = op.Squeeze(y, op.Constant(value_ints=[1]))
    return (op.Transpose(y, perm=[1, 0, 2]) if batch_first else y), h


def _batch_norm(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, cudnn: bool) -> Any:
    return op.BatchNormalization(x, gamma, beta, mean, variance, epsilon=eps)


def _to(x: Any, dtype: int, *ignored: Any) -> Any:
    return op.Cast(x, to=dtype)


def _to_device(x: Any, device: Any, dtype: int, *ignored: Any) -> Any:
    return op.Cast(x, to=dtype)


def _to_layout(x: Any, dtype: int | None = None, **ignored: Any) -> Any:
    return op.Identity(x) if dtype in (None, -1) else op.Cast(x, to=dtype)


def _attention(
    query: Any, key: Any, value: Any, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None
) -> Any:
    """Attention with a boolean mask. A row that may see nothing gives zeros, as in torch.

    Differs: the exporter's own looks for NaN in the whole [batch, heads, queries, keys] matrix; this multiplies the result instead.
    """
    width = int(query.shape[-1])
    scaled = op.Mul(query, op.Constant(value_float=float(width**-0.5 if scale is None else scale)))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[*range(len(key.shape) - 2), len(key.shape) - 1, len(key.shape) - 2]))
    if mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    bias = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=-3.0e38))
    seen = op.ReduceMax(op.Cast(mask, to=ir.DataType.FLOAT), op.Constant(value_ints=[-1]), keepdims=1)
    return op.Mul(op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), value), seen)


def _is_plain_attention(node: fx.Node) -> bool:
    """Whether `_attention` covers this node: float32, no causal flag, no grouped queries, no mask or a boolean one."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    query = node.args[0]
    assert isinstance(query, fx.Node)
    is_boolean = mask is None or (isinstance(mask, fx.Node) and mask.meta["val"].dtype == torch.bool)
    return is_boolean and not causal and not node.kwargs.get("enable_gqa", False) and query.meta["val"].dtype == torch.float32


def _clone(x: Any, memory_format: Any = None) -> Any:
    return op.Identity(x)


def _global_average(x: Any, output_size: Any) -> Any:
    return op.GlobalAveragePool(x)


def translations(graph: fx.Graph) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for operators that the exporter has none for; for a kind of pooling only where it is global throughout."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.planish.onnx_lstm.default: _lstm,
        torch.ops.planish.onnx_gru.default: _gru,
        aten.clone.default: _clone,
        aten.to.dtype: _to,
        aten.to.device: _to_device,
        aten.to.dtype_layout: _to_layout,
    }
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    if all(None not in node.args[1:5] and not node.args[5] for node in nodes if short_name(node) == "batch_norm"):
        table[aten.batch_norm.default] = _batch_norm
    if all(_is_plain_attention(node) for node in nodes if short_name(node) == "scaled_dot_product_attention"):
        table[aten.scaled_dot_product_attention.default] = _attention
    for pool in (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default):
        mine = [node for node in nodes if node.target is pool]
        if mine and all(set(node.args[1]) == {1} and len(node.args[0].meta["val"].shape) == len(node.args[1]) + 2 for node in mine):
            table[pool] = _global_average
    return table
