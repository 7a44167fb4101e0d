"""The connection to the job database, and its two kinds of writes.

`write` is for job state: durable when it returns (SQLite: WAL with synchronous=FULL), one at a
time (SQLite: BEGIN IMMEDIATE; Postgres: an advisory lock), so that no transaction sees half of
another and the order of acceptance is the order of `seq`. Jobs come a few in a second, so this
costs nothing that a clip of seconds would show. `note` is for progress: a process that dies loses
none of it, a power cut may lose the last of it (synchronous=NORMAL; synchronous_commit=off).

What a database can do wrong comes out as DatabaseBusy (try again), DiskFull or BadSetting. Left
out: what is written.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from wanfit.errors import BadSetting, DatabaseBusy, DiskFull, WanfitError
from wanfit.jobs import schema
from wanfit.jobs.filesystem import network_kind

BUSY_S = 10.0  # ours, as PocketBase has it: a write takes milliseconds
WAL_LIMIT_BYTES = 64 << 20  # as Rails has it: what stays of the WAL after a checkpoint
FULL_BYTES = 1 << 20  # ours: with less free, an input/output error of SQLite is a full disk
ADVISORY_LOCK = 0x77616E666974  # "wanfit": Postgres' lock of our writers
DRIVER = "postgresql+psycopg"
NO_ROOM_STATES = ("53100",)  # Postgres' SQLSTATE disk_full
READ_ONLY_CODES = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN)


@dataclass(slots=True)
class Transaction:
    """A write under way, with the moment that it shows, and the jobs that it changed."""

    connection: sa.Connection
    now_s: float
    changed: list[str] = field(default_factory=list)

    def execute(self, statement: sa.Executable) -> sa.CursorResult[Any]:
        result = self.connection.execute(statement)
        assert isinstance(result, sa.CursorResult)
        return result


class Database:
    """url: a path or sqlite:///path, or postgresql://... `wall_s` gives the time to show."""

    def __init__(
        self, url: str, *, busy_s: float = BUSY_S, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._wall_s = wall_s
        self._busy_s = busy_s
        self._turn = threading.Lock()  # SQLite's own waiting is a lottery between threads
        self._listeners: list[Callable[[str], None]] = []
        self._path = _sqlite_path(url)
        if self._path is not None:
            place = _checked_place(self._path)
            self._writer, self._noter, self._reader = (
                _sqlite_engine(place, kind, busy_s) for kind in ("FULL", "NORMAL", "READ")
            )
        else:
            self._writer = self._noter = self._reader = _postgres_engine(url)
        try:
            with self.write() as tx:
                _make_tables(tx.connection)
        except BaseException:
            self.close()
            raise

    @property
    def is_of_one_host(self) -> bool:
        """Whether every process that uses it runs on this machine."""
        return self._path is not None

    def close(self) -> None:
        for engine in {self._writer, self._noter, self._reader}:
            engine.dispose()

    def listen(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Calls back with the id of each job that changed, after the commit."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that is on disk when the block has ended, or not at all."""
        with self._transaction(self._writer, alone=True) as tx:
            yield tx

    @contextmanager
    def note(self) -> Iterator[Transaction]:
        """A transaction that a power cut may undo."""
        with self._transaction(self._noter, alone=False) as tx:
            yield tx

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent sight."""
        with self._errors(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def _transaction(self, engine: sa.Engine, *, alone: bool) -> Iterator[Transaction]:
        with self._errors():
            with self._in_turn(), engine.begin() as connection:
                if self._path is None:
                    _begin_on_postgres(connection, alone, self._busy_s)
                tx = Transaction(connection, self._wall_s())
                yield tx
            for job_id in dict.fromkeys(tx.changed):
                for callback in tuple(self._listeners):
                    callback(job_id)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._path is None:
            yield
            return
        if not self._turn.acquire(timeout=self._busy_s):
            raise _busy(self._busy_s)
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.TimeoutError:  # no connection became free
            raise _busy(self._busy_s) from None
        except sa.exc.DBAPIError as error:
            ours = self._translated(error)
            if ours is None:
                raise
            raise ours from error

    def _translated(self, error: sa.exc.DBAPIError) -> WanfitError | None:
        original = error.orig
        if isinstance(original, sqlite3.Error):
            assert self._path is not None
            return _sqlite_error(original, self._path, self._busy_s)
        state = getattr(original, "sqlstate", None)
        if state in NO_ROOM_STATES:
            return DiskFull(f"The disk of the job database is full: {_line(original)}")
        if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
            return DatabaseBusy(
                f"The job database does not answer: {_line(original)}", hint="Try again later"
            )
        return None


def _busy(busy_s: float) -> DatabaseBusy:
    return DatabaseBusy(f"The job database was locked for {busy_s:g} s", hint="Try again later")


def _sqlite_path(url: str) -> Path | None:
    """The file of a SQLite database, or None for Postgres. Raises BadSetting."""
    if "://" not in url:
        return Path(url).absolute()
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise BadSetting("The URL of the job database cannot be read", hint=_HINT) from None
    kind = parsed.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return None
    if kind != "sqlite":
        raise BadSetting(f"Jobs are not kept in a database of the kind {kind!r}", hint=_HINT)
    if parsed.database in (None, "", ":memory:"):
        raise BadSetting("A database in memory keeps no jobs", hint=_HINT)
    return Path(str(parsed.database)).absolute()


_HINT = "Give a path, or a URL as sqlite:///path or postgresql://user@host/name"


def _checked_place(path: Path) -> Path:
    """The path, its directory made, its file ours alone to read. Raises BadSetting."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        kind = network_kind(path.parent)
        if kind is not None:
            raise BadSetting(
                f"The job database {str(path)!r} would be on a network file system ({kind}), where"
                " SQLite's locks and shared memory do not hold, so that jobs would be lost",
                hint="Put it on a disk of this machine, or use Postgres (postgresql://...)",
            )
        # SQLite gives its other files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BadSetting(
            f"The job database {str(path)!r} cannot be opened: {error.strerror}",
            hint="Give a path that can be written",
        ) from None
    return path


def _sqlite_engine(path: Path, kind: str, busy_s: float) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": busy_s, "check_same_thread": False},
        pool_size=4 if kind == "READ" else 1,
        max_overflow=28 if kind == "READ" else 0,
        pool_timeout=busy_s,
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # Python begins nothing: `begin` below does
        connection.execute(f"PRAGMA busy_timeout={int(busy_s * 1000)}")  # first: the rest may wait
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise BadSetting(f"The job database {str(path)!r} cannot use WAL, only {mode}")
        connection.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
        connection.execute("PRAGMA temp_store=MEMORY")
        if kind == "READ":
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute(f"PRAGMA synchronous={kind}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if kind == "READ" else "BEGIN IMMEDIATE")

    return engine


def _sqlite_error(error: sqlite3.Error, path: Path, busy_s: float) -> WanfitError | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return None
    primary = code & 0xFF
    no_room = shutil.disk_usage(path.parent).free < FULL_BYTES
    if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and no_room):
        return DiskFull(
            f"The disk of the job database {str(path)!r} is full", hint="Make room on it"
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _busy(busy_s)
    if primary == sqlite3.SQLITE_IOERR or primary in READ_ONLY_CODES:
        return DatabaseBusy(f"The job database {str(path)!r} cannot be used now: {error}")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return BadSetting(f"{str(path)!r} is no whole job database: {error}")
    return None


def _postgres_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url).set(drivername=DRIVER)
    try:
        return sa.create_engine(parsed, pool_size=8, max_overflow=24, pool_pre_ping=True)
    except ImportError:
        raise BadSetting(
            "Postgres needs the package psycopg, which is not installed",
            hint="pip install 'wanfit[postgres]'",
        ) from None


def _begin_on_postgres(connection: sa.Connection, alone: bool, busy_s: float) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(busy_s * 1000)}ms'")
    if alone:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    else:
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def _make_tables(connection: sa.Connection) -> None:
    """Makes what is missing. Raises BadSetting for the tables of a newer wanfit."""
    schema.metadata.create_all(connection)
    version = connection.scalar(
        sa.select(schema.about.c.value).where(schema.about.c.name == "version")
    )
    if version is None:
        connection.execute(
            sa.insert(schema.about).values(name="version", value=str(schema.VERSION))
        )
    elif int(version) > schema.VERSION:
        raise BadSetting(
            f"The job database has version {version}, and this wanfit knows {schema.VERSION}",
            hint="Use the wanfit that made it, or another database",
        )


def _line(error: object) -> str:
    return " ".join(str(error).split())
