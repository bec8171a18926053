"""What a run says when a budget cannot be met, nothing is faster, the machine is noisy, or the disk is full."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planish
import replaying
import small_jobs
from planish import cli, conclude, pursuit, trial, winners
from planish.errors import RuntimeFailed
from planish.report import terminal
from planish.report.page import page
from planish.result import Result

TESTS = Path(__file__).parents[1]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Any:
    return monkeypatch.setattr


def run(out: Path, budget: planish.Budget, job: planish.Workload | None = None, **changes: Any) -> Result:
    arguments: dict[str, Any] = {"trials": 1, "threads": 1, "techniques": ("quantize",)}
    return planish.optimize(job or small_jobs.stripes_job(), "onnxruntime:cpu", budget, out, **arguments | changes)


def strict_job() -> planish.Workload:
    """The job of the stripes, of which any change loses something."""
    return small_jobs.stripes_job(metric="cosine")


def test_a_budget_that_cannot_be_met(tmp_path: Path, put: Any, capfd: pytest.CaptureFixture[str]) -> None:
    replaying.install(put)
    out, job = tmp_path / "stripes.planish", tmp_path / "job.py"
    job.write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport small_jobs\njob = small_jobs.stripes_job()\n")
    command = ["optimize", str(job), "--out", str(out), "--json", "--latency", "0.01x", "--target", "onnxruntime:cpu"]
    assert cli.main([*command, "--trials", "1", "--threads", "1", "--techniques", "quantize"]) == 3
    said, told = capfd.readouterr()
    answer = json.loads(said)
    assert answer["verdict"] == "infeasible"
    assert answer["artifact"] is None
    assert "the limit is 0.01x" in answer["reason"]
    assert "infeasible" in told.splitlines()[-1]
    nearest = [answer["trials"][i] for i in answer["nearest"]]
    assert min(trial["latency_ratio"]["median"] for trial in nearest if trial["latency_ratio"]) < 0.5
    assert not out.exists()
    assert cli.main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert "infeasible" in (tmp_path / "page.html").read_text()
    assert cli.main(["resume", str(out), str(job), "--accept-nearest"]) == 3
    assert "kept" in capfd.readouterr().err
    assert out.exists()


def test_a_search_that_the_time_limit_cut_is_not_called_infeasible(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    budget, chosen = planish.Budget(latency="0.2x", drop=1e-9), {"techniques": ("prune",), "trials": 4}
    whole = run(tmp_path / "whole.planish", budget, strict_job(), **chosen)
    assert whole.verdict == "infeasible" and not whole.time_limited
    assert whole.reason.startswith("nothing found holds the budget; nearest: the drop is")
    assert "infeasible: nothing found" in terminal.result_text(whole.summary) and "give more time" not in terminal.result_text(
        whole.summary
    )
    put(pursuit, "SEARCH_SHARE", 1e-9)
    cut = run(tmp_path / "cut.planish", budget, strict_job(), time_limit=600, **chosen)
    assert (cut.verdict, cut.summary.exit_code, cut.time_limited) == ("infeasible", 3, True)
    assert cut.reason.startswith(
        "not met within the time limit of 600 s; a longer one may: 1 of at most 4 plans was tried; nearest: the drop"
    )
    assert cut.to_json()["time_limited"] is True and cut.summary.nearest
    text = " ".join(terminal.result_text(cut.summary).split())
    assert text.startswith("stripes: not met within") and "infeasible" not in text and "nearest trials:" in text
    assert "nothing was written: give more time" in text and not any("longer --time-limit" in note for note in cut.notes)
    assert "<h2>Not met within the time limit</h2>" in page(cut.summary) and ">Infeasible<" not in page(cut.summary)


def test_what_tables_say_no_plan_can_meet_is_infeasible_however_short_the_time(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    put(pursuit, "SEARCH_SHARE", 1e-9)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.001x"), time_limit=600, techniques=("quantize", "prune"), trials=4)
    assert result.verdict == "infeasible" and not result.time_limited
    assert result.reason.startswith("nothing found holds the budget; nearest: latency")


def test_a_plan_that_tables_promise_and_nobody_found_is_said(tmp_path: Path, put: Any) -> None:
    """Every trial holds the limit, and the final measurement does not."""
    replaying.install(put)
    before = conclude.ratio
    put(conclude, "ratio", lambda a, b: msgspec.structs.replace(before(a, b), median=0.9, low=0.89, high=0.91))
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.6x", drop=0.5), techniques=("prune",))
    assert result.verdict == "infeasible" and not result.time_limited
    wanted = (
        "nothing that was tried holds the budget, though the tables say that a plan should hold the limit on latency; nearest: latency 0.9x"
    )
    assert result.reason.startswith(wanted)


@pytest.mark.parametrize("drop", [1e-9, 0.9], ids=["missed", "met"])
def test_recovery_that_had_no_time_is_told_where_it_would_have_changed_something(tmp_path: Path, put: Any, drop: float) -> None:
    replaying.install(put)
    budget, chosen = planish.Budget(latency="0.2x", drop=drop), {"techniques": ("prune", "distill"), "trials": 2}
    put(pursuit, "_RESERVE_S", 1e4)
    result = run(tmp_path / "short.planish", budget, strict_job(), time_limit=600, **chosen)
    assert result.plan is not None and result.plan.recovery.samples == 0 and result.drop > 0
    noted = [note for note in result.notes if note.startswith("no time was left for recovery: everything else took ")]
    if drop == 0.9:
        assert result.verdict == "met" and len(noted) == 1
        assert f"win back some of the {result.drop:.4g} that is lost" in noted[0]
    else:
        assert result.time_limited and "plans was tried, and no time was left for recovery; nearest: the drop" in result.reason
        assert not noted, "the verdict says it"
    put(pursuit, "_RESERVE_S", 1.0)
    enough = run(tmp_path / "enough.planish", planish.Budget(latency="0.2x", drop=0.9), strict_job(), time_limit=600, **chosen)
    assert enough.verdict == "met" and enough.plan.recovery.samples > 0
    assert not any("for recovery" in note for note in enough.notes)


def test_the_nearest_is_written_where_it_was_asked_for(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    out = tmp_path / "stripes.planish"
    result = run(out, planish.Budget(latency="0.01x"), accept_nearest=True, techniques=("quantize", "distill"))
    assert result.verdict == "infeasible"
    assert result.summary.exit_code == 3
    assert result.ratios["latency"].median < 0.5
    assert result.plan is not None and result.plan.recovery.samples > 0, "however far above its limit, it is recovered"
    x, _ = small_jobs.images(3, seed=4)
    assert planish.load(out, threads=1)(x.numpy()).shape == (3, small_jobs.CLASSES)


def test_the_nearest_on_each_limit_are_named(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    result = run(tmp_path / "stripes.planish", planish.Budget(macs="0.01x"), techniques=("prune",))
    assert result.verdict == "infeasible"
    measured = [t.macs for t in result.trials if t.latency_ratio is not None]
    assert min(measured) in [result.trials[i].macs for i in result.summary.nearest]


def test_a_crash_of_the_original_is_not_held_against_a_plan(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    before, died = trial.interleaved, []

    def dies(probes: Any, *arguments: Any, **named: Any) -> Any:
        if not died:
            died.append(True)
            next(probe for (whose, _), probe in probes.items() if whose == "original").close()
            raise RuntimeFailed("crashed", "gone")
        return before(probes, *arguments, **named)

    put(trial, "interleaved", dies)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.6x", drop="30pt"))
    assert died and result.verdict == "met"
    assert {t.outcome.kind for t in result.trials} == {"measured"}


def test_where_nothing_is_faster_an_unlimited_run_keeps_the_original(tmp_path: Path, put: Any) -> None:
    replaying.install(put, replaying.LARGER_IS_QUICKER)
    result = run(tmp_path / "stripes.planish", planish.Budget(), techniques=("prune", "quantize"))
    assert result.verdict == "met"
    assert result.ratios["latency"].median == 1
    assert result.ratios["size"].median == 1
    assert result.drop == 0
    assert result.plan is None
    assert all(operator.why for operator in result.operators if operator.kind in ("conv", "linear"))
    assert (tmp_path / "stripes.planish" / "model.onnx").stat().st_size == result.original.size_bytes


def test_where_nothing_is_faster_a_limit_is_infeasible(tmp_path: Path, put: Any) -> None:
    replaying.install(put, replaying.LARGER_IS_QUICKER)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.9x"))
    assert result.verdict == "infeasible"
    assert not (tmp_path / "stripes.planish").exists()


@pytest.mark.parametrize("limit", ["0.4ms", "0.25x"])
def test_a_noisy_machine_leaves_it_undecided(tmp_path: Path, put: Any, limit: str) -> None:
    replaying.install(put, replaying.NOISY)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency=limit))
    assert result.verdict == "undecided"
    assert result.summary.exit_code == 4
    assert "too noisy" in result.reason
    assert not result.optimized.latency_s.trustworthy
    assert not (tmp_path / "stripes.planish").exists()


def test_an_output_that_is_there_stays_unless_told(tmp_path: Path, put: Any) -> None:
    replaying.install(put)
    out = tmp_path / "stripes.planish"
    run(out, planish.Budget(latency="0.5x"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(planish.PlanishError, match="already there; give --overwrite"):
        run(out, planish.Budget(latency="0.5x"))
    with LargestFile(100_000), pytest.raises(planish.PlanishError, match=r"cannot|full|large"):
        run(out, planish.Budget(latency="0.5x"), overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"stripes.planish", "stripes.study"}
    assert run(out, planish.Budget(latency="0.6x"), overwrite=True).budget.limits[0].value == 0.6


class LargestFile:
    """Writing beyond a number of bytes fails meanwhile, as on a full disk."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize(
    "limit",
    [
        {"size": "0.5x"},
        *(pytest.param(limit, marks=pytest.mark.slow) for limit in ({"macs": "0.5x"}, {"throughput": "2x"}, {"memory": "0.99x"})),
    ],
)
def test_every_limit_that_a_machine_can_measure(tmp_path: Path, put: Any, limit: dict[str, str]) -> None:
    replaying.install(put)
    result = run(tmp_path / "stripes.planish", planish.Budget(**limit, drop=0.3), techniques=("prune", "quantize"), trials=2)
    assert result.verdict == "met", result.reason
    (name,) = limit
    assert result.ratios["latency" if name == "throughput" else name].median <= float(limit[name].rstrip("x")) or name == "throughput"
    assert math.isfinite(result.drop)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"budget": planish.Budget(drop=2.0)}, "drop"),
        ({"budget": planish.Budget(energy="0.5x")}, "energy"),
        ({"out": "there.study"}, r"out: .*\.study"),
        ({"out": ""}, "out: "),
        ({"out": "a\0b"}, "out: "),
        ({"out": "/proc/nowhere/net.planish"}, "out: .* cannot be written"),
        ({"search": "sorcery"}, "no search named 'sorcery'"),
        ({"saliency": "tailor"}, "no saliency named 'tailor'; did you mean 'taylor'"),
        ({"saliency": "taylor+"}, "no saliency named ''"),
        ({"schedule": "iteratve"}, "no schedule named 'iteratve'; did you mean 'iterative'"),
        ({"masking": "wander", "techniques": ("mask",)}, "no masking named 'wander'; did you mean 'wanda'"),
        ({"techniques": ()}, "techniques: "),
        ({"techniques": "prunes"}, "did you mean 'prune'"),
        ({"trials": 0}, "trials: "),
        ({"seed": -1}, "seed: "),
        ({"time_limit": math.nan}, "time_limit: "),
        ({"threads": 2.5}, "threads: "),
        ({"target": "tpu:cpu"}, "no runtime named 'tpu'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], text: str
) -> None:
    monkeypatch.chdir(tmp_path)

    def build() -> None:
        pytest.fail("the model was built")

    with pytest.raises(planish.PlanishError, match=text):
        planish.optimize(small_jobs.stripes_job(build), **{"out": "net.planish"} | changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("comfort", "low", "high"), [(0.9, 0.0, 0.72 * 1.03), (-1.0, 0.8, 1.0)])
