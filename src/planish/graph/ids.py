"""Index propagation: every value carries, per dimension, the ids of its indices; ties between ids say what must be removed together.

An id is one index of one dimension of one parameter (or of padding, or of a created constant). Id 0 stands for "fixed". A dimension
without ids is fixed, or neutral if its size is 1. *Weak* ids belong to dimensions that only repeat a value (`expand`, `zeros`): they
can be resized and yield to other ids. A rule says for one kind of operator what is tied, what is fixed, and which ids its outputs carry.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planish.graph.facts import Facts, Shape, arguments, attribute, rule_name

Signature = tuple[Any, ...]


@dataclass(slots=True)
class Val:
    """The ids that one tensor carries.

    Args:
        shape: its shape in the analysed run.
        ids: dimension -> int64 vector of ids, as long as the dimension; a dimension that is missing is fixed (or neutral, of size 1).
        weak: dimensions whose ids are weak.
        origin: dimension -> (parameter, dimension) that it is, for parameters and movements of parameters.
    """

    shape: Shape
    ids: dict[int, Tensor] = field(default_factory=dict)
    weak: set[int] = field(default_factory=set)
    origin: dict[int, tuple[str, int]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def only(self, dims: Iterable[int], shape: Shape | None = None) -> Val:
        """The same value with the ids of `dims` alone; `shape` may replace its own where later dimensions change."""
        wanted = set(dims)
        ids = {d: v for d, v in self.ids.items() if d in wanted}
        return Val(self.shape if shape is None else shape, ids, self.weak & wanted)

    def leading(self, count: int) -> Val:
        """The first `count` dimensions."""
        return self.only(range(count), self.shape[:count])


Result = Val | list[Val | None]
Rule = Callable[["Step"], Result | None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by short name (in-place variants are the same operator).

    A rule returns the ids of the output or outputs, or None for a form of the operator that it does not cover.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


class Ids:
    """The ids issued so far, and what was said about them.

    Args:
        decisions: signature -> choice, where a rule has more than one way to keep a tensor rectangular; 0 is the default.
    """

    def __init__(self, decisions: Mapping[Signature, int] | None = None) -> None:
        self.size = 1
        self.decisions = dict(decisions or {})
        self.options: dict[Signature, int] = {}
        self.left: list[NDArray[np.int64]] = []
        self.right: list[NDArray[np.int64]] = []
        self.fixes: list[tuple[NDArray[np.int64], str]] = []
        self.inexact: list[NDArray[np.int64]] = []
        self.roles: dict[tuple[str, int], str] = {}

    def fresh(self, count: int) -> Tensor:
        """New ids, one per index."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def tie(self, a: Tensor, b: Tensor, why: str = "") -> None:
        """Say that ids must be removed together, elementwise after broadcasting; whatever meets id 0 is fixed."""
        a, b = torch.broadcast_tensors(a, b)
        x, y = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        fixed = (x == 0) | (y == 0)
        if fixed.any():
            self.fix(torch.from_numpy(np.maximum(x[fixed], y[fixed])), why or "it meets a dimension that is fixed")
            x, y = x[~fixed], y[~fixed]
        self.left.append(x)
        self.right.append(y)

    def fix(self, ids: Tensor, why: str) -> None:
        """Say that ids can never be removed."""
        self.fixes.append((ids.reshape(-1).numpy(), why))

    def fix_all(self, val: Val | None, why: str, dims: Iterable[int] | None = None) -> None:
        """Fix all ids of a value, or those of some dimensions."""
        if val is None:
            return
        wanted = val.ids.keys() if dims is None else dims
        for d in wanted:
            if d in val.ids:
                self.fix(val.ids[d], why)

    def mark_inexact(self, ids: Tensor) -> None:
        """Say that a statistic runs over these ids, so that removing one changes what the others give."""
        self.inexact.append(ids.reshape(-1).numpy())

    def choose(self, signature: Signature, options: int) -> int:
        """Which of `options` ways to take for this kind of place."""
        self.options[signature] = options
        return self.decisions.get(signature, 0)

    def put(self, val: Val, dim: int, ids: Tensor, weak: bool, why: str) -> None:
        """Label a dimension. Where two families meet in it only one can be told apart: a weak one yields, else the newcomer is fixed."""
        if dim in val.ids:
            if weak or dim not in val.weak:
                self.fix(ids, why)
                return
            self.fix(val.ids[dim], why)
            val.weak.discard(dim)
        val.ids[dim] = ids
        if weak:
            val.weak.add(dim)

    def join(self, shape: Shape, vals: Sequence[Val], why: str) -> Val:
        """The elementwise combination of values under broadcasting: equal positions are tied."""
        out = Val(shape)
        for d in range(len(shape)):
            found: list[tuple[bool, Tensor]] = []
            fixed = False
            for val in vals:
                e = d - (len(shape) - val.rank)
                if e < 0 or val.shape[e] == 1:
                    continue
                if e in val.ids:
                    found.append((e in val.weak, val.ids[e]))
                else:
                    fixed = True
            if not found:
                continue
            found.sort(key=lambda pair: pair[0])
            weak, first = found[0]
            for _, other in found[1:]:
                if other is not first:
                    self.tie(other, first, why)
            if fixed:
                self.fix(first, why)
            else:
                self.put(out, d, first, weak, why)
        return out

    def contract(self, a: Val, i: int, b: Val, j: int, why: str) -> None:
        """Sum over dimension `i` of `a` and `j` of `b` together: their ids are tied, or fixed by a side that has none."""
        x, y = a.ids.get(i), b.ids.get(j)
        if x is not None and y is not None:
            self.tie(x, y, why)
        elif x is not None:
            self.fix(x, why)
        elif y is not None:
            self.fix(y, why)

    def role(self, val: Val | None, dim: int, role: str) -> None:
        """Note what an operator does with a parameter's dimension; the first operator in the program decides."""
        if val is not None and dim in val.origin:
            self.roles.setdefault(val.origin[dim], role)

    def rectangle(self, ids: Tensor, kind: str, why: str) -> tuple[int, Tensor] | None:
        """The one dimension along which a tensor of ids varies, and its ids.

        Where it varies along several (a view of channels as heads by head size), survivors must still fill a rectangle: one dimension
        keeps its ids and the others are tied along it. Which one is a decision per kind of place.
        """
        u = ids
        for d in range(u.dim()):
            if u.shape[d] > 1 and u.stride(d) == 0:
                u = u.narrow(d, 0, 1)
        varying = []
        for d in range(u.dim()):
            if u.shape[d] > 1:
                if bool((u == u.narrow(d, 0, 1)).all()):
                    u = u.narrow(d, 0, 1)
                else:
                    varying.append(d)
        if not varying:
            if u.numel():
                self.fix(u.reshape(-1)[:1], why)
            return None
        keep = varying[0]
        if len(varying) > 1:
            keep = varying[self.choose((kind, tuple(ids.shape[1:]), tuple(varying)), len(varying))]
            for d in varying:
                if d != keep:
                    self.tie(u, u.narrow(d, 0, 1), why)
                    u = u.narrow(d, 0, 1)
        return keep, u.reshape(-1).contiguous()

    def move(self, val: Val, run: Callable[[Tensor], Any], shapes: Sequence[Shape | None], kind: str, why: str) -> list[Val | None]:
        """Carry ids through an operator that only moves elements, by running it on the ids themselves, one dimension at a time."""
        outs: list[Val | None] = [None if shape is None else Val(shape) for shape in shapes]
        for d in sorted(val.ids, key=lambda d: (d in val.weak, d)):
            view = [1] * val.rank
            view[d] = -1
            moved = run(val.ids[d].view(view).expand(val.shape))
            for out, ids in zip(outs, moved if isinstance(moved, (tuple, list)) else [moved], strict=True):
                if out is None:
                    continue
                found = self.rectangle(ids, kind, why)
                if found is not None:
                    self.put(out, found[0], found[1], d in val.weak, why)
                    if d in val.origin:
                        out.origin.setdefault(found[0], val.origin[d])
        return outs


