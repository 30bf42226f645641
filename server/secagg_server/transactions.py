"""One way into the database: a transaction that is whole, serialised, and tried again if it may be.

Those that write queue for the database's write lock before they read anything, so that what they
read stays true until they commit.
"""

from __future__ import annotations

import functools
import random
import sqlite3
import time
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
    TimeoutError,
)
from sqlalchemy.orm import Session, sessionmaker

from secagg.audit import Detail
from secagg.errors import ConfigurationError, StorageError
from secagg.extras import missing
from secagg.instruments import SILENT, Meter
from secagg_server.metrics import STORE_FAILURES, TRANSACTIONS

__all__ = ["Change", "Database", "HasDatabase", "noted", "reading", "writing"]

ATTEMPTS = 6
LOCK_WAIT_MS = 2000
CONNECT_TIMEOUT_S = 5
_LOOK_AGAIN_S = 0.01
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_WRITES = "secagg_writes"
_CHANGES = "secagg_changes"
# Serialization failure, deadlock, lock timeout, and two that took the same place at once.
_TRANSIENT = {"40001", "40P01", "55P03", "23505"}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

_S = TypeVar("_S", bound="HasDatabase")
_P = ParamSpec("_P")
_R = TypeVar("_R")

Change = Callable[[str, Mapping[str, Detail]], None]
"""Called with the name and the details of something that has changed."""


def _ignored(event: str, details: Mapping[str, Detail]) -> None:
    """Of no interest."""


class Database:
    """An engine, and the rules for its transactions.

    Args:
        meter: times transactions, and counts those that fail.
        changed: told of each change that was `noted`, once it is committed, and once only.

    Raises:
        ConfigurationError: a URL that names no database this can use.
    """

    def __init__(self, url: str, meter: Meter = SILENT, changed: Change = _ignored) -> None:
        self._meter, self._changed = meter, changed
        self.engine = _engine(url)
        self._readers: sessionmaker[Session] = sessionmaker(self.engine, expire_on_commit=False)
        self._writers: sessionmaker[Session] = sessionmaker(
            self.engine.execution_options(**{_WRITES: True}), expire_on_commit=False
        )

    def close(self) -> None:
        """Release the connections."""
        self.engine.dispose()

    def read(self, work: Callable[[Session], _R]) -> _R:
        """Run work that changes nothing, in one transaction.

        Raises:
            StorageError: the database does not answer.
        """
        return self._run("read", self._readers, work)

    def write(self, work: Callable[[Session], _R]) -> _R:
        """Run work in one transaction, which no other writing one overlaps.

        Raises:
            StorageError: the database does not answer, is locked, full or read-only. When its
                answer was lost, the change may have been made.
        """
        return self._run("write", self._writers, work)

    def _run(
        self, access: str, sessions: sessionmaker[Session], work: Callable[[Session], _R]
    ) -> _R:
        with self._meter.timed(TRANSACTIONS, access=access):
            result, changes = self._retried(sessions, work)
        for change, details in changes:
            self._changed(change, details)
        return result

    def _retried(
        self, sessions: sessionmaker[Session], work: Callable[[Session], _R]
    ) -> tuple[_R, list[tuple[str, Mapping[str, Detail]]]]:
        """What the work returns, and what it noted when it was committed."""
        for attempt in range(ATTEMPTS):
            try:
                with sessions.begin() as session:
                    result = work(session)
            except (DBAPIError, TimeoutError) as error:
                if not _is_transient(error) or attempt == ATTEMPTS - 1:
                    self._meter.add(STORE_FAILURES)
                    # Not the error itself: it quotes SQL and values, and values name clients.
                    raise _translated(error) from None
            else:
                return result, session.info.get(_CHANGES, [])
            _pause(attempt)
        raise AssertionError("the last attempt returns or raises")


def noted(session: Session, event: str, details: Mapping[str, Detail]) -> None:
    """Say what a transaction changes, for `Database` to tell once it is committed."""
    session.info.setdefault(_CHANGES, []).append((event, details))