def test_a_limit_is_undercut_where_that_costs_little(tmp_path: Path, put: Any, comfort: float, low: float, high: float) -> None:
    """A plan that just holds its limit in one state of the machine misses it in another."""
    replaying.install(put)
    put(pursuit, "_COMFORT", comfort)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.6x", drop="30pt"), trials=6, techniques=("prune", "distill"))
    assert result.verdict == "met", result.reason
    assert low <= result.ratios["latency"].median / 0.6 <= high


@pytest.mark.parametrize("lost", [0.5, 0.27], ids=["too much", "nearly"])
def test_a_winner_that_loses_too_much_is_followed_by_a_milder_one(tmp_path: Path, put: Any, lost: float) -> None:
    replaying.install(put)
    judged: list[float] = []
    before = winners._validation_drop

    def first_is_bad(bench: Any, plan: Any, exported: Any, confidence: Any) -> Any:
        judged.append(exported.ratio.median)
        return (lost, lost) if len(judged) == 1 else before(bench, plan, exported, confidence)

    put(winners, "_validation_drop", first_is_bad)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.6x", drop="30pt"), trials=6, techniques=("prune", "distill"))
    assert result.verdict == "met", result.reason
    assert judged[0] <= 0.72 * 1.03 * 0.6 < judged[1] == result.ratios["latency"].median <= 0.6


