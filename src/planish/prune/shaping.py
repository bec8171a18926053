"""How the units of a plan leave a net: what a schedule is, what it gets, the surgery that ends it, and the norms and gates that it steers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from planish.graph.graph import Analysis, Graph, Group
from planish.graph.groups import analyse
from planish.graph.ids import Val
from planish.graph.operators import Labels
from planish.graph.replay import Replay
from planish.graph.surgery import prune
from planish.prune.order import Order, Orders
from planish.prune.readers import readers

Kept = Mapping[tuple[str, int], NDArray[np.int64]]
Step = dict[str, float]
"""Figures of one moment of a schedule, by name."""


class Fit(Protocol):
    """Training towards the original, given to schedules by the recovery."""

    def __call__(
        self,
        graph: Graph,
        /,
        share: float,
        name: str,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[float, float], None] | None = None,
    ) -> None:
        """Train `graph` in place.

        Args:
            graph: its parameters are trained; buffers that require gradients get them.
            share: of the time and the samples that shaping has.
            name: tells its checkpoint from those of other calls.
            penalty: a scalar that is added to the loss of every step.
            after_step: called after every step with the learning rate at that moment and the share of training that is done.
        """


@dataclass(frozen=True)
class Shaping:
    """What a schedule gets.

    Args:
        graph: the net with all its units, its plan's blocks bypassed; a schedule may train it or copies of it.
        analysis: of that graph.
        widths: units that stay, by group of that analysis; others keep all.
        orders: of that analysis's groups.
        levels: group -> widths that may be chosen, widest first; for schedules that choose the widths themselves.
        price: units that stay by group, fractions allowed -> predicted cost, a scalar that can be differentiated; what `widths` cost is
            what may be spent.
        reorder: the same criterion's orders of another graph.
        refit: (pruned graph, what it kept of the original) -> refitted in place by least squares.
        fit: trains.
        say: tells the user a sentence.
    """

    graph: Graph
    analysis: Analysis
    widths: Mapping[str, int]
    orders: Orders
    levels: Mapping[str, Sequence[int]]
    price: Callable[[Mapping[str, Tensor]], Tensor]
    reorder: Callable[[Graph, Analysis], Orders]
    refit: Callable[[Graph, Kept], None]
    fit: Fit
    say: Callable[[str], None]

    def leaving(self, name: str) -> int:
        """How many units of a group leave."""
        return self.analysis.groups[name].units - self.widths[name]


@dataclass(frozen=True)
class Shaped:
    """What a schedule gives.

    Args:
        graph: the net without the units that left.
        kept: (parameter or buffer, dimension) -> indices of `Shaping.graph` that survive.
        widths: units that stayed, by group.
        history: figures of the way there, in order.
    """

    graph: Graph
    kept: Kept
    widths: Mapping[str, int]
    history: tuple[Step, ...] = ()


class Schedule(Protocol):
    """A way for units to leave.

    Called once per recovered plan, before the recovery that follows surgery; not where a plan narrows nothing.
    """

    def shape(self, shaping: Shaping) -> Shaped:
        """The smaller net. It must be no wider than `Shaping.widths`, or cost no more than they do."""
        ...


def cut(shaping: Shaping, trained: Graph, scores: Mapping[str, NDArray[np.float64]], widths: Mapping[str, int] | None = None) -> Shaped:
    """The lowest units of every group that narrows, gone from a copy of `Shaping.graph` with the tensors of `trained`; refitted.

    Units that the criterion says must stay do, whatever their score; equal scores go in its order.

    Args:
        shaping: what was asked for.
        trained: has the parameters and buffers of `Shaping.graph` under the same names, and perhaps more.
        scores: group -> [units]; higher stays. Groups that have none leave by the criterion.
        widths: units that stay, of the groups that have scores; those of `shaping` by default.
    """
    own = {name: width for name, width in shaping.widths.items() if widths is None or name not in scores}
    chosen = {**own, **(widths or {})}
    dense = carried(shaping.graph, trained)
    gone = {name: _lowest(shaping, name, scores.get(name), shaping.analysis.groups[name].units - width) for name, width in chosen.items()}
    pruned = prune(dense, shaping.analysis, {name: units.tolist() for name, units in gone.items() if len(units)})
    shaping.refit(pruned.graph, pruned.kept)
    stayed = {name: shaping.analysis.groups[name].units - len(units) for name, units in gone.items()}
    return Shaped(pruned.graph, pruned.kept, stayed)


def _lowest(shaping: Shaping, name: str, scores: NDArray[np.float64] | None, count: int) -> NDArray[np.int64]:
    """The units of a group that go first: by their scores, then by the criterion; never those that it keeps."""
    order = shaping.orders[name]
    if scores is None:
        return order.going(count).units
    place = np.argsort(np.argsort(order.scores, kind="stable"), kind="stable")
    ranked = np.lexsort((place, np.where(np.isnan(scores), np.inf, scores))).argsort().astype(np.float64)
    return Order(np.where(np.isnan(order.scores), np.nan, ranked), order.multiple).going(count).units


def entrances(analysis: Analysis) -> set[str]:
    """Groups that run through an input or a state: behind the gather that surgery puts there they cannot be narrowed again."""
    labels = analysis.ids
    assert isinstance(labels, Labels)
    program = labels.program
    found = set()
    for node in (*program.state, *program.idle):
        val = program.vals[node]
        if isinstance(val, Val):
            units = {int(unit) for d in val.dims for ids in val.labels(d) for unit in labels.unit[ids.numpy()]}
            found |= {labels.place[unit][0] for unit in units if unit in labels.place}
    return found


def carried(graph: Graph, trained: Graph) -> Graph:
    """A copy of `graph` with the values that its parameters and buffers have in `trained`."""
    copied = graph.copy()
    values = trained.module.state_dict()
    copied.module.load_state_dict({name: values[name] for name in copied.module.state_dict()})
    return copied


def again(graph: Graph, shaping: Shaping) -> tuple[Analysis, Orders]:
    """Analysis and orders of a graph that units have left."""
    analysis = analyse(graph)
    return analysis, shaping.reorder(graph, analysis)


def followed(original: Analysis, now: Analysis, kept: Kept) -> dict[str, str]:
    """What the groups of a graph are called once units have left it: with fewer heads, say, their places may be what gives a group its name.

    Args:
        original: of the graph.
        now: of what it became.
        kept: what surgery left of it.

    Returns:
        name of a group of the original -> its name now, where it still is a group.
    """
    found: dict[str, str] = {}
    for name, group in original.groups.items():
        for key, unit_of in group.unit_of.items():
            before = unit_of[kept[key]] if key in kept else unit_of
            for other in now.groups.values():
                if key in other.unit_of and name not in found and _is_same(before, other.unit_of[key], other.units):
                    found[name] = other.name
    return found


def _is_same(before: NDArray[np.int64], after: NDArray[np.int64], units: int) -> bool:
    """Whether both say the same of each index, but for the numbers of units."""
    if len(before) != len(after) or not np.array_equal(before < 0, after < 0):
        return False
    return (
        len(set(zip(before[before >= 0].tolist(), after[after >= 0].tolist(), strict=True))) == len(np.unique(before[before >= 0])) == units
    )


class Units:
    """The norms of a group's units over some of its parameters, each parameter relative to what its units had on average at the start.

    Args:
        graph: whose parameters they are.
        group: whose units.
        roles: which of its dimensions count.
    """

    def __init__(self, graph: Graph, group: Group, roles: Sequence[str] = ("out", "in", "affine")) -> None:
        parameters = dict(graph.module.named_parameters(remove_duplicate=False))
        self.units = group.units
        self._parts: list[tuple[Tensor, int, Tensor, float]] = []
        for (name, dim), role in group.roles.items():
            if role in roles and name in parameters:
                unit_of = torch.from_numpy(np.where(group.unit_of[name, dim] < 0, group.units, group.unit_of[name, dim]))
                squares = self._by_unit(parameters[name].detach(), dim, unit_of)
                level = float(squares.mean())
                if level > 0:
                    self._parts.append((parameters[name], dim, unit_of, level))

    def _by_unit(self, tensor: Tensor, dim: int, unit_of: Tensor) -> Tensor:
        squares = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1).square().sum(1)
        return torch.zeros(self.units + 1).index_add_(0, unit_of, squares)[: self.units]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """[units]: 1 on average at the start."""
        if not self._parts:
            return torch.ones(self.units)
        squares = [self._by_unit(tensor, dim, unit_of) / level for tensor, dim, unit_of, level in self._parts]
        return torch.stack(squares).mean(0).sqrt()

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply everything that belongs to each unit by its factor, [units]."""
        padded = torch.cat([factors, factors.new_ones(1)])
        for tensor, dim, unit_of, _ in self._parts:
            tensor.mul_(padded[unit_of].view([-1 if d == dim else 1 for d in range(tensor.dim())]).to(tensor.dtype))


