"""Quantizers chosen on calibration data and put into a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planish.graph.attention import LEVELS, has_fixed_keys, probabilities
from planish.graph.fake_quantize import LARGEST_BIAS, PER_CHANNEL, fake_quantize_per_tensor_affine
from planish.graph.parts import Parts, bias_of, parts_of, tensor_of
from planish.graph.replay import Replay
from planish.quantize.arithmetic import SIGNED8, TINY_RANGE, UINT8, Grid, Quantizer
from planish.quantize.contract import Observer
from planish.quantize.placement import Placement, Read, source_among

aten = torch.ops.aten
BATCH = 50  # calibration samples that are run at once


def watch(
    module: GraphModule,
    flat: Sequence[Tensor],
    values: Sequence[str],
    make: Callable[[Grid], Observer],
    grid: Grid = UINT8,
    signed: Mapping[str, bool] = MappingProxyType({}),
) -> dict[str, Quantizer | str]:
    """For each value its quantizer on the calibration data, or why it can have none.

    Args:
        module: run in the mode that it is in.
        flat: inputs of all calibration samples, sample axis 0.
        values: fx node names.
        make: an observer for a grid.
        grid: that they are rounded to.
        signed: those that get signed grids instead -> whether they do where they are never below zero, too.
    """
    replay = Replay(module)
    observers = {replay.by_name[value]: make(grid) for value in values}
    around_zero = {replay.by_name[value]: make(SIGNED8) for value in values if value in signed}
    largest = dict.fromkeys(observers, 0.0)
    reasons: dict[Node, str] = {}
    with torch.no_grad():
        for start in range(0, len(flat[0]) if observers else 0, BATCH):
            for node, environment in replay.visits([value[start : start + BATCH] for value in flat]):
                if node in observers and node not in reasons:
                    found = environment[node]
                    if not isinstance(found, Tensor) or not found.is_floating_point():
                        reasons[node] = f"{node.name} is no floating-point tensor"
                    elif not math.isfinite(size := float(torch.stack(torch.aminmax(found)).abs().max())):
                        reasons[node] = f"{node.name} is not finite on the calibration data"
                    else:
                        largest[node] = max(largest[node], size)
                        observers[node].update(found)
                        if node in around_zero:
                            around_zero[node].update(found)
    for node, size in largest.items():
        if size <= TINY_RANGE:
            reasons.setdefault(node, f"{node.name} is zero on all of the calibration data")
    chosen: dict[str, Quantizer | str] = {node.name: reason for node, reason in reasons.items()}
    for node, found in observers.items():
        if node not in reasons:
            quantizer = found.quantizer()
            is_signed = node in around_zero and (signed[node.name] or bool(quantizer.zero_point > grid.low))
            chosen[node.name] = around_zero[node].quantizer() if is_signed else quantizer
    return chosen


def probability_steps(module: GraphModule, flat: Sequence[Tensor], attentions: Sequence[str], is_sized: bool) -> dict[str, Tensor]:
    """For each attention the step of its probabilities' grid, with which the largest on the calibration data is the last point.

    Where a query may see fewer keys than on the calibration data, that is no bound: the last point is 1, and what is spread over very many keys
    is lost.

    Args:
        module: run in the mode that it is in.
        flat: inputs of all calibration samples, sample axis 0.
        attentions: fx node names.
        is_sized: whether no axis of an input but the first may vary.
    """
    replay = Replay(module)
    largest = {replay.by_name[name]: TINY_RANGE for name in attentions if is_sized and has_fixed_keys(replay.by_name[name])}
    with torch.no_grad():
        for start in range(0, len(flat[0]) if largest else 0, BATCH):
            for node, environment in replay.visits([value[start : start + BATCH] for value in flat]):
                if node in largest:
                    options: Any = map_arg(node.kwargs, environment.__getitem__)
                    weights, _ = probabilities(*replay.arguments(node, environment), **options)
                    largest[node] = max(largest[node], float(weights.amax()))
    found = {node.name: size for node, size in largest.items()}
    return {name: torch.tensor(found.get(name, 1.0) / LEVELS) for name in attentions}


def why_not(module: GraphModule, placement: Placement, nodes: Mapping[str, str], watched: Mapping[str, Quantizer | str]) -> dict[str, str]:
    """Operators of the placement that cannot be int8 after all -> why: parameters or inputs that are not finite, or nothing but zeros."""
    by_name = {node.name: node for node in module.graph.nodes}
    unfit: dict[str, str] = {}
    for name, weight in placement.operators.items():
        node = by_name[nodes[name]]
        if weight is not None:
            bias = bias_of(node)
            reason = unfit_parameters(module, [by_name[weight]], [bias] if bias is not None else [])
            if reason:
                unfit[name] = reason
        parts = parts_of(node)
        for position in parts.activations if isinstance(parts, Parts) else ():
            source = source_among(node, position, placement)
            found = watched[source] if source is not None else "its input has no place for a quantizer"
            if isinstance(found, str):
                unfit.setdefault(name, "its input " + found)
    return unfit


def unfit_parameters(module: GraphModule, weights: Iterable[Node], biases: Iterable[Node]) -> str:
    """Why parameters cannot be rounded: not finite, or weights of nothing but zeros; "" where they can."""
    values = [tensor_of(module, weight) for weight in weights]
    if not all(bool(torch.isfinite(weight).all()) for weight in values):
        return "its weight is not finite"
    if any(float(weight.abs().max()) <= TINY_RANGE for weight in values):
        return "its weight is zero"
    return "" if all(bool(torch.isfinite(tensor_of(module, bias)).all()) for bias in biases) else "its bias is not finite"


def weight_quantizer(
    module: GraphModule,
    weight: str,
    readers: Sequence[Read],
    grid: Grid,
    make: Callable[[Grid], Observer],
    activations: Mapping[str, Quantizer],
    placement: Placement,
) -> Quantizer:
    """The quantizer of a weight, with scales that are large enough for its readers' biases.

    A runtime stores a bias as int32 in units of input scale times weight scale; a channel with tiny weights and an ordinary bias
    (a pruned or dead filter) would overflow there, so its scale is raised, which costs nothing: its weights are tiny.

    Args:
        weight: fx node name of the parameter.
        readers: the operators that read it in int8.
        grid: per channel.
        activations: value -> its quantizer.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    watcher = make(grid)
    watcher.update(tensor_of(module, by_name[weight]))
    quantizer = watcher.quantizer()
    scale = quantizer.scale
    for reader in readers:
        node = by_name[reader.node]
        bias = bias_of(node)
        source = first_source(module, reader, placement)
        if bias is not None and source is not None and source in activations:
            needed = tensor_of(module, bias).abs().double() / (LARGEST_BIAS * activations[source].scale.double())
            scale = torch.maximum(scale, needed.float())
    return Quantizer(grid, scale, quantizer.zero_point)


