"""The decisions of a graph: a width per group, a bit per block, a precision and a mask per operator, each value with its predicted loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planish.errors import PlanError, UnknownName
from planish.plan import FULL_PRECISION, Option, Plan
from planish.prune.masks.pattern import parse_pattern
from planish.search.factor import Assignment, Table

if TYPE_CHECKING:
    from planish.graph.graph import Analysis, Block, Operator, Size

UNMASKED = "none"


@dataclass(frozen=True)
class Variable:
    """One decision. The first value changes nothing and loses nothing.

    Args:
        technique: "width", "block", "precision" or "mask".
        subject: the name of the group, block or operator.
        values: units kept from all downwards; 0 and 1 for a block, and the adaptors that it may leave; "fp32" and further schemes; "none" and
            patterns of zeros.
        losses: predicted loss of each value.
    """

    technique: str
    subject: str
    values: tuple[int | str, ...]
    losses: tuple[float, ...]


def groups_of(operator: Operator) -> tuple[str, ...]:
    """The groups whose widths an operator's shapes depend on, in order of their first mention."""
    sizes: Iterable[Size] = itertools.chain(*operator.inputs, operator.output, *operator.weights)
    return tuple(dict.fromkeys(group for size in sizes for group in size.groups))


class Space:
    """All plans that the options of a graph allow. An assignment gives, for each variable, the index of its value.

    A block that is bypassed takes its operators' precisions and masks, and the groups that only its operators know, out of the decision:
    `canonical` sets them to their first value, so that equal nets have equal plans.

    Args:
        analysis: what was found in the graph.
        options: what could be done, with losses in one unit. Losses that are not finite are left out; a narrower width never
            counts as losing less than a wider one (calibration noise would otherwise prefer it).
        template: the plan whose target, saliency, masking, observer, rounding, recovery and seed all plans of this space share.

    Raises:
        UnknownName: an option for a group, block or operator that the graph has not.
        PlanError: a width outside [1, units), or a technique other than "width", "block", "precision" and "mask".
        UsageError: a pattern of zeros that makes no sense.
    """

    def __init__(self, analysis: Analysis, options: Sequence[Option], template: Plan) -> None:
        self.analysis = analysis
        self.template = template
        self.variables = _variables(analysis, options)
        self.sizes = tuple(len(variable.values) for variable in self.variables)
        self.index = {(v.technique, v.subject): i for i, v in enumerate(self.variables)}
        self.guards = tuple(self._guards(variable) for variable in self.variables)

    def _guards(self, variable: Variable) -> tuple[int, ...]:
        """Indices of the block bits that make a variable irrelevant."""
        blocks = self.analysis.blocks.values()
        if variable.technique in ("precision", "mask"):
            return self.bits_of(variable.subject)
        if variable.technique == "width":
            users = {name for name, operator in self.analysis.operators.items() if variable.subject in groups_of(operator)}
            inside: Iterable[Block] = (block for block in blocks if users and users <= set(block.operators))
        else:
            own = set(self.analysis.blocks[variable.subject].operators)
            inside = (block for block in blocks if own < set(block.operators))
        return self._bits(block.name for block in inside)

    def _bits(self, blocks: Iterable[str]) -> tuple[int, ...]:
        return tuple(sorted(self.index[("block", name)] for name in blocks if ("block", name) in self.index))

    def bits_of(self, operator: str) -> tuple[int, ...]:
        """Indices of the block bits that remove an operator."""
        return self._bits(block.name for block in self.analysis.blocks.values() if operator in block.operators)

    @property
    def identity(self) -> Assignment:
        """The assignment that changes nothing."""
        return (0,) * len(self.variables)

    @property
    def count(self) -> int:
        """How many assignments there are; an upper bound on the number of plans."""
        return math.prod(self.sizes)

    def all(self) -> Iterator[Assignment]:
        """Every canonical assignment, once."""
        for assignment in itertools.product(*(range(size) for size in self.sizes)):
            if self.canonical(assignment) == assignment:
                yield assignment

    def canonical(self, assignment: Sequence[int]) -> Assignment:
        """The same net with every irrelevant variable at its first value."""
        return tuple(
            0 if any(assignment[bit] for bit in guards) else int(value) for value, guards in zip(assignment, self.guards, strict=True)
        )

    def losses(self) -> list[tuple[tuple[int, ...], Table]]:
        """For each variable, the ascending variables that its loss depends on (itself and its guards) and the table."""
        out = []
        for number, (variable, guards) in enumerate(zip(self.variables, self.guards, strict=True)):
            scope = tuple(sorted((number, *guards)))
            table = np.zeros([self.sizes[v] for v in scope])
            table[tuple(slice(None) if v == number else 0 for v in scope)] = variable.losses
            out.append((scope, table))
        return out

    def plan(self, assignment: Sequence[int], **changes: Any) -> Plan:
        """The plan of an assignment; `changes` override fields of the template."""
        chosen = self.canonical(assignment)
        picked = [(v, v.values[i]) for v, i in zip(self.variables, chosen, strict=True) if i]
        plan = self.template.replace(
            widths={v.subject: value for v, value in picked if v.technique == "width"},
            blocks=tuple(v.subject for v, _ in picked if v.technique == "block"),
            adaptors={v.subject: str(value) for v, value in picked if v.technique == "block" and value != 1},
            precisions={v.subject: value for v, value in picked if v.technique == "precision"},
            masks={v.subject: value for v, value in picked if v.technique == "mask"},
        )
        return plan.replace(**changes) if changes else plan

    def offers(self, technique: str, subject: str, value: int | str) -> bool:
        """Whether a choice is one of this space."""
        number = self.index.get((technique, subject))
        return number is not None and value in self.variables[number].values

    def assignment(self, plan: Plan) -> Assignment:
        """The canonical assignment of a plan.

        Raises:
            PlanError: the plan makes a choice that this space does not offer.
        """
        chosen = [0] * len(self.variables)
        wanted: list[tuple[str, str, int | str]] = [("width", name, width) for name, width in plan.widths.items()]
        wanted += [("block", name, plan.adaptors.get(name, 1)) for name in plan.blocks]
        wanted += [("precision", name, scheme) for name, scheme in plan.precisions.items()]
        wanted += [("mask", name, pattern) for name, pattern in plan.masks.items()]
        for technique, subject, value in wanted:
            number = self.index.get((technique, subject))
            if number is None or not self.offers(technique, subject, value):
                offered = "nothing" if number is None else ", ".join(map(str, self.variables[number].values))
                raise PlanError(f"plan: {technique} {value!r} of {subject[:120]!r} is not an option of this graph; offered: {offered}")
            chosen[number] = self.variables[number].values.index(value)
        return self.canonical(chosen)