class Step:
    """One operator of the program, as its rule sees it."""

    def __init__(self, program: Program, node: Node) -> None:
        self.program, self.ids, self.node = program, program.ids, node
        self.name = rule_name(node.target)
        self.arguments = arguments(node)
        self.why = f"`{self.name}` ({node.name})"

    @property
    def shape(self) -> Shape:
        """The shape of the (first) output."""
        return self.program.facts.shape(self.node.name)

    @property
    def shapes(self) -> list[Shape | None]:
        """The shapes of all outputs."""
        found = self.program.facts.shapes[self.node.name]
        return found if isinstance(found, list) else [found]

    def val(self, name: str) -> Val | None:
        """The value of a tensor argument by its name in the schema, or None where it was not given."""
        argument = self.arguments.get(name)
        return self.program.operand(argument, self.node) if isinstance(argument, Node) else None

    def tensor(self, name: str) -> Val:
        """The same for an argument that must be there."""
        found = self.val(name)
        assert found is not None, (self.node.name, name)
        return found

    def vals(self, name: str) -> list[Val]:
        """The values of an argument that is a list of tensors (or one tensor)."""
        argument = self.arguments.get(name)
        found = [
            self.program.operand(a, self.node)
            for a in (argument if isinstance(argument, (list, tuple)) else [argument])
            if isinstance(a, Node)
        ]
        return [val for val in found if val is not None]

    def operands(self) -> list[Val]:
        """All tensor arguments, in order."""
        found = [self.program.operand(a, self.node) for a in self.node.all_input_nodes]
        return [val for val in found if val is not None]

    def value(self, name: str) -> Any:
        """The concrete value of an argument that is no tensor (integers and lists of integers)."""
        return map_arg(self.arguments[name], self._concrete)

    def _concrete(self, node: Node) -> Any:
        return self.program.facts.values.get(node.name)

    def run(self, first: Tensor) -> Any:
        """The operator itself, with `first` in place of its first argument."""
        args = map_arg(self.node.args[1:], self._concrete)
        assert callable(self.node.target) and isinstance(args, tuple)
        return self.node.target(first, *args, **map_arg(self.node.kwargs, self._concrete))

    def move(self, val: Val, run: Callable[[Tensor], Any] | None = None) -> Result:
        """Carry ids through this operator as a movement."""
        outs = self.ids.move(val, run or self.run, self.shapes, self.name, self.why)
        if isinstance(self.program.facts.shapes[self.node.name], list):
            return outs
        assert outs[0] is not None
        return outs[0]

    def plain(self) -> Result:
        """Outputs that carry no ids."""
        outs: list[Val | None] = [None if shape is None else Val(shape) for shape in self.shapes]
        if isinstance(self.program.facts.shapes[self.node.name], list):
            return outs
        assert outs[0] is not None
        return outs[0]