def first_source(module: GraphModule, reader: Read, placement: Placement) -> str | None:
    """The value with a quantizer that the first activation of an operator comes from; None where there is none."""
    node = next(node for node in module.graph.nodes if node.name == reader.node)
    parts = parts_of(node)
    return source_among(node, parts.activations[0], placement) if isinstance(parts, Parts) else None


def insert(module: GraphModule, value: str, readers: Sequence[Read], quantizer: Quantizer, owner: str = "") -> Node:
    """Puts a fake quantizer behind a node, for the given readers alone; returns its node. The caller recompiles.

    Args:
        module: changed in place: gets the buffers `OWNER_scale` and `OWNER_zero_point`, or uses those that it has.
        value: fx node name.
        readers: who reads the quantized value instead; at least one.
        quantizer: scales and grid.
        owner: the value whose quantizer this is; "" for `value` itself.
    """
    graph = module.graph
    by_name = {node.name: node for node in graph.nodes}
    source = by_name[value]
    names = [f"{owner or value}_scale", f"{owner or value}_zero_point"]
    for name, tensor in zip(names, (quantizer.scale, quantizer.zero_point), strict=True):
        if not hasattr(module, name):
            module.register_buffer(name, tensor.clone())
        assert torch.equal(getattr(module, name), tensor), name
    first = min((by_name[read.node] for read in readers), key=list(graph.nodes).index)
    grid = quantizer.grid
    target: Callable[..., Tensor]
    arguments: tuple[Node | int, ...]
    with graph.inserting_before(first):
        scale, zero_point = graph.get_attr(names[0]), graph.get_attr(names[1])
        if grid.axis is None:
            target, arguments = fake_quantize_per_tensor_affine, (source, scale, zero_point, grid.low, grid.high)
        else:
            target = PER_CHANNEL
            arguments = (source, scale, zero_point, grid.axis, grid.low, grid.high)
        node = graph.call_function(target, arguments)
    node.meta = own_values(source)
    for read in readers:
        replace_argument(by_name[read.node], read.position, source, node)
    return node


def replace_argument(node: Node, position: int, old: Node, new: Node) -> None:
    """Puts one value in the place of another in one argument of a node, which may be a list (the weights of a recurrent layer)."""
    node.update_arg(position, map_arg(node.args[position], lambda value: new if value is old else value))


def own_values(source: Node) -> dict[str, Any]:
    """What is known of a node that another of the same shape and type may say of itself."""
    return {key: source.meta[key] for key in ("val", "tensor_meta", "nn_module_stack") if key in source.meta}
