"""From operators to kernels: what each operator costs as a table over the widths, the precision and the block bits it depends on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.graph.graph import Operator, Size
from planish.graph.macs import operator_macs
from planish.measure.kernels import Kernel
from planish.plan import FULL_PRECISION, rank_of
from planish.quantize.contract import scheme_named
from planish.search.factor import Table
from planish.search.space import Space, groups_of

if TYPE_CHECKING:
    from planish.graph.graph import Block

Grid = Mapping[int, tuple[int, ...]]
"""Variable -> the indices of its values at which kernels are measured, ascending, with both ends."""

_ATTRIBUTES = ("batch_first", "dilation", "dim", "groups", "kernel_size", "op", "padding", "reverse", "stride", "transposed")
_TRANSPARENT = frozenset({"add", "relu", "relu6", "clamp", "hardtanh", "max", "maximum", "minimum"})
_MOST_EXACT = 4096
_LEVELS = (64, 32, 24, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2)
_CELLS = tuple(round(4096 / 1.4**step) for step in range(24))
"""How many values of a width, and how many combinations of values of all widths of a term, are tried."""


def kernel_of(operator: Operator, widths: Mapping[str, int], precision: str) -> Kernel:
    """The kernel that an operator becomes when groups keep `widths` units and it runs in `precision` ("fp32", or a scheme)."""

    def shape(sizes: Sequence[Size]) -> tuple[int, ...]:
        return tuple(size.at(widths) for size in sizes)

    inputs, output = tuple(shape(sizes) for sizes in operator.inputs), shape(operator.output)
    weights = tuple(shape(sizes) for sizes in operator.weights)
    attributes: dict[str, int | str | tuple[int, ...]] = {}
    for name in _ATTRIBUTES:
        value = _plain(operator.attributes.get(name))
        if value is not None:
            attributes[name] = value
    if operator.kind == "conv":
        attributes.pop("kernel_size", None)
        channels = output[1] if attributes.get("transposed") else inputs[0][1]
        attributes["groups"] = max(1, channels // (weights or inputs[1:])[0][1])
    if not operator.reads and operator.kind != "embedding":
        attributes["from_input"] = 1
    kind, executed = operator.kind, scheme_named(precision).executed
    if kind == "matmul" and (matrix := next((shape for shape in weights if len(shape) == 2), None)) is not None:
        kind, inputs = "linear", inputs[:1]  # `addmm` and products with a parameter: weights are (inputs, outputs) there
        weights = (matrix[::-1], *(shape for shape in weights if len(shape) == 1))
    return Kernel(kind, inputs, output, weights, tuple(sorted(attributes.items())), operator.fused, executed)


def _plain(value: Any) -> int | str | tuple[int, ...] | None:
    """An attribute as a kernel holds it: booleans as 0 and 1, sequences as tuples; None where it is neither number nor text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(int(v) for v in value)
    return int(value) if isinstance(value, (bool, int)) else None


