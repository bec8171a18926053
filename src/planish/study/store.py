"""A study: the trials of one job in a database that loses no finished one, whenever it is killed and however many work on it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from planish.budget import Budget
from planish.errors import MissingFile, OutputExists, StudyError
from planish.measurement import Measurement, Outcome
from planish.plan import Plan
from planish.study.schema import FILE, VERSION, check_file, connect, events, meta, metadata, transaction, trials

if sys.platform != "win32":
    import fcntl

Stage = Literal["candidate", "trial", "winner"]
State = Literal["waiting", "running", "finished"]
CONCLUDED = "concluded"
"""The event that marks a study whose run came to its verdict."""
LOOKED = "looked at test"
"""The event that counts a look at the test split; a study that takes another's place inherits them."""
_GIVEN = "given"
_CHECKPOINTS = "checkpoints"
_ATTEMPTS = 2


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a study belongs to.

    Args:
        fingerprint: part of the job ("parameters", "data", "functions", "version") -> hash; must match to resume.
        budget: of the job; must match to resume.
        arguments: what else `optimize` was called with; must match to resume.
        seed: of the search; must match to resume.
        machine: fingerprint of the machine; decides only what must be measured again.
        out: the name (not the place) of the artifact; two that would share a study are told apart by it.
    """

    fingerprint: dict[str, str]
    budget: Budget
    arguments: dict[str, Any] = {}
    seed: int = 0
    machine: str = ""
    out: str = ""

    def differences(self, other: Meta) -> list[str]:
        """Names of what must match and does not."""
        parts = {**self.fingerprint, **other.fingerprint}
        out = [name for name in sorted(parts) if self.fingerprint.get(name) != other.fingerprint.get(name)]
        out += ["budget"] if msgspec.to_builtins(self.budget) != msgspec.to_builtins(other.budget) else []
        arguments = {**self.arguments, **other.arguments}
        out += [name for name in sorted(arguments) if self.arguments.get(name) != other.arguments.get(name)]
        return out + (["seed"] if self.seed != other.seed else [])


class Stored(msgspec.Struct, frozen=True):
    """One trial as the study holds it.

    Args:
        id: counts up in the order of creation.
        plan: what is to be done.
        stage: "candidate", "trial" or "winner".
        state: "waiting", "running" or "finished".
        outcome: how it ended; None until then.
        evidence: what the search was told of it (JSON values).
        measurement: what was measured, where something was.
        seconds: what it took.
        attempts: how often a worker took it.
    """

    id: int
    plan: Plan
    stage: Stage
    state: State
    outcome: Outcome | None
    evidence: dict[str, Any] | None
    measurement: Measurement | None
    seconds: float
    attempts: int


class Lease(msgspec.Struct, frozen=True):
    """The right to carry out one trial until `until` (seconds since the epoch); `token` fences off whoever held it before."""

    trial: Stored
    token: int
    until: float


class Study:
    """Trials in `folder/study.db`. Made by `create` or `open`; a context manager.

    One main process holds a study at a time; its workers open it as `shared` and work by leases.
    """

    def __init__(self, folder: Path, engine: Engine, lock: int | None) -> None:
        self.folder, self._engine, self._lock = folder, engine, lock
        self._path = folder / FILE

    @classmethod
    def create(cls, folder: Path, meta_: Meta, replaces: Study | None = None, plans: Sequence[Plan] = ()) -> Study:
        """A new study; the folder appears whole or not at all.

        Args:
            folder: of the study.
            meta_: what it belongs to.
            replaces: the study that is there now: deleted once the new one stands in its place. The looks at the test split are kept.
            plans: to be tried first, in this order; see `given`.

        Raises:
            OutputExists: the folder is already there.
        """
        folder = Path(folder)
        looks = [] if replaces is None else [event for event in replaces.events() if event[2] == LOOKED]
        if folder.exists() and replaces is None:
            raise OutputExists(f"study: {folder} is already there; resume it, give another name, or allow overwriting")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            engine = connect(URL.create("sqlite", database=str(fresh / FILE)))
            with transaction(engine, fresh / FILE) as connection:
                metadata.create_all(connection)
                values = {"version": str(VERSION), "meta": msgspec.json.encode(meta_, order="sorted").decode()}
                connection.execute(meta.insert(), [{"key": key, "value": value} for key, value in values.items()])
                for created, _, kind, detail in looks:
                    connection.execute(events.insert().values(created=created, kind=kind, detail=detail))
                new = cls(fresh, engine, None)
                for number in dict.fromkeys(new._add(connection, plan, "candidate") for plan in plans):
                    new._log(connection, _GIVEN, "", number)
            engine.dispose()
            fresh.chmod(0o755)
            _put(fresh, folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, expected: Meta | None = None, shared: bool = False) -> Study:
        """A study that is already there. The main process gets what a killed one left running back as waiting.

        Args:
            folder: of the study.
            expected: what it must belong to.
            shared: as a worker, beside the main process.

        Raises:
            MissingFile: nothing is there.
            StudyError: it is no study, belongs to another job, or is held by another process.
        """
        folder = Path(folder)
        path = folder / FILE
        if not folder.exists():
            raise MissingFile(f"study: {folder} is not there; `planish optimize` makes one beside its output")
        if not path.is_file():
            raise StudyError(f"study: {folder} is no study: it has no {FILE}")
        check_file(path)
        lock = None if shared else lock_folder(folder)
        study = cls(folder, connect(URL.create("sqlite", database=str(path))), lock)
        try:
            found = study.meta
            differing = found.differences(expected) if expected is not None else []
            if differing:
                raise StudyError(
                    f"study: {folder} belongs to another job: {', '.join(differing)} differ{'s' if len(differing) == 1 else ''}; "
                    "resume with what it was started with, or start a new study under another name"
                )
            if not shared:
                study._take_back()
        except BaseException:
            study.close()
            raise
        return study

    def close(self) -> None:
        """Let go of the study."""
        self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> Any:
        return transaction(self._engine, self._path)

    @property
    def meta(self) -> Meta:
        """What the study belongs to.

        Raises:
            StudyError: the database is not a study's, or of another version.
        """
        with self._begin() as connection:
            if not {"meta", "trials", "events"} <= set(sa.inspect(connection).get_table_names()):
                raise StudyError(f"study: {self._path} is a database, but not a study's")
            values = {row.key: row.value for row in connection.execute(meta.select())}
        if values.get("version") != str(VERSION):
            raise StudyError(
                f"study: {self._path} has version {values.get('version', 'none')[:20]!r}; this planish reads version {VERSION}"
            )
        decoded: Meta = self.decode(values.get("meta", ""), Meta)
        return decoded

    def decode(self, value: Any, kind: Any) -> Any:
        """What this database holds, as JSON text or as plain data read from it, as `kind`.

        Raises:
            StudyError: it is not that.
        """
        try:
            return msgspec.json.decode(value, type=kind) if isinstance(value, str) else msgspec.convert(value, kind)
        except (msgspec.DecodeError, ValueError) as err:
            raise StudyError(f"study: {self._path} holds an entry that is damaged or was not written by planish: {err}") from err

    def add(self, plan: Plan, stage: Stage) -> int:
        """The id of a plan's trial at a stage; a waiting one is made where there is none."""
        with self._begin() as connection:
            return self._add(connection, plan, stage)

    def _add(self, connection: Connection, plan: Plan, stage: Stage) -> int:
        found = connection.execute(sa.select(trials.c.id).where(trials.c.digest == plan.digest, trials.c.stage == stage)).scalar()
        if found is not None:
            return int(found)
        values = {"digest": plan.digest, "stage": stage, "plan": msgspec.json.encode(plan, order="sorted").decode()}
        made = connection.execute(trials.insert().values(**values, state="waiting", created=time.time()))
        assert made.inserted_primary_key is not None
        return int(made.inserted_primary_key[0])

    def lease(self, worker: str = "", seconds: float = 600.0, stage: Stage | None = None) -> Lease | None:
        """The right to carry out the oldest waiting trial, or None. Expired leases are first given up as lost.

        Args:
            worker: a name for the log.
            seconds: how long the lease lasts unless it is renewed.
            stage: only trials of this stage.
        """
        now = time.time()
        with self._begin() as connection:
            self._expire(connection, now)
            query = sa.select(trials.c.id).where(trials.c.state == "waiting").order_by(trials.c.id).limit(1)
            number = connection.execute(query if stage is None else query.where(trials.c.stage == stage)).scalar()
            if number is None:
                return None
            values = {"token": trials.c.token + 1, "attempts": trials.c.attempts + 1, "lease_until": now + seconds, "worker": worker}
            connection.execute(trials.update().where(trials.c.id == number).values(state="running", **values))
            row = connection.execute(trials.select().where(trials.c.id == number)).one()
            self._log(connection, "leased", worker, number)
        return Lease(self._stored(row), row.token, row.lease_until)

    def renew(self, lease: Lease, seconds: float = 600.0) -> bool:
        """Whether the lease still holds; if so it now lasts `seconds` from here."""
        with self._begin() as connection:
            update = trials.update().where(*_held(lease)).values(lease_until=time.time() + seconds)
            return int(connection.execute(update).rowcount) == 1

    def finish(
        self,
        lease: Lease,
        outcome: Outcome,
        evidence: Any = None,
        measurement: Measurement | None = None,
        seconds: float = 0.0,
    ) -> bool:
        """Store how a leased trial ended; False, and nothing stored, where someone else holds or finished it since."""
        with self._begin() as connection:
            values = _ended(outcome, evidence, measurement, seconds)
            done = connection.execute(trials.update().where(*_held(lease)).values(**values)).rowcount == 1
            self._log(connection, "finished" if done else "refused", outcome.kind if done else "came back too late", lease.trial.id)
        return bool(done)

    def record(
        self,
        plan: Plan,
        stage: Stage,
        outcome: Outcome,
        evidence: Any = None,
        measurement: Measurement | None = None,
        seconds: float = 0.0,
        *,
        again: bool = False,
    ) -> bool:
        """Store how a plan ended at a stage, without a lease; False, and nothing stored, where that was already known.

        Evidence may say in "place" where it was measured (machine and versions); what was measured elsewhere is replaced.

        Args:
            plan: what was done.
            stage: how dear the trial was.
            outcome: how it ended.
            evidence: what the search is told: anything that msgspec writes as a JSON object.
            measurement: what was measured.
            seconds: what it took.
            again: it was measured once more: what was known is replaced.
        """
        with self._begin() as connection:
            number = self._add(connection, plan, stage)
            values = _ended(outcome, evidence, measurement, seconds)
            found = connection.execute(trials.select().where(trials.c.id == number)).one()
            if not again and found.state == "finished" and self._place(found.evidence) == self._place(values["evidence"]):
                return False
            connection.execute(trials.update().where(trials.c.id == number).values(token=trials.c.token + 1, **values))
            return True

    def _place(self, evidence: str | None) -> Any:
        return None if evidence is None else self.decode(evidence, dict[str, Any]).get("place")

    def given(self) -> list[Plan]:
        """The plans that this study was made to try first, in that order, whether they were tried since or not."""
        query = trials.select().join(events, events.c.trial == trials.c.id).where(events.c.kind == _GIVEN).order_by(trials.c.id)
        with self._begin() as connection:
            rows = connection.execute(query).all()
        return [self._stored(row).plan for row in rows]

    def finished(self, stage: Stage | None = None) -> list[Stored]:
        """Trials that ended, at one stage or all, in the order in which they were created."""
        return self._all(stage, "finished")

    def unfinished(self, stage: Stage | None = None) -> list[Stored]:
        """Trials that are waiting or running, in the order in which they were created."""
        return sorted(self._all(stage, "waiting") + self._all(stage, "running"), key=lambda stored: stored.id)

    def _all(self, stage: Stage | None, state: State) -> list[Stored]:
        query = trials.select().where(trials.c.state == state).order_by(trials.c.id)
        with self._begin() as connection:
            rows = connection.execute(query if stage is None else query.where(trials.c.stage == stage)).all()
        return [self._stored(row) for row in rows]

    def lookup(self, digest: str, stage: Stage) -> Stored | None:
        """The trial of a plan at a stage, in whatever state, or None."""
        with self._begin() as connection:
            row = connection.execute(trials.select().where(trials.c.digest == digest, trials.c.stage == stage)).one_or_none()
        return None if row is None else self._stored(row)

    def checkpoint(self, name: str) -> Path:
        """The file in which a training of this study keeps what it would go on from."""
        return self.folder / _CHECKPOINTS / f"{name}.safetensors"

    def forget_checkpoints(self) -> None:
        """Delete them: the run came to its end."""
        shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)

    def kept(self, kind: str, type_: Any) -> list[Any]:
        """The details of all events of a kind as what they are, JSON of `type_`, oldest first.

        Raises:
            StudyError: one is not.
        """
        with self._begin() as connection:
            rows = connection.execute(sa.select(events.c.detail).where(events.c.kind == kind).order_by(events.c.id)).all()
        return [self.decode(row.detail, type_) for row in rows]

    def keep(self, kind: str, value: Any) -> None:
        """Enter an event whose detail is `value` as JSON."""
        self.log(kind, msgspec.json.encode(value).decode())

    def log(self, kind: str, detail: str = "") -> None:
        """Enter an event."""
        with self._begin() as connection:
            self._log(connection, kind, detail)

    def count(self, kind: str) -> int:
        """How many events of a kind there are."""
        with self._begin() as connection:
            return int(connection.execute(sa.select(sa.func.count()).where(events.c.kind == kind)).scalar_one())

    def events(self) -> list[tuple[float, int | None, str, str]]:
        """All events as (seconds since the epoch, trial or None, kind, detail), oldest first."""
        with self._begin() as connection:
            return [(row.created, row.trial, row.kind, row.detail) for row in connection.execute(events.select().order_by(events.c.id))]

    def _log(self, connection: Connection, kind: str, detail: str, trial: int | None = None) -> None:
        connection.execute(events.insert().values(created=time.time(), trial=trial, kind=kind, detail=detail))

    def _expire(self, connection: Connection, now: float) -> None:
        """Leases that ran out: back to waiting the first time, finished as lost the second."""
        query = trials.select().where(trials.c.state == "running", trials.c.lease_until < now)
        for row in connection.execute(query).all():
            values: dict[str, Any] = {"state": "waiting", "token": row.token + 1}
            if row.attempts >= _ATTEMPTS:
                lost = Outcome("lost", f"its worker did not come back, {_ATTEMPTS} times")
                values = {"token": row.token + 1, **_ended(lost, None, None, 0.0)}
            connection.execute(trials.update().where(trials.c.id == row.id).values(**values))
            self._log(connection, "lost", f"{row.worker or 'a worker'} did not come back", row.id)

    def _take_back(self) -> None:
        """What the main process before this one left running waits again; that it was killed is no fault of the trial."""
        with self._begin() as connection:
            values = {"state": "waiting", "token": trials.c.token + 1, "attempts": trials.c.attempts - 1}
            connection.execute(trials.update().where(trials.c.state == "running").values(**values))

    def _stored(self, row: Any) -> Stored:
        plan: Plan = self.decode(row.plan, Plan)
        if plan.digest != row.digest:
            raise StudyError(f"study: {self._path}: the plan of trial {row.id} does not match its digest; it was changed by hand")
        text = msgspec.json.encode({"kind": row.outcome, "detail": row.detail or ""}).decode()
        return Stored(
            id=row.id,
            plan=plan,
            stage=row.stage,
            state=row.state,
            outcome=None if row.outcome is None else self.decode(text, Outcome),
            evidence=None if row.evidence is None else self.decode(row.evidence, dict[str, Any]),
            measurement=None if row.measurement is None else self.decode(row.measurement, Measurement),
            seconds=row.seconds or 0.0,
            attempts=row.attempts,
        )


def _put(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; what was there is set aside first, put back where that fails, and deleted last."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    is_there = folder.exists()
    if is_there:
        os.rename(folder, old)
    try:
        os.rename(fresh, folder)
    except BaseException:
        if is_there:
            os.rename(old, folder)
        raise
    if is_there:
        shutil.rmtree(old)


def _held(lease: Lease) -> tuple[Any, ...]:
    return (trials.c.id == lease.trial.id, trials.c.token == lease.token, trials.c.state == "running")


def _ended(outcome: Outcome, evidence: Any, measurement: Measurement | None, seconds: float) -> Mapping[str, Any]:
    return {
        "state": "finished",
        "outcome": outcome.kind,
        "detail": outcome.detail,
        "evidence": None if evidence is None else msgspec.json.encode(evidence).decode(),
        "measurement": None if measurement is None else msgspec.json.encode(measurement).decode(),
        "seconds": seconds,
        "lease_until": None,
    }


def lock_folder(folder: Path) -> int | None:
    """The main process's lock, which ends with the process however it ends; None where the system has none."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise StudyError(
            f"study: {folder} is held by another process ({holder or 'unknown'}); wait until it ends, or end it and resume"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