def _variables(analysis: Analysis, options: Sequence[Option]) -> tuple[Variable, ...]:
    known = {"width": analysis.groups, "block": analysis.blocks, "precision": analysis.operators, "mask": analysis.operators}
    kinds = {"width": "group", "block": "block", "precision": "operator", "mask": "operator"}
    losses: dict[tuple[str, str], dict[int | str, float]] = {}
    for option in options:
        if option.technique not in known:
            raise PlanError(f"option: technique must be 'width', 'block', 'precision' or 'mask'; got {option.technique[:60]!r}")
        if option.subject not in known[option.technique]:
            raise UnknownName(kinds[option.technique], option.subject, known[option.technique])
        if option.technique == "width":
            units = analysis.groups[option.subject].units
            if not isinstance(option.value, int) or not 1 <= option.value <= units:
                raise PlanError(f"option: the width of {option.subject!r} must be in [1, {units}]; got {option.value!r}")
            if option.value == units:
                continue
        if option.technique == "mask" and option.value != UNMASKED:
            parse_pattern(str(option.value))
        if math.isfinite(option.loss) and option.value not in (0, FULL_PRECISION, UNMASKED):
            losses.setdefault((option.technique, option.subject), {})[option.value] = max(0.0, option.loss)
    ordered = [(technique, subject) for technique, subjects in known.items() for subject in subjects if (technique, subject) in losses]
    return tuple(_variable(analysis, technique, subject, losses[technique, subject]) for technique, subject in ordered)


def _variable(analysis: Analysis, technique: str, subject: str, losses: dict[int | str, float]) -> Variable:
    if technique == "width":
        widths = sorted((int(width) for width in losses), reverse=True)
        rising = itertools.accumulate((losses[width] for width in widths), max)
        return Variable(technique, subject, (analysis.groups[subject].units, *widths), (0.0, *rising))
    first: int | str = 0 if technique == "block" else FULL_PRECISION if technique == "precision" else UNMASKED
    return Variable(technique, subject, (first, *losses), (0.0, *losses.values()))
