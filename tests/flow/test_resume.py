"""Killed, interrupted, forked or shared: a run that is carried on comes to the choice of one that was never disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import planish
import replaying
import small_jobs
from planish import cli, flow, pursuit, recovery, trial, trials
from planish.artifact import study_folder
from planish.errors import MissingFile, OutputExists, StudyError
from planish.graph.capture import capture
from planish.graph.groups import analyse
from planish.measurement import Outcome
from planish.result import Result
from planish.study import store
from planish.study.store import CONCLUDED, LOOKED, Study

BUDGET = planish.Budget(latency="0.25x", drop="30pt")
TESTS = Path(__file__).parents[1]
JOB = """
import sys
sys.path.insert(0, TESTS)
import small_jobs
job = small_jobs.stripes_job()
"""
DRIVER = """
import sys
sys.path.insert(0, TESTS)
import replaying
from planish import cli
replaying.install()
replaying.die_after(int(sys.argv[1]), int(sys.argv[2]))
sys.exit(cli.main(sys.argv[3:]))
"""
COMMAND = ["--target", "onnxruntime:cpu", "--latency", "0.25x", "--drop", "30pt", "--trials", "3", "--threads", "1"]


class Killed(BaseException):
    """Ends a run like a signal that nothing can catch, but leaves the test's process."""


@pytest.fixture(autouse=True)
def _replay(monkeypatch: pytest.MonkeyPatch) -> None:
    replaying.install(monkeypatch.setattr)


def run(out: Path, **changes: Any) -> Result:
    arguments: dict[str, Any] = {"budget": BUDGET, "trials": 3, "threads": 1}
    return planish.optimize(small_jobs.stripes_job(), "onnxruntime:cpu", out=out, **arguments | changes)


def choice(result: Result) -> tuple[Any, ...]:
    """What must not depend on having been disturbed; losses may differ in their last bits from process to process."""
    tried = {(trial.stage, trial.plan.digest, trial.outcome.kind, trial.drop) for trial in result.trials}
    return result.verdict, result.plan, result.drop, result.ratios["size"].median, tried


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        replaying.install(patch.setattr)
        return run(tmp_path_factory.mktemp("undisturbed") / "stripes.planish")


def test_the_same_seed_gives_the_same_run(undisturbed: Result, tmp_path: Path) -> None:
    assert undisturbed.verdict == "met", undisturbed.reason
    assert undisturbed.plan.widths or undisturbed.plan.blocks
    assert len(undisturbed.trials) >= 5
    assert choice(run(tmp_path / "stripes.planish")) == choice(undisturbed)


def test_another_seed_may_differ_but_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "stripes.planish"
    assert run(out, seed=7, trials=1, techniques=("quantize",), budget=planish.Budget(latency="0.5x")).seed == 7
    with Study.open(study_folder(out)) as study:
        assert study.meta.seed == 7


