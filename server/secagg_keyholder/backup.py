"""Copies of the ledger without its secrets, and one of them in the place of a lost ledger."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from secagg.errors import ConfigurationError, StorageError
from secagg.private_files import write
from secagg_keyholder.database import LEDGER, Database, as_error, of_state, utc_now

__all__ = ["backup_ledger", "clear_backup", "is_backup", "restore_ledger", "write_backup"]


def write_backup(database: Database, target: Path) -> None:
    """Write a consistent copy, without seals and sums, to a new file for its owner alone.

    The copy knows that it is one (:func:`is_backup`). What it lacks never reaches the target's
    disk: it is removed from a copy in memory first.

    Raises:
        ConfigurationError: the file exists, or its folder does not.
        StorageError: it cannot be written; no half of it is left.
    """
    if target.exists() or not target.parent.is_dir():
        raise ConfigurationError(
            f"expected a new file in a folder that exists; got {target}; choose another name"
        )
    with database.transaction():
        database.log("backup-begun")
    with (
        as_error(StorageError, target),
        closing(sqlite3.connect(":memory:", isolation_level=None)) as copy,
    ):
        database.copy_to(copy)
        copy.execute("UPDATE rounds SET sums = NULL")
        copy.execute("UPDATE admissions SET admission = NULL")
        copy.execute("INSERT OR REPLACE INTO facts VALUES ('backup', ?)", (utc_now(),))
        # Without this, what was removed would stay behind in pages that are no longer used.
        copy.execute("VACUUM")
        write(target, copy.serialize())


def backup_ledger(state_dir: Path, target: Path) -> None:
    """Copy the ledger of a state directory, in use or not; see :func:`write_backup`.

    Raises:
        ConfigurationError: there is no ledger, too.
    """
    with closing(of_state(state_dir)) as database:
        write_backup(database, target)


def is_backup(database: Database) -> bool:
    """Whether this was a backup: it may not know of the last releases."""
    return bool(database.rows("SELECT 1 FROM facts WHERE key = 'backup'"))


def clear_backup(database: Database) -> None:
    """Forget that this was a backup, once what follows from it was done."""
    with database.transaction():
        if database.change("DELETE FROM facts WHERE key = 'backup'"):
            database.log("restore-cleared")


def restore_ledger(backup: Path, state_dir: Path) -> None:
    """Copy a backup into an empty state directory.

    Raises:
        ConfigurationError: there is a ledger already, or the file is not a backup.
    """
    target = state_dir / LEDGER
    # What SQLite left beside a ledger would be taken for a part of the one put in its place.
    if any(state_dir.glob(f"{LEDGER}*")):
        raise ConfigurationError(
            f"expected a state_dir without a ledger; {str(state_dir)!r} has one, which knows more "
            "than any backup; move it away only if it is damaged"
        )
    try:
        data = backup.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected a readable backup; {backup}: {error.strerror}"
        ) from None
    write(target, data)
    try:
        _check_backup(target)
    except BaseException:
        target.unlink()
        raise


def _check_backup(path: Path) -> None:
    with closing(Database(path)) as database:
        if not is_backup(database):
            raise ConfigurationError(
                "expected a file written by `secagg-keyholder backup`; this is a ledger that was "
                "copied some other way: it could reopen rounds that were released"
            )
