"""What several plans of one graph share: batch norm folded, calibration samples, and quantizers that were each chosen once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from planish.quantize.contract import Observer, Scheme
from planish.quantize.insert import first_source, watch, weight_quantizer
from planish.quantize.local import WeightQuantizer, local_quantizer
from planish.quantize.placement import Placement, Read
from planish.target import Target


@dataclass(frozen=True)
class Ground:
    """A graph that is about to be quantized, in one way or in several: what was watched for one of them serves the others too.

    Args:
        graph: in float, batch norm folded, evaluation mode; nobody changes it.
        flat: inputs of the calibration samples, sample axis 0.
        make: the observer that chooses ranges.
        watched: value -> its quantizer on the calibration data, or why it can have none; grows as values are asked for.
    """

    graph: Graph
    flat: Sequence[Tensor]
    make: type[Observer]
    watched: dict[str, Quantizer | str] = field(default_factory=dict)
    _weights: dict[tuple[str, tuple[Read, ...], tuple[str | None, ...], Grid], Quantizer] = field(default_factory=dict)
    _local: dict[tuple[str, Parts, str, int], WeightQuantizer] = field(default_factory=dict)

    @property
    def module(self) -> GraphModule:
        """The program of the graph."""
        return self.graph.module

    def watch(self, values: Iterable[str]) -> None:
        """Run the calibration samples for the values (fx node names) that were not watched before."""
        new = [value for value in values if value not in self.watched]
        self.watched.update(watch(self.module, self.flat, new, self.make))

    @property
    def activations(self) -> dict[str, Quantizer]:
        """The quantizers of the values that were watched and have one."""
        return {value: found for value, found in self.watched.items() if isinstance(found, Quantizer)}

    def weight_quantizer(self, weight: str, readers: tuple[Read, ...], grid: Grid, placement: Placement) -> Quantizer:
        """The quantizer of a weight for its readers in static schemes, with scales that are large enough for their biases."""
        sources = tuple(first_source(self.module, reader, placement) for reader in readers)
        key = weight, readers, sources, grid
        if key not in self._weights:
            self._weights[key] = weight_quantizer(self.module, weight, readers, grid, self.make, self.activations, placement)
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
