"""What several plans of one graph share: batch norm folded, calibration samples, and quantizers that were each chosen once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule

from planish import registry
from planish.data import Split
from planish.graph.fold import fold_batch_norm
from planish.graph.graph import Graph
from planish.graph.modes import set_mode
from planish.graph.parts import Parts, tensor_of
from planish.graph.replay import take
from planish.quantize.arithmetic import Grid, Quantizer
from planish.quantize.contract import Equalization, Observer, Scheme, check_equalization
from planish.quantize.equalize.cross_layer import equalize_layers
from planish.quantize.equalize.smooth import Smoothed, readers_by_activation, smooth
from planish.quantize.insert import first_source, probability_steps, watch, weight_quantizer
from planish.quantize.local import WeightQuantizer, local_quantizer
from planish.quantize.placement import Placement, Read
from planish.runtimes.contract import Runtime
from planish.target import Target


@dataclass(frozen=True)
class Ground:
    """A graph that is about to be quantized, in one way or in several: what was watched for one of them serves the others too.

    Args:
        graph: in float, batch norm folded, evaluation mode; nobody changes it.
        flat: inputs of the calibration samples, sample axis 0.
        make: the observer that chooses ranges.
        watched: value -> its quantizer on the calibration data, or why it can have none; grows as values are asked for.
        smoothed: activations that were searched for a smoothing, and what came of it.
    """

    graph: Graph
    flat: Sequence[Tensor]
    make: type[Observer]
    watched: dict[str, Quantizer | str] = field(default_factory=dict)
    smoothed: tuple[Smoothed, ...] = ()
    _steps: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[tuple[str, tuple[Read, ...], tuple[float, ...], Grid], Quantizer] = field(default_factory=dict)
    _local: dict[tuple[str, Parts, str, int], WeightQuantizer] = field(default_factory=dict)

    @property
    def module(self) -> GraphModule:
        """The program of the graph."""
        return self.graph.module

    def watch(self, placement: Placement) -> None:
        """Run the calibration samples for the values of a placement that were not watched before."""
        new = [value for value in placement.watched if value not in self.watched]
        self.watched.update(watch(self.module, self.flat, new, self.make, signed=placement.signed))

    @property
    def activations(self) -> dict[str, Quantizer]:
        """The quantizers of the values that were watched and have one."""
        return {value: found for value, found in self.watched.items() if isinstance(found, Quantizer)}

    def probability_steps(self, attentions: Sequence[str]) -> Mapping[str, Tensor]:
        """The steps of the probabilities of some attentions (fx node names), and of those that were asked for before."""
        new = [name for name in attentions if name not in self._steps]
        self._steps.update(probability_steps(self.module, self.flat, new, self.graph.signature.is_sized))
        return self._steps

    def weight_quantizer(
        self, weight: str, readers: tuple[Read, ...], grid: Grid, placement: Placement, activations: Mapping[str, Quantizer]
    ) -> Quantizer:
        """The quantizer of a weight for its readers in static schemes, with scales that are large enough for their biases."""
        sources = tuple(first_source(self.module, reader, placement) for reader in readers)
        scales = tuple(float(activations[source].scale) for source in sources if source is not None and source in activations)
        key = weight, readers, scales, grid
        if key not in self._weights:
            self._weights[key] = weight_quantizer(self.module, weight, readers, grid, self.make, activations, placement)
        return self._weights[key]

    def local_quantizer(self, weight: str, parts: Parts, scheme: Scheme, target: Target) -> WeightQuantizer:
        """The quantizer of a weight for operators with these parts in a scheme without static activations."""
        key = weight, parts, scheme.name, target.weight_range
        if key not in self._local:
            (node,) = (node for node in self.module.graph.nodes if node.name == weight)
            self._local[key] = local_quantizer(tensor_of(self.module, node), parts, scheme, target, self.make)
        return self._local[key]


def folded(graph: Graph) -> Graph:
    """A copy of a graph with its batch norm folded, in evaluation mode."""
    found = fold_batch_norm(graph)
    set_mode(found, False)
    return found


def ground_of(graph: Graph, split: Split, observer: str, samples: int) -> Ground:
    """The ground of a graph on at most so many calibration samples.

    Raises:
        UnknownName: an observer that nobody registered. DataError: no calibration sample.
    """
    make: type[Observer] = registry.get("observer", observer)
    return Ground(folded(graph), take(split, samples), make)


def equalized(ground: Ground, chosen: Iterable[tuple[str, Scheme]], runtime: Runtime, target: Target, equalization: Equalization) -> Ground:
    """A ground whose channels are scaled against each other as operators in these schemes want it; the same in float.

    Args:
        ground: stays as it is; it is what comes back where nothing is to be done.
        chosen: fx node name and scheme of each operator that leaves fp32.
        runtime: smooths only what it executes in int8.
        target: gives the range of weights.
        equalization: how.

    Raises:
        UnknownName: an equalization that there is not.
    """
    check_equalization(equalization)
    largest = {node: scheme.largest_weight(target.weight_range) for node, scheme in chosen if scheme.activations == "static"}
    if equalization == "none" or (equalization == "smooth" and not largest):
        return ground
    graph = ground.graph.copy()
    if equalization == "cross-layer":
        equalize_layers(graph.module)
        return Ground(graph, ground.flat, ground.make)
    groups = readers_by_activation(graph.module, largest, runtime.quantize_inputs_of)
    found = tuple(smooth(graph.module, groups, list(ground.flat), largest))
    graph.module.recompile()
    return Ground(graph, ground.flat, ground.make, smoothed=found)
