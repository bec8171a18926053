"""Where quantizers go: a pure function of the program, of the operators that become int8, and of what the runtime says that it needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from planish.graph.modes import short_name
from planish.graph.parts import Parts, parts_of, steps_of, tensor_of
from planish.quantize.concatenations import grids_in_common, parts_of_concatenation
from planish.quantize.movements import PADDINGS, POOLS, RECTIFIERS, argument, is_rectified, moves, source_of

ADDITIONS = frozenset({"add", "add_"})


@dataclass(frozen=True)
class Read:
    """One argument of one node: `node.args[position]`."""

    node: str
    position: int


@dataclass(frozen=True)
class Placement:
    """Which values get a quantizer and who reads the quantized value, by fx node names.

    Args:
        activations: value -> its readers that get the quantized value; one quantizer per value, in program order.
        weights: parameter node -> (readers, dimension with one scale per index).
        operators: the operators that are int8 -> the weight's node, or None.
        skipped: operators that stay in float -> why.
        repeats: value -> the value whose quantizer it gets too. A padded value that of what it moves, which changes no number: ONNX Runtime
            passes int8 through slices and views but not through padding, and would add the two in float behind it. Parts of a
            concatenation that of the whole.
        shared: value -> the values on whose ranges its quantizer is chosen, itself among them: a concatenation and its parts.
        signed: the values with a grid that has zero in its middle -> whether they have it where they are never below zero, too.
    """

    activations: Mapping[str, tuple[Read, ...]]
    weights: Mapping[str, tuple[tuple[Read, ...], int]]
    operators: Mapping[str, str | None]
    skipped: Mapping[str, str]
    repeats: Mapping[str, str]
    shared: Mapping[str, tuple[str, ...]]
    signed: Mapping[str, bool] = field(default_factory=dict)

    @property
    def watched(self) -> list[str]:
        """The values whose ranges decide on quantizers."""
        return [value for value in self.activations if value not in self.repeats] + [v for members in self.shared.values() for v in members]


def source_among(node: Node, position: int, placement: Placement) -> str | None:
    """The value whose quantizer an operator's argument has, through movements; None if it has none."""
    value = source_of(argument(node, position), lambda value: value.name in placement.activations)
    return None if value is None else placement.repeats.get(value.name, value.name)


def narrow_reads(module: GraphModule, placement: Placement, bits: Mapping[str, int]) -> dict[str, dict[int, tuple[Read, ...]]]:
    """Value -> bits below 8 -> its readers that want no more: operators, and movements all of whose readers do.

    Args:
        module: the program that was placed in.
        bits: fx node name of an operator -> bits of its activations; every other reader gets 8.
    """
    nodes = {node.name: node for node in module.graph.nodes}

    def wanted(node: Node) -> int:
        return max(map(wanted, node.users), default=8) if node.name not in bits and moves(node) else bits.get(node.name, 8)

    out: dict[str, dict[int, tuple[Read, ...]]] = {}
    for value, reads in placement.activations.items():
        for width in sorted({wanted(nodes[read.node]) for read in reads} - {8}):
            out.setdefault(value, {})[width] = tuple(read for read in reads if wanted(nodes[read.node]) == width)
    return out


def _is_residual(node: Node) -> bool:
    """Whether a node adds two activations, without a factor."""
    if short_name(node) not in ADDITIONS or node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
        return False
    return all(isinstance(a, Node) and a.op != "get_attr" and _is_float(a) for a in node.args[:2])


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (int, float, torch.SymInt)) and (not isinstance(value, torch.Tensor) or value.is_floating_point())


def after_activation(node: Node) -> Node:
    """The value that an operator issues once the rectifiers that only it feeds are fused into it."""
    while len(node.users) == 1:
        (user,) = node.users
        if short_name(user) not in RECTIFIERS:
            break
        node = user
    return node


