"""Each operator alone in a scheme: the nodes before it are run once for all operators, those after it once for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish import registry
from planish.graph.fake_quantize import fake_quantize_dynamic
from planish.graph.graph import Analysis
from planish.graph.parts import Parts, known_parts, parts_of, tensor_of, weights_of
from planish.graph.replay import Environment, Replay
from planish.quantize.arithmetic import Quantizer, fake_quantize, int8_weights, unsigned
from planish.quantize.concatenations import with_shared
from planish.quantize.contract import Scheme
from planish.quantize.equalize.smooth import readers_by_activation, smooth, unclipped
from planish.quantize.ground import Ground
from planish.quantize.insert import watch, why_not
from planish.quantize.local import form_of, rounded, why_not_locally
from planish.quantize.placement import Placement, place, source_among
from planish.quantize.schemes.int8 import INT8
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import Runtime
from planish.target import Target


@dataclass(frozen=True)
class Rounded:
    """How an activation is rounded.

    Args:
        quantizer: its grid; None: that of each call's range.
        inverse: what it is multiplied with before, [channels], where it is smoothed.
    """

    quantizer: Quantizer | None = None
    inverse: Tensor | None = None

    def scaled(self, value: Tensor) -> Tensor:
        """The activation as it comes to the quantizer."""
        return value if self.inverse is None else value * self.inverse

    def __call__(self, value: Tensor) -> Tensor:
        """The activation as the operator gets it."""
        return fake_quantize_dynamic(value) if self.quantizer is None else fake_quantize(self.scaled(value), self.quantizer)


@dataclass(frozen=True)
class Alone:
    """One operator on its own in a scheme.

    Args:
        name: of the operator.
        scheme: its name.
        node: of the folded program.
        form: what computes it.
        weights: parameter -> what stands in for it.
        activations: position among the node's arguments -> how it is rounded.
    """

    name: str
    scheme: str
    node: Node
    form: Callable[..., Any]
    weights: Mapping[str, Tensor]
    activations: Mapping[int, Rounded]


@dataclass(frozen=True)
class Ran:
    """What came of one operator on its own.

    Args:
        operator: which.
        inputs: position among the node's arguments -> the activation in float, before it was rounded.
        outputs: the flat outputs of the whole program.
    """

    operator: Alone
    inputs: Mapping[int, Tensor]
    outputs: list[Any]


def candidates(
    ground: Ground, analysis: Analysis, runtime: Runtime, target: Target, schemes: Sequence[str], is_smooth: bool
) -> tuple[list[Alone], dict[str, str]]:
    """The operators that can be quantized, in the order of the program, and why the other contractions have no static form.

    Args:
        is_smooth: whether the activations of static operators are smoothed where that pays, for each operator by itself.
    """
    order = {node: index for index, node in enumerate(ground.module.graph.nodes)}
    alone: list[Alone] = []
    reasons: dict[str, str] = {}
    for scheme in (registry.get("scheme", name) for name in schemes):
        if scheme.activations == "static":
            found, unfit = _static(ground, analysis, runtime, target, scheme, is_smooth)
            alone += found
            reasons.update(unfit)
        else:
            alone += _local(ground, analysis, target, scheme)
    return sorted(alone, key=lambda operator: order[operator.node]), reasons


def _static(
    ground: Ground, analysis: Analysis, runtime: Runtime, target: Target, scheme: Scheme, is_smooth: bool
) -> tuple[list[Alone], dict[str, str]]:
    originals = {node.name: node for node in ground.module.graph.nodes}
    reasons = {}
    nodes = {}
    for name, operator in analysis.operators.items():
        if not (reason := unsupported(originals[operator.node], scheme)):
            nodes[name] = operator.node
        elif operator.kind in ("conv", "linear", "matmul", "attention", "lstm", "gru"):
            reasons[name] = reason
    largest = scheme.largest_weight(target.weight_range)
    if is_smooth:
        graph = ground.graph.copy()
        single = [[name] for group in readers_by_activation(graph.module, nodes.values(), runtime.quantize_inputs_of) for name in group]
        smoothed = smooth(graph.module, single, list(ground.flat), dict.fromkeys(nodes.values(), largest), fold=False)
        ground = Ground(graph, ground.flat, ground.make, smoothed=tuple(smoothed))
    module = ground.module
    by_name = {node.name: node for node in module.graph.nodes}
    placement = place(module, nodes, runtime.quantize_inputs_of, ())
    reasons.update(placement.skipped)
    ground.watch(placement)
    reasons.update(why_not(module, placement, nodes, ground.watched))
    watched = with_shared(ground.activations, placement.shared)
    if scheme.activation_bits < INT8.activation_bits:
        narrow = watch(module, ground.flat, list(watched), ground.make, unsigned(scheme.activation_bits))
        watched = {value: found for value, found in narrow.items() if isinstance(found, Quantizer)}
    inverses = {name: found.inverse for found in ground.smoothed for name in found.readers}
    attentions = [nodes[name] for name in placement.operators if analysis.operators[name].kind == "attention"]
    steps = ground.probability_steps(attentions)
    whole = unclipped(module, placement, ground.watched, ground.smoothed) if scheme.activation_bits == INT8.activation_bits else {}
    alone = []
    for name, weight in placement.operators.items():
        if name in reasons:
            continue
        node = by_name[nodes[name]]
        activations = {**watched, **dict([whole[node.name]])} if node.name in whole else watched
        weights = {}
        if weight is not None:
            readers, axis = placement.weights[weight]
            quantizer = ground.weight_quantizer(weight, readers, int8_weights(largest, axis), placement, activations)
            weights[str(by_name[weight].target)] = fake_quantize(tensor_of(module, by_name[weight]), quantizer)
        rounding = _argument_quantizers(node, placement, activations, inverses.get(node.name))
        original = originals[node.name]
        form = form_of(original, scheme)
        if node.name in attentions:
            form = functools.partial(form, step=steps[node.name])
        alone.append(Alone(name, scheme.name, original, form, weights, rounding))
    return alone, reasons


def _local(ground: Ground, analysis: Analysis, target: Target, scheme: Scheme) -> list[Alone]:
    module = ground.module
    by_name = {node.name: node for node in module.graph.nodes}
    alone = []
    for name, operator in analysis.operators.items():
        node = by_name[operator.node]
        parts = parts_of(node)
        if not isinstance(parts, Parts) or parts.weight is None or why_not_locally(module, node, scheme):
            continue
        stand_ins = {
            str(weight.target): rounded(tensor_of(module, weight), parts, ground.local_quantizer(weight.name, parts, scheme, target))
            for weight in weights_of(node, parts)
        }
        positions = parts.activations if scheme.activations == "dynamic" else ()
        alone.append(Alone(name, scheme.name, node, form_of(node, scheme), stand_ins, dict.fromkeys(positions, Rounded())))
    return alone


def _argument_quantizers(
    node: Node, placement: Placement, activations: Mapping[str, Quantizer], inverse: Tensor | None
) -> dict[int, Rounded]:
    found: dict[int, Rounded] = {}
    for position in known_parts(node).activations:
        source = source_among(node, position, placement)
        assert source is not None, node.format_node()
        found[position] = Rounded(activations[source], inverse)
    return found


def runs_alone(replay: Replay, operators: Sequence[Alone], flat: list[Tensor]) -> Iterator[Ran]:
    """One run for each operator, from an environment that is carried on to it once.

    Args:
        replay: of the folded program.
        operators: in the order of the program.
        flat: inputs of some samples, run at once.
    """
    environment, reached = replay.start(flat), 0
    for operator in operators:
        first = replay.position[operator.node]
        while reached < first:
            replay.step(replay.nodes[reached], environment)
            reached += 1
        arguments = replay.arguments(operator.node, environment)
        inputs = {position: arguments[position] for position in operator.activations}
        yield Ran(operator, inputs, _run_alone(replay, operator, dict(environment)))


def _run_alone(replay: Replay, operator: Alone, environment: Environment) -> list[Any]:
    """The flat outputs when one operator is in its scheme, from an environment that holds everything before it; it is consumed."""
    node = operator.node
    stand_ins = {value: operator.weights[str(value.target)] for value in node.all_input_nodes if str(value.target) in operator.weights}
    arguments = list(replay.arguments(node, {**environment, **stand_ins}))
    for position, rounding in operator.activations.items():
        arguments[position] = rounding(arguments[position])
    kwargs = torch.fx.node.map_arg(node.kwargs, environment.__getitem__)
    environment[node] = operator.form(*arguments, **kwargs)
    replay.release(node, environment)
    return replay.run(environment, replay.position[node] + 1)
