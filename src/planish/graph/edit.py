"""What surgery does to one node: an edit recomputes the literal sizes of an operator from the indices that survive."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

from planish.graph.facts import arguments, rule_name
from planish.graph.ids import Val
from planish.graph.program import Program

EDITS: dict[str, Callable[[Edit], None]] = {}


def edit(*names: str) -> Callable[[Callable[[Edit], None]], Callable[[Edit], None]]:
    """Register an edit for operators by short name; it is called for each such node once something was removed."""

    def register(function: Callable[[Edit], None]) -> Callable[[Edit], None]:
        for name in names:
            assert name not in EDITS, name
            EDITS[name] = function
        return function

    return register


class Survivors:
    """Which ids stay. `keep` is a boolean array over ids."""

    def __init__(self, keep: NDArray[np.bool_]) -> None:
        self.keep = keep

    def mask(self, val: Val, dim: int) -> NDArray[np.bool_]:
        """For each index along a dimension, whether it stays."""
        mask = np.ones(val.shape[dim], bool)
        for ids in val.labels(dim):
            mask &= self.keep[ids.numpy()]
        return mask

    def count(self, val: Val, dim: int) -> int:
        """How many indices stay along a dimension."""
        return int(self.mask(val, dim).sum())

    def changed(self, val: Val | None, dim: int) -> bool:
        """Whether a dimension shrinks."""
        return val is not None and bool(val.labels(dim)) and not bool(self.mask(val, dim).all())

    def indices(self, val: Val, dim: int) -> NDArray[np.int64]:
        """The indices that stay along a dimension."""
        return np.flatnonzero(self.mask(val, dim)).astype(np.int64)


class Edit:
    """One node of the new graph, and what the analysis says about its original.

    Args:
        program: the ids of the original program.
        survivors: which of them stay.
        module: the new module, where an edit may register a constant.
        node: the node of the new graph.
        original: its original; `arguments` are the original's, `current` the new node's.
    """

    def __init__(self, program: Program, survivors: Survivors, module: torch.fx.GraphModule, node: Node, original: Node) -> None:
        self.program, self.survivors, self.module, self.node, self.original = program, survivors, module, node, original
        self.name = rule_name(node.target)
        self.arguments = arguments(original)
        self.current = arguments(node)

    @property
    def out(self) -> Val:
        """The ids of the (single) output; of a constant that several read, those that the first of them sees."""
        found = self.program.vals[self.original.name]
        if self.program.is_constant(self.original):
            found = self.program.first_copies().get(self.original.name, found)
        assert isinstance(found, Val)
        return found

    @property
    def outs(self) -> list[Val]:
        """The ids of several outputs."""
        found = self.program.vals[self.original.name]
        return [v for v in found if v is not None] if isinstance(found, list) else [self.out]

    def val(self, name: str) -> Val:
        """The ids of a tensor argument."""
        found = self.program.operand(self.arguments[name], self.original)
        assert found is not None, (self.original.name, name)
        return found

    def value(self, name: str) -> Any:
        """The concrete value that an argument had in the analysed run."""
        return torch.fx.node.map_arg(self.arguments[name], lambda n: self.program.facts.values.get(n.name))

    def dim(self, name: str = "dim", of: str = "self") -> int:
        """An argument that names a dimension, from 0."""
        return int(self.value(name)) % self.val(of).rank

    def set(self, name: str, value: Any) -> None:
        """Replace an argument by its name in the schema."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        names = [a.name for a in self.node.target._schema.arguments]
        position = names.index(name)
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def become(self, target: Any, *args: Any) -> None:
        """Make the node call another operator."""
        self.node.target = target
        self.node.args = args
        self.node.kwargs = {}

    def resized(self, sizes: list[Any], dims: list[int]) -> list[Any]:
        """The entries of a size argument after removal; `dims[i]` is the output dimension that `sizes[i]` speaks of.

        A symbolic entry (batch times heads) is scaled: `entry * new // old`; -1 stays.
        """
        fresh: list[Any] = []
        for size, d in zip(sizes, dims, strict=True):
            if not self.survivors.changed(self.out, d) or (isinstance(size, int) and size == -1):
                fresh.append(size)
            elif isinstance(size, Node):
                graph = self.node.graph
                with graph.inserting_before(self.node):
                    scaled = graph.call_function(operator.mul, (size, self.survivors.count(self.out, d)))
                    fresh.append(graph.call_function(operator.floordiv, (scaled, self.out.shape[d])))
            else:
                fresh.append(self.survivors.count(self.out, d))
        return fresh
