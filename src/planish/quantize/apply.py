"""A precision plan carried out: fake quantization in the program, which still trains (straight-through) and exports to the runtimes' forms."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from planish import registry
from planish.data import Split
from planish.errors import PlanError
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Analysis, Graph
from planish.graph.modes import set_mode
from planish.graph.replay import Replay, affordable, take
from planish.quantize.arithmetic import Quantizer, int8_weights
from planish.quantize.bias import correct_biases
from planish.quantize.contract import Equalization, Observer, check_equalization
from planish.quantize.equalize.cross_layer import equalize_layers
from planish.quantize.equalize.smooth import Smoothed, readers_by_activation, smooth, unclipped
from planish.quantize.insert import insert, watch, weight_quantizer, why_not
from planish.quantize.local import quantize_locally, why_not_locally
from planish.quantize.placement import place
from planish.quantize.subjects import chosen_nodes
from planish.runtimes.contract import Runtime
from planish.target import Target


@dataclass(frozen=True)
class Quantized:
    """A graph with fake quantization in place.

    Args:
        graph: evaluation mode; weights are still float parameters.
        operators: names of the operators that compute in their schemes now, static ones first.
        skipped: operators that were to leave fp32 and stay there -> why.
    """

    graph: Graph
    operators: tuple[str, ...]
    skipped: Mapping[str, str]


def quantize(
    graph: Graph,
    analysis: Analysis,
    precisions: Mapping[str, str],
    runtime: Runtime,
    target: Target,
    split: Split,
    observer: str = "mse",
    samples: int = 300,
    bias_correction: bool = True,
    equalization: Equalization = "smooth",
) -> Quantized:
    """A copy of `graph` whose chosen operators compute in their schemes, batch norm folded.

    In static schemes weights get per-channel symmetric quantizers in the target's range, activations per-tensor affine unsigned ones;
    in the others weights are rounded per channel or per group where they are read. All are `fake_quantize_*` nodes with scales and zero
    points in buffers. An operator whose weights or inputs are not finite, or all zero on the calibration data, stays in float and is named.

    Args:
        graph: is not changed.
        analysis: of that graph.
        precisions: operator name -> the name of a scheme, or "fp32"; operators that are not named stay in float.
        runtime: whose declared needs decide where quantizers go.
        target: whose instruction set decides the range of the weights.
        split: calibration samples.
        observer: the registered observer that chooses ranges.
        samples: how many calibration samples are watched; 300 are what other tools take, more changed no accuracy by more than noise.
        equalization: "smooth" changes linear maps in static schemes whose outputs are then nearer to the original's, by their error on the
            calibration data, and rounds an activation in its full range where clipping would cost them more. "cross-layer" shares
            channels out between operators in any scheme: it is exact in float, costs nothing later, and need not help.
        bias_correction: whether the mean error of each output channel is taken out of its bias.

    Raises:
        PlanError: a scheme that nobody registered, or that the runtime does not execute.
        UnknownName: an operator that the analysis has not, an observer that nobody registered, or an equalization that there is not.
        DataError: no calibration sample.

    References:
        Nagel et al., A White Paper on Neural Network Quantization, 2021.
    """
    make: type[Observer] = registry.get("observer", observer)
    check_equalization(equalization)
    chosen = chosen_nodes(analysis, precisions)
    nodes = {name: node for name, (node, _) in chosen.items()}
    for name, (_, scheme) in chosen.items():
        if scheme.name not in runtime.schemes:
            reason = scheme.refusal or f"it executes {', '.join(runtime.schemes)}"
            raise PlanError(f"precisions: {scheme.name!r} of {name!r} cannot run in {runtime.name}: {reason}")
    largest = {node: scheme.largest_weight(target.weight_range) for node, scheme in chosen.values()}
    static = {name: node for name, (node, scheme) in chosen.items() if scheme.activations == "static"}
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    module = folded.module
    flat = take(split, samples)
    if equalization == "cross-layer":
        equalize_layers(module)
    smoothed: list[Smoothed] = []
    if equalization == "smooth":
        smoothed = smooth(module, readers_by_activation(module, static.values(), runtime.quantize_inputs_of), flat, largest)
    skipped: dict[str, str] = {}
    matrices = {found.node for found in analysis.operators.values() if len(found.output) == 2}
    watched: dict[str, Quantizer | str] = {}
    while True:
        left = {name: node for name, node in static.items() if name not in skipped}
        placement = place(module, left, runtime.quantize_inputs_of, runtime.quantize_outputs_of, matrices)
        skipped.update(placement.skipped)
        new = [value for value in placement.activations if value not in watched and value not in placement.repeats]
        watched.update(watch(module, flat, new, make))
        unfit = why_not(module, placement, static, watched)
        if not unfit:
            break
        skipped.update(unfit)
    watched.update(unclipped(module, placement, watched, smoothed).values())
    by_name = {node.name: node for node in module.graph.nodes}
    local = {name: scheme for name, (_, scheme) in chosen.items() if name not in static}
    unfit = {name: reason for name, scheme in local.items() if (reason := why_not_locally(module, by_name[nodes[name]], scheme))}
    skipped.update(unfit)
    local = {name: scheme for name, scheme in local.items() if name not in unfit}
    reference = copy.deepcopy(module)
    owners = {value: placement.repeats.get(value, value) for value in placement.activations}
    activations = {value: found for value, owner in owners.items() if isinstance(found := watched[owner], Quantizer)}
    for name, (readers, axis) in placement.weights.items():
        grid = int8_weights(min(largest[reader.node] for reader in readers), axis)
        insert(module, name, readers, weight_quantizer(module, name, readers, grid, make, activations, placement))
    for value, quantizer in activations.items():
        insert(module, value, placement.activations[value], quantizer, owners[value])
    quantize_locally(module, {nodes[name]: scheme for name, scheme in local.items()}, target, make)
    module.graph.lint()
    module.recompile()
    done = (*placement.operators, *local)
    if bias_correction:
        enough = affordable(Replay(reference), folded, samples)
        correct_biases(reference, module, [nodes[name] for name in done], [value[:enough] for value in flat])
    return Quantized(folded, done, skipped)
