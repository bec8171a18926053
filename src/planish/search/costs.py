"""Predicted costs of every plan of a space: latency from kernel tables, bytes, memory and MACs, as factors over its variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from planish.budget import Limit
from planish.errors import BudgetError
from planish.measure.kernels import Kernel
from planish.plan import FULL_PRECISION
from planish.search.factor import Assignment, Table
from planish.search.kernels import Grid, Term, fill_unmeasured, grids, terms_of
from planish.search.lagrangian import Problem
from planish.search.memory import memory_rows, size_rows
from planish.search.space import Space

_LINE_WEIGHT = 50.0
"""Of the line through all measurements, against those close to a limit: one at the limit has 100, one 4 % away 50."""

_TRIAL_NOISE, _TILT_DOUBT, _OFFSET_DOUBT = 0.07, 0.35, 0.2
"""Standard deviations: relative, of a measured trial; of the logarithm by which tables of one precision may be off against another's; and of
what a net takes besides its kernels, as a share of the quickest net."""
_FREEDOM, _ROUNDS, _SETTLED = 3.0, 6, 0.02
"""Degrees of freedom of the distribution (Student's t) that relative errors of trials are taken to have: one that is far from what all
others say moves a fit little, however far it is; how often what each counts is found anew, and the change that ends that."""
_TILTS = tuple(np.exp(np.linspace(-0.8, 0.8, 65)).tolist())


@dataclass(frozen=True)
class Affine:
    """A correction of a predicted cost: `measured = offset + slope * predicted`.

    Args:
        offset: at least 0 wherever it was fitted on more than one point, below every measurement.
        slope: above 0.
        n: measurements behind it; 0 is the identity.
        spread: relative standard deviation of the measurements about it, weighted as in the fit.
    """

    offset: float = 0.0
    slope: float = 1.0
    n: int = 0
    spread: float = 0.0

    def __call__(self, predicted: float) -> float:
        """The measurement to expect."""
        return self.offset + self.slope * predicted

    def inverse(self, measured: float) -> float:
        """The prediction at which `measured` is to be expected."""
        return (measured - self.offset) / self.slope

    def errors(self, predicted: ArrayLike, measured: ArrayLike) -> NDArray[np.float64]:
        """By how much each measurement was missed, relative to it."""
        return np.asarray((self.offset + self.slope * np.asarray(predicted)) / np.asarray(measured) - 1.0)

    @classmethod
    def fit(cls, predicted: ArrayLike, measured: ArrayLike, near: float | None = None, *, is_by_tables: bool = False) -> Affine:
        """Least squares of relative errors, then scaled so that it is right about `near` (in the measured unit).

        By tables, errors are the machine's, with heavy tails: a trial that was taken in another state than the rest is hardly counted.
        The line's form comes from all measurements: fitted to the few that lie close to a limit, one that was taken while the machine
        was slow would turn it. The scale counts the line itself as one measurement close to the limit. Predictions that differ by less
        than 5 % among each other fix the slope alone. Where the predictions are sums of measured kernels, little else can be left for the
        offset: it is fitted against a prior about 0.

        References: Lange, Little and Taylor, 1989 (Student's t by iteratively reweighted least squares).
        """
        p, m = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
        good = np.isfinite(p) & np.isfinite(m) & (p > 0) & (m > 0)
        p, m = p[good], m[good]
        if not len(p):
            return cls()
        trust, line = np.ones(len(p)), cls()
        for _ in range(_ROUNDS if is_by_tables else 1):
            line, before = cls._line(p, m, trust, is_by_tables), trust
            if is_by_tables:
                trust = (_FREEDOM + 1) / (_FREEDOM + (line.errors(p, m) / _TRIAL_NOISE) ** 2)
            if np.abs(trust - before).max() < _SETTLED:
                break
        weights = np.ones(len(p)) if near is None else 1.0 / (0.1 + np.abs(m / near - 1.0)) ** 2
        shares, counts = 1.0 / (1.0 + line.errors(p, m)), weights * trust
        scale = 1.0 if near is None else float((counts @ shares + _LINE_WEIGHT) / (counts.sum() + _LINE_WEIGHT))
        found = cls(scale * line.offset, scale * line.slope, len(p))
        spread = math.sqrt(float(counts @ found.errors(p, m) ** 2 / counts.sum()))
        return replace(found, spread=spread)

    @classmethod
    def _line(cls, p: NDArray[np.float64], m: NDArray[np.float64], trust: NDArray[np.float64], is_by_tables: bool) -> Affine:
        """Least squares of relative errors, each counting as often as it is trusted."""
        if np.ptp(p) > 0.05 * p.max():
            root = np.sqrt(trust)
            rows, wanted = np.stack([root / m, root * p / m], axis=1), root
            if is_by_tables:
                rows, wanted = np.vstack([rows, [_TRIAL_NOISE / (_OFFSET_DOUBT * m.min()), 0.0]]), np.append(wanted, 0.0)
            both, _ = nnls(rows * m.mean(), wanted)
            if both[1] > 0:
                return cls(*(both * m.mean()).tolist())
        return cls(0.0, float(trust @ (p / m) / (trust @ (p / m) ** 2)))


def tilt(parts: NDArray[np.float64], measured: ArrayLike) -> NDArray[np.float64]:
    """What to multiply each precision's predicted seconds with before they are added, `[precisions]`; the first is 1.

    Tables of one precision may have been taken while the machine was slow, and those of another not; no line through the sums can
    say so. Of all factors, those under which the errors that `Affine.fit` leaves are likeliest, with a log-normal prior about 1 and the
    offset's.

    Args:
        parts: predicted seconds of each plan by precision, `[plans, precisions]`.
        measured: seconds of the same plans.
    """
    factors = np.ones(parts.shape[1])

    def unlikely(precision: int, factor: float) -> float:
        tried = factors.copy()
        tried[precision] = factor
        fit = Affine.fit(parts @ tried, measured, is_by_tables=True)
        errors = fit.errors(parts @ tried, measured) / _TRIAL_NOISE
        unlikely_errors = (_FREEDOM + 1) * float(np.log1p(errors**2 / _FREEDOM).sum())
        unlikely_offset = fit.offset / (_OFFSET_DOUBT * float(np.min(measured)))
        return unlikely_errors + (math.log(factor) / _TILT_DOUBT) ** 2 + unlikely_offset**2

    for precision in [*range(1, parts.shape[1])] * (1 if parts.shape[1] <= 2 else 2):
        if len(parts) > 1 and parts[:, precision].any():
            factors[precision] = min(_TILTS, key=lambda factor: unlikely(precision, factor))
    return factors


def calibrated(parts: NDArray[np.float64], measured: ArrayLike) -> tuple[NDArray[np.float64], Affine]:
    """The tilt, and the line through what it makes of the tables: `line(parts @ tilt)` is the measurement to expect."""
    factors = tilt(parts, measured)
    return factors, Affine.fit(parts @ factors, measured, is_by_tables=True)


Lookup = Callable[[Sequence[Kernel]], NDArray[np.float64]]
Factors = list[tuple[tuple[int, ...], Table]]


class Costs:
    """The costs of a space's plans, as sums of tables over its variables.

    Args:
        space: the decisions.
        lookup: seconds of each kernel in the target, NaN where it could not be measured; called once, with every kernel that is
            needed. None where the target has no tables: then there is no latency, and MACs stand for it.
        most_kernels: at most about so many kernels are asked for; with more, widths in between are interpolated.
    """

    def __init__(self, space: Space, lookup: Lookup | None, most_kernels: int = 600) -> None:
        self.space = space
        terms = terms_of(space)
        rows: dict[str, Factors] = {}
        self.kernels: tuple[Kernel, ...] = ()
        self.unmeasured: tuple[Kernel, ...] = ()
        self._parts: dict[str, Factors] = {}
        if lookup is not None:
            found = grids(terms, most_kernels)
            self.kernels = _all_kernels(terms, found)
            measured = dict(zip(self.kernels, np.asarray(lookup(self.kernels), dtype=np.float64).tolist(), strict=True))
            self.unmeasured = tuple(kernel for kernel, seconds in measured.items() if not np.isfinite(seconds))
            seconds = fill_unmeasured(terms, found, measured)
            tables: list[Factors] = []
            for precision in sorted({kernel.precision for kernel in self.kernels}, key=lambda name: (name != FULL_PRECISION, name)):
                own = {kernel: figure if kernel.precision == precision else 0.0 for kernel, figure in seconds.items()}
                tables.append([term.latency(grid, own) for term, grid in zip(terms, found, strict=True)])
                self._parts[precision] = _merged(tables[-1])
            rows["latency"] = [(parts[0][0], sum((table for _, table in parts[1:]), parts[0][1])) for parts in zip(*tables, strict=True)]
        working = [term for term in terms if term.operator is not None]
        rows["macs"] = [term.macs() for term in working]
        self._names = [term.name for term in (terms if lookup is not None else working)]
        rows["size"] = size_rows(space)
        rows.update({f"memory@{name}": factors for name, factors in memory_rows(space, size_rows(space, is_packed=False)).items()})
        self.factors = rows
        self.problem = Problem(space.sizes, {"loss": space.losses(), **rows})

    @property
    def quantities(self) -> tuple[str, ...]:
        """What is predicted: "latency" (seconds), "macs", "size" and "memory" (bytes)."""
        return tuple(dict.fromkeys(row.partition("@")[0] for row in self.factors))

    @property
    def effort(self) -> str:
        """What "fast" means here: "latency", or "macs" where the target has no tables."""
        return "latency" if "latency" in self.factors else "macs"

    def rows(self, quantity: str) -> tuple[str, ...]:
        """The problem's rows that a quantity is the largest of (memory peaks at one of several moments)."""
        return tuple(row for row in self.factors if row.partition("@")[0] == quantity)

    def predict(self, assignment: Sequence[int]) -> dict[str, float]:
        """Loss and all costs of one assignment, uncorrected, by quantity."""
        values = dict(zip(self.problem.rows, self.problem.values(self.space.canonical(assignment)).tolist(), strict=True))
        return {"loss": values["loss"], **{q: max(values[row] for row in self.rows(q)) for q in self.quantities}}

    def quickest_scheme(self) -> Assignment | None:
        """One scheme wherever it makes the net quicker, of all the quickest; None without tables, or where none does.

        It is what other tools stop at, so that nothing may be slower. Where each scheme was tried everywhere, before there were tables, it had
        operators too that it makes slower, and the others in fp32.
        """
        if "latency" not in self.factors:
            return None
        numbers = [number for number, variable in enumerate(self.space.variables) if variable.technique == "precision"]
        found = [(self.predict(self.space.identity)["latency"], self.space.identity)]
        for scheme in dict.fromkeys(scheme for number in numbers for scheme in self.space.variables[number].values[1:]):
            chosen: list[int] = list(self.space.identity)
            for number in numbers:
                if scheme in self.space.variables[number].values:
                    chosen[number] = self.space.variables[number].values.index(scheme)
            seconds = self.predict(chosen)["latency"]
            for number in numbers:
                without = [*chosen[:number], 0, *chosen[number + 1 :]]
                if chosen[number] and (quicker := self.predict(without)["latency"]) < seconds:
                    chosen, seconds = without, quicker
            found.append((seconds, tuple(chosen)))
        quickest = min(found)[1]
        return quickest if any(quickest) else None

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that predicted latency has parts in, floating point first; empty without tables."""
        return tuple(self._parts)

    def parts(self, assignment: Sequence[int]) -> NDArray[np.float64]:
        """Predicted seconds of one assignment by precision, uncorrected, `[precisions]`. Conversions count as floating point."""
        chosen = self.space.canonical(assignment)
        found = [sum(float(table[tuple(chosen[v] for v in scope)]) for scope, table in own) for own in self._parts.values()]
        return np.asarray(found, dtype=np.float64)

    def tilted(self, factors: NDArray[np.float64]) -> Factors:
        """The row "latency" where each precision's seconds count `factors` times, `[precisions]` (see `tilt`)."""
        return _merged([(s, f * t) for own, f in zip(self._parts.values(), factors.tolist(), strict=True) for s, t in own])

    def shares(self, assignment: Sequence[int]) -> dict[str, float]:
        """Predicted seconds (or MACs) of each operator, conversions with the operator that needs them; for the report."""
        chosen = self.space.canonical(assignment)
        out: dict[str, float] = {}
        for name, (scope, table) in zip(self._names, self.factors[self.effort], strict=True):
            out[name] = out.get(name, 0.0) + float(table[tuple(chosen[v] for v in scope)])
        return out


def _merged(factors: Factors) -> Factors:
    """Tables over the same variables added to one."""
    out: dict[tuple[int, ...], Table] = {}
    for scope, table in factors:
        out[scope] = out[scope] + table if scope in out else table
    return list(out.items())


def reachable_kernels(space: Space, most: int = 600) -> tuple[Kernel, ...]:
    """Every kernel that `Costs` would ask its lookup for, each once."""
    terms = terms_of(space)
    return _all_kernels(terms, grids(terms, most))


def _all_kernels(terms: Sequence[Term], found: Sequence[Grid]) -> tuple[Kernel, ...]:
    return tuple(dict.fromkeys(kernel for term, grid in zip(terms, found, strict=True) for kernel in term.kernels(grid)))


def ceilings(limits: Sequence[Limit], original: Mapping[str, float], batch: int) -> dict[str, float]:
    """Upper bounds of measured quantities from a budget's limits.

    Throughput becomes a latency; energy, which no table predicts, is taken to fall as latency does.

    Args:
        limits: of the budget.
        original: what the uncompressed model measures in the same target: "latency" (seconds), "size", "memory" (bytes), "macs" of
            one call, and "energy" if known.
        batch: samples in the call that latency is measured at.

    Raises:
        BudgetError: a relative limit on something that the original has no figure for.
    """
    out: dict[str, float] = {}
    for limit in limits:
        quantity = limit.quantity
        if quantity == "throughput":
            bound = batch / limit.bound(batch / original["latency"])
            quantity = "latency"
        elif quantity == "energy":
            if not original.get("energy"):
                raise BudgetError("energy: this machine cannot tell what the original uses, so nothing can be promised; give a latency")
            bound = original["latency"] * limit.bound(original["energy"]) / original["energy"]
            quantity = "latency"
        elif limit.relative:
            bound = limit.bound(original[quantity])
        else:
            bound = limit.value * (batch if quantity == "macs" else 1)
        out[quantity] = min(bound, out.get(quantity, np.inf))
    return out