def place(
    module: GraphModule,
    operators: Mapping[str, str],
    inputs_of: Collection[str],
    outputs_of: Collection[str] = (),
    matrices: Collection[str] = (),
) -> Placement:
    """Quantizers for the chosen operators, and for what lies between them where the runtime executes that in int8 as well.

    - Every activation input of an int8 operator gets a quantizer; it sits after the fused rectifier of what issues the value, and
      before operators that only move values, unless somebody reads the moved value in float.
    - A value has one quantizer, shared by all who read it in int8; who reads it in float reads the unquantized value.
    - An addition, an averaging pool or a concatenation gets quantized inputs if its kind ("add", "sum", "pool", "cat") is in `inputs_of`,
      an int8 operator issues one of its inputs, and its output goes to an int8 reader: alone between float neighbours it would only cost
      conversions and accuracy (the residual stream of a Transformer stays in float). Of a "sum" one input stays as an int8 operator issued
      it for this reader alone. What is concatenated shares one quantizer.
    - Where `outputs_of` names an operator's kind, its output has a quantizer even if only float readers follow.

    Args:
        module: the program, with batch norm folded; it is only read.
        operators: operator name -> fx node name, of those that are to be int8.
        inputs_of: operator kinds whose activation inputs the runtime wants quantized.
        outputs_of: operator kinds that the runtime executes in int8 only with a quantized output; "gemm" is a linear map of a matrix.
        matrices: fx names of the operators that issue a matrix, of two axes.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    chosen: dict[Node, Parts] = {}
    issued: dict[str, str | None] = {}
    skipped: dict[str, str] = {}
    for name, node_name in operators.items():
        node = nodes[node_name]
        found = parts_of(node)
        if isinstance(found, Parts) and found.kind not in inputs_of:
            found = f"the runtime executes no {found.kind} in int8"
        if isinstance(found, Parts) and found.kind == "conv_transpose" and (reason := _no_transposed(module, node)):
            found = reason
        if isinstance(found, str):
            skipped[name] = found
            continue
        chosen[node] = found
        weight = node.args[found.weight] if found.weight is not None else None
        issued[name] = weight.name if isinstance(weight, Node) else None
    carried = _carried(module, chosen, inputs_of)

    reads: dict[Node, set[tuple[Node, int]]] = {}
    weights: dict[Node, tuple[list[Read], int]] = {}
    for node, inputs in chosen.items():
        for position in inputs.activations:
            reads.setdefault(argument(node, position), set()).add((node, position))
        if inputs.weight is not None:
            readers, axis = weights.setdefault(argument(node, inputs.weight), ([], inputs.axis))
            assert axis == inputs.axis, "a shared weight is contracted along different dimensions"
            readers.append(Read(node.name, inputs.weight))
    for node, kind in carried.items():
        for value, position in _quantized_inputs(node, kind, chosen):
            reads.setdefault(value, set()).add((node, position))
    for node, kind in [*((n, _issuer(n, i, matrices)) for n, i in chosen.items()), *carried.items()]:
        if kind in outputs_of:
            _read_by_all(after_activation(node), reads)
    repeats = _lift_over_movements(reads, order)
    concatenations = [node for node, kind in carried.items() if kind == "cat"]
    shared = grids_in_common(concatenations, reads.keys() - repeats.keys(), order)
    repeats.update({member: owner for owner, members in shared.items() for member in members if member is not owner})
    repeats.update({value: repeats[source] for value, source in repeats.items() if source in repeats})
    return Placement(
        {
            value.name: tuple(Read(n.name, p) for n, p in sorted(reads[value], key=lambda r: (order[r[0]], r[1])))
            for value in sorted(reads, key=order.__getitem__)
        },
        {value.name: (tuple(readers), axis) for value, (readers, axis) in weights.items()},
        issued,
        skipped,
        {value.name: source.name for value, source in repeats.items()},
        {owner.name: tuple(member.name for member in members) for owner, members in shared.items()},
        _signed(reads) if "signed" in inputs_of else {},
    )


def _signed(values: Collection[Node]) -> dict[str, bool]:
    """The values that products of two activations read, in whatever precision -> whether one of them has it on its right."""
    sides = {value.name: _sides(value) for value in values}
    return {name: "right" in found for name, found in sides.items() if found}


def _sides(value: Node) -> set[str]:
    """On which sides of products a value stands, through movements."""
    found: set[str] = set()
    for user in value.users:
        parts = parts_of(user)
        if isinstance(parts, Parts) and parts.weight is None:
            found.update("right" if position else "left" for position in _positions(user, value) if position in parts.activations)
        elif moves(user):
            found |= _sides(user)
    return found


def _no_transposed(module: GraphModule, node: Node) -> str:
    """Why a transposed convolution would not run in int8, or be slower than in float, in the runtime that has such a kernel; "" where it does.

    OpenVINO on AVX-512: brgconv in int8 for one group, strides up to 3 and kernels no smaller than the stride, and only if zero is the
    lowest integer of the input; else it runs in float, without a word. Dilated ones run as `jit_gemm`, 10 times slower than in float.
    """
    stride, dilation, groups = steps_of(node)
    kernel = tensor_of(module, argument(node, 1)).shape[2:]
    if groups > 1:
        return "a transposed convolution in groups has no int8 kernel"
    if max(dilation) > 1:
        return "a dilated transposed convolution is slower in int8"
    if max(stride) > 3 or min(kernel) < max(stride):
        return "a transposed convolution has an int8 kernel only for strides up to 3 and kernels no smaller than the stride"
    if not is_rectified(argument(node, 0)):
        return "a transposed convolution has an int8 kernel only behind a rectifier; its input may be below zero"
    return ""


def _quantized_inputs(node: Node, kind: str, chosen: Collection[Node]) -> list[tuple[Node, int]]:
    """The activations of a carried operator that get a quantizer, and the argument where it reads each."""
    values = _carried_inputs(node, kind)
    if kind == "cat":
        return [(value, 0) for value in values]
    mine = next((value for value in values if kind == "sum" and value in chosen and len(value.users) == 1), None)
    return [(value, position) for position, value in enumerate(values) if value is not mine]


def _issuer(node: Node, parts: Parts, matrices: Collection[str]) -> str:
    """The kind of operator that issues a value: "gemm" for a linear map of a matrix, else the operator's own."""
    return "gemm" if parts.kind == "linear" and node.name in matrices else parts.kind


