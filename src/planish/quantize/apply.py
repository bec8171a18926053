"""A precision plan carried out: fake quantization in the program, which still trains (straight-through) and exports to the runtimes' forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from planish import registry
from planish.data import Split
from planish.errors import PlanError
from planish.graph.attention import static_attention
from planish.graph.graph import Analysis, Graph
from planish.graph.replay import Replay, affordable
from planish.quantize.arithmetic import Quantizer, int8_weights, unsigned
from planish.quantize.bias import correct_biases, round_biases_
from planish.quantize.concatenations import with_shared
from planish.quantize.contract import Equalization, Rounding
from planish.quantize.equalize.smooth import unclipped
from planish.quantize.ground import Ground, equalized, ground_of
from planish.quantize.insert import insert, watch, why_not
from planish.quantize.local import form_of, quantize_locally, why_not_locally
from planish.quantize.placement import Placement, Read, narrow_reads, place
from planish.quantize.round import round_
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
        nearest: operators whose weights are rounded to nearest although another rounding was asked for -> why.
    """

    graph: Graph
    operators: tuple[str, ...]
    skipped: Mapping[str, str]
    nearest: Mapping[str, str] = field(default_factory=dict)


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
    rounding: str = "nearest",
    seed: int = 0,
    equalization: Equalization = "smooth",
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
        equalization: "smooth" changes linear maps in static schemes whose outputs are then nearer to the original's, by their error on the
            calibration data, and rounds an activation in its full range where clipping would cost them more. "cross-layer" shares
            channels out between operators in any scheme: it is exact in float, costs nothing later, and need not help.
        bias_correction: whether the mean error of each output channel is taken out of its bias.
        rounding: the registered method that chooses the grid point of each weight. By any but "nearest" the parameters become the
            rounded values themselves. Left to nearest, by name in `Quantized.nearest`: embeddings, weights that are read in another
            form too, and weights with more than 8192 inputs.
        seed: of the rounding.

    Raises:
        PlanError: a scheme that nobody registered, or that the runtime does not execute.
        UnknownName: an operator that the analysis has not, an observer or a rounding that nobody registered, or an equalization that there
            is not.
        DataError: no calibration sample.

    References:
        Nagel et al., A White Paper on Neural Network Quantization, 2021.
    """
    chosen = chosen_nodes(analysis, precisions)
    ground = equalized(ground_of(graph, split, observer, samples), chosen.values(), runtime, target, equalization)
    return quantize_on(ground, analysis, precisions, runtime, target, bias_correction, rounding, seed)


def quantize_on(
    ground: Ground,
    analysis: Analysis,
    precisions: Mapping[str, str],
    runtime: Runtime,
    target: Target,
    bias_correction: bool = True,
    rounding: str = "nearest",
    seed: int = 0,
) -> Quantized:
    """What `quantize` gives, on a ground that other plans of the same graph may stand on too."""
    method: Rounding = registry.get("rounding", rounding)()
    chosen = chosen_nodes(analysis, precisions)
    nodes = {name: node for name, (node, _) in chosen.items()}
    for name, (_, scheme) in chosen.items():
        if scheme.name not in runtime.schemes:
            reason = scheme.refusal or f"it executes {', '.join(runtime.schemes)}"
            raise PlanError(f"precisions: {scheme.name!r} of {name!r} cannot run in {runtime.name}: {reason}")
    largest = {node: scheme.largest_weight(target.weight_range) for node, scheme in chosen.values()}
    static = {name: node for name, (node, scheme) in chosen.items() if scheme.activations == "static"}
    reference = ground.module
    placement, skipped = _placed(ground, analysis, static, runtime)
    by_name = {node.name: node for node in reference.graph.nodes}
    local = {name: scheme for name, (_, scheme) in chosen.items() if name not in static}
    unfit = {name: reason for name, scheme in local.items() if (reason := why_not_locally(reference, by_name[nodes[name]], scheme))}
    skipped.update(unfit)
    local = {name: scheme for name, scheme in local.items() if name not in unfit}
    whole = unclipped(reference, placement, ground.watched, ground.smoothed)
    activations = with_shared({**ground.activations, **dict(whole.values())}, placement.shared)
    product = ground.graph.copy()
    module = product.module
    owners = {value: placement.repeats.get(value, value) for value in placement.activations}
    narrow_of = narrow_reads(reference, placement, {nodes[name]: chosen[name][1].activation_bits for name in placement.operators})
    narrow = _narrow(ground, {(owners[value], width) for value in placement.activations for width in narrow_of.get(value, ())})
    for name, (readers, axis) in placement.weights.items():
        grid = int8_weights(min(largest[reader.node] for reader in readers), axis)
        insert(module, name, readers, ground.weight_quantizer(name, readers, grid, placement, activations))
    for value, owner in owners.items():
        if (quantizer := activations.get(owner)) is not None:
            further = {width: (reads, narrow[owner, width]) for width, reads in narrow_of.get(value, {}).items()}
            _insert_activation(module, value, placement.activations[value], owner, quantizer, further)
    in_product = {node.name: node for node in module.graph.nodes}
    for name in placement.operators:
        node = in_product[nodes[name]]
        node.target = form_of(node, chosen[name][1])
    _insert_steps(module, ground)
    schemes = {nodes[name]: scheme for name, scheme in local.items()}
    quantize_locally(module, schemes, lambda weight, parts, scheme: ground.local_quantizer(weight.name, parts, scheme, target))
    module.graph.lint()
    module.recompile()
    done = (*placement.operators, *local)
    by_node = {nodes[name]: name for name in done}
    unrounded: dict[str, str] = {}
    flat = list(ground.flat)
    if bias_correction or method.needs:
        enough = affordable(Replay(reference), ground.graph, len(flat[0]))
        flat = [value[:enough] for value in flat]
    if method.needs:
        unrounded = round_(Replay(module), list(by_node), analysis, flat, method, ground.make, seed)
    if bias_correction:
        correct_biases(reference, module, list(by_node), flat)
    round_biases_(module)
    return Quantized(product, done, skipped, {by_node[node]: reason for node, reason in unrounded.items()})


def _placed(ground: Ground, analysis: Analysis, static: Mapping[str, str], runtime: Runtime) -> tuple[Placement, dict[str, str]]:
    """Where the quantizers of static schemes go once all operators that cannot have them are out, and why those cannot."""
    module = ground.module
    matrices = {found.node for found in analysis.operators.values() if len(found.output) == 2}
    skipped: dict[str, str] = {}
    while True:
        left = {name: node for name, node in static.items() if name not in skipped}
        placement = place(module, left, runtime.quantize_inputs_of, runtime.quantize_outputs_of, matrices)
        skipped.update(placement.skipped)
        ground.watch(placement)
        unfit = why_not(module, placement, static, ground.watched)
        if not unfit:
            return placement, skipped
        skipped.update(unfit)


def _insert_steps(module: GraphModule, ground: Ground) -> None:
    """Gives each attention in a static scheme the step of its probabilities, as a buffer `NODE_probability_scale`."""
    attentions = [node for node in module.graph.nodes if node.target is static_attention]
    steps = ground.probability_steps([node.name for node in attentions])
    for node in attentions:
        name = f"{node.name}_probability_scale"
        module.register_buffer(name, steps[node.name].clone())
        with module.graph.inserting_before(node):
            node.update_kwarg("step", module.graph.get_attr(name))


def _narrow(ground: Ground, wanted: Collection[tuple[str, int]]) -> dict[tuple[str, int], Quantizer]:
    """The quantizers of values that are rounded to fewer than 8 bits, by value and bits; each has one in 8 bits too."""
    out: dict[tuple[str, int], Quantizer] = {}
    for width in sorted({width for _, width in wanted}):
        values = sorted(value for value, bits in wanted if bits == width)
        for value, found in watch(ground.module, ground.flat, values, ground.make, unsigned(width)).items():
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
