"""Studies: nothing finished is lost or doubled, late workers are refused, strangers are turned away by name."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import msgspec
import pytest
from sqlalchemy.engine import URL

from planish.budget import Budget
from planish.errors import MissingFile, OutputExists, StudyError
from planish.measurement import Estimate, Machine, Measurement, Outcome
from planish.plan import Plan
from planish.study import schema
from planish.study.store import LOOKED, Meta, Study

META = Meta({"parameters": "aa", "data": "bb"}, Budget(latency="0.5x"), {"search": "solver"}, seed=3, machine="m")
DONE = Outcome("measured")


def plan(number=0):
    return Plan(target="onnxruntime:cpu", widths={"conv": 8 * (number + 1)})


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "net.study", META) as made:
        yield made


def measurement():
    estimate = Estimate(1e-3, 0.9e-3, 1.1e-3, 30)
    machine = Machine("p", "avx2", 2, 1 << 30, "linux", "3.11", "f")
    return Measurement(
        runtime="onnxruntime:cpu",
        machine=machine,
        threads=1,
        batch=1,
        latency_s=estimate,
        cpu_s=estimate,
        size_bytes=7,
        peak_memory_bytes=8,
        macs=9,
    )


def test_what_is_recorded_comes_back_after_opening_again(study):
    evidence = {"kind": "trial", "loss": 0.1 + 0.2, "costs": {"latency": 1e-3}}
    assert study.record(plan(), "trial", Outcome("over budget", "é <b>"), evidence, measurement(), 2.5)
    study.close()
    with Study.open(study.folder, META) as again:
        assert again.meta == META
        (stored,) = again.finished("trial")
        assert stored == again.lookup(plan().digest, "trial")
    assert (stored.plan, stored.outcome, stored.seconds) == (plan(), Outcome("over budget", "é <b>"), 2.5)
    assert stored.evidence == evidence and stored.measurement == measurement()


def test_a_plan_is_one_trial_per_stage_and_its_first_end_counts(study):
    assert study.add(plan(), "candidate") == study.add(plan(), "candidate")
    assert study.record(plan(), "candidate", DONE, {"loss": 1.0})
    assert not study.record(plan(), "candidate", Outcome("diverged"), {"loss": 2.0})
    assert study.record(plan(), "winner", DONE)
    assert [t.stage for t in study.finished()] == ["candidate", "winner"]
    assert study.lookup(plan().digest, "candidate").evidence == {"loss": 1.0}
    assert study.lookup(plan(5).digest, "candidate") is None


def test_what_was_measured_elsewhere_is_replaced(study):
    assert study.record(plan(), "trial", DONE, {"loss": 1.0, "place": "here 1.0"})
    assert not study.record(plan(), "trial", DONE, {"loss": 2.0, "place": "here 1.0"})
    assert study.record(plan(), "trial", Outcome("mismatch"), {"loss": 3.0, "place": "here 2.0"})
    (stored,) = study.finished()
    assert (stored.outcome.kind, stored.evidence) == ("mismatch", {"loss": 3.0, "place": "here 2.0"})


def test_a_study_that_replaces_another_inherits_looks_and_plans(study):
    study.record(plan(7), "trial", DONE)
    for _ in range(2):
        study.log(LOOKED)
    study.log("concluded", "met")
    study.close()
    with Study.open(study.folder) as old, Study.create(study.folder, META, old, [plan(1), plan(0), plan(1)]) as new:
        assert (new.count(LOOKED), new.count("concluded")) == (2, 0)
        assert new.finished() == []
        assert new.given() == [t.plan for t in new.unfinished("candidate")] == [plan(1), plan(0)]
        new.record(plan(1), "candidate", DONE)
        assert new.given() == [plan(1), plan(0)], "what is tried first does not depend on how far it came"
        assert [t.plan for t in new.unfinished("candidate")] == [plan(0)]
    assert os.listdir(study.folder.parent) == ["net.study"]


def test_what_cannot_be_replaced_stays(study, monkeypatch):
    study.record(plan(), "trial", DONE)
    rename = os.rename

    def fails(source, target):
        if target == study.folder and not source.name.endswith(".old"):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="disk is gone"):
        Study.create(study.folder, META, study)
    assert [t.plan for t in study.finished()] == [plan()]
    assert os.listdir(study.folder.parent) == ["net.study"]


def test_leases_go_out_in_order_and_only_once(study):
    for number in range(3):
        study.add(plan(number), "trial")
    study.add(plan(9), "candidate")
    leases = [study.lease("w", stage="trial") for _ in range(4)]
    assert [lease and lease.trial.plan for lease in leases] == [plan(0), plan(1), plan(2), None]
    assert [t.state for t in study.unfinished("trial")] == ["running"] * 3
    assert study.finish(leases[1], DONE, {"loss": 1.0})
    assert [t.plan for t in study.finished()] == [plan(1)]


def test_a_late_worker_is_refused_and_a_lost_trial_is_retried_once(study):
    study.add(plan(), "trial")
    slow = study.lease("slow", seconds=-1.0)
    second = study.lease("second", seconds=600.0)
    assert second.trial.id == slow.trial.id and second.token > slow.token
    assert not study.finish(slow, DONE, {"loss": 9.0}), "its lease ran out"
    assert not study.renew(slow)
    assert study.renew(second, seconds=-1.0)
    assert study.lease("third") is None, "lost twice is lost"
    assert not study.finish(second, DONE)
    (lost,) = study.finished()
    assert lost.outcome.kind == "lost" and "2 times" in lost.outcome.detail and lost.evidence is None
    assert [kind for _, _, kind, _ in study.events()] == ["leased", "lost", "leased", "refused", "lost", "refused"]


def test_what_a_killed_main_process_left_running_waits_again(study):
    study.add(plan(), "trial")
    stale = study.lease("child", seconds=600.0)
    study.close()
    with Study.open(study.folder) as again:
        assert [t.state for t in again.unfinished()] == ["waiting"]
        assert not again.finish(stale, DONE)
        lease = again.lease("child")
        assert lease.trial.attempts == 1
        assert again.finish(lease, DONE)


def test_another_job_is_refused_by_the_names_of_what_differs(study):
    study.close()
    other = Meta({"parameters": "aa", "data": "XX", "version": "2"}, Budget(latency="0.4x"), {"search": "random"}, seed=4, machine="other")
    with pytest.raises(StudyError, match=r"belongs to another job: data, version, budget, search, seed differ; resume with"):
        Study.open(study.folder, other)
    with pytest.raises(StudyError, match=r": seed differs; "):
        Study.open(study.folder, msgspec.structs.replace(META, seed=5))
    Study.open(study.folder, msgspec.structs.replace(META, machine="another")).close()


def test_two_processes_at_once(study):
    with pytest.raises(StudyError, match=rf"is held by another process \({os.getpid()}\); wait until it ends"):
        Study.open(study.folder)
    with Study.open(study.folder, shared=True) as worker:
        study.add(plan(), "trial")
        assert study.finish(worker.lease(), DONE)


def test_what_is_no_study_is_named(tmp_path, study):
    with pytest.raises(MissingFile, match=r"nothing\.study is not there"):
        Study.open(tmp_path / "nothing.study")
    with pytest.raises(OutputExists, match=r"net\.study is already there"):
        Study.create(study.folder, META)
    folder = tmp_path / "page.study"
    folder.mkdir()
    with pytest.raises(StudyError, match=r"page\.study is no study: it has no study\.db"):
        Study.open(folder)
    for content, said in (
        (b"<!DOCTYPE html><p>404", "is an HTML page"),
        (b"", "is empty"),
        (b"\x80\x04pickle", "is not one"),
    ):
        (folder / "study.db").write_bytes(content)
        with pytest.raises(StudyError, match=rf"page\.study/study\.db should be a study's database but {said}"):
            Study.open(folder)
    (tmp_path / "file.study").write_text("<html>")
    with pytest.raises(StudyError, match=r"file\.study is no study"):
        Study.open(tmp_path / "file.study")
    (folder / "study.db").unlink()
    with sqlite3.connect(folder / "study.db") as other:
        other.execute("CREATE TABLE t (a)")
    other.close()
    with pytest.raises(StudyError, match="is a database, but not a study's"):
        Study.open(folder)


def test_a_truncated_database_is_one_sentence(study):
    for number in range(50):
        study.record(plan(number), "candidate", DONE)
    study.close()
    path = study.folder / "study.db"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StudyError, match=r"study\.db (cannot be read|is a database)"):
        Study.open(study.folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE trials SET plan = '{\"target\": 3}'", "damaged or was not written by planish"),
        ('UPDATE trials SET plan = \'{"target": "openvino:cpu"}\'', "does not match its digest"),
        ("UPDATE trials SET evidence = '!!python/object:os.system'", "damaged or was not written by planish"),
        ("UPDATE trials SET outcome = 'fine'", "damaged or was not written by planish"),
        ("UPDATE meta SET value = '99' WHERE key = 'version'", "has version '99'; this planish reads version 1"),
    ],
)
def test_entries_changed_by_hand_are_refused(study, change, said):
    study.record(plan(), "trial", DONE, {"loss": 1.0})
    study.close()
    with sqlite3.connect(study.folder / "study.db") as other:
        other.execute(change)
    other.close()
    with pytest.raises(StudyError, match=said):
        Study.open(study.folder).finished()


def test_a_password_is_never_shown():
    with pytest.raises(StudyError) as caught:
        schema.connect(URL.create("postgresql", "me", "hunter2", "host", 5432, "studies"))
    assert "hunter2" not in str(caught.value) and "me:***@host" in str(caught.value)


def test_a_full_or_read_only_disk_is_one_sentence_and_loses_nothing(study):
    study.record(plan(), "trial", DONE)
    with study._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    study._engine.dispose()

    from sqlalchemy import event

    @event.listens_for(study._engine, "connect")
    def full(connection, _record):
        connection.execute(f"PRAGMA max_page_count={pages}").close()

    def fill():
        for number in range(1, 200):
            study.record(plan(number), "trial", DONE, {"note": "x" * 4000})

    with pytest.raises(StudyError, match=r"study\.db cannot be read or written: database or disk is full"):
        fill()
    event.remove(study._engine, "connect", full)
    assert study.lookup(plan().digest, "trial").outcome == DONE


WRITER = """
import sys
from pathlib import Path
from planish.measurement import Outcome
from planish.plan import Plan
from planish.study.store import Study
study = Study.open(Path(sys.argv[1]))
number = len(study.finished())
while True:
    plan = Plan(target="x:cpu", widths={"g": number + 1})
    study.add(plan, "trial")
    lease = study.lease("w")
    assert lease.trial.plan == plan, lease
    assert study.finish(lease, Outcome("measured"), {"loss": float(number)}, seconds=1.0)
    print(plan.digest, flush=True)
    number += 1
