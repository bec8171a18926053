"""The report page: figures, escaping, and what a real browser makes of it: no error, no request, no overflow."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import inspecting
import making
import pages
from planish.measurement import Estimate, Outcome, Sensitivity
from planish.report.groups_page import groups_page
from planish.report.page import MARK, page
from planish.report.plots import front, trials_figure
from planish.result import OperatorRow, Summary

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'><b>{{ 7 * 7 }}{% raw %}",
    "ü" * 300,
    "nul\0bell\a\x1b[31m\u202e",
    "../../etc/passwd",
    "<a href='https://example.invalid/'>click</a>$\\frac{1}{2}$",
]


def hostile() -> Summary:
    """A result in which every free text is hostile."""
    good = making.summary()
    rows = tuple(
        OperatorRow(name=name, kind=name, width_before=3, width_after=3, precision=name, why=name, time_before_s=1e-5) for name in HOSTILE
    )
    trials = tuple(
        msgspec.structs.replace(trial, outcome=Outcome("mismatch", name)) for trial, name in zip(good.trials, HOSTILE * 2, strict=False)
    )
    losses = tuple(
        Sensitivity(name=name, kind=name, scheme=name, tried=name, sqnr_alone_db={name: 5.0, "int8": -3.0}, sqnr_without_db=9.0)
        for name in HOSTILE
    )
    names = "".join(HOSTILE)
    return making.summary(
        name=names,
        reason=names,
        target=HOSTILE[1],
        metric=HOSTILE[2],
        operators=rows * 8,
        trials=trials,
        notes=tuple(HOSTILE),
        groups=dict.fromkeys(HOSTILE, (4, 2)),
        baselines={name: making.measurement() for name in HOSTILE},
        artifact=names,
        seconds=dict.fromkeys(HOSTILE, 1.0),
        diagnosis=making.diagnosis(operators=losses * 8, findings=tuple(HOSTILE), metric=HOSTILE[1], split=HOSTILE[2]),
    )


def test_the_verdict_comes_first_and_the_figures_are_there() -> None:
    text = page(making.summary())
    assert MARK in text[:2000]
    shown = " ".join(" ".join(pages.Reader(text).text).split())
    assert shown.index("Budget met") < shown.index("What was asked") < shown.index("Original and optimized") < shown.index("Every operator")
    for part in (
        "2.26×",
        "1.40 ms → 620 µs a call",
        "+0.0048",
        "−0.0021 … +0.0114",
        "17 int8, 2 float on CPU",
        "about 15× as fast",
        "32 → 24",
    ):
        assert part in shown
    assert "the program's output" in shown
    assert "bypassed with its block" in shown
    assert "planish.load(" in shown


@pytest.mark.parametrize(
    ("changes", "wanted", "unwanted"),
    [
        ({"verdict": "infeasible", "reason": "nothing holds", "artifact": None, "nearest": (2, 4)}, "Nothing held the budget", "Use it"),
        ({"verdict": "undecided", "artifact": None}, "Undecided", "Budget met"),
        ({"split": "validation"}, "Selection-biased", "Infeasible"),
        ({"optimized": None, "ratios": {}, "drop": None, "verdict": "infeasible", "plan": None}, "Infeasible", "Budget met"),
        ({"trials": (), "operators": (), "groups": {}, "notes": (), "baselines": {}, "seconds": {}}, "Budget met", "Every trial"),
        ({"control_quality": 0.897, "control_drop": 0.006}, "dense control", "Infeasible"),
        ({"ratios": {"latency": Estimate(0.5, 0.3, 0.9, 10, False)}}, "not trustworthy", "Infeasible"),
    ],
)
def test_every_kind_of_result_has_a_page(changes: dict[str, Any], wanted: str, unwanted: str) -> None:
    shown = " ".join(" ".join(pages.Reader(page(making.summary(**changes))).text).split())
    assert wanted in shown
    assert unwanted not in shown


def test_what_quantization_loses_is_a_table_with_a_figure_of_the_worst() -> None:
    text = page(making.summary())
    reader = pages.Reader(text)
    shown = " ".join(" ".join(reader.text).split())
    section = shown.partition("What quantization loses")[2].partition("Where the run's time went")[0]
    assert "with all as planned the outputs keep 24.0 dB, accuracy 0.8800 (0.8958 in float); 64 samples of validation" in section
    assert re.search(r"head fp32 3\.1 equal 24\.0 0\.8930 0\.2 % kept in fp32", section)
    assert re.search(r"layer3\. 0\. fc int8-weights 11\.5 31\.5 24\.4 0\.8930 0\.2 % weights alone, in int8", section)
    assert re.search(r"conv2 int8 36\.0 36\.0 – – 0\.2 % none: left in int8", section)
    assert "head (the last operator) is kept in fp32" in section
    inline = re.search(r'<script type="application/json" id="data-sensitivity">(.*?)</script>', text, re.DOTALL)
    assert inline is not None
    static, planned = json.loads(inline[1])["data"]
    assert static["x"] == [3.1, 11.5, 14.0, 25.0, 36.0, 46.0]
    assert planned["x"] == [None, 31.5, 34.0, None, None, None]
    without = pages.Reader(page(making.summary(diagnosis=None)))
    assert "What quantization loses" not in "".join(without.text)


def test_a_limit_that_was_missed_is_marked() -> None:
    from planish.budget import Budget

    shown = " ".join(" ".join(pages.Reader(page(making.summary(budget=Budget(latency="0.4x", size="2MB", drop="0.1pt")))).text).split())
    table = shown.partition("What was asked")[2].partition("Original and optimized")[0]
    assert re.search(r"latency 0\.40× 560 µs 620 µs missed", table)
    assert re.search(r"size 2\.00 MB 2\.00 MB 812 kB holds", table)
    assert "missed" in table.partition("drop")[2]


def test_hostile_names_are_text() -> None:
    text = page(hostile())
    plain, reader = pages.Reader(page(making.summary())), pages.Reader(text)
    count = [sum(tag == name for tag, _ in r.tags) for r in (plain, reader) for name in ("script", "img", "a", "b", "link", "iframe")]
    assert count[:6] == count[6:]
    assert not [attrs for _, attrs in reader.tags if any(name.startswith("on") for name in attrs)]
    assert "\0" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7 * 7 }}" in "".join(reader.text)
    inline = re.search(r'<script type="application/json" id="data-trials">(.*?)</script>', text, re.DOTALL)
    assert inline is not None
    assert "<" not in inline[1]
    assert json.loads(inline[1])["data"]


def test_the_page_names_no_address_to_load() -> None:
    for tag, attrs in pages.Reader(page(hostile())).tags:
        for name in ("src", "href", "action", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([], []),
        ([(1.0, 1.0)], [0]),
        ([(1.0, 1.0), (0.5, 2.0), (2.0, 0.5), (1.5, 1.5)], [1, 0, 2]),
        ([(1.0, 1.0), (1.0, 1.0), (1.0, 0.5)], [2]),
    ],
)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]], wanted: list[int]) -> None:
    assert front(points) == wanted


def test_no_nan_reaches_the_page() -> None:
    trials = tuple(
        msgspec.structs.replace(trial, drop=math.nan if i % 2 else trial.drop, loss=math.inf)
        for i, trial in enumerate(making.summary().trials)
    )
    nothing = Estimate(math.nan, math.nan, math.nan, 0, False)
    text = page(
        making.summary(
            trials=trials, ratios={"latency": nothing}, baselines={"x:cpu": making.measurement(latency_s=nothing)}, drop=math.nan
        )
    )
    shown = "".join(pages.Reader(text).text)
    assert not re.search(r"\bnan\b|\binf\b", shown)
    for inline in re.findall(r'<script type="application/json" id="data-\w+">(.*?)</script>', text, re.DOTALL):
        assert "NaN" not in inline and "Infinity" not in inline


def test_trials_without_figures_make_no_plot() -> None:
    bare = msgspec.structs.replace(making.summary().trials[0], drop=None)
    assert trials_figure(making.summary(trials=(bare,))) is None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (Path(CHROMIUM).exists() and Path(DRIVER).exists()):
        pytest.skip("no chromium with its driver here; `make services` installs them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    profile = tmp_path_factory.mktemp("profile")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    )
    for flag in (*quiet.split(), f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, env=os.environ | {"NO_PROXY": "*"}))
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


def load(browser: Any, file: Path, width: int, scheme: str) -> None:
    """Open a page at a width, in a colour scheme; what the browser logged before is forgotten."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())


