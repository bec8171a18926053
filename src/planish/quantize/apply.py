"""A precision plan carried out: fake quantization in the program, which still trains (straight-through) and exports to the runtimes' forms."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from planish import registry
from planish.data import Split
from planish.errors import PlanError
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Analysis, Graph
from planish.graph.modes import set_mode
from planish.graph.replay import Replay, affordable, take
from planish.quantize.arithmetic import Quantizer, int8_weights, unsigned
from planish.quantize.bias import correct_biases, round_biases_
from planish.quantize.contract import Observer
from planish.quantize.insert import insert, watch, weight_quantizer, why_not
from planish.quantize.local import quantize_locally, why_not_locally
from planish.quantize.placement import Read, narrow_reads, place
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
) -> Quantized:
    """A copy of `graph` whose chosen operators compute in their schemes, batch norm folded.

    In static schemes weights get per-channel symmetric quantizers in the target's range, activations per-tensor affine unsigned ones;
    in the others weights are rounded per channel or per group where they are read. A value that some read in 8 bits and some in fewer is rounded
    to 8 first, so that it lies in memory once, and further for those who want less. All are `fake_quantize_*` nodes with scales and zero
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
        bias_correction: whether the mean error of each output channel is taken out of its bias.

    Raises:
        PlanError: a scheme that nobody registered, or that the runtime does not execute.
        UnknownName: an operator that the analysis has not, or an observer that nobody registered.
        DataError: no calibration sample.

    References:
        Nagel et al., A White Paper on Neural Network Quantization, 2021.
    """
    make: type[Observer] = registry.get("observer", observer)
    chosen = chosen_nodes(analysis, precisions)
    nodes = {name: node for name, (node, _) in chosen.items()}
    for name, (_, scheme) in chosen.items():
        if scheme.name not in runtime.schemes:
            reason = scheme.refusal or f"it executes {', '.join(runtime.schemes)}"
            raise PlanError(f"precisions: {scheme.name!r} of {name!r} cannot run in {runtime.name}: {reason}")
    bits = {node: scheme.weight_bits for node, scheme in chosen.values()}
    static = {name: node for name, (node, scheme) in chosen.items() if scheme.activations == "static"}
    folded = fold_batch_norm(graph)
    set_mode(folded, False)
    module = folded.module
    flat = take(split, samples)
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
    by_name = {node.name: node for node in module.graph.nodes}
    local = {name: scheme for name, (_, scheme) in chosen.items() if name not in static}
    unfit = {name: reason for name, scheme in local.items() if (reason := why_not_locally(module, by_name[nodes[name]], scheme))}
    skipped.update(unfit)
    local = {name: scheme for name, scheme in local.items() if name not in unfit}
    reference = copy.deepcopy(module)
    owners = {value: placement.repeats.get(value, value) for value in placement.activations}
    activations = {value: found for value, owner in owners.items() if isinstance(found := watched[owner], Quantizer)}
    reads_of = narrow_reads(module, placement, {nodes[name]: chosen[name][1].activation_bits for name in placement.operators})
    narrow = _narrow(module, flat, {(owners[value], width) for value in activations for width in reads_of.get(value, ())}, make)
    for name, (readers, axis) in placement.weights.items():
        grid = int8_weights(min(target.weight_range, *(2 ** (bits[reader.node] - 1) - 1 for reader in readers)), axis)
        insert(module, name, readers, weight_quantizer(module, name, readers, grid, make, activations, placement))
    for value, quantizer in activations.items():
        further = {width: (reads, narrow[owners[value], width]) for width, reads in reads_of.get(value, {}).items()}
        _insert_activation(module, value, placement.activations[value], owners[value], quantizer, further)
    quantize_locally(module, {nodes[name]: scheme for name, scheme in local.items()}, target, make)
    module.graph.lint()
    module.recompile()
    done = (*placement.operators, *local)
    if bias_correction:
        enough = affordable(Replay(reference), folded, samples)
        correct_biases(reference, module, [nodes[name] for name in done], [value[:enough] for value in flat])
    round_biases_(module)
    return Quantized(folded, done, skipped)


def _narrow(
    module: GraphModule, flat: list[Tensor], wanted: Collection[tuple[str, int]], make: type[Observer]
) -> dict[tuple[str, int], Quantizer]:
    """The quantizers of values that are rounded to fewer than 8 bits, by value and bits; each has one in 8 bits too."""
    out: dict[tuple[str, int], Quantizer] = {}
    for width in sorted({width for _, width in wanted}):
        values = sorted(value for value, bits in wanted if bits == width)
        for value, found in watch(module, flat, values, make, unsigned(width)).items():
            assert isinstance(found, Quantizer), found
            out[value, width] = found
    return out


def _insert_activation(
    module: GraphModule,
    value: str,
    readers: tuple[Read, ...],
    owner: str,
    quantizer: Quantizer,
    further: Mapping[int, tuple[tuple[Read, ...], Quantizer]],
) -> None:
    """Puts the quantizers behind an activation: one of 8 bits, and behind it those of fewer for the readers that want them.

    Args:
        owner: the value whose quantizers these are.
        further: bits -> readers and quantizer; where these are all there are, they read the value itself.
    """
    narrow = {read for reads, _ in further.values() for read in reads}
    if set(readers) - narrow:
        value = insert(module, value, readers, quantizer, owner).name
    for width, (reads, fewer) in further.items():
        insert(module, value, reads, fewer, f"{owner}_{width}_bits")
