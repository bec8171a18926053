"""The operators that cost time, with their sizes as sums of products of the widths of groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node

from planish.graph.facts import Facts, Shape, arguments, rule_name
from planish.graph.graph import Operator, Size
from planish.graph.ids import Val
from planish.graph.naming import module_path, unique
from planish.graph.program import Program

KINDS = {
    "conv": ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "linear": ("linear",),
    "matmul": ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    "attention": ("scaled_dot_product_attention",),
    "lstm": ("lstm", "lstm_cell"),
    "gru": ("gru", "gru_cell"),
    "embedding": ("embedding",),
    "norm": ("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm"),
    "softmax": ("softmax", "_softmax", "log_softmax", "_log_softmax"),
    "pool": (
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
        "max_pool2d_with_indices",
        "mean",
        "sum",
        "amax",
        "amin",
    ),
    "elementwise": (
        *("gelu", "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "elu", "selu", "celu", "mish", "leaky_relu", "softplus"),
        *("prelu", "glu", "pow", "clamp", "where", "masked_fill", "rsub"),
    ),
    "other": (
        *("cat", "stack", "pad", "index", "index_select", "gather", "roll", "cumsum", "upsample_nearest2d", "upsample_bilinear2d"),
        *("scatter", "scatter_add", "scatter_reduce", "index_add", "index_put"),
    ),
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
_PASSING = frozenset({"dropout", "contiguous", "clone", "alias", "detach", "to", "feature_dropout", "lift_fresh_copy"})
_FUSING = frozenset({"conv", "linear", "matmul", "norm"})
_PLAIN_ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "output_padding", "batch_first", "dim")


def kind_of(node: Node) -> str | None:
    """The kind of operator that a node is, or None where it costs nothing to speak of (a movement, a mask, arithmetic on sizes)."""
    if node.op != "call_function":
        return None
    name = rule_name(node.target)
    if name in _KIND_OF:
        return _KIND_OF[name]
    if name in _PASSING:
        return None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return "elementwise"
    return None


@dataclass(frozen=True)
class Labels:
    """The solved ids of a program: what `surgery.py` and `operators.py` need.

    Args:
        program: the ids.
        unit: for each id, the number of its unit, or -1 where it is fixed.
        place: number of a unit -> (group, position in it); a unit that is in no group is missing.
        widths: full width by group.
    """

    program: Program
    unit: NDArray[np.int64]
    place: Mapping[int, tuple[str, int]]
    widths: Mapping[str, int]

    @functools.cached_property
    def _names(self) -> list[str]:
        return ["", *self.widths]

    @functools.cached_property
    def _of_unit(self) -> NDArray[np.int64]:
        """For each unit the number of its group in `_names`, 0 where it is in none; the last stands for -1, what is fixed."""
        number = {name: n for n, name in enumerate(self._names)}
        found = np.zeros(int(self.unit.max(initial=0)) + 2, np.int64)
        found[list(self.place)] = [number[group] for group, _ in self.place.values()]
        return found

    def size(self, val: Val | None, dim: int, full: int) -> Size:
        """Dimension `dim` of a value, whose size is `full` at the example's batch."""
        labels = val.labels(dim) if val is not None else ()
        if not labels:
            return Size(full)
        base = len(self.widths) + 1
        codes = functools.reduce(lambda code, ids: code * base + self._of_unit[self.unit[ids.numpy()]], labels, np.int64(0))
        total: dict[tuple[str, ...], int] = {}
        for code, count in zip(*(found.tolist() for found in np.unique(codes, return_counts=True)), strict=True):
            if groups := tuple(self._names[n] for n in (code // base, code % base) if n):
                total[groups] = total.get(groups, 0) + count
        widths = {groups: tuple(self.widths[group] for group in groups) for groups in total}
        terms = tuple((groups, max(1, count // math.prod(widths[groups]))) for groups, count in sorted(total.items()))
        fixed = len(labels[0]) - sum(count * math.prod(widths[groups]) for groups, count in terms)
        return Size(full, max(fixed, 0), terms, tuple(widths[groups] for groups, _ in terms)) if terms else Size(full)

    def sizes(self, val: Val | None, shape: Shape) -> tuple[Size, ...]:
        """All dimensions of a value."""
        return tuple(self.size(val, d, k) for d, k in enumerate(shape))


class _Finder:
    """Finds operators in a module, given labels and the facts at the example's own batch."""

    def __init__(self, module: GraphModule, labels: Labels, facts: Facts) -> None:
        self.nodes = list(module.graph.nodes)
        self.labels, self.facts, self.program = labels, facts, labels.program
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.kinds = {node: kind for node in self.nodes if (kind := self._kind(node)) is not None}
        self.leader: dict[Node, Node] = {}  # every node that is computed inside an operator -> that operator's node
        self.followers: dict[Node, list[Node]] = {}
        self.names: dict[Node, str] = {}

    def _kind(self, node: Node) -> str | None:
        kind = kind_of(node)
        if kind is None or (kind != "embedding" and node.name not in self.facts.floating):
            return None
        if not any(self._is_activation(a) for a in node.all_input_nodes) and kind not in ("embedding", "linear", "matmul"):
            return None
        return kind

    def _is_activation(self, node: Node) -> bool:
        return node.op != "get_attr" and self.facts.shapes.get(node.name) is not None

    def _is_activation_tensor(self, node: Node) -> bool:
        return self._is_activation(node) and not self._origin(node)

    def _origin(self, node: Node) -> str | None:
        """The parameter that a node is, possibly moved."""
        val = self.program.vals.get(node.name)
        if node.op == "get_attr":
            return self.program.canonical(str(node.target))
        if isinstance(val, Val) and val.origin and all(a.op == "get_attr" or self._origin(a) for a in node.all_input_nodes):
            return next(iter(val.origin.values()))[0]
        return None

    def _fold(self) -> None:
        """A batch norm that alone follows a convolution is part of it."""
        for node in self.nodes:
            if self.kinds.get(node) == "conv" and len(node.users) == 1:
                (user,) = node.users
                if user.op == "call_function" and rule_name(user.target) == "batch_norm" and user.args[0] is node:
                    self.leader[user] = node
                    self.kinds.pop(user, None)

    def _claim(self) -> None:
        """Let operators fuse the element-wise maps that follow them alone.

        The last producer in the program claims first: when it runs, the other operand of an addition is ready.
        """
        heavy = [node for node in reversed(self.nodes) if self.kinds.get(node) in _FUSING]
        light = [node for node in self.nodes if self.kinds.get(node) == "elementwise"]
        for node in (*heavy, *light):
            if node in self.leader:
                continue
            self.followers[node] = []
            shape, last = self.facts.shape(node.name), node
            while len(last.users) == 1:
                (user,) = last.users
                if self.leader.get(user) is not node:
                    if user in self.leader or user in self.followers or user.op != "call_function" or self.facts.shape(user.name) != shape:
                        break
                    if self.kinds.get(user) == "elementwise":
                        self.followers[node].append(user)
                    elif rule_name(user.target) not in _PASSING:
                        break
                    self.leader[user] = node
                last = user

    def _name(self, node: Node) -> str:
        parameters = [self._origin(a) for a in node.all_input_nodes if self._origin(a)]
        weights = [p for p in parameters if p is not None and p in self._parameters]
        name = module_path(weights[0]) if weights and self.kinds[node] != "elementwise" else node.name
        return unique(name, dict.fromkeys(self.names.values()))

    def _sources(self, nodes: list[Node]) -> list[str]:
        """Names of the operators that compute these nodes, looking through movements."""
        found: dict[str, None] = {}
        seen: set[Node] = set()
        stack = nodes[::-1]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            leader = self.leader.get(node, node)
            if leader in self.names:
                found.setdefault(self.names[leader])
            elif node.op == "call_function":
                stack.extend(reversed([a for a in node.all_input_nodes if self._is_activation(a)]))
        return list(found)

    def _tensors(self, inside: Collection[Node]) -> list[str]:
        """Names of the parameters, buffers and constants that these nodes use, looking through what belongs to no operator."""
        found: dict[str, None] = {}
        seen = set(inside)
        stack = sorted(inside, key=lambda node: -self.position[node])
        while stack:
            for argument in stack.pop().all_input_nodes:
                if argument in seen or argument in self.leader or argument in self.kinds:
                    continue
                seen.add(argument)
                if argument.op != "get_attr":
                    stack.append(argument)
                elif isinstance(self.facts.shapes[argument.name], tuple):
                    found.setdefault(self.program.canonical(str(argument.target)))
        return list(found)

    def find(self, module: GraphModule) -> dict[str, Operator]:
        """The operators by name, in the order of the program."""
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        self._fold()
        self._claim()
        found: dict[str, Operator] = {}
        for node in self.nodes:
            if node in self.kinds and node not in self.leader:
                self.names[node] = self._name(node)
                found[self.names[node]] = self._operator(node)
        return found

    def _operator(self, node: Node) -> Operator:
        kind = self.kinds[node]
        given = arguments(node)
        activations: list[Node] = []
        parameters: list[Node] = []
        for argument in _operands(node):
            if self.facts.shapes.get(argument.name) is None:
                continue
            (parameters if self._origin(argument) else activations).append(argument)
        operand = self.program.operand
        attributes: dict[str, Any] = {
            name: given[name] for name in _PLAIN_ATTRIBUTES if given.get(name) is not None and not _symbolic(given[name])
        }
        name = rule_name(node.target)
        weights = [(a, self._val(a, node)) for a in parameters]
        if kind == "conv":
            attributes["kernel_size"] = self.facts.shape(weights[0][0].name)[2:] if weights else self.facts.shape(activations[1].name)[2:]
            attributes["groups"] = given["groups"]
            attributes["transposed"] = "transpose" in name
        elif kind in ("lstm", "gru"):
            attributes["hidden_size"] = self.facts.shape(weights[1][0].name)[1]
        elif kind in ("elementwise", "norm", "pool", "other", "softmax"):
            attributes["op"] = name
            if name == "mean":
                attributes["dim"] = given.get("dim")
        elif kind == "matmul":
            attributes["weight_first"] = bool(parameters) and node.all_input_nodes[-2:][0] in parameters
            if name == "einsum":
                attributes["equation"] = str(given["equation"]).replace(" ", "")
        elif kind == "attention":
            attributes["causal"] = bool(given.get("is_causal"))
        followers = self.followers.get(node, [])
        inside = {node, *followers, *(n for n, led_by in self.leader.items() if led_by is node)}
        read = [a for n in (node, *followers) for a in n.all_input_nodes if self._is_activation(a) and a not in inside]
        out = self.program.vals.get(node.name)
        first = out[0] if isinstance(out, list) else out
        owner = next((o for a in parameters if (o := self._origin(a)) in self._parameters), None)
        return Operator(
            name=self.names[node],
            node=node.name,
            kind=kind,
            weight=owner,
            inputs=tuple(self.labels.sizes(operand(a, node), self.facts.shape(a.name)) for a in activations),
            output=self.labels.sizes(first, self.facts.shape(node.name)),
            weights=tuple(self.labels.sizes(val, self.facts.shape(a.name)) for a, val in weights),
            attributes=attributes,
            fused=tuple(rule_name(n.target) for n in followers),
            reads=tuple(self._sources(read)),
            tensors=tuple(self._tensors(inside)),
        )

    def _val(self, node: Node, consumer: Node) -> Val | None:
        return self.program.operand(node, consumer)


def _operands(node: Node) -> list[Node]:
    """The nodes among the arguments in their order, each as often as it is one: a key may be the value too."""
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _symbolic(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(isinstance(v, Node) for v in value))


def find_operators(module: GraphModule, labels: Labels, facts: Facts) -> dict[str, Operator]:
    """The operators that cost time, in the order of the program.

    Args:
        module: the program.
        labels: its solved ids.
        facts: shapes at the example's own batch.
    """
    return _Finder(module, labels, facts).find(module)
