"""Weights of a quantized program rounded by a method that looks at calibration data, one after the other in the order of the program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.graph.graph import Analysis
from planish.graph.modes import short_name
from planish.graph.moments import Moments
from planish.graph.replay import Environment, Replay, in_batches
from planish.quantize.arithmetic import Grid
from planish.quantize.contract import Observer, Rounding
from planish.quantize.places import Place, find_places

_CHUNK, _CHUNK_OF_BLOCKS = 32, 8
"""Samples that run at once. Where blocks are learned one such batch is a step: more would make steps slower than they make them better."""
_FEWEST_ROWS, _MOST_ROWS = 8192, 65536


@dataclass(frozen=True)
class _Unit:
    """Weights that are rounded together.

    Args:
        places: of one layer, or of those of a residual branch, in the order of the program.
        end: the addition that ends the branch; None for a layer.
    """

    places: tuple[Place, ...]
    end: Node | None = None


def round_(
    replay: Replay,
    operators: Sequence[str],
    analysis: Analysis,
    flat: list[Tensor],
    method: Rounding,
    make: Callable[[Grid], Observer],
    seed: int = 0,
) -> dict[str, str]:
    """Rounds the weights of a program with fake quantizers in place anew; the parameters become the rounded values.

    The program runs once over the samples, and each weight is rounded when it is reached, on what the weights before it give as they are
    rounded by then. A weight that several operators read counts the inputs of all, as the program with nearest rounding gives them.

    Args:
        replay: of the program, whose module is changed in place: weights, and the scales of groups.
        operators: fx names of the operators that are quantized.
        analysis: knows the residual branches.
        flat: calibration inputs.
        method: chooses the grid points.
        make: an observer for a grid.
        seed: of the positions that are drawn where a layer has more of them than are needed, and of the method.

    Returns:
        fx name -> why its weight is rounded to nearest all the same, of operators that have one.
    """
    generator = torch.Generator().manual_seed(seed)
    places, reasons = find_places(replay, operators)
    units = _units(replay, places, analysis if "blocks" in method.needs else None)
    values = [replay.start(chunk) for chunk in in_batches(flat, _CHUNK_OF_BLOCKS if "blocks" in method.needs else _CHUNK)]
    with torch.no_grad():
        shared = _of_shared(replay, [place for place in places if len(place.readers) > 1], flat, generator)
        constant: set[Node] = set()
        for node in replay.nodes:
            unit = units.get(node)
            if unit is not None and unit.end is not None:
                layers = [place.layer(None, make) for place in unit.places]
                for place, rounded in zip(unit.places, method.rounded(layers, _Part(replay, unit, values), generator), strict=True):
                    place.write(rounded, values)
            elif unit is not None:
                (place,) = unit.places
                moments = shared.get(place.rounding) or _moments(replay, place, node, values, generator)
                gram = moments.second(centered=False)[0]
                if bool(torch.isfinite(gram).all()):
                    place.write(method.rounded([place.layer(gram, make)], None, generator)[0], values)
                else:
                    reasons[node.name] = "its inputs are not finite"
            _step(replay, node, values, constant)
    return reasons


def _step(replay: Replay, node: Node, values: Sequence[Environment], constant: set[Node]) -> None:
    """One node in all environments; what follows from parameters alone is computed once."""
    once = None
    if node.op == "get_attr" or (node.op == "call_function" and node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
        constant.add(node)
        once = replay.value(node, values[0])
    for environment in values:
        if once is None:
            replay.step(node, environment)
        else:
            environment[node] = once
            replay.release(node, environment)


def _moments(replay: Replay, place: Place, node: Node, values: Sequence[Environment], generator: torch.Generator) -> Moments:
    """Of the inputs of one of a weight's readers, at random positions."""
    reader, source = next(pair for pair in zip(place.readers, place.inputs, strict=True) if pair[0].node is node)
    count = place.matrix().shape[1]
    rows = math.ceil(min(max(16 * count, _FEWEST_ROWS), _MOST_ROWS) / len(values))
    found = Moments(reader.groups, count)
    for environment in values:
        positions = reader.draw(replay.value(node, environment), rows, generator)
        found.add(reader.columns(environment[source], place.parameter, positions))
    return found


def _of_shared(replay: Replay, places: Sequence[Place], flat: list[Tensor], generator: torch.Generator) -> dict[Node, Moments]:
    """For each weight that several operators read, by its fake quantizer, the moments of all of their inputs together."""
    found: dict[Node, Moments] = {}
    if not places:
        return found
    at = {reader.node: place for place in places for reader in place.readers}
    values = [replay.start(chunk) for chunk in in_batches(flat, _CHUNK)]
    constant: set[Node] = set()
    for node in replay.nodes:
        if node in at:
            rounding, moments = at[node].rounding, _moments(replay, at[node], node, values, generator)
            found[rounding] = found[rounding] + moments if rounding in found else moments
        _step(replay, node, values, constant)
    return found


def _units(replay: Replay, places: Sequence[Place], analysis: Analysis | None) -> dict[Node, _Unit]:
    """What is rounded when a node is reached: a branch at the first of its layers, the innermost where branches hold branches."""
    left = {place.readers[0].node: place for place in places}
    units: dict[Node, _Unit] = {}
    blocks = sorted(analysis.blocks.values(), key=lambda block: len(block.operators)) if analysis is not None else ()
    for block in blocks:
        assert analysis is not None
        inside = {analysis.operators[name].node for name in block.operators}
        first = [node for node, place in left.items() if node.name in inside and len(place.readers) == 1]
        end = replay.by_name.get(block.node)
        if first and end is not None:
            unit = _Unit(tuple(left[node] for node in first), end)
            if not any(short_name(node).endswith("_") for node in _between(replay, unit)):
                units[first[0]] = unit
                for node in first:
                    del left[node]
    return {**units, **{node: _Unit((place,)) for node, place in left.items()}}


def _between(replay: Replay, unit: _Unit) -> list[Node]:
    """The nodes from the first layer of a branch to its end, without what makes the weights."""
    given = {place.value for place in unit.places}
    start = replay.position[unit.places[0].readers[0].node]
    found: set[Node] = set()
    stack = [unit.end] if unit.end is not None else []
    while stack:
        node = stack.pop()
        if node not in found and node not in given and replay.position[node] >= start:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found, key=replay.position.__getitem__)


class _Part:
    """`Outputs` of a branch, from the values that it finds in each batch's environment.

    Args:
        replay: of the program.
        unit: the branch.
        values: environments that have come to its first layer; they stay as they are.
    """

    def __init__(self, replay: Replay, unit: _Unit, values: Sequence[Environment]) -> None:
        self._replay, self._unit, self._values = replay, unit, values
        self._nodes = _between(replay, unit)
        self.batches = len(values)

    def __call__(self, batch: int, weights: Sequence[Tensor] | None) -> Tensor:
        environment = dict(self._values[batch])
        given: Mapping[Place, Tensor] = dict(zip(self._unit.places, weights or [p.matrix() for p in self._unit.places], strict=True))
        environment.update({place.value: place.in_layout(matrix) for place, matrix in given.items()})
        for node in self._nodes:
            if weights is None and short_name(node).startswith("fake_"):
                environment[node] = environment[node.all_input_nodes[0]]
            else:
                environment[node] = self._replay.value(node, environment)
        assert self._unit.end is not None
        found: Tensor = environment[self._unit.end]
        return found
