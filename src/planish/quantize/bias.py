"""Bias correction: the mean error that rounding leaves in each output channel is taken out of its bias."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.modes import short_name
from planish.graph.parts import bias_of
from planish.graph.replay import Replay


def correct_biases(reference: GraphModule, quantized: GraphModule, nodes: Sequence[str], flat: list[Tensor]) -> None:
    """Adds to the bias of each quantized operator the mean, per output channel, by which its output falls short of the float program's.

    Operators are corrected in the order of the program, each with all that come before it corrected already. An operator without a
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
        replay = Replay(reference)
        environment = replay.start(flat)
        for node in replay.nodes:
            if node.op not in ("placeholder", "output"):
                environment[node] = replay.value(node, environment)
            if node.name in nodes and _correctable(node):
                wanted[node.name] = _channel_means(node, environment[node])
            replay.release(node, environment)
        replay = Replay(quantized)
        environment = replay.start(flat)
        for node in replay.nodes:
            if node.op not in ("placeholder", "output"):
                environment[node] = replay.value(node, environment)
            if node.name in wanted:
                shift = torch.nan_to_num(wanted[node.name] - _channel_means(node, environment[node]), 0.0, 0.0, 0.0)
                bias = bias_of(node)
                assert bias is not None
                operator.attrgetter(str(bias.target))(quantized).data += shift
                environment[node] = environment[node] + _along_channels(node, shift, environment[node].dim())
            replay.release(node, environment)


def _correctable(node: Node) -> bool:
    bias = bias_of(node)
    if bias is None:
        return False
    readers = {user for other in node.graph.nodes if other.op == "get_attr" and other.target == bias.target for user in other.users}
    return readers == {node}


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