CREATED = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})


class Program:
    """The ids of a whole program: `vals` by node name, `copies` of constants by (node, consumer), `parameters` by their first name."""

    def __init__(self, module: GraphModule, facts: Facts, decisions: Mapping[Signature, int] | None = None) -> None:
        self.module, self.facts, self.ids = module, facts, Ids(decisions)
        self.vals: dict[str, Result | None] = {}
        self.copies: dict[tuple[str, str], Val] = {}
        self.parameters: dict[str, Val] = {}
        self.unknown: dict[str, list[str]] = {}
        self.first_user: dict[str, int] = {}
        self._alias: dict[int, str] = {}
        for position, node in enumerate(module.graph.nodes):
            self._visit(node, position)

    def operand(self, node: Node, consumer: Node) -> Val | None:
        """What `consumer` sees of `node`. A constant that several read is copied for each, or it would tie them all together."""
        if self.is_constant(node) and len(node.users) > 1:
            key = (node.name, consumer.name)
            if key not in self.copies:
                self.copies[key] = self._constant(node)
            return self.copies[key]
        val = self.vals.get(node.name)
        return val if isinstance(val, Val) else None

    def is_constant(self, node: Node) -> bool:
        """Whether a node is a tensor that is the same whatever the inputs are, and is no parameter."""
        if node.op == "get_attr":
            return not isinstance(attribute(self.module, str(node.target)), torch.nn.Parameter)
        return node.op == "call_function" and rule_name(node.target) in CREATED

    def canonical(self, name: str) -> str:
        """The first name of a tensor that has several (tied weights)."""
        return self._alias.setdefault(id(attribute(self.module, name)), name)

    def _constant(self, node: Node) -> Val:
        if node.op != "get_attr":
            created = RULES[rule_name(node.target)](Step(self, node))
            assert isinstance(created, Val)
            return created
        name, shape = str(node.target), self.facts.shape(node.name)
        return Val(shape, {d: self.ids.fresh(k) for d, k in enumerate(shape) if k > 1}, set(), {d: (name, d) for d in range(len(shape))})

    def _visit(self, node: Node, position: int) -> None:
        if node.op == "placeholder":
            self.vals[node.name] = Val(self.facts.shape(node.name))
        elif node.op == "get_attr":
            if isinstance(self.facts.shapes[node.name], tuple):
                name = self.canonical(str(node.target))
                if name not in self.parameters:
                    self.parameters[name] = self._constant(node)
                self.vals[node.name] = self.parameters[name]
        elif node.op == "output":
            for used in node.all_input_nodes:
                self.ids.fix_all(self.operand(used, node), "it is the program's output")
        elif node.target is operator.getitem:
            several, index = self.vals.get(node.args[0].name), node.args[1]  # type: ignore[union-attr]
            self.vals[node.name] = several[index] if isinstance(several, list) and isinstance(index, int) else None
        elif self.facts.shapes[node.name] is not None:
            self._apply(node)

    def _apply(self, node: Node) -> None:
        step = Step(self, node)
        found = RULES.get(step.name)
        if found is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            found = RULES["pointwise"]
        result = found(step) if found is not None else None
        if result is None:
            operands = step.operands()
            if any(val.ids for val in operands):
                self.unknown.setdefault(step.name, []).append(node.name)
            for val in operands:
                self.ids.fix_all(val, f"the operator {step.why} has no rule")
            result = step.plain()
        self.vals[node.name] = result
