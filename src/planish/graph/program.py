"""Interpretation of a program over ids: every node's rule says what is tied, what is fixed, and which ids its outputs carry."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from planish.graph.facts import Facts, Shape, arguments, attribute, rule_name
from planish.graph.ids import Ids, Signature, Val

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


class Step:
    """One operator of the program, as its rule sees it.

    Attributes:
        looked_up: operands whose positions a rule has tied to what they are looked up in; those of all others are fixed.
    """

    def __init__(self, program: Program, node: Node) -> None:
        self.program, self.ids, self.node = program, program.ids, node
        self.name = rule_name(node.target)
        self.arguments = arguments(node)
        self.why = f"`{self.name}` ({node.name})"
        self.looked_up: list[Val] = []

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


MOVES_POSITIONS = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "to", "clone", "contiguous"}
    | {"detach", "alias", "_to_copy", "slice", "select", "narrow"}
)
"""Operators that hand positions which a router picked on as they are."""

CREATED = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})


class Program:
    """The ids of a whole program: `vals` by node name, `copies` of constants by (node, consumer), `parameters` by their first name.

    Args:
        module: a captured program.
        facts: of a run of it.
        decisions: see `Ids`.
        state: name of an input that the caller feeds from the step before -> position of the output that it is fed from.
        idle: name of an input some of whose channels never vary -> the axis of its channels, which may go.
    """

    def __init__(
        self,
        module: GraphModule,
        facts: Facts,
        decisions: Mapping[Signature, int] | None = None,
        state: Mapping[str, int] | None = None,
        idle: Mapping[str, int] | None = None,
    ) -> None:
        self.module, self.facts, self.ids = module, facts, Ids(decisions)
        self.state, self.idle = dict(state or {}), dict(idle or {})
        self.vals: dict[str, Result | None] = {}
        self.copies: dict[tuple[str, str], Val] = {}
        self.parameters: dict[str, Val] = {}
        self.unknown: dict[str, list[str]] = {}
        self._alias: dict[int, str] = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        for node in module.graph.nodes:
            self._visit(node)

    def operand(self, node: Node, consumer: Node) -> Val | None:
        """What `consumer` sees of `node`. A constant that several read is copied for each, or it would tie them all together."""
        if self.is_constant(node) and len(node.users) > 1:
            key = (node.name, consumer.name)
            if key not in self.copies:
                self.copies[key] = self._constant(node)
            return self.copies[key]
        val = self.vals.get(node.name)
        return val if isinstance(val, Val) else None

    def first_copies(self) -> dict[str, Val]:
        """Constants that several read -> what the first of them sees; surgery gives the others their own where they differ."""
        found: dict[str, Val] = {}
        for (name, _), val in self.copies.items():
            found.setdefault(name, val)
        return found

    def is_constant(self, node: Node) -> bool:
        """Whether a node is a tensor that is the same whatever the inputs are, and is no parameter."""
        if node.op == "get_attr":
            return not isinstance(attribute(self.module, str(node.target)), torch.nn.Parameter)
        return node.op == "call_function" and rule_name(node.target) in CREATED

    def canonical(self, name: str) -> str:
        """The first name of a tensor that has several (tied weights), as `named_parameters` gives it."""
        return self._alias.setdefault(id(attribute(self.module, name)), name)

    def _constant(self, node: Node) -> Val:
        if node.op != "get_attr":
            created = RULES[rule_name(node.target)](Step(self, node))
            assert isinstance(created, Val)
            return created
        name, shape = self.canonical(str(node.target)), self.facts.shape(node.name)
        return Val(shape, {d: self.ids.fresh(k) for d, k in enumerate(shape) if k > 1}, set(), {d: (name, d) for d in range(len(shape))})

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            shape = self.facts.shape(node.name)
            dims = range(1, len(shape)) if node.name in self.state else [self.idle[node.name]] if node.name in self.idle else []
            self.vals[node.name] = Val(shape, {d: self.ids.fresh(shape[d]) for d in dims if shape[d] > 1})
        elif node.op == "get_attr":
            if isinstance(self.facts.shapes[node.name], tuple):
                name = self.canonical(str(node.target))
                if name not in self.parameters:
                    self.parameters[name] = self._constant(node)
                self.vals[node.name] = self.parameters[name]
        elif node.op == "output":
            self._output(node)
        elif node.target is operator.getitem:
            source, index = node.args
            several = self.vals.get(source.name) if isinstance(source, Node) else None
            self.vals[node.name] = several[index] if isinstance(several, list) and isinstance(index, int) else None
        elif self.facts.shapes[node.name] is not None:
            self._apply(node)

    def _output(self, node: Node) -> None:
        """Outputs are fixed, but for a state, whose units may go where the next step reads none of them."""
        outputs = node.args[0]
        assert isinstance(outputs, (list, tuple))
        fed: dict[int, list[Val]] = {}
        for name, position in self.state.items():
            given = self.vals[name]
            if isinstance(given, Val):
                fed.setdefault(position, []).append(given)
        for position, used in enumerate(outputs):
            val = self.operand(used, node) if isinstance(used, Node) else None
            if val is not None and val.points is not None:
                self.ids.fix(val.points, "positions in it are the program's output")
            if val is None or position not in fed:
                self.ids.fix_all(val, "it is the program's output")
                continue
            for given in fed[position]:
                for d in range(val.rank):
                    self.ids.contract(val, d, given, d, "it is the program's output")

    def _apply(self, node: Node) -> None:
        step = Step(self, node)
        found = RULES.get(step.name)
        if found is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            found = RULES["pointwise"]
        result = found(step) if found is not None else None
        for val in step.operands():
            if val.points is None or any(val is other for other in step.looked_up):
                continue
            if step.name in MOVES_POSITIONS and len(step.operands()) == 1 and isinstance(result, Val):
                result.points = val.points
            else:  # whatever computes with positions, surgery would change
                self.ids.fix(val.points, f"positions in it are numbers in {step.why}")
        if result is None:
            operands = step.operands()
            if any(val.ids for val in operands):
                self.unknown.setdefault(step.name, []).append(node.name)
            for val in operands:
                self.ids.fix_all(val, f"the operator {step.why} has no rule")
            result = step.plain()
        self.vals[node.name] = result
