"""Which units of a group go first, and who takes over what they carried: from a saliency, several of them, or a clustering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from planish import registry
from planish.graph.graph import Analysis, Graph, Group
from planish.prune.contract import Material, Redundancy, Saliency
from planish.prune.readers import Readings, inputs_of_readers
from planish.prune.saliency.magnitude import Magnitude
from planish.prune.units import columns, finite, lowest, members, relative, unit_mean, vectors

_SAMPLES = 256
_NEGLIGIBLE, _STILL = 1e-6, 1e-5
"""Of the largest variance in a group, and of an input's own mean square: a variance below it is the rounding of moments that were summed in
single precision."""
_ROUNDING, _AXES = 1e-10, 64


@dataclass(frozen=True)
class Going:
    """Units that go at some width.

    Args:
        units: their numbers.
        into: for each the unit that takes over what it carried, or -1.
        factors: for each how much of that unit it is: what reads the unit that goes is added, times this, to what reads the other.
    """

    units: NDArray[np.int64]
    into: NDArray[np.int64]
    factors: NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """In which order the units of one group go.

    Args:
        scores: [units], higher is dearer to lose, NaN must stay.
        multiple: what the number of units that stay is a multiple of.
        clusters: (how many) -> the cluster of each unit; None: units go by score alone, and nothing is merged.
        shares: [units, units], how much of unit v unit u is, as far as readers see, or by the weights where nobody is known to read them;
            without it 1.
        remark: what its scores or clusters stand on, where it is not what was asked for.
        reserved: how many units have no score since they are not for removal.
    """

    scores: NDArray[np.float64]
    multiple: int = 1
    clusters: Callable[[int], NDArray[np.int64]] | None = None
    shares: NDArray[np.float32] | None = None
    remark: str = ""
    reserved: int = 0
    _known: dict[int, Going] = field(default_factory=dict, compare=False, repr=False)

    def going(self, count: int) -> Going:
        """The units that go when `count` should; fewer, where others must stay."""
        if count not in self._known:
            units, into = self._merged(count) if self.clusters is not None else self._by_score(count)
            if len(units) < count:
                fewer = len(units) - (len(units) - len(self.scores)) % self.multiple
                units, into = units[:fewer], into[:fewer]
            factors = np.ones(len(units))
            if self.shares is not None:
                factors = np.where(into >= 0, self.shares[units, into], 0.0).astype(np.float64)
            self._known[count] = Going(units, into, factors)
        return self._known[count]

    def _by_score(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        units = lowest(self.scores, count)
        return units, np.full(len(units), -1, np.int64)

    def _merged(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The dearest unit of each cluster stays. Where that leaves too many, the cheapest of those that stay go too; where too few, the
        dearest of the others stay."""
        assert self.clusters is not None
        found = self.clusters(len(self.scores) - count)
        dear = np.where(np.isnan(self.scores), np.inf, self.scores)
        heads = {int(label): int(np.flatnonzero(found == label)[np.argmax(dear[found == label])]) for label in np.unique(found)}
        into = np.array([heads[int(label)] for label in found], np.int64)
        is_head = into == np.arange(len(into))
        units = lowest(np.where(is_head, np.nan, self.scores), count)
        if len(units) < count:
            units = np.concatenate([units, lowest(np.where(is_head, self.scores, np.nan), count - len(units))])
        return units, np.where(np.isin(into[units], units), -1, into[units])


Orders = Mapping[str, Order]


def remarks(orders: Orders) -> list[str]:
    """Sentences for the report: units whose scores are not finite, and groups that are ordered by something else than was asked for."""
    found = {name: int(np.isnan(order.scores).sum()) - order.reserved for name, order in orders.items()}
    kept = [f"{name} ({count} of {len(orders[name].scores)})" for name, count in found.items() if count]
    out = [f"saliency: units whose score is not finite are kept: {_some(kept)}."] if kept else []
    for remark in sorted({order.remark for order in orders.values() if order.remark}):
        out.append(
            f"saliency: ordered {remark}, since nothing else is known of them: {_some([n for n, o in orders.items() if o.remark == remark])}."
        )
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def merge_(tensors: Mapping[str, Tensor], group: Group, going: Going) -> None:
    """Adds what reads each unit that goes to what reads the unit that takes over, in place.

    Args:
        tensors: parameters by name, those of the group at least.
        group: whose units they are.
        going: what goes, and into what.
    """
    merged = going.into >= 0
    if not merged.any():
        return
    for (name, dim), role in group.roles.items():
        if role == "in" and name in tensors:
            rows = members(group.unit_of[name, dim], group.units)
            source, place = (torch.from_numpy(rows[units[merged]].reshape(-1)) for units in (going.units, going.into))
            factors = torch.from_numpy(np.repeat(going.factors[merged], rows.shape[1])).to(tensors[name].dtype)
            view = [-1 if d == dim else 1 for d in range(tensors[name].dim())]
            tensors[name].index_add_(dim, place, tensors[name].index_select(dim, source) * factors.view(view))


def is_clustering(name: str) -> bool:
    """Whether a criterion is a clustering, of whatever behind a colon, and no saliency."""
    return name.partition(":")[0] in registry.names("redundancy")


def needs_labels(name: str) -> bool:
    """Whether a saliency, or one of several joined by "+", needs samples with labels; a clustering never does.

    Raises:
        UnknownName: nobody registered such a name.
    """
    registry.check("saliency", name)
    if is_clustering(name):
        return False
    return any("labels" in registry.get("saliency", part).needs for part in name.split("+"))