"""


def test_kill_at_any_moment_loses_no_finished_trial(study):
    """What the writer said was finished is there after SIGKILL, once, and the next writer carries on with what was left waiting."""
    study.close()
    rng = random.Random(0)
    said = []
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(study.folder)], stdout=subprocess.PIPE, text=True)
        said.append(process.stdout.readline().strip())
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        with Study.open(study.folder) as again:
            kept = [t.plan.digest for t in again.finished()]
            losses = [t.evidence["loss"] for t in again.finished()]
        assert len(kept) == len(set(kept))
        assert set(said) <= set(kept)
        assert losses == [float(i) for i in range(len(kept))]
    assert "" not in said and len(said) >= 6


WORKER = """
import sys
from pathlib import Path
from planish.measurement import Outcome
from planish.study.store import Study
with Study.open(Path(sys.argv[1]), shared=True) as study:
    while lease := study.lease(sys.argv[2]):
        assert study.finish(lease, Outcome("measured"), {"worker": sys.argv[2]})
"""


def test_workers_beside_each_other_lose_and_double_nothing(study):
    for number in range(40):
        study.add(plan(number), "trial")
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(study.folder), name]) for name in ("a", "b", "c")]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    done = study.finished()
    assert [t.plan for t in done] == [plan(number) for number in range(40)]
    assert all(t.attempts == 1 for t in done)
    assert len(study.events()) == 80