def check_quiet(browser: Any, file: Path, width: int) -> None:
    """No error, no request but for the page itself, no overflow, and no script of a name has run."""
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:///", "data:", "blob:"))] == []
    assert asked[0] == file.as_uri()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.title != "owned"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    for name, summary in {"good": making.summary(), "hostile": hostile()}.items():
        file = tmp_path / f"{name}.html"
        file.write_text(page(summary), encoding="utf-8")
        load(browser, file, width, scheme)
        drawn = browser.execute_async_script(
            "const done = arguments[0]; let n = 0;"
            "(function wait() { const k = document.querySelectorAll('.plot .main-svg').length;"
            " if (k >= 3 || ++n > 100) done(k); else setTimeout(wait, 50); })();"
        )
        assert drawn >= 3, "the plots were not drawn"
        check_quiet(browser, file, width)
        assert browser.find_element("css selector", ".verdict h2").is_displayed()
        if name == "hostile":
            assert "<script>document.title='owned'</script>" in browser.execute_script("return document.body.innerText")
            assert browser.execute_script("return document.querySelectorAll('main script:not([type]), main img, main b').length") == 0


def test_a_table_is_sorted_by_any_column_in_a_browser(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "sorted.html"
    file.write_text(page(making.summary()), encoding="utf-8")
    load(browser, file, 1280, "light")

    def order(column: int) -> list[str]:
        browser.execute_script(f"document.querySelectorAll('table.sortable .sort')[{column}].click()")
        found: list[str] = browser.execute_script(
            "return Array.from(document.querySelectorAll('table.sortable tbody th')).map(cell => cell.textContent)"
        )
        return found

    first = [row.name for row in making.diagnosis().operators]
    assert order(0) == sorted(first) and order(0) == sorted(first, reverse=True)
    assert order(2) == first and order(2) == first[::-1], "by value, where text would put 11.5 before 3.1"
    assert order(4)[-1] == order(4)[-1] == "layer1.0.conv2", "what was not measured stays last, whichever way"
    assert browser.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
    check_quiet(browser, file, 1280)


LIT = """return Array.from(document.querySelectorAll('.op.lit')).map(op =>
    [op.dataset.name, ['out', 'in', 'affine', 'passes', 'block'].filter(role => op.classList.contains('is-' + role))])"""
SEEN = """const pane = document.getElementById('pane').getBoundingClientRect();
    return Array.from(document.querySelectorAll('.op.lit .box')).some(box => { const at = box.getBoundingClientRect();
        return at.top >= pane.top && at.bottom <= pane.bottom && at.left >= pane.left && at.right <= pane.right + 1; })"""


def lit(browser: Any) -> dict[str, list[str]]:
    """The operators that are lit, each with what it is to the group."""
    return dict(browser.execute_script(LIT))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_group_lights_up_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    data = inspecting.found()
    file = tmp_path / "groups.html"
    file.write_text(groups_page(data), encoding="utf-8")
    load(browser, file, width, scheme)
    assert lit(browser) == {}
    for number, group in enumerate(data["groups"]):
        by_role = group["operators"]
        wanted = {name: [role for role in by_role if name in by_role[role]] for names in by_role.values() for name in names}
        browser.execute_script(f"document.querySelector('button[data-group=\"{number}\"]').focus()")
        assert lit(browser) == wanted, group["name"]
        assert browser.execute_script(SEEN), "a member is scrolled into the picture"
        assert group["name"] in browser.find_element("id", "said").text
        tags = browser.execute_script("return Array.from(document.querySelectorAll('.op:not(.lit) .tag')).map(tag => tag.textContent)")
        assert set(tags) <= {""}
    browser.execute_script("document.activeElement.blur()")
    assert lit(browser) == {}

    first, stem = (next(i for i, o in enumerate(data["operators"]) if o["name"] == name) for name in ("first", "stem"))
    browser.execute_script(f"document.getElementById('op-{first}').focus()")
    assert lit(browser)["second"] == ["in"], "a focused operator lights the group that it issues"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert lit(browser)["second"] == ["in"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert "out" in lit(browser)["stem"], "pressed again, the next one, which it reads"
    lines = "return Array.from(document.querySelectorAll('.line.lit')).map(line => [line.dataset.from, line.dataset.to].map(Number))"
    names = [operator["name"] for operator in data["operators"]]
    ways = sorted((names[a], names[b]) for a, b in browser.execute_script(lines))
    assert ("stem", "first") in ways and ("stem", "second") in ways, "the stream and its skip"
    assert ("first", "second") not in ways, "which carries another group"
    browser.execute_script(f"document.getElementById('op-{stem}').focus()")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert lit(browser) == {}
    browser.execute_script("document.querySelector('button[data-block]').click()")
    assert lit(browser) == {"first": ["block"], "second": ["block"]}
    check_quiet(browser, file, width)


def test_hostile_names_in_the_picture_in_a_browser(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(groups_page(inspecting.hostile()), encoding="utf-8")
    for width in (1280, 420):
        load(browser, file, width, "light")
        browser.execute_script("document.querySelectorAll('button[data-group]').forEach(button => button.click())")
        assert len(lit(browser)) == 2
        check_quiet(browser, file, width)
