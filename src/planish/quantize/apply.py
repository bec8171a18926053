"""A precision plan carried out: fake quantization in the program, which still trains (straight-through) and exports as QDQ."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from planish import registry
from planish.data import Split
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Analysis, Graph
from planish.graph.modes import set_mode
from planish.graph.replay import Replay, affordable, take
from planish.quantize.arithmetic import Quantizer, int8_weights
from planish.quantize.bias import correct_biases
from planish.quantize.contract import Observer
from planish.quantize.insert import insert, watch, weight_quantizer, why_not
from planish.quantize.placement import place
from planish.quantize.subjects import chosen_nodes
from planish.runtimes.contract import Runtime
from planish.target import Target


@dataclass(frozen=True)
class Quantized:
    """A graph with fake quantization in place.

    Args:
        graph: evaluation mode; weights are still float parameters.
        operators: names of the operators that are int8 now.
        skipped: operators that were to be int8 and stay in float -> why.
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
) -> Quantized:
    """A copy of `graph` whose chosen operators compute on int8 values, batch norm folded.

    Weights get per-channel symmetric quantizers in the target's range, activations per-tensor affine unsigned ones; both are
    `fake_quantize_*` nodes with scales and zero points in buffers. An operator whose weights or inputs are not finite, or
    all zero on the calibration data, stays in float and is named.

    Args:
        graph: is not changed.
        analysis: of that graph.
        precisions: operator name -> "int8" or "fp32"; operators that are not named stay in float.
        runtime: whose declared needs decide where quantizers go.
        target: whose instruction set decides the range of the weights.
        split: calibration samples.
        observer: the registered observer that chooses ranges.
        samples: how many calibration samples are watched; 300 are what other tools take, more changed no accuracy by more than noise.
        bias_correction: whether the mean error of each output channel is taken out of its bias.

    Raises:
        PlanError: a precision that is neither "int8" nor "fp32".
        UnknownName: an operator that the analysis has not, or an observer that nobody registered.
        DataError: no calibration sample.

    References:
        Nagel et al., A White Paper on Neural Network Quantization, 2021.
    """
    make: type[Observer] = registry.get("observer", observer)
    nodes = chosen_nodes(analysis, precisions)
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    module = folded.module
    flat = take(split, samples)
    skipped: dict[str, str] = {}
    watched: dict[str, Quantizer | str] = {}
    while True:
        left = {name: node for name, node in nodes.items() if name not in skipped}
        placement = place(module, left, runtime.quantize_inputs_of, runtime.quantize_outputs_of)
        skipped.update(placement.skipped)
        new = [value for value in placement.activations if value not in watched and value not in placement.repeats]
        watched.update(watch(module, flat, new, make))
        unfit = why_not(module, placement, nodes, watched)
        if not unfit:
            break
        skipped.update(unfit)
    reference = copy.deepcopy(module)
    owners = {value: placement.repeats.get(value, value) for value in placement.activations}
    activations = {value: found for value, owner in owners.items() if isinstance(found := watched[owner], Quantizer)}
    for name, (readers, axis) in placement.weights.items():
        grid = int8_weights(target.weight_range, axis)
        insert(module, name, readers, weight_quantizer(module, name, readers, grid, make, activations, placement))
    for value, quantizer in activations.items():
        insert(module, value, placement.activations[value], quantizer, owners[value])
    module.graph.lint()
    module.recompile()
    if bias_correction:
        enough = affordable(Replay(reference), folded, samples)
        correct_biases(reference, module, [nodes[name] for name in placement.operators], [value[:enough] for value in flat])
    return Quantized(folded, tuple(placement.operators), skipped)
