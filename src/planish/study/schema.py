"""The tables of a study, and the connection to them: SQLite with a write-ahead log, every commit on disk before it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DatabaseError

from planish.errors import StudyError

VERSION = 1
FILE = "study.db"
_HEADER = b"SQLite format 3\x00"

metadata = sa.MetaData()
meta = sa.Table("meta", metadata, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String, nullable=False))
trials = sa.Table(
    "trials",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String(16), nullable=False),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("plan", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("token", sa.Integer, nullable=False, default=0),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("lease_until", sa.Float),
    sa.Column("worker", sa.String),
    sa.Column("outcome", sa.String),
    sa.Column("detail", sa.String),
    sa.Column("evidence", sa.String),
    sa.Column("measurement", sa.String),
    sa.Column("seconds", sa.Float),
    sa.Column("created", sa.Float, nullable=False),
    sa.UniqueConstraint("digest", "stage"),
    sa.CheckConstraint("state IN ('waiting', 'running', 'finished')"),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("trial", sa.Integer),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("detail", sa.String, nullable=False),
)


def connect(url: URL) -> Engine:
    """An engine whose transactions take the write lock at once, wait up to 30 s for it, and are on disk when they end.

    Raises:
        StudyError: not an SQLite address; a password in it is not shown.
    """
    if url.get_backend_name() != "sqlite":
        raise StudyError(f"study: this version keeps studies in SQLite files; got {url.render_as_string(hide_password=True)!r}")
    engine = sa.create_engine(url, connect_args={"timeout": 30.0}, poolclass=sa.pool.NullPool)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # pysqlite would begin transactions by itself, and late
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=30000", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextlib.contextmanager
def transaction(engine: Engine, path: Path) -> Iterator[Connection]:
    """A transaction whose database errors become one sentence about `path`.

    Raises:
        StudyError: the file is damaged, full, read-only or locked for too long.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except DatabaseError as err:
        raise StudyError(f"study: {path} cannot be read or written: {err.orig}; nothing that was finished before is lost") from err


def check_file(path: Path) -> None:
    """Refuse a file that is no SQLite database.

    Raises:
        StudyError: the file is something else, or empty.
    """
    with path.open("rb") as file:
        head = file.read(len(_HEADER))
    if head != _HEADER:
        what = "is empty" if not head else "is an HTML page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else "is not one"
        raise StudyError(f"study: {path} should be a study's database but {what}; give the folder that `planish optimize` made")