@dataclass(frozen=True)
class Term:
    """One summand of the latency: an operator, or the conversion of a tensor between two precisions.

    Args:
        name: the operator that it is counted with.
        space: the decisions.
        operator: the operator; None for a conversion.
        shape: of the converted tensor.
        widths: variables of the groups that the shapes depend on, ascending.
        schemes: variables of the precisions it depends on: the operator's own, or those of writer and reader that have one.
        bits: block bits that remove it.
        share: what part of the kernel's seconds counts.
        chosen: a block's variable and the number of its value where the term exists only then (an adaptor); None otherwise.
    """

    name: str
    space: Space
    operator: Operator | None
    shape: tuple[Size, ...]
    widths: tuple[int, ...]
    schemes: tuple[int, ...]
    bits: tuple[int, ...]
    share: float = 1.0
    chosen: tuple[int, int] | None = None

    def _kept(self, picked: Sequence[int]) -> dict[str, int]:
        variables = self.space.variables
        return {variables[v].subject: int(variables[v].values[i]) for v, i in zip(self.widths, picked, strict=True)}

    def entries(self, grid: Grid) -> Iterator[tuple[tuple[int, ...], Kernel | None, float, bool]]:
        """For each cell of (widths on the grid, schemes): where it is, its kernel (None: costs nothing), its work, if it multiplies.

        The work is multiply-accumulates, or output elements for what multiplies nothing.
        """
        domains = [grid[v] for v in self.widths]
        names = [self.space.variables[v].values for v in self.schemes]
        for cell in itertools.product(*(range(len(domain)) for domain in domains)):
            kept = self._kept([domain[i] for domain, i in zip(domains, cell, strict=True)])
            output = self.operator.output if self.operator is not None else self.shape
            elements = float(np.prod([size.at(kept) for size in output], dtype=np.float64))
            macs = operator_macs(self.operator, kept) if self.operator is not None else 0
            for picked in itertools.product(*(range(len(values)) for values in names)):
                precisions = [str(values[i]) for values, i in zip(names, picked, strict=True)]
                yield (*cell, *picked), self._kernel(kept, precisions), float(macs) or elements, macs > 0

    def _kernel(self, kept: Mapping[str, int], precisions: Sequence[str]) -> Kernel | None:
        if self.operator is not None:
            return kernel_of(self.operator, kept, precisions[0] if precisions else FULL_PRECISION)
        is_static = [scheme_named(precision).activations == "static" for precision in precisions]
        if len(set(is_static)) == 1 and (len(is_static) == 2 or not is_static[0]):
            return None
        shape = tuple(size.at(kept) for size in self.shape)
        return Kernel("conversion", (shape,), shape)

    def kernels(self, grid: Grid) -> list[Kernel]:
        """Every kernel of the term on the grid."""
        return [kernel for _, kernel, *_ in self.entries(grid) if kernel is not None]

    def latency(self, grid: Grid, seconds: Mapping[Kernel, float]) -> tuple[tuple[int, ...], Table]:
        """Seconds as a table over the term's variables (ascending), interpolated between the widths of the grid."""
        table = np.zeros([len(grid[v]) for v in self.widths] + [self.space.sizes[v] for v in self.schemes])
        for cell, kernel, *_ in self.entries(grid):
            table[cell] = 0.0 if kernel is None else self.share * seconds[kernel]
        return self._spread(self._interpolated(table, grid), self.widths + self.schemes)

    def macs(self) -> tuple[tuple[int, ...], Table]:
        """Multiply-accumulates as a table over the term's variables (ascending)."""
        assert self.operator is not None
        sizes = [self.space.sizes[v] for v in self.widths]
        every = int(np.prod(sizes)) <= _MOST_EXACT
        grid = {v: tuple(range(size)) if every else _levels(size, 12) for v, size in zip(self.widths, sizes, strict=True)}
        table = np.zeros([len(grid[v]) for v in self.widths])
        for cell in np.ndindex(*table.shape):
            table[cell] = operator_macs(self.operator, self._kept([grid[v][i] for v, i in zip(self.widths, cell, strict=True)]))
        return self._spread(self._interpolated(table, grid), self.widths)

    def _interpolated(self, table: Table, grid: Grid) -> Table:
        """`[grid of each width, ...]` -> `[all values of each width, ...]`, linear in the width between neighbours of the grid."""
        for axis, v in enumerate(self.widths):
            values = np.asarray(self.space.variables[v].values, dtype=np.float64)
            if table.shape[axis] < len(values):
                known = values[list(grid[v])][::-1]
                upper = np.searchsorted(known, values).clip(1, len(known) - 1)
                weight = (values - known[upper - 1]) / (known[upper] - known[upper - 1])
                rising = np.moveaxis(table, axis, -1)[..., ::-1]
                table = np.moveaxis(rising[..., upper - 1] * (1 - weight) + rising[..., upper] * weight, -1, axis)
        return table

    def _spread(self, table: Table, variables: tuple[int, ...]) -> tuple[tuple[int, ...], Table]:
        return spread(self.space, table, variables, self.bits, self.chosen)


def spread(
    space: Space, table: Table, variables: tuple[int, ...], bits: tuple[int, ...], chosen: tuple[int, int] | None = None
) -> tuple[tuple[int, ...], Table]:
    """A table over `variables`, zero where one of the block `bits` is set, and wherever the variable `chosen[0]` has another value than number
    `chosen[1]`; over the ascending variables of all.
    """
    scope = tuple(sorted({*variables, *bits, *([chosen[0]] if chosen else [])}))
    order = sorted(range(len(variables)), key=lambda axis: variables[axis])
    out = np.zeros([space.sizes[v] for v in scope])
    at = dict([chosen]) if chosen else {}
    out[tuple(at[v] if v in at else 0 if v in bits else slice(None) for v in scope)] = table.transpose(order)
    return scope, out


def width_variables(space: Space, sizes: Sequence[Size]) -> tuple[int, ...]:
    """The width variables that shapes depend on, ascending."""
    groups = {group for size in sizes for group in size.groups}
    return tuple(sorted(space.index[("width", group)] for group in groups if ("width", group) in space.index))


def terms_of(space: Space) -> list[Term]:
    """Every operator, then every conversion between an operator and one that it reads.

    A tensor that several operators read is converted once; each reader is charged its part. Additions, rectifiers and pools take
    their inputs in whatever precision comes. The kernel "conversion" quantizes and dequantizes, so a change costs half of it.
    Quantizing the program's own input is part of the int8 kernel that reads it.
    """
    operators = space.analysis.operators
    readers: dict[str, int] = {}
    for operator in operators.values():
        for name in operator.reads:
            readers[name] = readers.get(name, 0) + 1
    terms = []
    for operator in operators.values():
        widths = tuple(sorted(space.index[("width", g)] for g in groups_of(operator) if ("width", g) in space.index))
        own = (space.index[("precision", operator.name)],) if ("precision", operator.name) in space.index else ()
        terms.append(Term(operator.name, space, operator, (), widths, own, space.bits_of(operator.name)))
    for operator in operators.values():
        terms += _conversions(space, operator, readers)
    return [*terms, *adaptor_terms(space)]


