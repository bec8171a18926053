"""The picture of a net as plain data: boxes for operators, lines for what they read, brackets for blocks, all with coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from planish.report.figures import plain
from planish.report.layout import Layout, lanes, lay_out

BOX, HEAD, FUSED, ROW = 192, 42, 16, 20
_STEP, _GAP, _LANE, _BRACKET, _MARGIN = BOX + 18, 34, 12, 24, 14
_CORNER = 10.0
LETTERS = 24
"""So many letters of a name fit into a box."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """One operator.

    Args:
        number: its place in the program.
        name: as the user's model calls it, in full.
        label, detail, fused: the lines in the box; a light operator has only the first.
        x, y, width, height: of the box.
        is_light: it is element-wise, and drawn as a row below what it reads.
        roles: role -> numbers of the groups that it is that to.
        blocks: numbers of the blocks that it vanishes with.
    """

    number: int
    name: str
    label: str
    detail: str
    fused: str
    x: float
    y: float
    width: float
    height: float
    is_light: bool
    roles: dict[str, list[int]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """What one operator reads of another: their numbers, and the path in SVG's language."""

    source: int
    target: int
    path: str


@dataclass(frozen=True)
class Bracket:
    """A block that can be bypassed, beside its operators."""

    number: int
    label: str
    x: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Picture:
    """A net drawn from top to bottom; `frame` is what SVG calls its view box: left, top, width, height."""

    frame: tuple[float, float, float, float]
    boxes: list[Box]
    lines: list[Line]
    brackets: list[Bracket]


def picture(data: dict[str, Any]) -> Picture:
    """The picture of what `planish inspect` found.

    Args:
        data: the object that `inspect --json` prints.

    Returns:
        Each operator once, as a box; a line for each that one reads of another, but for those that are drawn in one stack, where
        contact says it; the same for the same data.
    """
    operators = {operator["name"]: operator for operator in data["operators"]}
    light = {name for name, operator in operators.items() if operator["kind"] == "elementwise"}
    layout = lay_out({name: operator["reads"] for name, operator in operators.items()}, light)
    frame = _Frame(layout, operators)
    boxes = [frame.box(name) for name in operators]
    for number, group in enumerate(data["groups"]):
        for role, names in group["operators"].items():
            for name in names:
                boxes[frame.number[name]].roles.setdefault(role, []).append(number)
    for number, block in enumerate(data["blocks"]):
        for name in block["operators"]:
            boxes[frame.number[name]].blocks.append(number)
    lines = frame.lines()
    brackets = frame.brackets(data["blocks"], boxes)
    left = min([*frame.left, *(bracket.x - 12 for bracket in brackets)], default=0.0) - _MARGIN
    width, height = max(frame.right, default=0.0) + _MARGIN - left, max(frame.bottom, default=0.0) + 2 * _MARGIN
    return Picture((left, -_MARGIN, width, height), boxes, lines, brackets)


