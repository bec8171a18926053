"""Bytes of a plan: parameters by precision and mask, and activations that are alive at the moments where memory may peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from planish.plan import FULL_PRECISION
from planish.prune.masks.pattern import parse_pattern
from planish.quantize.contract import Scheme, scheme_named
from planish.runtimes.storage import packed_bytes
from planish.search.factor import Table
from planish.search.kernels import adaptor_terms, spread, width_variables
from planish.search.space import UNMASKED, Space

if TYPE_CHECKING:
    from planish.graph.graph import Operator, Size

Factors = list[tuple[tuple[int, ...], Table]]
_MOMENTS = 4


def _elements(space: Space, shape: tuple[Size, ...], variables: tuple[int, ...]) -> Table:
    """Elements of a tensor as a table over width variables."""
    subjects = [space.variables[v] for v in variables]
    axes = [
        np.asarray(variable.values, dtype=np.int64).reshape([-1 if i == n else 1 for i in range(len(subjects))])
        for n, variable in enumerate(subjects)
    ]
    total = np.ones([len(variable.values) for variable in subjects])
    widths = {variable.subject: axis for variable, axis in zip(subjects, axes, strict=True)}
    for size in shape:
        total = total * size.at(widths)
    return total


def _bytes(
    space: Space, operator: Operator, shape: tuple[Size, ...], of_scheme: Callable[[Scheme], float] | None
) -> tuple[tuple[int, ...], Table]:
    """Bytes of a tensor of an operator: so many of each element by its precision, or four."""
    widths = width_variables(space, shape)
    table = _elements(space, shape, widths)
    own = space.index.get(("precision", operator.name)) if of_scheme is not None else None
    if own is None or of_scheme is None:
        return spread(space, 4.0 * table, widths, space.bits_of(operator.name))
    each = np.asarray([of_scheme(scheme_named(str(scheme))) for scheme in space.variables[own].values])
    return spread(space, table[..., None] * each, (*widths, own), space.bits_of(operator.name))


def _stored(space: Space, operator: Operator, shape: tuple[Size, ...]) -> tuple[tuple[int, ...], Table] | None:
    """Bytes of an operator's weight in a file, by widths, precision and mask; None where it has no mask to choose."""
    mask = space.index.get(("mask", operator.name))
    if mask is None:
        return None
    widths, own = width_variables(space, shape), space.index.get(("precision", operator.name))
    count = _elements(space, shape, widths)
    rows = np.broadcast_to(_elements(space, shape[:1], widths), count.shape)
    schemes = [FULL_PRECISION] if own is None else [str(scheme) for scheme in space.variables[own].values]
    table = np.zeros((*count.shape, len(schemes), space.sizes[mask]))
    for cell in np.ndindex(*table.shape):
        total, lines = float(count[cell[:-2]]), float(rows[cell[:-2]])
        pattern, scheme = space.variables[mask].values[cell[-1]], scheme_named(schemes[cell[-2]])
        each, item = scheme.weight_bytes, scheme.item_bytes
        gone = 0.0 if pattern == UNMASKED else lines * parse_pattern(str(pattern)).gone(round(total / lines))
        table[cell] = min(total * each, packed_bytes(total, total - gone, item)) if gone and item else total * each
    if own is None:
        return spread(space, table[..., 0, :], (*widths, mask), space.bits_of(operator.name))
    return spread(space, table, (*widths, own, mask), space.bits_of(operator.name))


def size_rows(space: Space, is_packed: bool = True) -> Factors:
    """Bytes of all parameters that operators hold, each once; matrices and kernels in the operator's precision, vectors in fp32.

    Args:
        space: the decisions.
        is_packed: as a file holds them, where zeros of a mask take a bit each; else as memory does, where they take as much as others.
    """
    out: Factors = []
    seen: set[str] = set()
    for operator in space.analysis.operators.values():
        weights = operator.weights
        if operator.weight is not None and operator.weight in seen:
            weights = weights[1:]
        seen.add(operator.weight or operator.name)
        for number, shape in enumerate(weights):
            stored = _stored(space, operator, shape) if is_packed and number == 0 and len(shape) > 1 else None
            out.append(stored or _bytes(space, operator, shape, (lambda scheme: scheme.weight_bytes) if len(shape) > 1 else None))
    for term in adaptor_terms(space):
        assert term.operator is not None
        for shape in term.operator.weights:
            widths = width_variables(space, shape)
            out.append(spread(space, 4.0 * _elements(space, shape, widths), widths, term.bits, term.chosen))
    return out


def memory_rows(space: Space, weights: Factors) -> dict[str, Factors]:
    """For each moment (an operator's name) at which memory may peak: bytes of all parameters and of the activations then alive.

    Moments are those of the uncompressed graph with the most bytes alive, less those whose tensors are all alive at another one.
    """
    operators = list(space.analysis.operators.values())
    last = {operator.name: number for number, operator in enumerate(operators)}
    for number, operator in enumerate(operators):
        for name in operator.reads:
            if name in last:
                last[name] = max(last[name], number)
    alive = [[o for o in operators[: number + 1] if last[o.name] >= number] for number in range(len(operators))]
    full = {o.name: float(np.prod([size.full for size in o.output], dtype=np.float64)) for o in operators}
    order = sorted(range(len(operators)), key=lambda number: (-sum(full[o.name] for o in alive[number]), number))
    out: dict[str, Factors] = {}
    chosen: list[set[str]] = []
    for number in order:
        names = {o.name for o in alive[number]}
        if len(chosen) < _MOMENTS and not any(names <= other for other in chosen):
            chosen.append(names)
            out[operators[number].name] = [
                *weights,
                *(_bytes(space, o, o.output, lambda scheme: scheme.activation_bytes) for o in alive[number]),
            ]
    return out or {"start": list(weights)}