@dataclass(frozen=True)
class Gated:
    """A net whose units have gates.

    Args:
        graph: a copy whose convolutions and linear maps read every unit times its gate.
        gates: group -> [units], 1 at first: buffers of `graph` that require gradients, which no optimizer knows. Groups that no such
            operator reads have none.
    """

    graph: Graph
    gates: Mapping[str, Tensor]


def gated(graph: Graph, analysis: Analysis, names: Sequence[str]) -> Gated:
    """A copy of a graph with gates for the units of some groups."""
    copied = graph.copy()
    fx = copied.module.graph
    replay = Replay(copied.module)
    parameters = dict(copied.module.named_parameters(remove_duplicate=False))
    gates: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        group = analysis.groups[name]
        reading = readers(replay, group, parameters)
        if not reading:
            continue
        gate = torch.ones(group.units)
        copied.module.register_buffer(f"gates_{number}", gate)
        gates[name] = gate.requires_grad_()
        for place, operator in enumerate(reading):
            unit_of = group.unit_of[operator.weight, 1]
            copied.module.register_buffer(f"gates_{number}_of_{place}", torch.from_numpy(np.where(unit_of < 0, group.units, unit_of)))
            with fx.inserting_before(operator.node):
                value = fx.get_attr(f"gates_{number}")
                padded = fx.call_function(torch.ops.aten.constant_pad_nd.default, (value, [0, 1], 1.0))
                picked = fx.call_function(torch.ops.aten.index_select.default, (padded, 0, fx.get_attr(f"gates_{number}_of_{place}")))
                shaped = fx.call_function(torch.ops.aten.view.default, (picked, [-1, *[1] * len(operator.stride)]))
                source = operator.node.args[0]
                assert isinstance(source, Node)
                scaled = fx.call_function(torch.ops.aten.mul.Tensor, (source, shaped))
            operator.node.update_arg(0, scaled)
    fx.lint()
    copied.module.recompile()
    return Gated(copied, gates)