class HasDatabase(Protocol):
    """What `reading` and `writing` need of a class."""

    @property
    def database(self) -> Database:
        """Where its methods work."""
        ...


def reading(
    method: Callable[Concatenate[_S, Session, _P], _R],
) -> Callable[Concatenate[_S, _P], _R]:
    """Make a method that takes a session one transaction that changes nothing."""

    @functools.wraps(method)
    def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self.database.read(lambda session: method(self, session, *args, **kwargs))

    return run


def writing(
    method: Callable[Concatenate[_S, Session, _P], _R],
) -> Callable[Concatenate[_S, _P], _R]:
    """Make a method that takes a session one transaction; it may run more than once."""

    @functools.wraps(method)
    def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return self.database.write(lambda session: method(self, session, *args, **kwargs))

    return run


def _pause(attempt: int) -> None:
    # Jitter keeps those that collided from colliding again; it protects no secret.
    time.sleep(0.01 * 2**attempt * random.uniform(0.5, 1.5))  # noqa: S311


def _is_transient(error: SQLAlchemyError) -> bool:
    origin = getattr(error, "orig", None)
    if isinstance(origin, sqlite3.Error):
        # The low byte is the error, the rest its variety.
        return (getattr(origin, "sqlite_errorcode", None) or 0) & 0xFF in _LOCKED
    return getattr(origin, "sqlstate", None) in _TRANSIENT


def _translated(error: SQLAlchemyError) -> Exception:
    name = type(error).__name__
    if isinstance(error, IntegrityError | DataError) and not _is_transient(error):
        return RuntimeError(
            f"expected a change that the store's tables allow; the database refused it ({name}); "
            "this is a mistake in the program; report it"
        )
    return StorageError(
        f"expected the store's database to do its work; it did not ({name}); check that it runs, "
        "may be written, has room left and is not locked by another program; then try again"
    )


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        parsed = parsed.set(drivername=_DRIVERS[parsed.drivername])
        engine = _sqlite(parsed) if parsed.drivername == "sqlite" else _postgresql(parsed)
    except ModuleNotFoundError as error:
        raise ConfigurationError(missing(error.name or "of a driver", "postgresql")) from None
    except (SQLAlchemyError, ImportError, ValueError, KeyError) as error:
        # Not the error's text: it may quote the URL, and the URL may hold a password.
        raise ConfigurationError(
            "expected a usable store_url such as sqlite:////folder/file.sqlite3 or "
            f"postgresql://user@host/database; got {type(error).__name__}; check its form and that "
            "the database's driver is installed"
        ) from None
    return engine


def _sqlite(url: URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise ConfigurationError("expected store_url to name a file; a database in memory forgets")
    # Parameters hold receipts and keys; they stay out of the text of errors.
    engine = create_engine(url, hide_parameters=True)
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own BEGIN is deferred, and would not wrap changes of the schema.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={LOCK_WAIT_MS}")
    _write_ahead(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: sqlite3.Cursor) -> None:
    """Let readers and a writer work at once; the file remembers it.

    SQLite refuses this at once, without its wait for locks, while somebody else writes to a file
    that is not so yet: another process that starts on an empty one.
    """
    give_up_at = monotonic() + LOCK_WAIT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode not in _LOCKED or monotonic() >= give_up_at:
                raise
            time.sleep(_LOOK_AGAIN_S)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: URL) -> Engine:
    if "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": str(CONNECT_TIMEOUT_S)})
    engine = create_engine(
        url, hide_parameters=True, isolation_level="SERIALIZABLE", pool_pre_ping=True
    )
    event.listen(engine, "begin", _begin_postgresql)
    return engine


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_WRITES, False):
        # Before the first query, which fixes what the transaction sees. Every change ends in the
        # audit log, so that without a queue writers would only fail one another. They queue at
        # the smallest table: the lock on a large one would be in the way of its vacuum.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCK_WAIT_MS}")
        connection.exec_driver_sql("LOCK TABLE heartbeat IN EXCLUSIVE MODE")