def adaptor_terms(space: Space) -> list[Term]:
    """What the adaptors cost that blocks may leave, in floating point; each only where its block is bypassed that way."""
    terms = []
    for v, variable in enumerate(space.variables):
        for number, value in enumerate(variable.values):
            if variable.technique == "block" and isinstance(value, str):
                for operator in _adaptor(space.analysis.blocks[variable.subject], rank_of(value)):
                    widths = width_variables(space, operator.output + operator.inputs[0])
                    terms.append(Term(operator.name, space, operator, (), widths, (), space.guards[v], 1.0, (v, number)))
    return terms


def _adaptor(block: Block, rank: int | None) -> list[Operator]:
    channels = block.stream[block.axis]
    ends = [(channels, channels)] if rank is None else [(channels, Size(rank)), (Size(rank), channels)]
    found = []
    for number, (given, made) in enumerate(ends):
        inputs, output = (tuple(size if d == block.axis else old for d, old in enumerate(block.stream)) for size in (given, made))
        spatial = len(block.stream) - 2 if block.adaptor == "conv" else 0
        attributes = {"stride": (1,) * spatial, "padding": (0,) * spatial, "dilation": (1,) * spatial} if spatial else {}
        weights = ((made, given, *[Size(1)] * spatial), (made,))
        name = f"{block.name}.adaptor.{number}"
        found.append(Operator(name, name, block.adaptor, None, (inputs,), output, weights, attributes, reads=(block.skip,)))
    return found


def _conversions(space: Space, operator: Operator, readers: Mapping[str, int]) -> list[Term]:
    own = space.index.get(("precision", operator.name))
    out = []
    for name in dict.fromkeys(operator.reads):
        writer = space.analysis.operators.get(name)
        if writer is None:
            continue
        other = space.index.get(("precision", name))
        if (own is None and (other is None or _is_transparent(operator))) or (other is None and _is_transparent(writer)):
            continue
        schemes = tuple(v for v in (other, own) if v is not None)
        bits = tuple(sorted({*space.bits_of(name), *space.bits_of(operator.name)}))
        widths = width_variables(space, writer.output)
        out.append(Term(operator.name, space, None, writer.output, widths, schemes, bits, 0.5 / readers[name]))
    return out


def _is_transparent(operator: Operator) -> bool:
    return operator.kind == "pool" or (operator.kind == "elementwise" and operator.attributes.get("op") in _TRANSPARENT)


def _levels(size: int, most: int) -> tuple[int, ...]:
    return tuple(sorted({round(i) for i in np.linspace(0, size - 1, min(size, most)).tolist()}))


def grids(terms: Sequence[Term], most: int) -> list[Grid]:
    """For each term the values of its width variables at which kernels are measured: all, or as many as keep the kernels below `most`.

    What is too much is taken from the terms of many cells: of those that depend on several groups, heads and their places among them.
    """
    known: list[tuple[Grid, frozenset[Kernel]]] = [({}, frozenset())] * len(terms)
    found: list[Grid] = []
    for cells in _CELLS:
        found = [_within(term, cells) for term in terms]
        if sum(math.prod(map(len, grid.values())) for grid in found) > 30 * most:
            continue
        known = [
            old if old[0] == grid and old[1] else (grid, frozenset(term.kernels(grid)))
            for term, grid, old in zip(terms, found, known, strict=True)
        ]
        if len(frozenset().union(*(kernels for _, kernels in known))) <= most:
            break
    return found


def _within(term: Term, cells: int) -> Grid:
    """As many values of each width as leave at most so many cells; both ends at least."""
    grid: Grid = {}
    for levels in _LEVELS:
        grid = {v: _levels(term.space.sizes[v], levels) for v in term.widths}
        if math.prod(map(len, grid.values())) <= cells:
            break
    return grid


def fill_unmeasured(terms: Sequence[Term], found: Sequence[Grid], measured: Mapping[Kernel, float]) -> dict[Kernel, float]:
    """Seconds of every kernel; one that could not be measured takes its work times the median seconds per work of its kind.

    Falls back from (kind, precision) to the kind, to all that multiply or all that only move (as the kernel does), to everything
    measured, to a nanosecond per unit of work.
    """
    work: dict[Kernel, tuple[float, bool]] = {}
    for term, grid in zip(terms, found, strict=True):
        for _, kernel, amount, multiplies in term.entries(grid):
            if kernel is not None:
                work[kernel] = (amount, multiplies)

    def keys(kernel: Kernel) -> tuple[tuple[object, ...], ...]:
        return ((kernel.kind, kernel.precision), (kernel.kind,), (work[kernel][1],), ())

    rates: dict[tuple[object, ...], list[float]] = {}
    for kernel, seconds in measured.items():
        if np.isfinite(seconds):
            for key in keys(kernel):
                rates.setdefault(key, []).append(max(0.0, seconds) / work[kernel][0])
    out = {}
    for kernel, seconds in measured.items():
        known = [rates[key] for key in keys(kernel) if key in rates]
        guess = work[kernel][0] * (float(np.median(known[0])) if known else 1e-9)
        out[kernel] = max(0.0, seconds) if np.isfinite(seconds) else guess
    return out
