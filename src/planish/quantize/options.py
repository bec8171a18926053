"""Options for quantization: the loss of each operator when it alone computes in a scheme, measured without labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish import registry
from planish.data import Split
from planish.graph.divergence import divergence
from planish.graph.fake_quantize import fake_quantize_dynamic
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Analysis, Graph
from planish.graph.modes import set_mode
from planish.graph.parts import Parts, parts_of, tensor_of
from planish.graph.replay import Environment, Replay, affordable, in_batches, samples_within, take
from planish.plan import Option
from planish.quantize.arithmetic import Grid, Quantizer, fake_quantize, int8_weights, unsigned
from planish.quantize.contract import Observer, Scheme
from planish.quantize.insert import watch, weight_quantizer, why_not
from planish.quantize.local import local_quantizer, rounded, why_not_locally
from planish.quantize.placement import Placement, place, source_among
from planish.quantize.subjects import unsupported
from planish.runtimes.contract import Runtime
from planish.target import Target

_CHUNK = 64
_LEAST_SAMPLES = 16


@dataclass(frozen=True)
class _Alone:
    """One operator on its own in a scheme: what stands in for its weight, and how its activation arguments are rounded."""

    name: str
    scheme: str
    node: Node
    weights: Mapping[str, Tensor]
    arguments: Mapping[int, Callable[[Tensor], Tensor]]


@torch.no_grad()
def precision_options(
    graph: Graph,
    analysis: Analysis,
    runtime: Runtime,
    target: Target,
    split: Split,
    schemes: Sequence[str] = ("int8",),
    observer: str = "mse",
    samples: int = 256,
    kind: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
) -> list[Option]:
    """An option for each operator and scheme that fit, with what the outputs lose when it is the only one.

    The loss is the divergence of the outputs from the original's, the same measure that pruning's options carry. Weights and activation
    inputs are rounded as `quantize` would; the nodes before an operator are run once for all operators, those after it once for each.

    Args:
        graph: the original; left as it is.
        analysis: of that graph.
        runtime: only operators of kinds that it executes in int8 are offered.
        target: gives the range of the weights.
        split: calibration samples.
        schemes: names of the registry's kind "scheme".
        observer: the registered observer that chooses ranges.
        samples: at most this many are used.
        kind: "logits" or "values"; None guesses from the outputs.
        progress: called with (runs done, runs in all).
        seconds: about what it may take; fewer samples are used where they would take longer, but never fewer than 16.

    Returns:
        Options in the order of the program; losses are finite and at least 0. `float_reasons` says why others are missing.

    Raises:
        DataError: no calibration sample, or outputs of the original that are not finite.
    """
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    replay = Replay(folded.module)
    passes = 0.5 * len(analysis.operators) * len(schemes) + 2
    flat = take(split, samples_within(replay, split, affordable(replay, folded, samples), passes, seconds, _LEAST_SAMPLES))
    alone, _ = _candidates(folded, analysis, runtime, target, flat, schemes, observer)
    chunks = in_batches(flat, _CHUNK)
    reference = [replay.run(replay.start(chunk)) for chunk in chunks]
    measure = divergence([torch.cat(values) for values in zip(*reference, strict=True)], kind)
    losses = dict.fromkeys(((operator.name, operator.scheme) for operator in alone), 0.0)
    done = 0
    for chunk, outputs in zip(chunks, reference, strict=True):
        environment, reached = replay.start(chunk), 0
        for operator in alone:
            first = replay.position[operator.node]
            while reached < first:
                replay.step(replay.nodes[reached], environment)
                reached += 1
            changed = _run_alone(replay, operator, dict(environment))
            losses[operator.name, operator.scheme] += float(measure.per_sample(changed, outputs).double().sum())
            done += 1
            if progress is not None:
                progress(done, len(chunks) * len(alone))
    found = [Option("precision", name, scheme, max(loss / len(flat[0]), 0.0)) for (name, scheme), loss in losses.items()]
    return [option for option in found if math.isfinite(option.loss)]


@torch.no_grad()
def float_reasons(graph: Graph, analysis: Analysis, runtime: Runtime, target: Target, split: Split, samples: int = 64) -> dict[str, str]:
    """Operators that multiply and have no static int8 form -> why: no kernel, or weights or inputs that cannot be quantized."""
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    _, reasons = _candidates(folded, analysis, runtime, target, take(split, samples), ("int8",), "minmax")
    return reasons


def _candidates(
    folded: Graph, analysis: Analysis, runtime: Runtime, target: Target, flat: list[Tensor], schemes: Sequence[str], observer: str
) -> tuple[list[_Alone], dict[str, str]]:
    """The operators that can be quantized, in the order of the program, and why the other contractions have no static form."""
    order = {node: index for index, node in enumerate(folded.module.graph.nodes)}
    make = registry.get("observer", observer)
    alone: list[_Alone] = []
    reasons: dict[str, str] = {}
    known = [registry.get("scheme", name) for name in schemes]
    if static := [scheme for scheme in known if scheme.activations == "static"]:
        found, reasons = _static(folded, analysis, runtime, target, flat, static, make)
        alone += found
    for scheme in known:
        if scheme.activations != "static":
            alone += _local(folded.module, analysis, target, scheme, make)
    return sorted(alone, key=lambda operator: order[operator.node]), reasons


def _static(
    folded: Graph,
    analysis: Analysis,
    runtime: Runtime,
    target: Target,
    flat: list[Tensor],
    schemes: Sequence[Scheme],
    make: Callable[[Grid], Observer],
) -> tuple[list[_Alone], dict[str, str]]:
    module = folded.module
    by_name = {node.name: node for node in module.graph.nodes}
    reasons = {}
    nodes = {}
    for name, operator in analysis.operators.items():
        if not (reason := unsupported(by_name[operator.node], schemes[0])):
            nodes[name] = operator.node
        elif operator.kind in ("conv", "linear", "matmul", "attention", "lstm", "gru"):
            reasons[name] = reason
    placement = place(module, nodes, runtime.quantize_inputs_of, ())
    reasons.update(placement.skipped)
    watched = watch(module, flat, [value for value in placement.activations if value not in placement.repeats], make)
    reasons.update(why_not(module, placement, nodes, watched))
    wide = {value: found for value, found in watched.items() if isinstance(found, Quantizer)}
    alone = []
    for scheme in schemes:
        activations = wide
        if scheme.activation_bits < 8:
            found = watch(module, flat, list(wide), make, unsigned(scheme.activation_bits))
            activations = {value: quantizer for value, quantizer in found.items() if isinstance(quantizer, Quantizer)}
        for name, weight in placement.operators.items():
            if name in reasons:
                continue
            node = by_name[nodes[name]]
            weights = {}
            if weight is not None:
                readers, axis = placement.weights[weight]
                grid = int8_weights(min(target.weight_range, 2 ** (scheme.weight_bits - 1) - 1), axis)
                quantizer = weight_quantizer(module, weight, readers, grid, make, wide, placement)
                parameter = str(by_name[weight].target)
                weights[parameter] = fake_quantize(tensor_of(module, by_name[weight]), quantizer)
            alone.append(_Alone(name, scheme.name, node, weights, _argument_quantizers(node, placement, activations)))
    return alone, reasons


def _local(module: GraphModule, analysis: Analysis, target: Target, scheme: Scheme, make: Callable[[Grid], Observer]) -> list[_Alone]:
    by_name = {node.name: node for node in module.graph.nodes}
    alone = []
    for name, operator in analysis.operators.items():
        node = by_name[operator.node]
        parts = parts_of(node)
        if not isinstance(parts, Parts) or parts.weight is None or why_not_locally(module, node, scheme):
            continue
        weight = node.args[parts.weight]
        assert isinstance(weight, Node)
        values = tensor_of(module, weight)
        stand_in = rounded(values, parts, local_quantizer(values, parts, scheme, target, make))
        arguments = dict.fromkeys(parts.activations if scheme.activations == "dynamic" else (), fake_quantize_dynamic)
        alone.append(_Alone(name, scheme.name, node, {str(weight.target): stand_in}, arguments))
    return alone


def _argument_quantizers(node: Node, placement: Placement, activations: Mapping[str, Quantizer]) -> dict[int, Callable[[Tensor], Tensor]]:
    parts = parts_of(node)
    assert isinstance(parts, Parts), parts
    found: dict[int, Callable[[Tensor], Tensor]] = {}
    for position in parts.activations:
        source = source_among(node, position, placement)
        assert source is not None, node.format_node()
        found[position] = functools.partial(fake_quantize, quantizer=activations[source])
    return found


def _run_alone(replay: Replay, operator: _Alone, environment: Environment) -> list[Any]:
    """The flat outputs when one operator is in its scheme, from an environment that holds everything before it; it is consumed."""
    node = operator.node
    assert callable(node.target)
    arguments = list(replay.arguments(node, environment))
    for position, rounding in operator.arguments.items():
        arguments[position] = rounding(arguments[position])
    for position, argument in enumerate(node.args):
        if isinstance(argument, Node) and argument.op == "get_attr" and str(argument.target) in operator.weights:
            arguments[position] = operator.weights[str(argument.target)]
    kwargs = torch.fx.node.map_arg(node.kwargs, environment.__getitem__)
    environment[node] = node.target(*arguments, **kwargs)
    replay.release(node, environment)
    return replay.run(environment, replay.position[node] + 1)
