"""The ledger's SQLite file: one connection, transactions that last, and a log of every change."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from secagg.audit import Detail, Entry, next_entry
from secagg.errors import ConfigurationError, SecaggError, StorageError
from secagg.private_files import flush, make_folder
from secagg_keyholder.schema import MIGRATIONS

__all__ = ["LEDGER", "Change", "Database", "as_error", "check", "of_state", "utc_now"]

LEDGER = "ledger.sqlite3"
"""The ledger's file in a key holder's state directory."""

Change = Callable[[str, Mapping[str, Detail]], None]
"""Called with the name and the details of something that has changed."""

_BUSY_SECONDS = 10.0

# FULL: a commit is on the disk when it returns. secure_delete: what is deleted is overwritten.
_SETTINGS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON")


def _ignored(event: str, details: Mapping[str, Detail]) -> None:
    """Of no interest."""


class Database:
    """A SQLite file of this version's tables. Safe to use from several threads.

    Every method raises StorageError when the file cannot be read or written.

    Args:
        path: made, for its owner alone, if it is not there; brought to this version if it is older.
        changed: told of each entry of the audit log, once it is committed.

    Raises:
        ConfigurationError: not a ledger, one of a newer version, or not to be opened.
    """

    def __init__(self, path: Path, changed: Change = _ignored) -> None:
        self._path = path
        self._changed = changed
        self._changes: list[tuple[str, Mapping[str, Detail]]] = []
        self._lock = threading.RLock()
        with as_error(ConfigurationError, path):
            self._connection = _connected(path)
            try:
                with self._committed():
                    self._migrate()
            except BaseException:
                self._connection.close()
                raise

    def _migrate(self) -> None:
        version = _version(self._connection)
        for number in range(version, len(MIGRATIONS)):
            for statement in MIGRATIONS[number]:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version = {number + 1}")
        if version < len(MIGRATIONS):
            self.log("ledger-migrated", version=len(MIGRATIONS), before=version)

    def close(self) -> None:
        """Release the file."""
        with self._lock:
            self._connection.close()

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """What a query finds; what another thread has not committed yet is waited for."""
        with self._lock, as_error(StorageError, self._path):
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make what is done within last when it ends, all of it or nothing."""
        with self._lock:
            self._changes = []
            with as_error(StorageError, self._path), self._committed():
                yield
            changes = self._changes
        for event, details in changes:
            self._changed(event, details)

    @contextmanager
    def _committed(self) -> Iterator[None]:
        # The write lock is taken at once, so that what a transaction reads is true when it commits.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # Some failures have rolled back already.
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def change(self, statement: str, *values: object) -> int:
        """Change rows within a :meth:`transaction`; how many it were."""
        return self._connection.execute(statement, values).rowcount

    def log(self, event: str, **details: Detail) -> None:
        """Append to the audit log within a :meth:`transaction`.

        Args:
            details: must not name clients; see `audit.client_hash`.
        """
        rows = self._connection.execute(
            """SELECT sequence, time, event, details, previous, hash FROM audit
                ORDER BY sequence DESC LIMIT 1"""
        ).fetchall()
        last = Entry(*rows[0]) if rows else None
        entry = next_entry(last, event, details, datetime.now(UTC))
        self.change("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", *astuple(entry))
        self._changes.append((event, details))

    def ping(self) -> None:
        """Write something and forget it.

        Raises:
            StorageError: the file cannot be written.
        """
        with self.transaction():
            self.change("INSERT OR REPLACE INTO facts VALUES ('ping', ?)", utc_now())

    def copy_to(self, other: sqlite3.Connection) -> None:
        """Copy everything that is committed."""
        with self._lock, as_error(StorageError, self._path):
            self._connection.backup(other)


def utc_now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@contextmanager
def as_error(kind: type[SecaggError], path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk raise into an error that says what to do about the file."""
    try:
        yield
    # SQLite's own words about a damaged file need not be text, and it may ask for any memory.
    except (sqlite3.Error, OSError, UnicodeDecodeError, MemoryError) as error:
        # Not the error's text: it may quote a statement.
        what = getattr(error, "sqlite_errorname", None) or getattr(error, "strerror", None)
        raise kind(
            f"expected a ledger that can be read and written; {path}: "
            f"{what or type(error).__name__}; check that it is one, its owner and the space left"
        ) from None


def _connected(path: Path) -> sqlite3.Connection:
    if not path.exists():
        make_folder(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        flush(path.parent)
    db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _check_version(db, path)
        for setting in _SETTINGS:
            db.execute(f"PRAGMA {setting}")
    except BaseException:
        db.close()
        raise
    return db


def of_state(state_dir: Path) -> Database:
    """The ledger of a state directory, in use or not.

    Raises:
        ConfigurationError: there is none; or see `Database`.
    """
    path = state_dir / LEDGER
    if not path.exists():
        raise ConfigurationError(
            f"expected a key holder's state_dir; {str(state_dir)!r} has no ledger; pass the one "
            "that it runs with"
        )
    return Database(path)


def check(path: Path) -> None:
    """Refuse a file that `Database` would refuse; one that is not there yet is fine.

    Raises:
        ConfigurationError: not a ledger, one of a newer version, or not to be opened.
    """
    if path.exists():
        with as_error(ConfigurationError, path), closing(sqlite3.connect(path)) as db:
            _check_version(db, path)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    version = _version(db)
    if version < 0:
        raise ConfigurationError(
            f"expected a ledger; {path} has version {version}, as no ledger has; it is damaged: "
            "take a backup"
        )
    if version > len(MIGRATIONS):
        raise ConfigurationError(
            f"expected a ledger of version {len(MIGRATIONS)} or older; {path} has version "
            f"{version}; run the newer key holder that wrote it"
        )
    if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ConfigurationError(
            f"expected a key holder's ledger; {path} is another database; choose another file"
        )
