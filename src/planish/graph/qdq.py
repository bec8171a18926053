"""Fake-quantized nodes become quantize / dequantize pairs for export, and quantized weights become int8 constants."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from planish.graph.fake_quantize import PER_CHANNEL, fake_codebook, fake_quantize_per_tensor_affine
from planish.graph.graph import Graph
from planish.graph.interpret import attribute
from planish.graph.modes import short_name

aten = torch.ops.aten
_decomposed = torch.ops.quantized_decomposed
_PER_TENSOR = (
    fake_quantize_per_tensor_affine,
    aten.fake_quantize_per_tensor_affine.default,
    aten.fake_quantize_per_tensor_affine.tensor_qparams,
)
_FULL_RANGES = {(0, 255): torch.uint8, (-128, 127): torch.int8}


def is_quantized(graph: Graph) -> bool:
    """Whether the program holds a fake-quantized node."""
    return any(short_name(node).startswith("fake_") for node in graph.module.graph.nodes)


def to_qdq(graph: Graph) -> Graph:
    """A copy whose fake-quantized nodes are `quantized_decomposed` pairs, for `to_onnx`; it computes the same, and does not train.

    A weight is stored as int8 (or uint8) under its own name with the suffix "_quantized", and only dequantized. An activation
    whose range is not the whole of its type is clamped first, since ONNX's QuantizeLinear saturates at the type's range.

    Args:
        graph: not changed; scales and zero points are numbers, or parameters and buffers (read now).
    """
    swapped = graph.copy()
    module = swapped.module
    for node in list(module.graph.nodes):
        if node.target in _PER_TENSOR:
            _swap_per_tensor(module, node)
        elif node.target is fake_codebook:
            _swap_codebook(module, node)
        elif node.target is PER_CHANNEL:
            _swap_per_channel(module, node)
    module.graph.eliminate_dead_code()
    clean = fx.GraphModule(module, module.graph)
    for submodule in clean.modules():
        submodule.training = module.training
    swapped.module = clean
    return swapped


def _number(module: fx.GraphModule, value: object) -> float:
    """A scale or zero point that is a literal, or a tensor of one element."""
    return float(attribute(module, str(value.target)).item()) if isinstance(value, fx.Node) else float(value)  # type: ignore[arg-type]


def _dtype(low: int) -> torch.dtype:
    return torch.int8 if low < 0 else torch.uint8


def held(module: fx.GraphModule, path: str, value: Tensor) -> fx.Node:
    """A `get_attr` node, at the insertion point, of a new buffer; an equal one of that name is used again."""
    parent, _, leaf = path.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    number = 1
    while (known := getattr(owner, leaf, None)) is not None and not (known.dtype == value.dtype and torch.equal(known, value)):
        number += 1
        leaf = f"{path.rpartition('.')[2]}_{number}"
    owner.register_buffer(leaf, value)
    return module.graph.get_attr(f"{parent}.{leaf}" if parent else leaf)


def _swap_per_tensor(module: fx.GraphModule, node: fx.Node) -> None:
    x, scale_argument, zero_argument, low, high = node.args
    assert isinstance(x, fx.Node) and isinstance(low, int) and isinstance(high, int)
    scale, zero, dtype = _number(module, scale_argument), int(_number(module, zero_argument)), _dtype(low)
    graph = module.graph
    quantizer = (scale, zero, low, high, dtype)
    with graph.inserting_before(node):
        if x.op == "get_attr":
            weight: Tensor = attribute(module, str(x.target)).detach()
            stored = _decomposed.quantize_per_tensor.default(weight, *quantizer)
            quantized = held(module, f"{x.target}_quantized", stored)
        else:
            if (low, high) not in _FULL_RANGES:
                x = graph.call_function(aten.clamp.default, (x, (low - zero) * scale, (high - zero) * scale))
            quantized = graph.call_function(_decomposed.quantize_per_tensor.default, (x, *quantizer))
        result = graph.call_function(_decomposed.dequantize_per_tensor.default, (quantized, *quantizer))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _swap_codebook(module: fx.GraphModule, node: fx.Node) -> None:
    """A weight with few values is a constant; the file keeps it as what it is."""
    x, values = (attribute(module, str(argument.target)).detach() for argument in node.args)  # type: ignore[union-attr]
    with module.graph.inserting_before(node):
        stored = held(module, f"{node.args[0].target}_shared", fake_codebook(x, values))  # type: ignore[union-attr]
    node.replace_all_uses_with(stored)
    module.graph.erase_node(node)


def _swap_per_channel(module: fx.GraphModule, node: fx.Node) -> None:
    x, scale_argument, zero_argument, axis, low, high = node.args
    assert isinstance(x, fx.Node) and isinstance(scale_argument, fx.Node) and isinstance(zero_argument, fx.Node)
    assert isinstance(low, int) and isinstance(axis, int)
    dtype = _dtype(low)
    scales = attribute(module, str(scale_argument.target)).detach().float()
    zeros = attribute(module, str(zero_argument.target)).detach()
    graph = module.graph
    with graph.inserting_before(node):
        if x.op == "get_attr":
            weight: Tensor = attribute(module, str(x.target)).detach()
            stored = _decomposed.quantize_per_channel.default(weight, scales, zeros.to(torch.int64), axis, low, high, dtype)
            quantized = held(module, f"{x.target}_quantized", stored)
        else:
            quantized = graph.call_function(
                _decomposed.quantize_per_channel.default, (x, scale_argument, zero_argument, axis, low, high, dtype)
            )
        # the operator subtracts in the zero point's own type, which only zeros survive in int8
        zero_read = zero_argument if zeros.any() else held(module, f"{zero_argument.target}_int8", zeros.to(dtype))
        result = graph.call_function(
            _decomposed.dequantize_per_channel.default, (quantized, scale_argument, zero_read, axis, low, high, dtype)
        )
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
