"""Biases of quantized operators: the mean error of each output channel taken out, and the integers that runtimes make of them.

A runtime adds a bias to sums of integers, as int32 in units of input scale times weight scale. With 8 bits these are too fine to matter, with four they
are not: rounded by ONNX Runtime alone they left 19 dB between a small ResNet and its artifact, and rounded here first, 116 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.fake_quantize import LARGEST_BIAS
from planish.graph.interpret import attribute
from planish.graph.modes import short_name
from planish.graph.parts import Parts, bias_of, parts_of, tensor_of
from planish.graph.replay import Replay


def correct_biases(reference: GraphModule, quantized: GraphModule, nodes: Sequence[str], flat: list[Tensor]) -> None:
    """Adds to the bias of each quantized operator the mean, per output channel, by which its output falls short of the float program's.

    Operators are corrected in the order of the program, each with all that come before it corrected and rounded already. An operator without a
    bias, or whose bias others share, is left as it is.

    Args:
        reference: the same program without quantizers; its nodes have the same names.
        quantized: its biases are changed in place.
        nodes: fx names of the operators.
        flat: calibration inputs, run at once.

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019, section 4.2 (the empirical form).
    """
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        for node, environment in Replay(reference).visits(flat):
            if node.name in nodes and _correctable(node):
                wanted[node.name] = _channel_means(node, environment[node])
        static = static_biases(quantized)
        for node, environment in Replay(quantized).visits(flat):
            if node.name in wanted:
                shift = torch.nan_to_num(wanted[node.name] - _channel_means(node, environment[node]), 0.0, 0.0, 0.0)
                bias = bias_of(node)
                assert bias is not None
                values = tensor_of(quantized, bias)
                before = values.clone()
                values += shift
                if node.name in static:
                    _round_(*static[node.name])
                shift = values - before
                environment[node] = environment[node] + _along_channels(node, shift, environment[node].dim())


def _correctable(node: Node) -> bool:
    bias = bias_of(node)
    if bias is None:
        return False
    readers = {user for other in node.graph.nodes if other.op == "get_attr" and other.target == bias.target for user in other.users}
    return readers == {node}


def biases_kept(module: GraphModule) -> Callable[[float, float], None]:
    """A step after an optimizer's that raises scales of weights where a bias would leave the range of its integers.

    `weight_quantizer` begins with such scales, but in a channel with tiny weights nothing else would hold them up.
    """
    held = static_biases(module).values()

    def after_step(rate: float, progress: float) -> None:
        for bias, read, weight in held:
            weight.copy_(torch.maximum(weight, bias.abs() / (LARGEST_BIAS * read)))

    return after_step


@torch.no_grad()
def round_biases_(module: GraphModule) -> None:
    """Rounds biases to what runtimes make of them, in place; one that several operators read stays as it is."""
    for held in static_biases(module).values():
        _round_(*held)


def _round_(bias: Tensor, read: Tensor, weight: Tensor) -> None:
    unit = read.double() * weight.double()
    bias.copy_((bias.double() / unit).round() * unit)


def static_biases(module: GraphModule) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """fx name of each operator in static int8 that has a bias of its own -> bias, scale of the input and scales of the weight."""
    found = {}
    for node in module.graph.nodes:
        parts, bias = parts_of(node), bias_of(node)
        if not isinstance(parts, Parts) or parts.weight is None or not parts.activations or bias is None or not _correctable(node):
            continue
        scales = [_scale(node.args[parts.activations[0]]), _scale(node.args[parts.weight])]
        read, weight = (attribute(module, str(scale.target)) if scale is not None else None for scale in scales)
        values = attribute(module, str(bias.target))
        if read is not None and weight is not None and read.numel() == 1 and weight.shape == values.shape:
            found[node.name] = values, read, weight
    return found


def _scale(value: object) -> Node | None:
    """The scale of the quantizer that a value comes from through movements."""
    while isinstance(value, Node) and value.op == "call_function" and value.args:
        if short_name(value).startswith("fake_quantize"):
            scale = value.args[1] if len(value.args) > 1 else None  # dynamic ones have none
            return scale if isinstance(scale, Node) and scale.op == "get_attr" else None
        value = value.args[0]
    return None


def _channel_axis(node: Node) -> int:
    return 1 if short_name(node).startswith("conv") else -1


def _channel_means(node: Node, output: Tensor) -> Tensor:
    axis = _channel_axis(node) % output.dim()
    rest = [other for other in range(1, output.dim()) if other != axis]
    each = output.mean(rest) if rest else output  # of each sample: many float32 values at most, never a copy of all in float64
    return each.double().mean(0).float()


def _along_channels(node: Node, shift: Tensor, rank: int) -> Tensor:
    shape = [1] * rank
    shape[_channel_axis(node)] = len(shift)
    return shift.view(shape)