def test_more_trials_never_leave_the_limit_itself_unsearched(tmp_path: Path, put: Any) -> None:
    """However long nothing becomes more promising at what is aimed at first, plans at the limit are proposed in the end."""
    replaying.install(put)
    put(pursuit, "_COMFORT", -1.0)
    result = run(tmp_path / "stripes.planish", planish.Budget(latency="0.6x", drop="30pt"), trials=40, techniques=("prune",))
    assert result.verdict == "met", result.reason
    assert 0.85 * 0.6 < result.ratios["latency"].median <= 0.6


def test_a_target_without_tables_learns_from_trials_what_its_macs_cost(tmp_path: Path, put: Any) -> None:
    """Latency follows the file's size here and not the MACs: half of the MACs is not half of the latency."""
    replaying.install(put)
    result = planish.optimize(
        small_jobs.stripes_job(),
        "torch:cpu",
        planish.Budget(latency="0.5x", drop="40pt"),
        tmp_path / "stripes.planish",
        trials=6,
        threads=1,
        techniques=("prune",),
    )
    assert result.verdict == "met", result.reason
    assert result.ratios["latency"].median <= 0.5


@pytest.mark.parametrize(("high", "kept"), [(0.99, False), (1.02, True)])
def test_a_gain_that_cannot_be_told_from_noise_is_none(tmp_path: Path, put: Any, high: float, kept: bool) -> None:
    replaying.install(put)
    before = conclude.ratio

    def ratio(a: Any, b: Any) -> Any:
        return msgspec.structs.replace(before(a, b), median=0.97, low=0.95, high=high)

    put(conclude, "ratio", ratio)
    result = run(tmp_path / "stripes.planish", planish.Budget())
    assert result.verdict == "met"
    assert (result.plan is None) == kept
    assert any("cannot be told" in note for note in result.notes) == kept
