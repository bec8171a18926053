"""Convolutions over few positions as matrix products of windows: the same function, for runtimes whose convolutions need many positions.

A runtime's convolution is a matrix product in which the positions are the columns, and its kernels work on 8 to 32 columns at a time; with
four positions most of them are empty. In the product of windows the positions are rows and the output channels are columns.
Measured on Silero's detector (convolutions with 4, 4, 2, 1, 1 and 1 positions, one thread): ONNX Runtime 43.5 -> 29.2 µs, OpenVINO 32.2 -> 34.0 µs,
whose convolutions are compiled for their shape.

A spectrum by even and odd halves of the window (cosines are even about its centre, sines odd, so that x[n] ± x[-n] halve the products) was
tried on the same net by hand and left out: with all else the same ONNX Runtime took 32.0 in place of 30.8 µs, OpenVINO 57 in place of 52, as the
reversal and the sums cost what the products save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from planish.graph.facts import arguments, at_batch
from planish.graph.graph import Graph
from planish.graph.interpret import attribute, observe
from planish.graph.modes import short_name

aten = torch.ops.aten
_ACTIVATIONS = {"relu": aten.relu.default, "sigmoid": aten.sigmoid.default}


def short_convolutions(graph: Graph, most: int) -> Graph:
    """The graph with convolutions along one axis that have at most `most` positions of output as linear maps of windows: a copy, or itself.

    Taps that see nothing but padding, at every position, are left out. Convolutions in groups, with dilation, with weights that are
    computed (fake-quantized), or over an axis whose size is free stay as they are; so does every program with an input that has a free
    axis beside the batch.

    Args:
        graph: not changed.
        most: positions from which a runtime's own convolution is as quick.
    """
    found = [node.name for node in graph.module.graph.nodes if short_name(node) == "conv1d" and _is_plain(node)]
    if not found or not graph.signature.is_sized:
        return graph
    lengths = {name: both for name, both in _lengths(graph, graph.example, found).items() if both[1] <= most}
    if isinstance(graph.signature.inputs[0].shape[0], str):
        other = _lengths(graph, at_batch(graph, len(graph.example[0]) + 1), list(lengths))
        lengths = {name: both for name, both in lengths.items() if other.get(name) == both}  # else the batch runs along it
    if not lengths:
        return graph
    copied = graph.copy()
    for node in [node for node in copied.module.graph.nodes if node.name in lengths]:
        _replace(copied.module, node, *lengths[node.name])
    copied.module.graph.eliminate_dead_code()
    copied.module.recompile()
    return copied


def _arguments(node: fx.Node) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """Input, weight, bias, stride, padding, dilation and groups of a convolution; what counts one axis is a number."""
    given = arguments(node)
    stride, padding, dilation = (
        value[0] if isinstance(value := given[name], (list, tuple)) else value for name in ("stride", "padding", "dilation")
    )
    return given["input"], given["weight"], given["bias"], stride, padding, dilation, given["groups"]


def _is_plain(node: fx.Node) -> bool:
    _, weight, bias, _, padding, dilation, groups = _arguments(node)
    constants = [weight] if bias is None else [weight, bias]
    is_constant = all(isinstance(value, fx.Node) and value.op == "get_attr" for value in constants)
    return is_constant and not node.kwargs and isinstance(padding, int) and dilation == 1 and groups == 1


def _lengths(graph: Graph, inputs: Sequence[Tensor], names: list[str]) -> dict[str, tuple[int, int]]:
    """How many positions each convolution reads and gives."""
    found: dict[str, tuple[int, int]] = {}

    def visit(name: str, args: tuple[Any, ...], out: Any) -> None:
        if out.dim() == 3:
            found[name] = args[0].shape[2], out.shape[2]

    with torch.no_grad():
        observe(graph, inputs, names, visit)
    return found


def _replace(module: fx.GraphModule, node: fx.Node, length: int, positions: int) -> None:
    source, weight_node, bias, stride, padding, _, _ = _arguments(node)
    weight: Tensor = attribute(module, str(weight_node.target)).detach()
    outputs, inputs, kernel = weight.shape
    live = live_taps(length, positions, kernel, stride, padding)
    if not live:
        return
    first, kernel = live[0], live[-1] - live[0] + 1
    begin, end = first - padding, first - padding + (positions - 1) * stride + kernel
    taps = weight[:, :, first : first + kernel]
    # With one position nothing overlaps and no padding is left, so that the input may stay as it lies: channels first.
    kept = taps if positions == 1 else taps.transpose(1, 2)
    name = f"{node.name}_windows"
    module.register_parameter(name, nn.Parameter(kept.reshape(outputs, kernel * inputs).contiguous(), requires_grad=False))
    graph = module.graph
    with graph.inserting_before(node):

        def call(target: Callable[..., Any], *args: Any) -> fx.Node:
            return graph.call_function(target, args)

        if length == 1 and positions == 1 and _adds_axis(source):
            # What lies between two products of single positions is one position: no axis is needed.
            windows = source.args[0]
        elif positions == 1:
            rows = call(aten.slice.Tensor, source, 2, begin, end) if begin > 0 or end < length else source
            windows = call(aten.reshape.default, rows, [-1, inputs * kernel])
        else:
            rows = call(aten.transpose.int, source, 1, 2) if inputs > 1 else call(aten.reshape.default, source, [-1, length, 1])
            windows = _overlapping(call, rows, (begin, end, length), stride, kernel, inputs, positions)
        result = call(aten.linear.default, windows, graph.get_attr(name), *([bias] if bias is not None else []))
        # Between a product and its activation a change of shape would keep a runtime from fusing them.
        last = next(iter(node.users)) if len(node.users) == 1 else node
        activation = _ACTIVATIONS.get(short_name(last))
        if activation is not None:
            result = call(activation, result)
        else:
            last = node
        turned = call(aten.unsqueeze.default, result, 2) if positions == 1 else call(aten.transpose.int, result, 1, 2)
        if positions == 1:
            # The axis that is added is often taken away at once.
            for user in [user for user in last.users if short_name(user) == "flatten" and list(user.args[1:]) in ([1], [1, -1], [1, 2])]:
                user.replace_all_uses_with(result)
    last.replace_all_uses_with(turned)


def live_taps(length: int, positions: int, kernel: int, stride: int, padding: int) -> list[int]:
    """The taps of a kernel that see more than padding at one position of output at least."""
    return [tap for tap in range(kernel) if any(padding <= p * stride + tap < padding + length for p in range(positions))]


def _adds_axis(node: fx.Node) -> bool:
    return node.target is aten.unsqueeze.default and node.args[1] in (2, -1)


def _overlapping(
    call: Callable[..., fx.Node], rows: fx.Node, span: tuple[int, int, int], stride: int, kernel: int, inputs: int, positions: int
) -> fx.Node:
    """The windows `[batch, positions, kernel * inputs]` of rows `[batch, length, inputs]`, of which those from begin to end count."""
    begin, end, length = span
    if begin > 0 or end < length:
        rows = call(aten.slice.Tensor, rows, 1, max(begin, 0), min(end, length))
    if begin < 0 or end > length:
        rows = call(aten.constant_pad_nd.default, rows, [0, 0, max(-begin, 0), max(end - length, 0)], 0.0)
    if kernel % stride == 0:
        # They overlap by whole strides: so many slices of blocks of one stride, side by side.
        blocks = call(aten.reshape.default, rows, [-1, positions + kernel // stride - 1, stride * inputs]) if stride > 1 else rows
        parts = [call(aten.slice.Tensor, blocks, 1, j, j + positions) for j in range(kernel // stride)]
        return call(aten.cat.default, parts, 2) if len(parts) > 1 else parts[0]
    parts = [call(aten.slice.Tensor, rows, 1, p * stride, p * stride + kernel) for p in range(positions)]
    return call(aten.cat.default, [call(aten.reshape.default, part, [-1, 1, kernel * inputs]) for part in parts], 1)
