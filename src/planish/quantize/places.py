"""Weights behind fake quantizers as matrices that multiply columns of inputs: where a rounding method finds and leaves them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from planish.graph.contraction import Contraction, contraction
from planish.graph.modes import short_name
from planish.graph.parts import RECURRENT, Parts, parameter_of, parts_of, tensor_of
from planish.graph.replay import Environment, Replay
from planish.quantize.arithmetic import Grid, GroupQuantizer
from planish.quantize.contract import Layer, Observer, Rounded
from planish.quantize.local import group_quantizer

aten = torch.ops.aten
_MOST_COLUMNS = 8192
"""Of a weight: its inputs' moments take a gigabyte in double precision beyond."""
_PER_GROUP = "fake_quantize_per_group"


@dataclass(frozen=True)
class Place:
    """A weight behind a fake quantizer, and who reads it.

    Args:
        module: that holds it.
        rounding: the fake quantizer.
        value: what the readers read: that, or its transpose.
        readers: how each of them multiplies its input with the weight.
        inputs: the node of the input of each.
        is_transposed: whether the weight is [inputs, outputs].
    """

    module: GraphModule
    rounding: Node
    value: Node
    readers: tuple[Contraction, ...]
    inputs: tuple[Node, ...]
    is_transposed: bool

    @property
    def parameter(self) -> Tensor:
        """The weight itself."""
        found = parameter_of(self.rounding)
        assert found is not None
        return tensor_of(self.module, found)

    def matrix(self) -> Tensor:
        """[outputs, columns]."""
        return (self.parameter.t() if self.is_transposed else self.parameter.flatten(1)).contiguous()

    def in_layout(self, matrix: Tensor) -> Tensor:
        """A matrix as the readers want it."""
        return matrix.t() if self.is_transposed else matrix.view(self.parameter.shape)

    @property
    def _buffers(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.rounding.args[1:3]
        assert isinstance(scale, Node) and isinstance(zero_point, Node)
        return tensor_of(self.module, scale), tensor_of(self.module, zero_point)

    def quantizer(self) -> GroupQuantizer:
        """The fake quantizer's grids, of the matrix."""
        *_, group, low, high = self.rounding.args
        assert isinstance(group, int) and isinstance(low, int) and isinstance(high, int)
        columns = self.matrix().shape[1]
        of = [values.view(-1, 1) if values.dim() == 1 else values for values in self._buffers]
        return GroupQuantizer(Grid(low, high), group if self._is_grouped else columns, *of)

    @property
    def _is_grouped(self) -> bool:
        return short_name(self.rounding) == _PER_GROUP

    def layer(self, gram: Tensor | None, make: Callable[[Grid], Observer]) -> Layer:
        """What a method is given. Scales of outputs may not change: those of static operators are bound to their biases."""
        quantizer = self.quantizer()
        regrid = functools.partial(group_quantizer, grid=quantizer.grid, group=quantizer.group, make=make) if self._is_grouped else None
        return Layer(self.matrix().clone(), quantizer, gram, regrid)

    def write(self, rounded: Rounded, values: Sequence[Environment]) -> None:
        """Puts a rounded weight and its scales into the module, and where environments hold the old ones."""
        quantizer = rounded.quantizer
        exact = quantizer.rounded(rounded.weight)
        assert torch.equal(exact, quantizer.rounded(exact)), "a rounded weight must stay as it is when it is rounded again"
        self.parameter.copy_(self.in_layout(exact))
        for buffer, found in zip(self._buffers, (quantizer.scale, quantizer.zero_point), strict=True):
            buffer.copy_(found.view(buffer.shape))
        weight = self.in_layout(exact)
        for environment in values:
            if self.value in environment:
                environment[self.value] = weight


def find_places(replay: Replay, operators: Sequence[str]) -> tuple[list[Place], dict[str, str]]:
    """The weights that a method can round, in the order of their first readers, and why the others are rounded to nearest.

    Args:
        replay: of the program with its fake quantizers.
        operators: fx names of the operators that are quantized.

    Returns:
        Places, and fx name -> why not.
    """
    module = replay.module
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    readers: dict[Node, list[Contraction]] = {}
    reasons: dict[str, str] = {}
    for node in sorted((replay.by_name[name] for name in operators), key=replay.position.__getitem__):
        parts = parts_of(node)
        if not isinstance(parts, Parts) or parts.weight is None:
            continue
        found = _reader(node, parts, tensors)
        value = node.args[parts.weight]
        if isinstance(found, str):
            reasons[node.name] = found
        elif isinstance(value, Node) and value.op != "get_attr":
            readers.setdefault(value, []).append(found)
    uses = _uses(replay, tensors)
    places = []
    for value, theirs in readers.items():
        if uses[id(tensors[theirs[0].weight])] == len(theirs) == len(value.users):
            places.append(_place(module, value, theirs))
        else:
            reasons.update(dict.fromkeys((reader.node.name for reader in theirs), "its weight is read in another form too"))
    return places, reasons


def _reader(node: Node, parts: Parts, tensors: Mapping[str, Tensor]) -> Contraction | str:
    assert parts.weight is not None
    if parts.kind == "embedding":
        return "an embedding multiplies no inputs"
    if parts.kind == "conv_transpose":
        return "its inputs cannot be read as columns"
    if parts.kind in RECURRENT:
        return "a recurrent layer multiplies what it gives itself, step by step"
    if short_name(node.args[parts.weight]) == "fake_codebook":  # type: ignore[arg-type]
        return "its values are fitted to it"
    if parts.kind == "conv":
        found = contraction(node, tensors)
        if found is None:
            return "its inputs cannot be read as columns"
    else:
        held = parameter_of(node.args[parts.weight])  # type: ignore[arg-type]
        assert held is not None, node.format_node()
        found = Contraction(node, str(held.target), None)
        if tensors[found.weight].dim() != 2:
            return "its weight is no matrix"
    columns = tensors[found.weight].numel() // tensors[found.weight].shape[parts.axis]
    return found if columns <= _MOST_COLUMNS else f"its inputs are more than {_MOST_COLUMNS}"


def _uses(replay: Replay, tensors: Mapping[str, Tensor]) -> Counter[int]:
    """How many nodes read each tensor, by any of its names, in any form."""
    found: Counter[int] = Counter()
    for node in replay.nodes:
        if node.op == "get_attr" and str(node.target) in tensors:
            found[id(tensors[str(node.target)])] += _leaves(node)
    return found


def _leaves(node: Node) -> int:
    """How many nodes read a parameter, rounded or turned on the way or not."""
    is_passed_on = [user.target is aten.t.default or short_name(user).startswith("fake_") for user in node.users]
    return sum(_leaves(user) if passes else 1 for user, passes in zip(node.users, is_passed_on, strict=True))


def _place(module: GraphModule, value: Node, readers: Sequence[Contraction]) -> Place:
    is_turned = value.target is aten.t.default
    rounding = value.args[0] if is_turned else value
    parts = [parts_of(reader.node) for reader in readers]
    inputs = [reader.node.args[its.activations[0]] for reader, its in zip(readers, parts, strict=True) if isinstance(its, Parts)]
    is_transposed = isinstance(parts[0], Parts) and parts[0].axis == 1
    assert isinstance(rounding, Node) and all(isinstance(source, Node) for source in inputs)
    return Place(module, rounding, value, tuple(readers), tuple(inputs), is_transposed)  # type: ignore[arg-type]
