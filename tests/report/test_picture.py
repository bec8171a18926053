"""The picture of a net: its layout, and that each operator, each edge and each member of a group is in the page."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inspecting
import pages
from planish.report.groups_page import groups_page
from planish.report.layout import lanes, lay_out, spread
from planish.report.page import MARK
from planish.report.picture import LETTERS, ending, picture, rounded

CHAIN = {"a": [], "relu": ["a"], "b": ["relu"], "c": ["b"], "add": ["c", "relu"], "d": ["add"]}


def test_a_layer_reads_only_from_above_and_what_is_light_joins_what_it_reads() -> None:
    layout = lay_out(CHAIN, {"relu", "add"})
    assert layout.stacks == (("a", "relu"), ("b",), ("c",), ("add",), ("d",))
    assert layout.layer == (0, 1, 2, 3, 4)
    assert layout.x == (0.0,) * 5
    assert layout.reads == ((), (0,), (1,), (0, 2), (3,))


def test_what_reads_nothing_stands_above_its_first_reader() -> None:
    layout = lay_out({"a": [], "b": ["a"], "late": [], "c": ["b", "late"]}, ())
    assert dict(zip((s[0] for s in layout.stacks), layout.layer, strict=True)) == {"a": 0, "b": 1, "late": 1, "c": 2}


@given(st.data())
def test_any_net_is_laid_out(data: st.DataObject) -> None:
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 14)))]
    reads = {name: data.draw(st.lists(st.sampled_from(names[:i]), unique=True, max_size=3)) if i else [] for i, name in enumerate(names)}
    light = data.draw(st.sets(st.sampled_from(names)))
    layout = lay_out(reads, light)
    assert sorted(itertools.chain(*layout.stacks)) == sorted(names)
    for i, sources in enumerate(layout.reads):
        assert all(layout.layer[source] < layout.layer[i] for source in sources)
    for layer in set(layout.layer):
        row = sorted(x for x, at in zip(layout.x, layout.layer, strict=True) if at == layer)
        assert all(b - a > 1 - 1e-9 for a, b in itertools.pairwise(row))
    assert lay_out(reads, light) == layout


@pytest.mark.parametrize(
    ("wanted", "places"),
    [([], []), ([0.3], [0.3]), ([0.0, 5.0], [0.0, 5.0]), ([1.0, 1.0], [0.5, 1.5]), ([2.0, 0.0, 9.0], [0.5, 1.5, 9.0])],
)
def test_places_are_as_near_as_a_distance_of_one_allows(wanted: list[float], places: list[float]) -> None:
    assert spread(wanted) == pytest.approx(places)


def test_spans_over_each_other_have_lanes_of_their_own() -> None:
    assert lanes({0: (0, 2), 1: (2, 4), 2: (0, 4), 3: (1, 3)}) == {0: 0, 1: 0, 3: 1, 2: 2}


def test_a_path_has_round_corners() -> None:
    assert rounded([(0, 0), (30, 0), (30, 8)]) == "M0.0 0.0L20.0 0.0Q30.0 0.0 30.0 4.0L30.0 8.0"


def test_boxes_lie_in_the_frame_and_not_over_each_other() -> None:
    drawn = picture(inspecting.found())
    left, top, width, height = drawn.frame
    for box in drawn.boxes:
        assert left < box.x and box.x + box.width < left + width
        assert top < box.y and box.y + box.height < top + height
    for a, b in itertools.combinations(drawn.boxes, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, (a.name, b.name)


def test_each_operator_and_each_edge_is_drawn_once() -> None:
    data = inspecting.found()
    names = [operator["name"] for operator in data["operators"]]
    reader = pages.Reader(groups_page(data))
    assert [op["data-name"] for op in reader.of_class("op")] == names
    lines = [(int(line["data-from"] or ""), int(line["data-to"] or "")) for line in reader.of_class("line")]
    assert len(set(lines)) == len(lines)
    drawn = picture(data)
    rows = {box.number for box in drawn.boxes if box.is_light}
    edges = {(names.index(read), names.index(o["name"])) for o in data["operators"] for read in o["reads"]}
    assert set(lines) <= edges
    for source, target in edges - set(lines):
        assert target in rows, "only what is drawn as a row of what it reads has no line to it"
        assert drawn.boxes[source].x == drawn.boxes[target].x
    assert (names.index("stem"), names.index("second")) in lines, "the skip joins the addition, which the second convolution computes"
    assert len(reader.of_class("bracket")) == len(data["blocks"]) == 1


def test_the_members_of_a_group_carry_its_number() -> None:
    data = inspecting.found()
    roles = {group["name"]: group["operators"] for group in data["groups"]}
    assert roles["stem"]["out"] == ["stem", "second"]
    assert roles["stem"]["in"] == ["first", "left", "right"]
    assert roles["first"] == {"out": ["first"], "in": ["second"], "affine": ["first"], "passes": []}, "its norm is folded into it"
    assert [block["operators"] for block in data["blocks"]] == [["first", "second"]]
    ops = pages.Reader(groups_page(data)).of_class("op")
    for number, group in enumerate(data["groups"]):
        for role, names in group["operators"].items():
            marked = [op["data-name"] for op in ops if str(number) in (op.get(f"data-{role}") or "").split()]
            assert marked == names, (group["name"], role)


def test_the_page_is_the_same_again() -> None:
    assert groups_page(inspecting.found()) == groups_page(inspecting.found())


def test_hostile_names_are_text_and_nothing_is_loaded() -> None:
    plain, text = pages.Reader(groups_page(inspecting.found())), groups_page(inspecting.hostile())
    reader = pages.Reader(text)
    assert MARK in text[:2000]
    for tag in ("script", "img", "b", "a", "iframe", "link"):
        assert sum(t == tag for t, _ in reader.tags) == sum(t == tag for t, _ in plain.tags), tag
    assert not [attrs for _, attrs in reader.tags if any(name.startswith("on") for name in attrs)]
    assert not set("\0\x1b\u202e") & set(text)
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    for tag, attrs in reader.tags:
        for name in ("src", "href", "action", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith("data:"), (tag, value)
    assert "{{ 7 * 7 }}{% raw %}&amp;" in "".join(reader.text)
    assert inspecting.HOSTILE[0] in [op["data-name"] for op in reader.of_class("op")]
    for box in picture(inspecting.hostile()).boxes:
        assert max(map(len, (box.label, box.detail, box.fused))) <= LETTERS


@pytest.mark.parametrize("without", ["groups", "blocks", "reasons", "notes"])
def test_a_net_without_something_has_a_page(without: str) -> None:
    data: dict[str, Any] = inspecting.found() | {without: type(inspecting.found()[without])()}
    assert "residual" in groups_page(data)


def test_a_net_without_operators_has_a_page() -> None:
    nothing: dict[str, Any] = {"operators": [], "groups": [], "blocks": [], "notes": []}
    text = groups_page(nothing | {"name": "view", "parameters": 0, "macs": 0, "unknown": {}, "reasons": {}})
    assert "No operator in it costs time" in text and "Nothing in it can be pruned" in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("bert.encoder.layer.0.intermediate.dense", "….0.intermediate.dense"),
        ("a." + "x" * 60, "….xxxxxxxxxx…xxxxxxxxxxx"),
        ("y" * 60, "yyyyyyyyyyy…yyyyyyyyyyyy"),
        ("short.\n\x1b", "short.??"),
    ],
)
def test_a_name_that_is_too_long_keeps_its_end(name: str, wanted: str) -> None:
    assert ending(name) == wanted
    assert len(wanted) <= LETTERS


def test_what_forks_and_joins_again_stays_in_one_column() -> None:
    layout = lay_out({"a": [], "q": ["a"], "k": ["a"], "v": ["a"], "s": ["q", "k"], "m": ["s", "v"], "add": ["m", "a"]}, ())
    x = dict(zip((s[0] for s in layout.stacks), layout.x, strict=True))
    assert [x[n] for n in "aqkv"] == [0, -1, 0, 1]
    assert x["s"] == x["m"] == x["add"] == 0
    masked = lay_out({"a": [], "q": ["a"], "k": ["a"], "mask": [], "s": ["q", "k", "mask"]}, ())
    assert masked.x[masked.stacks.index(("s",))] == masked.x[masked.stacks.index(("a",))]
    towers = lay_out({"a": [], "b": [], "both": ["a", "b"]}, ())
    assert towers.x == (-0.5, 0.5, 0.0)