@pytest.mark.parametrize("number", [2, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5, 6))])
def test_kill_and_resume_reach_the_same_choice(undisturbed: Result, tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]) -> None:
    out, job = tmp_path / "stripes.planish", tmp_path / "job.py"
    job.write_text(JOB.replace("TESTS", repr(str(TESTS))))
    driver = DRIVER.replace("TESTS", repr(str(TESTS)))
    command = ["optimize", str(job), "--out", str(out), *COMMAND]
    ended = subprocess.run(
        [sys.executable, "-c", driver, str(number), str(int(signal.SIGKILL)), *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    with Study.open(study_folder(out), shared=True) as study:
        finished = {(stored.stage, stored.plan.digest) for stored in study.finished()}
    assert len(finished) == number
    assert cli.main(["optimize", str(job), "--out", str(out), *COMMAND]) == 2
    assert f"planish resume {out}" in capfd.readouterr().err
    result = flow.resume(out, small_jobs.stripes_job())
    assert choice(result) == choice(undisturbed)
    assert finished <= {(trial.stage, trial.plan.digest) for trial in result.trials}
    assert planish.load(out, threads=1) is not None
    with pytest.raises(OutputExists, match="is finished; look at it with `planish report"):
        flow.resume(out, small_jobs.stripes_job())
    assert sorted(path.name for path in tmp_path.iterdir() if "job" not in path.name and path.name != "__pycache__") == [
        "stripes.planish",
        "stripes.study",
    ]


def test_an_interrupt_in_mid_run_ends_within_seconds_and_says_how_to_resume(tmp_path: Path) -> None:
    out, job = tmp_path / "stripes.planish", tmp_path / "job.py"
    job.write_text(JOB.replace("TESTS", repr(str(TESTS))))
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", DRIVER.replace("TESTS", repr(str(TESTS))), "99", "9"),
            *("optimize", str(job), "--out", str(out), *COMMAND, "--time-limit", "500"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith("candidates"):
            break
    children = _children(process.pid)
    assert children
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 8
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith(f"planish resume {out} {job} --time-limit 500")
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert {path.name for path in tmp_path.iterdir()} <= {"job.py", "stripes.study", "__pycache__"}
    with Study.open(study_folder(out)) as study:
        assert study.finished()


def _children(pid: int) -> list[int]:
    return [int(number) for task in Path(f"/proc/{pid}/task").iterdir() for number in (task / "children").read_text().split()]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that ended after its first trial."""
    out = tmp_path / "stripes.planish"
    with monkeypatch.context() as patch:
        replaying.install(patch.setattr)
        before = Study.record

        def record(self: Study, *arguments: Any, **named: Any) -> None:
            before(self, *arguments, **named)
            raise Killed

        patch.setattr(Study, "record", record)
        with pytest.raises(Killed):
            run(out)
    return out


def test_another_job_is_refused_by_what_differs(interrupted: Path) -> None:
    x, y = small_jobs.images(320, seed=3)
    cases = {
        "parameters": small_jobs.stripes_job(small_jobs.trained(steps=3)),
        "data": small_jobs.stripes_job(train=[(x, y)]),
        "functions": small_jobs.stripes_job(augment=lambda inputs: inputs.flip(-1)),
        "version": small_jobs.stripes_job(version="2"),
    }
    before = (study_folder(interrupted) / "study.db").read_bytes()
    for what, job in cases.items():
        with pytest.raises(StudyError, match=f"belongs to another job: {what}"):
            flow.resume(interrupted, job)
    with pytest.raises(StudyError, match="started with --threads 1; got 2"):
        flow.resume(interrupted, small_jobs.stripes_job(), threads=2)
    with pytest.raises(StudyError, match="budget"), Study.open(study_folder(interrupted), shared=True) as study:
        Study.open(study_folder(interrupted), _with_budget(study.meta, planish.Budget(latency="0.9x")))
    assert (study_folder(interrupted) / "study.db").read_bytes() == before
    assert not interrupted.exists()


def _with_budget(meta: Any, budget: planish.Budget) -> Any:
    return msgspec.structs.replace(meta, budget=budget)


def test_fork_tries_the_old_plans_first(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that no search of this seed would begin with: it can only come from the old study."""
    graph = capture(small_jobs.trained(), small_jobs.images(1, seed=2)[:1], {})
    group = min(analyse(graph).groups)
    with Study.open(study_folder(interrupted)) as study:
        (first,) = study.finished()
        odd = first.plan.replace(widths={group: 40}, precisions={})
        study.record(odd, "candidate", Outcome("measured"), {"evidence": {"kind": "candidate"}})
        study.record(odd.replace(widths={"no.such.group": 8}), "candidate", Outcome("measured"))
        study.record(odd.replace(widths={group: 48}), "candidate", Outcome("diverged"))
        study.log(LOOKED)
    monkeypatch.setattr(Study, "record", _until_pruned(Study.record))
    with pytest.raises(Killed):
        flow.resume(interrupted, small_jobs.stripes_job(small_jobs.trained(steps=10)), fork=True)
    with Study.open(study_folder(interrupted), shared=True) as study:
        assert [stored.plan for stored in study.finished("candidate") if stored.plan.widths] == [odd]
        assert odd.replace(widths={group: 48}) not in study.given()
        assert study.count(LOOKED) == 1
    assert sorted(os.listdir(interrupted.parent)) == ["stripes.study"]


def _until_pruned(before: Any) -> Any:
    def record(self: Study, plan: Any, stage: str, *arguments: Any, **named: Any) -> bool:
        answer: bool = before(self, plan, stage, *arguments, **named)
        if stage == "candidate" and plan.widths:
            raise Killed
        return answer

    return record


def test_a_run_is_carried_on_with_the_aims_that_the_clock_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first aims at the limit itself at once, for lack of time; the second has all the time, and knows what the first proposed."""
    out = tmp_path / "stripes.planish"
    with monkeypatch.context() as patch:
        patch.setattr(pursuit, "SEARCH_SHARE", 1e-9)
        patch.setattr(Study, "record", _until_pruned(Study.record))
        with pytest.raises(Killed):
            run(out, time_limit=600)
    with Study.open(study_folder(out)) as study:
        assert study.kept("aimed at", int) == [len(pursuit._AIMS) - 1]
        proposed = {stored.plan.digest for stored in study.finished("candidate") if stored.plan.widths}
    result = flow.resume(out, small_jobs.stripes_job())
    assert proposed and proposed <= {trial.plan.digest for trial in result.trials}
    with Study.open(study_folder(out)) as study:
        assert set(study.kept("aimed at", int)) == {len(pursuit._AIMS) - 1}


def test_a_study_stays_until_another_stands_in_its_place(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Study.open(study_folder(interrupted)) as study:
        kept = [stored.id for stored in study.finished()]
        study.log(LOOKED)
    with monkeypatch.context() as patch:
        patch.setattr(store.metadata, "create_all", _stop)
        with pytest.raises(Killed):
            run(interrupted, overwrite=True)
    with Study.open(study_folder(interrupted)) as study:
        assert [stored.id for stored in study.finished()] == kept
    with monkeypatch.context() as patch:
        patch.setattr(Study, "record", _stop)
        with pytest.raises(Killed):
            run(interrupted, overwrite=True)
    with Study.open(study_folder(interrupted)) as study:
        assert study.finished() == []
        assert study.count(LOOKED) == 1
    assert os.listdir(interrupted.parent) == ["stripes.study"]


def test_a_study_of_another_artifact_is_not_taken_over(interrupted: Path) -> None:
    with Study.open(study_folder(interrupted)) as study:
        study.log(CONCLUDED, "met")
    with pytest.raises(OutputExists, match=r"stripes\.study holds the trials of stripes\.planish; give another --out"):
        run(interrupted.with_suffix(""))


def test_another_machine_carries_on_and_measures_again(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    before = trial.export_and_measure

    def export_and_measure(bench: Any, graph: Any, plan: Any, *arguments: Any, **named: Any) -> Any:
        measured.append(plan.digest)
        return before(bench, graph, plan, *arguments, **named)

    monkeypatch.setattr(trials, "export_and_measure", export_and_measure)
    with Study.open(study_folder(interrupted), shared=True) as study:
        (known,) = [stored.plan.digest for stored in study.finished()]
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "recover", _stop)
        with pytest.raises(Killed):
            flow.resume(interrupted, small_jobs.stripes_job())
        assert known not in measured
        elsewhere = msgspec.structs.replace(trials.machine(), fingerprint="another")
        patch.setattr(trials, "machine", lambda: elsewhere)
        with pytest.raises(Killed):
            flow.resume(interrupted, small_jobs.stripes_job())
    assert known in measured


def _stop(*_: Any, **__: Any) -> None:
    raise Killed


def test_a_second_process_is_refused_and_harms_nothing(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one run is at work, another one on the same output is told so, and the first comes to its end."""
    refused: list[str] = []
    before = Study.record

    def record(self: Study, *arguments: Any, **named: Any) -> Any:
        if not refused:
            refused.append("")
            for start in (lambda: flow.resume(interrupted, small_jobs.stripes_job()), lambda: run(interrupted, overwrite=True)):
                with pytest.raises(StudyError, match="another process") as caught:
                    start()
                refused.append(str(caught.value))
        return before(self, *arguments, **named)

    monkeypatch.setattr(Study, "record", record)
    assert flow.resume(interrupted, small_jobs.stripes_job()).verdict == "met"
    assert len(refused) == 3


def test_what_cannot_be_resumed_is_one_sentence(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="there is no study"):
        flow.resume(tmp_path / "none.planish", small_jobs.stripes_job())
    with pytest.raises(planish.PlanishError, match="the job is needed again"):
        flow.resume(interrupted)
    with pytest.raises(OutputExists, match="interrupted run; carry it on with"):
        run(interrupted)
    assert os.listdir(tmp_path) == ["stripes.study"]