class _Frame:
    """Coordinates of the layers and stacks of a layout, and the ways between them.

    Attributes:
        left, right: of each layer, as far out as anything is drawn there.
        edge: of each layer where its outermost box ends, at its left (True) and right (False).
        is_left, lane: for each stack that is read far below, on which side of the layers what it gives runs down, and where.
    """

    def __init__(self, layout: Layout, operators: dict[str, dict[str, Any]]) -> None:
        self.layout, self.operators = layout, operators
        self.number = {name: i for i, name in enumerate(operators)}
        self.stack = {name: i for i, stack in enumerate(layout.stacks) for name in stack}
        self.first = {stack[0] for stack in layout.stacks}
        heights = [sum(map(self._height, stack)) for stack in layout.stacks]
        count = max(layout.layer, default=-1) + 1
        tallest = [max(heights[i] for i, at in enumerate(layout.layer) if at == k) for k in range(count)]
        self.top = [sum(tallest[:k]) + _GAP * k for k in range(count)]
        self.bottom = [top + height for top, height in zip(self.top, tallest, strict=True)]
        self.x = [_STEP * x for x in layout.x]
        self.end = [self.top[at] + height for at, height in zip(layout.layer, heights, strict=True)]
        inside = [[self.x[i] for i, at in enumerate(layout.layer) if at == k] for k in range(count)]
        self.left = [min(row) - BOX / 2 for row in inside]
        self.right = [max(row) + BOX / 2 for row in inside]
        self.edge = {False: tuple(self.right), True: tuple(self.left)}
        self._lay_lanes()

    def _height(self, name: str) -> int:
        if name not in self.first:
            return ROW
        return HEAD + (FUSED if self.operators[name]["fused"] else 0)

    def box(self, name: str) -> Box:
        stack = self.layout.stacks[self.stack[name]]
        above = sum(map(self._height, stack[: stack.index(name)]))
        operator = self.operators[name]
        kind = operator["op"] or operator["kind"]
        kernel, size = "×".join(map(str, operator["kernel"])), "×".join(map(str, operator["output"][1:]))
        is_light = name not in self.first
        does = f"{kind} {kernel}".strip() if operator["tensors"] else ""  # what has no parameters is named after what it does
        detail = f"{does} → {size}" if size else does
        return Box(
            number=self.number[name],
            name=name,
            label=plain(f"then {kind}", LETTERS) if is_light else ending(name),
            detail="" if is_light else plain(detail.strip(), LETTERS),
            fused="" if is_light or not operator["fused"] else plain("then " + ", ".join(operator["fused"]), LETTERS),
            x=self.x[self.stack[name]] - BOX / 2,
            y=self.top[self.layout.layer[self.stack[name]]] + above,
            width=BOX,
            height=self._height(name),
            is_light=is_light,
        )

    def _lay_lanes(self) -> None:
        """A lane beside the layers for each stack that is read far below, on the side to which it and its far readers lean."""
        layer = self.layout.layer
        far: dict[int, list[int]] = {}
        for target, sources in enumerate(self.layout.reads):
            for source in sources:
                if layer[target] - layer[source] > 1:
                    far.setdefault(source, []).append(target)
        self.is_left = {s: self.x[s] + sum(self.x[t] for t in targets) / len(targets) < -1.0 for s, targets in far.items()}
        self.lane: dict[int, float] = {}
        for side, outermost, drawn in ((False, max, self.right), (True, min, self.left)):
            spans = {s: (layer[s], max(layer[t] for t in targets)) for s, targets in far.items() if self.is_left[s] == side}
            for source, n in lanes(spans).items():
                within = range(spans[source][0], spans[source][1] + 1)
                away = 16 + _LANE * n
                self.lane[source] = outermost(self.edge[side][k] for k in within) + (-away if side else away)
                for k in within:
                    drawn[k] = outermost(drawn[k], self.lane[source])

    def lines(self) -> list[Line]:
        """A line for each operator that another reads, but for those that stand in one stack."""
        found = []
        for name, operator in self.operators.items():
            for read in operator["reads"]:
                source, target = self.stack[read], self.stack[name]
                if source != target:
                    is_far = self.layout.layer[target] - self.layout.layer[source] > 1
                    path = self._around(source, target) if is_far else self._down(source, target)
                    found.append(Line(self.number[read], self.number[name], path))
        return found

    def _down(self, source: int, target: int) -> str:
        (x, y), (to, end) = (self.x[source], self.end[source]), (self.x[target], self.top[self.layout.layer[target]])
        straight = self.bottom[self.layout.layer[source]]
        return f"M{x:.1f} {y:.1f}V{straight:.1f}C{x:.1f} {straight + 20:.1f} {to:.1f} {end - 20:.1f} {to:.1f} {end - 4:.1f}"

    def _around(self, source: int, target: int) -> str:
        """From a stack to one far below along a lane: out at its side where nothing stands beside it, else through the gap below."""
        is_left, lane = self.is_left[source], self.lane[source]
        x, to, half = self.x[source], self.x[target], -BOX / 2 if is_left else BOX / 2
        start, end = self.layout.layer[source], self.layout.layer[target]
        edge = self.edge[is_left]
        leaves, comes = self.end[source] - 10, self.top[end] + 12
        points: list[Point] = [(x + half, leaves), (lane, leaves)]
        if abs(edge[start] - (x + half)) > 1:
            gap = self.bottom[start] + 0.4 * _GAP
            points = [(x + half / 2, self.end[source]), (x + half / 2, gap), (lane, gap)]
        if abs(edge[end] - (to + half)) > 1:
            gap = self.top[end] - 0.5 * _GAP
            points += [(lane, gap), (to + half / 2, gap), (to + half / 2, self.top[end] - 4)]
        else:
            points += [(lane, comes), (to + half + (-4 if is_left else 4), comes)]
        return rounded(points)

    def brackets(self, blocks: Sequence[dict[str, Any]], boxes: Sequence[Box]) -> list[Bracket]:
        """A bracket at the left of the layers of each block; one around others stands further out."""
        layer = [self.layout.layer[self.stack[box.name]] for box in boxes]
        inside = {n: [box for box in boxes if n in box.blocks] for n, block in enumerate(blocks) if block["operators"]}
        spans = {n: (min(layer[b.number] for b in some), max(layer[b.number] for b in some) + 1) for n, some in inside.items()}
        found = []
        for number, lane in sorted(lanes(spans).items()):
            top, bottom = min(b.y for b in inside[number]), max(b.y + b.height for b in inside[number])
            x = min(self.left[slice(*spans[number])]) - 18 - _BRACKET * lane
            found.append(Bracket(number, ending(blocks[number]["name"], max(4, int(bottom - top) // 8)), x, top, bottom))
        return found


def ending(name: str, longest: int = LETTERS) -> str:
    """The last parts of a dotted name, as many as fit: `….attention.self.query`; a part that is too long is cut in its middle."""
    if len(name) <= longest:
        return plain(name, longest)
    parts = name.split(".")
    kept = plain(parts[-1], longest - 2) if len(parts) > 1 else plain(name, longest)
    for part in parts[-2:0:-1]:
        if len(part) + len(kept) + 3 > longest:
            break
        kept = f"{plain(part)}.{kept}"
    return f"….{kept}" if len(parts) > 1 else kept


def rounded(points: Sequence[Point]) -> str:
    """A path along `points` whose corners are round."""
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        (ax, ay), (bx, by) = _towards(corner, before), _towards(corner, after)
        parts.append(f"L{ax:.1f} {ay:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {bx:.1f} {by:.1f}")
    return "".join([*parts, f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"])


def _towards(corner: Point, other: Point) -> Point:
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = max(abs(dx) + abs(dy), 1e-9)
    share = min(_CORNER, length / 2) / length
    return corner[0] + dx * share, corner[1] + dy * share
