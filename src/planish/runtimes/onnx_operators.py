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


@torch.library.custom_op("planish::onnx_scatter", mutates_args=())
def _onnx_scatter(x: Tensor, index: Tensor, source: Tensor, dim: int, reduce: str, include_self: bool) -> Tensor:
    raise NotImplementedError("this operator exists only to be exported")


@_onnx_scatter.register_fake
def _(x: Tensor, index: Tensor, source: Tensor, dim: int, reduce: str, include_self: bool) -> Tensor:
    return torch.empty_like(x)


_ONNX_REDUCTION = {"sum": ("add", 0.0), "prod": ("mul", 1.0), "amax": ("max", float("-inf")), "amin": ("min", float("inf"))}
"""ONNX's name of a reduction, and what changes nothing in it."""


def _scatter(x: Any, index: Any, source: Any, dim: int, reduce: str, include_self: bool) -> Any:
    """Slices are scattered along the first axis, to which `dim` is moved and from which it is moved back."""
    reduction, neutral = _ONNX_REDUCTION[reduce]
    axes = list(range(len(x.shape)))
    axes[0], axes[dim] = axes[dim], axes[0]
    rows = op.Reshape(index, op.Constant(value_ints=[-1, 1]))
    if dim:
        x, source = op.Transpose(x, perm=axes), op.Transpose(source, perm=axes)
    if not include_self:
        x = op.ScatterND(x, rows, op.ConstantOfShape(op.Shape(source), value=ir.tensor([neutral], dtype=ir.DataType.FLOAT)))
    found = op.ScatterND(x, rows, source, reduction=reduction)
    return op.Transpose(found, perm=axes) if dim else found


def scatter_slices(graph: fx.Graph) -> None:
    """Scatter whole slices where an index is one vector, repeated along all other dimensions, in place.

    ONNX's ScatterElements, which takes an index per element, takes ONNX Runtime 47 times as long for a graph convolution on Cora (13,264 edges, 64
    wide: 8.0 and 0.17 ms on one thread of a Zen 4), and OpenVINO 8 times.

    Args:
        graph: of an exported program, with its values' sizes.
    """
    for node in graph.nodes:
        if node.target is aten.scatter_add.default:
            x, dim, index, source = node.args
            reduce, include_self = "sum", True
        elif node.target is aten.scatter_reduce.two and node.args[4] in _ONNX_REDUCTION:
            x, dim, index, source, reduce = node.args
            include_self = bool(node.kwargs.get("include_self", True))
        else:
            continue
        if index.target not in (aten.expand.default, aten.expand_as.default):
            continue
        rows, shape, rank = index.args[0].meta["val"], index.meta["val"].shape, x.meta["val"].dim()
        dim %= max(1, rank)
        is_vector = rows.dim() == rank and all(d == dim or size == 1 for d, size in enumerate(rows.shape))
        covers = source.meta["val"].shape == shape and all(d == dim or x.meta["val"].shape[d] == shape[d] for d in range(rank))
        if is_vector and covers and x.meta["val"].dtype == torch.float32 and rows.shape[dim] == shape[dim]:
            node.target = torch.ops.planish.onnx_scatter.default
            node.args, node.kwargs = (x, index.args[0], source, dim, reduce, include_self), {}
    graph.eliminate_dead_code()


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
        torch.ops.planish.onnx_scatter.default: _scatter,
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