def _read_by_all(value: Node, reads: dict[Node, set[tuple[Node, int]]]) -> None:
    """Every positional reader of `value` gets the quantized value."""
    for user in value.users:
        if user.op == "call_function":
            for position in _positions(user, value):
                reads.setdefault(value, set()).add((user, position))


def _positions(user: Node, value: Node) -> list[int]:
    """Where a node has a value among its arguments, or in a list there."""
    return [i for i, given in enumerate(user.args) if given is value or (isinstance(given, (list, tuple)) and value in given)]


def _lift_over_movements(reads: dict[Node, set[tuple[Node, int]]], order: Mapping[Node, int]) -> dict[Node, Node]:
    """Moves quantizers from the outputs of movements to their inputs, last first, where every reader of the output wants it quantized.

    Returns:
        Padded value -> the value whose quantizer it repeats.
    """
    padded: list[Node] = []
    pending = sorted(reads, key=order.__getitem__)
    while pending:
        value = pending.pop()
        if not moves(value) or not all(_reads_all(user, value, reads) for user in value.users):
            continue
        if short_name(value) in PADDINGS:
            padded.append(value)
        else:
            del reads[value]
        source = argument(value, 0)
        if source not in reads:
            pending = sorted([*pending, source], key=order.__getitem__)
        reads.setdefault(source, set()).add((value, 0))
    repeats: dict[Node, Node] = {}
    for value in padded:
        source = argument(value, 0)
        while source not in reads or source in padded:
            source = argument(source, 0)
        repeats[value] = source
    return repeats


def _reads_all(user: Node, value: Node, reads: Mapping[Node, set[tuple[Node, int]]]) -> bool:
    """Whether `user` gets the quantized value at every argument where it reads `value`."""
    positions = _positions(user, value)
    return bool(positions) and all((user, position) in reads[value] for position in positions)


def _carried_inputs(node: Node, kind: str) -> tuple[Node, ...]:
    """The activations of an addition, an averaging pool or a concatenation."""
    return (
        parts_of_concatenation(node) if kind == "cat" else tuple(argument(node, position) for position in range(1 if kind == "pool" else 2))
    )


def _carried(module: GraphModule, chosen: Mapping[Node, Parts], inputs_of: Collection[str]) -> dict[Node, str]:
    """Additions, averaging pools and concatenations that lie between int8 operators -> "add", "sum", "pool" or "cat"."""
    kinds = {}
    addition = next((kind for kind in ("sum", "add") if kind in inputs_of), "")
    for node in module.graph.nodes:
        kind = addition if _is_residual(node) else "pool" if short_name(node) in POOLS else "cat" if parts_of_concatenation(node) else ""
        if kind and kind in inputs_of:
            kinds[node] = kind
    fed: set[Node] = set()  # values that an int8 operator issues, moved and rectified
    candidates: dict[Node, str] = {}
    for node in module.graph.nodes:
        is_passed_on = short_name(node) in RECTIFIERS or moves(node)
        if node in chosen or (is_passed_on and node.args[0] in fed):
            fed.add(node)
        elif node in kinds and any(value in fed for value in _carried_inputs(node, kinds[node])):
            candidates[node] = kinds[node]
            fed.add(node)
    wanted: set[Node] = set(chosen)  # nodes that read their activations in int8, and what passes values on to them
    carried: dict[Node, str] = {}
    for node in reversed(module.graph.nodes):
        is_read = any(user in wanted for user in node.users)
        if node in candidates and is_read:
            carried[node] = candidates[node]
            wanted.add(node)
        elif (short_name(node) in RECTIFIERS or moves(node)) and is_read:
            wanted.add(node)
    return dict(reversed(carried.items()))
