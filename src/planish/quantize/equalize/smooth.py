"""SmoothQuant: outlier channels of an activation hand some of their size to the weights that read it, as far as the rounded outputs gain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.modes import short_name
from planish.graph.parts import Parts, bias_of, known_parts, parts_of, tensor_of
from planish.graph.replay import Replay, in_batches
from planish.quantize.arithmetic import Quantizer
from planish.quantize.equalize.channels import POINTWISE, is_read_by, scale_inputs_, scale_outputs_, weight_node
from planish.quantize.equalize.search import Reader, Sample, full_range, search
from planish.quantize.insert import BATCH, own_values
from planish.quantize.placement import Placement, source_among

aten = torch.ops.aten
ROWS = 512  # of each activation, kept for the search
SMOOTHED = "planish_smoothed"
"""Key of `node.meta`: the operator reads its activation in another scale than in the original."""
_PASSED = POINTWISE | {"detach"}
"""What a factor per channel may be moved over."""


@dataclass(frozen=True)
class Smoothed:
    """One activation after the search.

    Args:
        readers: fx names of the linear maps that read it.
        inverse: what it is multiplied with before them, [channels]; None: it is left as it was.
        sample: of its values, multiplied.
        weights: of the readers, which share memory with the program's.
    """

    readers: tuple[str, ...]
    inverse: Tensor | None
    sample: Sample
    weights: tuple[Reader, ...]


def readers_by_activation(module: GraphModule, operators: Iterable[str], kinds: Collection[str]) -> list[list[str]]:
    """The linear maps among operators, by fx name, grouped by the activation that they read: those that share one share its factors.

    Args:
        module: the program.
        operators: fx names of those that become static int8.
        kinds: of operators that the runtime executes in int8.
    """
    groups: dict[Node, list[str]] = {}
    by_name = {node.name: node for node in module.graph.nodes}
    for name in operators:
        if _is_smoothable(module, by_name[name], kinds):
            groups.setdefault(_activation(by_name[name]), []).append(name)
    return list(groups.values())


@torch.no_grad()
def smooth(
    module: GraphModule,
    groups: Sequence[Sequence[str]],
    flat: list[Tensor],
    largest: Mapping[str, int],
    fold: bool = True,
) -> list[Smoothed]:
    """Divides activations by a factor per channel and multiplies the weights of their readers with it, where that pays.

    The division goes into the affine part of a layer norm, or into a linear map, that issues the activation to nobody else; elsewhere
    it is an explicit multiplication before the readers. That costs 5 us of 60 in ONNX Runtime (32 x 1536 values before an int8 product);
    OpenVINO fuses it. Written as scales per channel of the quantizer it would compute the same on the same int8 kernels, but ONNX Runtime
    takes 750 us for such a quantizer, since its channels lie innermost.

    Args:
        module: changed in place; it computes the same in float. The caller recompiles.
        groups: of `readers_by_activation`, or parts of them.
        flat: calibration inputs.
        largest: fx name -> the largest integer of the grid of that operator's weight.
        fold: whether the division may go into what issues the activation.

    References:
        Xiao et al., SmoothQuant, 2023, equation 4. Differs: the strength is searched per activation by the error of the outputs (as AWQ
        does for weights, Lin et al. 2024), and "not at all" is among what is searched.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    nodes = [[by_name[name] for name in group] for group in groups]
    samples = _watch(module, {_activation(members[0]) for members in nodes}, flat)
    done = []
    for members in nodes:
        readers = tuple(Reader(_matrix(module, node), largest[node.name]) for node in members)
        sample, inverse = samples[_activation(members[0])], None
        factors = search(sample, readers) if _is_placeable(module, members, sample.is_matrix) else None
        if factors is not None:
            sample, inverse = sample.divided(factors), factors.reciprocal()
            for node in members:
                scale_inputs_(module, node, factors)
                node.meta[SMOOTHED] = True
            _multiply(module, members, inverse, fold)
        done.append(Smoothed(tuple(node.name for node in members), inverse, sample, readers))
    return done


@torch.no_grad()
def unclipped(
    module: GraphModule, placement: Placement, watched: Mapping[str, Quantizer | str], done: Iterable[Smoothed]
) -> dict[str, tuple[str, Quantizer]]:
    """Activations that are better not clipped: fx name of each reader -> the value that is rounded, and its quantizer.

    Args:
        module: after `smooth`.
        placement: of quantizers in it.
        watched: value -> what the observer chose for it.
        done: what `smooth` gave.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    found: dict[str, tuple[str, Quantizer]] = {}
    for activation in done:
        node = by_name[activation.readers[0]]
        value = source_among(node, _position(node), placement)
        chosen = None if value is None else watched[value]
        if value is None or not isinstance(chosen, Quantizer):
            continue
        whole = full_range(activation.sample, activation.weights, chosen)
        if whole is not None:
            found.update(dict.fromkeys(activation.readers, (value, whole)))
    return found


def _position(node: Node) -> int:
    return known_parts(node).activations[0]


def _activation(node: Node) -> Node:
    value = node.args[_position(node)]
    assert isinstance(value, Node)
    return value


def _matrix(module: GraphModule, node: Node) -> Tensor:
    """A linear map's weight as [outputs, inputs]."""
    weight, parts = weight_node(node), parts_of(node)
    assert weight is not None and isinstance(parts, Parts)
    values = tensor_of(module, weight)
    return values.t() if parts.axis else values


