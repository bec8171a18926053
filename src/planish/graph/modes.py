"""Train and eval mode of a captured program: the mode is baked into literals of its nodes, so these are what is flipped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from planish.graph.graph import Graph

aten = torch.ops.aten
TRAIN_DROPOUT = "planish_train_dropout_p"
"""Key of `node.meta`: the `dropout_p` that attention had in train mode, where eval mode baked zero."""

_FLAG: Mapping[str, tuple[int, bool]] = {
    "batch_norm": (5, True),
    "instance_norm": (5, True),
    "dropout": (2, False),
    "feature_dropout": (2, False),
    "alpha_dropout": (2, False),
    "feature_alpha_dropout": (2, False),
    "native_dropout": (2, False),
    "lstm": (6, False),
    "gru": (6, False),
    "rnn_tanh": (6, False),
    "rnn_relu": (6, False),
    "rrelu": (3, False),
}
"""Operator -> (position of its mode argument, whether it only has a mode if it keeps running statistics)."""


def short_name(node: fx.Node) -> str:
    """ "conv2d" for `aten.conv2d.default`, the function's name for others, "" for placeholders and the like."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def has_mode(node: fx.Node) -> bool:
    """Whether an operator has a train and an eval mode."""
    name = short_name(node).removesuffix("_")
    return name in _FLAG or "attention" in name


def _flip(node: fx.Node, training: bool) -> bool:
    """Set the mode of one node; whether anything changed."""
    name = short_name(node).removesuffix("_")
    if name == "scaled_dot_product_attention":
        if TRAIN_DROPOUT not in node.meta:
            return False
        wanted = node.meta[TRAIN_DROPOUT] if training else 0.0
        if len(node.args) > 4:
            node.update_arg(4, wanted)
        else:
            node.update_kwarg("dropout_p", wanted)
        return True
    if name not in _FLAG:
        return False
    position, needs_statistics = _FLAG[name]
    if needs_statistics and node.args[3] is None:
        return False
    if node.args[position] == training:
        return False
    node.update_arg(position, training)
    return True


def set_mode(graph: Graph, training: bool) -> None:
    """Put the program in train or eval mode, in place: batch norm, dropout, attention's dropout, and `module.training`.

    In train mode batch norm normalises by the batch and updates its running statistics. A norm that keeps no statistics
    normalises by the batch in both modes, as in the user's model.

    Args:
        graph: changed in place.
        training: the mode that is wanted.
    """
    module = graph.module
    changed = [_flip(node, training) for node in module.graph.nodes]
    if any(changed):
        module.recompile()
    for submodule in module.modules():
        submodule.training = training