def orders(name: str, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, Order]:
    """The order of every group.

    Args:
        name: a saliency; several, joined by "+", of which each is taken relative to the group's mean and all are added; or a clustering, of
            weights or, with ":activations" behind it, of what readers see.
        graph: the original; left as it is.
        analysis: of that graph.
        material: calibration data.
        seed: of whatever is random.

    Raises:
        UnknownName: nobody registered such a name.
        DataError: it needs labels, and there are none.
    """
    registry.check("saliency", name)
    if is_clustering(name):
        method, _, of = name.partition(":")
        clustered = _clustered(registry.get("redundancy", method)(), of or "weights", graph, analysis, material, seed)
        return {g: _idle_first(group) if group.idle else clustered[g] for g, group in analysis.groups.items()}
    methods: list[Saliency] = [registry.get("saliency", part)() for part in name.split("+")]
    parts = [one.scores(graph, analysis, material, seed) for one in methods]
    scores = parts[0] if len(parts) == 1 else {g: np.mean([relative(part[g]) for part in parts], axis=0) for g in parts[0]}
    others = {g for one in methods for g in one.others}
    return {
        g: _idle_first(group) if group.idle else Order(finite(scores[g]), group.multiple, remark="by magnitude" if g in others else "")
        for g, group in analysis.groups.items()
    }


def _idle_first(group: Group) -> Order:
    """Channels of an input that never vary may go, whatever a criterion says of them; no other may."""
    scores = np.full(group.units, np.nan)
    scores[list(group.idle)] = 0.0
    return Order(scores, group.multiple, reserved=group.least)


def _clustered(method: Redundancy, of: str, graph: Graph, analysis: Analysis, material: Material, seed: int) -> dict[str, Order]:
    scores = Magnitude().scores(graph, analysis, material, seed)
    seen = inputs_of_readers(graph, analysis, material.split, _SAMPLES)
    parameters = dict(graph.module.named_parameters())
    found = {}
    for name, group in analysis.groups.items():
        given, read = _given(group, parameters), _read(group, name, seen)
        grams = given if read is None else read
        usable = np.isfinite(given.diagonal()) & np.isfinite(grams.diagonal())
        alike = grams if of == "activations" else given
        features = _features(alike[np.ix_(usable, usable)], is_by_correlation=of == "activations" and read is not None)
        found[name] = Order(
            np.where(usable, scores[name], np.nan),
            group.multiple,
            _of_usable(method, features, usable, seed),
            _shares(grams, usable),
            remark="by weights" if of == "activations" and read is None else "",
        )
    return found


def _of_usable(
    method: Redundancy, features: NDArray[np.float64], usable: NDArray[np.bool_], seed: int
) -> Callable[[int], NDArray[np.int64]]:
    """Clusters of the units that can be compared, whose features are given; each of the others is one of its own."""

    def clusters(count: int) -> NDArray[np.int64]:
        labels = -1 - np.arange(len(usable))
        wanted = max(1, count - int(np.count_nonzero(~usable)))
        if wanted < len(features):
            labels[usable] = method.clusters(features, wanted, seed)
        return labels

    return clusters


def _read(group: Group, name: str, seen: Readings) -> NDArray[np.float64] | None:
    """[units, units], how the units vary together as their readers see them, each reader's share the same; None where nobody reads them."""
    total = []
    for weight in seen.readers[name]:
        gram = seen.moments[weight].second(centered=True)[0][0].numpy()
        power = seen.moments[weight].second(centered=False)[0][0].diagonal().numpy()
        still = gram.diagonal() < _STILL * power
        gram[still, :] = gram[:, still] = 0.0
        unit_of = group.unit_of[weight, 1]
        crossed = np.zeros((group.units, group.units))
        for at in columns(unit_of, group.units, len(gram) // len(unit_of)).T:
            crossed += gram[np.ix_(at, at)]
        level = float(np.nansum(crossed.diagonal()))
        total.append(crossed / max(level, np.finfo(float).tiny))
    return np.mean(total, axis=0) if total else None


def _given(group: Group, parameters: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """[units, units], products of the weights that issue the units and of what scales them, each module's weight and bias taken together."""
    modules: dict[str, NDArray[np.float64]] = {}
    for (name, dim), role in group.roles.items():
        if name in parameters and role in ("out", "affine"):
            rows = vectors(parameters[name], dim, group.unit_of[name, dim], group.units)
            module = name.rpartition(".")[0]
            modules[module] = modules.get(module, np.zeros((group.units, group.units))) + rows @ rows.T
    total = np.zeros((group.units, group.units))
    for products in modules.values():
        total += products / max(unit_mean(products.diagonal()), np.finfo(float).tiny)
    return total


def _features(products: NDArray[np.float64], is_by_correlation: bool) -> NDArray[np.float64]:
    """Points whose inner products these are, or, by correlation, whose squared distances are 2 - 2 x correlation: [units, axes], the largest
    64 axes; a unit that never varies lies at zero."""
    level = products.diagonal()
    if is_by_correlation:
        scale = np.where(level > _NEGLIGIBLE * level.max(initial=0.0), level, np.inf) ** -0.5
        products = products * scale[:, None] * scale
    values, axes = np.linalg.eigh(products)
    real = values > _ROUNDING * values.max(initial=0.0)
    real[: max(0, len(values) - _AXES)] = False
    return np.ascontiguousarray(axes[:, real] * np.sqrt(values[real])) if real.any() else np.zeros((len(products), 1))


def _shares(products: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[units, units], how much of unit v unit u is, by regression; 0 where either cannot be compared or v hardly varies."""
    level = np.where(usable, products.diagonal(), 0.0)
    root = np.sqrt(np.where(level > _NEGLIGIBLE * level.max(initial=0.0), level, 0.0))
    scale = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    known = np.where(usable[:, None] & usable, products, 0.0)
    correlation = np.clip(known * scale[:, None] * scale, -1.0, 1.0)
    return np.asarray(correlation * root[:, None] * scale, np.float32)