def _is_smoothable(module: GraphModule, node: Node, kinds: Collection[str]) -> bool:
    """Whether a node is a linear map with a weight of its own, which the runtime executes."""
    weight, parts = weight_node(node), parts_of(node)
    if weight is None or not isinstance(parts, Parts) or parts.kind == "conv" or parts.kind not in kinds:
        return False
    return is_read_by(module, weight, {node})


def _watch(module: GraphModule, values: Collection[Node], flat: list[Tensor]) -> dict[Node, Sample]:
    """A sample of each value over the calibration data."""
    replay = Replay(module)
    samples: dict[Node, Sample] = {}
    batches = in_batches(flat, BATCH) if values else []
    for batch in batches:
        for node, environment in replay.visits(batch):
            if node in values:
                rows = environment[node].detach()
                samples.setdefault(node, Sample([], [], *torch.aminmax(rows.reshape(-1, rows.shape[-1]), dim=0), rows.dim() <= 2))
                _add(samples[node], rows.reshape(-1, rows.shape[-1]), ROWS // len(batches))
    return samples


def _add(known: Sample, rows: Tensor, most: int) -> None:
    """Keeps some rows of a batch, evenly spread, and the one with the largest value: rare tokens may hold most of the outputs' energy."""
    step = max(1, -(-len(rows) // max(most, 1)))
    step += 1 - step % 2  # an odd step does not keep in step with the tokens of a sentence
    even = torch.arange(0, len(rows), step)
    largest = rows.abs().amax(1).argmax()
    chosen = torch.cat([even, largest.expand(int(largest % step != 0))])
    counts = torch.full((len(chosen),), float(step))
    counts[len(even) :] = 1.0
    low, high = torch.aminmax(rows, dim=0)
    known.rows.append(rows[chosen])
    known.counts.append(counts)
    known.low, known.high = torch.minimum(known.low, low), torch.maximum(known.high, high)


def _multiply(module: GraphModule, readers: Sequence[Node], inverse: Tensor, fold: bool) -> None:
    """Lets linear maps read their activation times a factor per channel."""
    value = _activation(readers[0])
    source = _foldable(module, value, readers) if fold else None
    if source is not None:
        _fold(module, source, inverse)
        return
    graph = module.graph
    name = f"{readers[0].name}_smoothing"
    module.register_buffer(name, inverse)
    with graph.inserting_before(min(readers)):
        scaled = graph.call_function(aten.mul.Tensor, (value, graph.get_attr(name)))
    scaled.meta = own_values(value)
    for node in readers:
        node.update_arg(_position(node), scaled)


def _is_placeable(module: GraphModule, readers: Sequence[Node], is_matrix: bool) -> bool:
    """Whether a multiplication has a place. One before the head of an image net would part it from the pool that it shares int8 with, and
    its few rows say little of a range per channel: ResNet-20's outputs fell from 32 to 23 dB SQNR on other images."""
    value = _activation(readers[0])
    return not is_matrix or _foldable(module, value, readers) is not None


def _foldable(module: GraphModule, value: Node, readers: Sequence[Node]) -> Node | None:
    """The layer norm or linear map that issues `value` to nobody but `readers`, with parameters of its own; None where there is none."""
    if any(user not in readers for user in value.users):
        return None
    while short_name(value) in _PASSED:
        (value,) = value.all_input_nodes
        if len(value.users) != 1:
            return None
    if short_name(value) == "layer_norm":
        own = [argument for argument in value.args[2:4] if isinstance(argument, Node)]
        is_affine = bool(own) and own[0] is value.args[2] and tensor_of(module, own[0]).dim() == 1
    else:
        weight, bias = weight_node(value), bias_of(value)
        parts = parts_of(value)
        is_affine = weight is not None and isinstance(parts, Parts) and parts.kind != "conv"
        own = [parameter for parameter in (weight, bias) if parameter is not None]
    return value if is_affine and all(is_read_by(module, parameter, {value}) for parameter in own) else None


def _fold(module: GraphModule, source: Node, inverse: Tensor) -> None:
    if short_name(source) != "layer_norm":
        scale_outputs_(module, source, inverse)
        return
    for parameter in source.args[2:4]:
        if isinstance(parameter, Node):
            tensor_of(module, parameter).mul_(inverse)
