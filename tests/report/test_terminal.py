"""Figures as text and the tables of the command line."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest

import inspecting
import making
from planish.budget import Budget
from planish.measurement import Estimate
from planish.report import figures, groups_text, rows, terminal
from planish.report.inspection_text import inspection_text
from planish.result import Summary


@pytest.mark.parametrize(
    ("show", "value", "wanted"),
    [
        (figures.seconds, 1.4321e-3, "1.43 ms"),
        (figures.seconds, 812e-6, "812 µs"),
        (figures.seconds, 0.99996e-3, "1.00 ms"),
        (figures.seconds, 2.1, "2.10 s"),
        (figures.seconds, 0.0, "0 ns"),
        (figures.seconds, None, "–"),
        (figures.seconds, math.nan, "–"),
        (figures.size, 3_535_000, "3.54 MB"),
        (figures.size, 12, "12.0 B"),
        (figures.count, 40_600_000, "40.6 M"),
        (figures.count, 7, "7.00"),
        (figures.ratio, 0.443, "0.44×"),
        (figures.ratio, 0.0443, "0.044×"),
        (figures.speed_up, 0.5, "2.00× as fast"),
        (figures.speed_up, 0.0, "–"),
        (figures.signed, -0.0021, "−0.0021"),
        (figures.signed, 0.0048, "+0.0048"),
        (figures.quality, 0.89584, "0.8958"),
        (figures.quality, 31.23456, "31.235"),
        (figures.duration, 4.26, "4.3 s"),
        (figures.duration, 185.4, "3 min 05 s"),
        (figures.duration, 4320.0, "1 h 12 min"),
        (figures.digits, 1430.4, "1430"),
        (figures.digits, 0.0412, "0.0412"),
        (figures.digits, 1e-9, "1.00e-09"),
    ],
)
def test_figures(show: object, value: float | None, wanted: str) -> None:
    assert callable(show)
    assert show(value) == wanted


def test_what_is_gained_elsewhere_is_told_as_surely_as_it_is_known() -> None:
    summary = making.summary()
    assert figures.gained(summary, summary.original.runtime) == "2.26× as fast"
    assert figures.gained(summary, "torch:cpu") == "about 15× as fast"
    noisy = msgspec.structs.replace(summary, elsewhere={"torch:cpu": Estimate(500.4, 90.0, 900.0, 22, False)})
    assert figures.gained(noisy, "torch:cpu") == "about 1100× as fast (noisy)"
    assert figures.gained(noisy, "openvino:cpu") == "–"


def test_what_evaluate_gives_has_no_interval() -> None:
    text = terminal.result_text(making.summary(metric="evaluate", split="evaluate", drop=0.0025, drop_interval=None))
    assert "drop of evaluate: +0.0025, allowed" in text


def test_an_interval_warns_when_it_decides_nothing() -> None:
    assert figures.interval(Estimate(1.4e-3, 1.3e-3, 1.5e-3, 9)) == ("1.40 ms", "1.30 – 1.50 ms")
    assert figures.interval(Estimate(1.4e-3, 0.3e-3, 9.5e-3, 9, False)) == ("1.40 ms", "0.30 – 9.50 ms, not trustworthy")


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (figures.ratio_span(Estimate(0.38718, 0.386, 0.388, 9)), "0.387× (0.386 – 0.388)"),
        (figures.ratio_span(Estimate(0.443, 0.43, 0.46, 9)), "0.44× (0.43 – 0.46)"),
        (figures.ratio_span(Estimate(0.0443, 0.043, 0.046, 9)), "0.044× (0.043 – 0.046)"),
        (figures.ratio_span(Estimate(1.0, 1.0, 1.0, 1)), "1.00×"),
        (figures.around(Estimate(0.99951e-3, 0.9991e-3, 0.9999e-3, 9)), "1.000 ms (0.999 – 1.000 ms)"),
        (figures.around(Estimate(99.96e-6, 98e-6, 104e-6, 9)), "100 µs (98 – 104 µs)"),
        (figures.around(Estimate(0.0, 0.0, 0.0, 9)), "0 ns (0 – 0 ns)"),
        (figures.factor_around(Estimate(0.3872, 0.3871, 0.3873, 9)), ("2.583×", "2.582 – 2.583×")),
        (figures.quality_around(9.9996, (9.5, 10.4321)), "9.9996 (9.5000 – 10.4321)"),
        (figures.quality_around(31.23456, (29.1, 33.0)), "31.235 (29.100 – 33.000)"),
        (figures.quality_around(0.5, None), "0.5000"),
    ],
)
def test_a_figure_lies_within_its_interval_as_both_are_shown(shown: object, wanted: object) -> None:
    assert shown == wanted


def test_the_terminal_and_the_page_round_a_ratio_like_its_interval() -> None:
    close = making.summary(ratios={"latency": Estimate(0.38718, 0.386, 0.388, 9)})
    text = terminal.result_text(close)
    assert re.search(r"^latency .* 0\.387×$", text, re.MULTILINE) and re.search(r"^ +95 % interval .* 0\.386 – 0\.388$", text, re.MULTILINE)
    assert rows.sides(close)[1].cells[3] == "0.387× (0.386 – 0.388)"
    assert rows.tiles(close)[0][0] == "2.58×" and "(2.58 – 2.59×)" in rows.tiles(close)[0][2]
    assert close.to_json()["ratios"]["latency"] == 0.38718


def test_plain_keeps_a_terminal_safe_and_both_ends_of_a_name() -> None:
    assert figures.plain("a\x1b[31m\nb\0") == "a?[31m?b?"
    long = figures.plain("start" + "x" * 500 + "end", 60)
    assert len(long) <= 60
    assert long.startswith("start") and long.endswith("end") and "…" in long


def test_the_five_worst_operators_are_named_with_their_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text = terminal.result_text(making.summary())
    table = text.partition("the 5 operators that lose most in int8")[2]
    assert "with all as planned the outputs keep 24.0 dB, accuracy 0.8800 (0.8958 in float); 64 samples of validation" in " ".join(
        table.split()
    )
    cures = {
        "head": "3.1 +equal +24.0 +kept in fp32",
        "layer3.0.fc": "11.5 +31.5 +24.4 +weights alone, in int8",
        "layer2.0.fc": "14.0 +34.0 +24.3 +int8-dynamic instead of int8",
        "layer1.0.conv1": "25.0 +25.0 +31.5 +none: left in int8",
        "layer1.0.conv2": "36.0 +36.0 +– +none: left in int8",
    }
    for name, wanted in cures.items():
        assert re.search(rf"^{re.escape(name)} +{wanted}$", table, re.MULTILINE), name
    assert "layer1.1.conv1" not in table
    assert "- head (the last operator) is kept in fp32" in table
    assert "operators that lose" not in terminal.result_text(making.summary(diagnosis=None))


def sensitivity(**changes: Any) -> dict[str, Any]:
    """What `inspect --sensitivity` adds."""
    return {"target": "onnxruntime:cpu", **msgspec.to_builtins(making.diagnosis(**changes)), "notes": ["calibration: one sample only"]}


def test_inspect_lists_every_operator_in_every_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = inspection_text(inspecting.found() | {"sensitivity": sensitivity()})
    table = text.partition("Sensitivity in onnxruntime:cpu")[2]
    assert re.search(r"^operator +int8 +int8-weights +int8-dynamic +all but it +accuracy +clipped$", table, re.MULTILINE)
    assert re.search(r"^layer2\.0\.fc +14\.0 +– +34\.0 +24\.3 +0\.8930 +3 %$", table, re.MULTILINE)
    assert "layer1.1.conv1" in table and "- calibration: one sample only" in table


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_every_table_fits_and_loses_nothing(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "layer." * 20 + "conv\x1b[31m"
    named = tuple(msgspec.structs.replace(row, name=f"{name}{row.name}") for row in making.diagnosis().operators)
    found = making.diagnosis(operators=named, findings=(name,), metric=name)
    summary = making.summary(name=name, verdict="infeasible", nearest=(0, 6), artifact=None, diagnosis=found)
    texts = [
        terminal.result_text(summary),
        terminal.trials_text(summary.trials),
        inspection_text(inspecting.hostile()),
        inspection_text(inspecting.found()),
        inspection_text(inspecting.found() | {"sensitivity": sensitivity(operators=named, findings=(name,), metric=name)}),
    ]
    for text in texts:
        assert max(map(len, text.splitlines())) <= columns
        assert "\x1b" not in text
    assert "nearest trials" in texts[0]
    assert "qualitylost" in "".join(texts[1].split())
    assert "unknown operator {{ 7 * 7 }}" in texts[2]
    assert "second" in texts[3]


def test_groups_are_listed_with_their_members_and_what_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = inspection_text(inspecting.found())
    assert re.search(r"^first +12 channels +\d+ % +\d+ % +exact$", text, re.MULTILINE)
    members = text.partition("Members")[2]
    assert re.search(
        r"^  first\n    out: first \(weight, bias\)\n    affine: norm \(weight, bias, running_mean, running_var\)\n    in: second \(weight\)$",
        members,
        re.MULTILINE,
    )
    assert re.search(r"^- stays dense, it is the program's output: head\.weight$", text, re.MULTILINE)


def test_of_very_many_names_the_first_and_the_last_are_listed() -> None:
    assert groups_text.listed([f"n{i}" for i in range(12)]) == ", ".join(f"n{i}" for i in range(12))
    assert groups_text.listed([f"n{i}" for i in range(40)]).endswith("n10, … 28 more …, n39")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "exact"),
        ({"exact": False, "multiple": 4}, "inexact: changes what a norm or softmax runs over, in steps of 4"),
        ({"pinned": "keep=stem.*"}, "pinned by keep=stem.*"),
    ],
)
def test_the_state_of_a_group(changes: dict[str, Any], wanted: str) -> None:
    assert groups_text.state({"exact": True, "multiple": 1, "pinned": ""} | changes) == wanted


@pytest.mark.parametrize(("value", "wanted"), [(0.0, "0 %"), (0.0004, "< 1 %"), (0.124, "12 %"), (1.0, "100 %")])
def test_a_share_is_never_nothing_where_there_is_something(value: float, wanted: str) -> None:
    assert groups_text.share(value) == wanted


def test_verification_and_bench() -> None:
    estimate = msgspec.to_builtins(Estimate(1.4e-3, 1.3e-3, 1.5e-3, 9))
    text = terminal.verification_text(
        {
            "artifact": "out/net.planish",
            "target": "onnxruntime:cpu",
            "holds": False,
            "findings": ["its outputs agree to 12 dB only"],
            "latency_s": estimate,
            "claimed_latency_s": estimate,
            "size_bytes": 812_000,
            "claimed_size_bytes": 911_000,
            "peak_memory_bytes": None,
            "claimed_peak_memory_bytes": 3_200_000,
            "sqnr_db": 12.0,
            "quality": 0.89,
            "claimed_quality": 0.9,
            "split": "test",
        }
    )
    for part in (
        "does not hold",
        "1.40 ms (1.30 – 1.50 ms)",
        "12 dB",
        "quality on test",
        "0.8900",
        "812 kB",
        "911 kB",
        "3.20 MB",
        "- its outputs agree",
    ):
        assert part in text
    row = {
        "name": "original",
        "target": "onnxruntime:cpu",
        "threads": 2,
        "latency_s": estimate,
        "cpu_s": estimate,
        "ratio": estimate,
        "size_bytes": 1,
        "quality": None,
    }
    text = terminal.bench_text([row | {"outcome": "measured"}, dict.fromkeys(row) | {"name": "b", "target": "c", "outcome": "crashed"}])
    assert "1.40 ms" in text and "crashed" in text and "measured" not in text


def test_nothing_changed_and_nothing_measured_are_said() -> None:
    text = terminal.result_text(making.summary(optimized=None, ratios={}, drop=None, baselines={}, plan=None))
    assert "–" in text
    assert "None" not in text
    read = msgspec.json.decode(msgspec.json.encode(making.summary()), type=Summary)
    assert terminal.result_text(read) == terminal.result_text(making.summary())


def _is_table(text: str, first: str, last: str, columns: int) -> bool:
    """Whether headings from `first` to `last` stand above one rule, and all lines fit."""
    heading = re.search(rf"^ *{first}\b.*\b{last}\n─+$", text, re.MULTILINE)
    return heading is not None and max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize(("columns", "is_output_shown"), [(80, False), (90, False), (120, True)])
def test_operators_stay_a_table_that_spares_columns(columns: int, is_output_shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    data = inspecting.found()
    long = [operator | {"name": f"encoder.layer.{i}.{operator['name']}.projection"} for i, operator in enumerate(data["operators"])]
    text = inspection_text(data | {"operators": long}).partition("Members")[0]
    assert _is_table(text, "operator", "int8", columns)
    assert ("1×12×8×8" in text) is is_output_shown
    assert ("(no room for output" in text) is not is_output_shown
    assert "can be quantized" in text


@pytest.mark.parametrize("limit", ["macs", "size", "latency"])
def test_both_nets_and_the_nearest_trials_stay_tables_at_80_columns(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    noisy = making.measurement(latency_s=Estimate(3.98e-3, 3.96e-3, 4.0e-3, 9, False), runtime="openvino:cpu")
    budget = Budget(**{limit: "0.5x"})
    text = terminal.result_text(making.summary(original=noisy, verdict="infeasible", nearest=(0, 6), artifact=None, budget=budget))
    assert re.search(r"original in.*ratio\n─+$", text, re.MULTILINE) and max(map(len, text.splitlines())) <= 80
    assert re.search(r"^latency +3\.98 ms +620 µs +0\.44×$", text, re.MULTILINE)
    assert re.search(r"^stage +outcome +latency.*why\n─+$", text, re.MULTILINE)
    assert ("MACs" in text.partition("nearest trials")[2].partition("─")[0]) is (limit == "macs")


def test_a_table_in_a_pipe_is_never_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row stays one line for grep, however long a path is; only a terminal's width breaks it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: (_ for _ in ()).throw(OSError))
    row = ("x" * 200, "openvino:cpu", "a note that is long enough to be folded", "end")
    assert len(terminal.table(("model", "target", "note", ""), [row]).splitlines()) == 3
    monkeypatch.setenv("COLUMNS", "80")
    assert "\n  target openvino:cpu, note a" in terminal.table(("model", "target", "note", ""), [row])
