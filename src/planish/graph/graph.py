"""The nouns of a captured program: Graph, Group, Block, Operator, Size, Analysis. The verbs are in the other files of this folder."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from planish.signature import Signature

Width = TypeVar("Width", int, NDArray[np.int64])


@dataclass
class Graph:
    """A captured program: still an `nn.Module` that trains, evaluates and exports.

    Args:
        module: takes the flat input tensors positionally, gives the tuple of flat outputs. Parameters and buffers keep the names
            that they had in the user's model.
        signature: names, dtypes, dynamic axes, and the structure that the caller sees.
        example: the flat example inputs, at the batch that latency is measured at.
        notes: sentences for the report ("the axis 'sequence' is static because ...").
        floats: what its floating-point operators are computed in where it runs: "fp32", or "bf16" in a runtime that executes it.
        idle: input name -> (axis, its channels that never vary), see `planish.graph.idle`.
    """

    module: torch.fx.GraphModule
    signature: Signature
    example: tuple[torch.Tensor, ...]
    notes: list[str] = field(default_factory=list)
    idle: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    floats: str = "fp32"

    def copy(self) -> Graph:
        """A deep copy of the module; signature and example are shared."""
        return Graph(copy.deepcopy(self.module), self.signature, self.example, list(self.notes), self.idle, self.floats)

    def __call__(self, inputs: Any) -> Any:
        """The outputs, in the original's structure, for inputs in the original's structure (torch tensors)."""
        return self.signature.unflatten(list(self.module(*self.signature.flatten(inputs))))


@dataclass(frozen=True)
class Size:
    """One size of one tensor at the example's batch, as a sum of products of widths of groups.

    `full` is the size now; `fixed + sum(count * product of units)` ids run along it (`full` is a multiple of that: batch times heads, say).
    """

    full: int
    fixed: int = 0
    terms: tuple[tuple[tuple[str, ...], int], ...] = ()  # (a group, or two that cross; ids along this size where a unit of each meets)
    units: tuple[tuple[int, ...], ...] = ()  # full widths of the groups in `terms`

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that it depends on, each once."""
        return tuple(dict.fromkeys(group for groups, _ in self.terms for group in groups))

    def at(self, widths: Mapping[str, Width]) -> Width | int:
        """The size when each group in `widths` keeps that many units (a group not named keeps all); for tables of widths a table."""
        if not self.terms:
            return self.full
        new: Width | int = self.fixed
        for (groups, count), units in zip(self.terms, self.units, strict=True):
            ids: Width | int = count
            for group, all_units in zip(groups, units, strict=True):
                ids = ids * widths.get(group, all_units)
            new = new + ids
        return self.full * new // self._ids

    @functools.cached_property
    def _ids(self) -> int:
        return self.fixed + sum(count * math.prod(units) for (_, count), units in zip(self.terms, self.units, strict=True))


@dataclass(frozen=True)
class Group:
    """A family of interchangeable units that must be removed together, e.g. the channels of a residual stream.

    Args:
        name: the module path of the first operator that issues the units ("layer1.0.conv1").
        units: how many there are now.
        unit_of: (parameter or buffer, dimension) -> for each index along it, the unit it belongs to, or -1 for another group's.
        roles: the same keys -> "out" (the dimension that an operator's weight or bias issues), "in" (that it contracts), "affine"
            (norm parameters, running statistics, anything element-wise).
        exact: False where removal changes a statistic over survivors (a layer norm over the pruned dimension).
        multiple: widths must stay a multiple of this many units (1 where nothing asks for it).
        pinned: why no unit may be removed (a `keep` glob), or "".
        routed: how many of the units a router picks at a time, as many of which must stay (the experts of a mixture); 0 where none does.
        idle: units that may go, all others must stay: channels of an input that never vary; () where any may.
        recurs: dimension -> in how many units of another group every unit of this one is found again: places in heads, in each head.
    """

    name: str
    units: int
    unit_of: Mapping[tuple[str, int], NDArray[np.int64]]
    roles: Mapping[tuple[str, int], str]
    exact: bool = True
    multiple: int = 1
    pinned: str = ""
    routed: int = 0
    idle: tuple[int, ...] = ()
    recurs: Mapping[tuple[str, int], int] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """How many units must stay."""
        return max(1, self.routed, self.units - len(self.idle) if self.idle else 0)


@dataclass(frozen=True)
class Operator:
    """One operator that costs time: a convolution, linear map, matmul, attention, recurrent layer, norm, pool or element-wise map.

    Args:
        name: the module path of its weight ("layer1.0.conv1"), or the node's name where it has none.
        node: the fx node's name in the graph's module.
        kind: "conv", "linear", "matmul", "attention", "lstm", "gru", "embedding", "norm", "pool", "elementwise", "softmax", "other".
        weight: the weight parameter's name, or None.
        inputs: the shapes of its activation inputs.
        output: the shape of its (first) output.
        weights: the shapes of its parameters, in the operator's order.
        attributes: what else its cost depends on: kernel_size, stride, padding, dilation, groups, transposed; hidden size; "op" with
            the operator's short name for element-wise, norm and pool.
        fused: short names of element-wise operators that directly follow it alone ("relu", "add"), in order; batch norm is folded.
        reads: names of the operators that its activation inputs come from, through movements and fused element-wise operators.
        tensors: names of the parameters, buffers and constants that it and what is computed inside it use, a folded norm's included.
    """

    name: str
    node: str
    kind: str
    weight: str | None
    inputs: tuple[tuple[Size, ...], ...]
    output: tuple[Size, ...]
    weights: tuple[tuple[Size, ...], ...]
    attributes: Mapping[str, Any]
    fused: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A residual branch that can be bypassed: the addition `node` then passes `skip` on.

    Args:
        name: the longest module path that all parameters of the branch share ("layer1.2"), made unique.
        node: fx name of the addition.
        skip: fx name of the value that remains.
        operators: names of the operators that vanish.
        parameters: names of the parameters that vanish.
        stream: the sizes of what the addition gives.
        adaptor: what a linear map in the branch's place would be: "conv" over axis 1, "linear" over the last; "" where there can be none.
    """

    name: str
    node: str
    skip: str
    operators: tuple[str, ...]
    parameters: tuple[str, ...]
    stream: tuple[Size, ...] = ()
    adaptor: str = ""

    @property
    def axis(self) -> int:
        """The axis of the channels that an adaptor would map."""
        return 1 if self.adaptor == "conv" else len(self.stream) - 1

    @property
    def channels(self) -> int:
        """How many channels that axis has."""
        return self.stream[self.axis].full


@dataclass(frozen=True)
class Analysis:
    """What was found in a graph: its groups, blocks and operators, and why the rest stays dense.

    Args:
        groups: prunable groups by name, in the order of the program.
        blocks: residual branches that can be bypassed, by name.
        operators: operators by name, in the order of the program.
        unknown: operator short name -> fx nodes, of operators without a rule: what they touch stays dense.
        reasons: parameter -> why its output dimension cannot be pruned ("the program's output", "unknown operator x", "keep=").
        ids: internal to `ids.py` and `surgery.py`.
    """

    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    operators: Mapping[str, Operator]
    unknown: Mapping[str, tuple[str, ...]]
    reasons: Mapping[str, str]
    ids: Any = None
