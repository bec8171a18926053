"""A layered layout of a net: operators stacked with what is element-wise after them, stacks in layers, so that data flows down.

References: Sugiyama, Tagawa and Toda, 1981: longest-path layers, then barycentres against crossings. Differs: no dummy nodes; a value
that is read far below is drawn past the layers in between, so that a residual net stays one straight column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_SWEEPS = 4


@dataclass(frozen=True)
class Layout:
    """Where the operators stand.

    Args:
        stacks: operators that are drawn in one piece, by the first's place in the program.
        layer: of each stack, from 0; a stack reads only from layers above its own.
        x: the middle of each stack, in widths of a stack; those of one layer are at least 1 apart.
        reads: the stacks that each stack reads.
    """

    stacks: tuple[tuple[str, ...], ...]
    layer: tuple[int, ...]
    x: tuple[float, ...]
    reads: tuple[tuple[int, ...], ...]


def lay_out(reads: Mapping[str, Sequence[str]], light: Collection[str]) -> Layout:
    """The same layout for the same net.

    Args:
        reads: operator -> operators that it reads, all of them earlier in the mapping.
        light: operators that join the stack that they read, if they read only one.
    """
    stacks, of = _stacks(reads, light)
    above = [sorted({of[r] for o in stack for r in reads[o]} - {i}) for i, stack in enumerate(stacks)]
    below: list[list[int]] = [[] for _ in stacks]
    for i, sources in enumerate(above):
        for source in sources:
            below[source].append(i)
    layer = _layers(above, below)
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for i, number in enumerate(layer):
        rows[number].append(i)
    _order(rows, above, below)
    return Layout(tuple(map(tuple, stacks)), tuple(layer), tuple(_places(rows, above)), tuple(map(tuple, above)))


def _stacks(reads: Mapping[str, Sequence[str]], light: Collection[str]) -> tuple[list[list[str]], dict[str, int]]:
    stacks: list[list[str]] = []
    of: dict[str, int] = {}
    for operator, sources in reads.items():
        read = {of[source] for source in sources}
        if operator in light and len(read) == 1:
            (of[operator],) = read
        else:
            of[operator] = len(stacks)
            stacks.append([])
        stacks[of[operator]].append(operator)
    return stacks, of


def _layers(above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> list[int]:
    """The longest path from the top; what reads nothing stands just above its first reader."""
    layer: list[int] = []
    for sources in above:
        layer.append(1 + max((layer[s] for s in sources), default=-1))
    for i, readers in enumerate(below):
        if not above[i] and readers:
            layer[i] = min(layer[r] for r in readers) - 1
    return layer


def _order(rows: Sequence[list[int]], above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> None:
    """Sort each row by the barycentre of its neighbours above, then below, in place."""
    place: dict[int, float] = {}

    def settle(row: Sequence[int]) -> None:
        place.update({stack: position - (len(row) - 1) / 2 for position, stack in enumerate(row)})

    for row in rows:
        settle(row)
    for _ in range(_SWEEPS):
        for ordered, neighbours in ((rows, above), (rows[::-1], below)):
            for row in ordered:
                row.sort(key=lambda stack: _mean([place[n] for n in neighbours[stack]], place[stack]))
                settle(row)


def _places(rows: Sequence[Sequence[int]], above: Sequence[Sequence[int]]) -> list[float]:
    """The middle of each stack: below what all its inputs come from, so that what forks and joins again stays in one column."""
    parent = _dominators(above)
    x = [0.0] * len(above)
    for row in rows:
        wanted = []
        for stack in row:
            source = parent[stack]
            wanted.append(x[source] if source is not None else _mean([x[n] for n in above[stack]], 0.0))
        for stack, place in zip(row, spread(wanted), strict=True):
            x[stack] = place
    return x


def _dominators(above: Sequence[Sequence[int]]) -> list[int | None]:
    """For each stack the last one that all ways to it run through, or None where there is none.

    Where ways share nothing the deeper one counts: a mask that comes from elsewhere moves no stream to another column.
    """
    parent: list[int | None] = []
    depth: list[int] = []
    for sources in above:
        common: int | None = sources[0] if sources else None
        for source in sources[1:]:
            common = _last_common(common, source, parent, depth) if common is not None else None
        parent.append(common)
        depth.append(0 if common is None else depth[common] + 1)
    return parent


def _last_common(one: int, two: int, parent: Sequence[int | None], depth: Sequence[int]) -> int | None:
    a: int | None = one
    b: int | None = two
    while a != b:
        if b is None or (a is not None and depth[a] >= depth[b]):
            a = None if a is None else parent[a]
        else:
            b = parent[b]
    if a is None and depth[one] != depth[two]:
        return one if depth[one] > depth[two] else two
    return a


def spread(wanted: Sequence[float]) -> list[float]:
    """Ascending places at least 1 apart, as near to `wanted` as that allows in the sense of least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(wanted):
        total, count = place - i, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    flat = [total / count for total, count in pools for _ in range(count)]
    return [place + i for i, place in enumerate(flat)]


def lanes(spans: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """For each span from one layer to another a lane beside the layers: short spans inside, and none over another in its lane.

    Spans may touch where one ends and the next begins.
    """
    taken: list[list[tuple[int, int]]] = []
    found: dict[int, int] = {}
    for key, (start, end) in sorted(spans.items(), key=lambda item: (item[1][1] - item[1][0], item[1], item[0])):
        free = (n for n, lane in enumerate(taken) if all(end <= s or e <= start for s, e in lane))
        found[key] = next(free, len(taken))
        if found[key] == len(taken):
            taken.append([])
        taken[found[key]].append((start, end))
    return found


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
