"""Brings a database to the tables of `schema`, or says that it is not there yet."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from secagg.errors import ConfigurationError

__all__ = ["check", "upgrade"]

_FIRST = "0001"
_LOCK_ID = 0x5ECA66
# Alembic keeps the migration that runs in a global of its own.
_ALEMBIC = threading.Lock()


def upgrade(engine: Engine) -> None:
    """Make or change the tables, in one transaction, so that they are the newest ones.

    Raises:
        ConfigurationError: a database that does not answer, may not be changed, or was made by a
            newer version.
    """
    try:
        with engine.connect() as connection, _ALEMBIC:
            _begin_alone(connection)
            _upgrade(connection)
            connection.commit()
    except (SQLAlchemyError, CommandError) as error:
        raise _unusable(error) from None


def check(engine: Engine) -> None:
    """Refuse what :func:`upgrade` would refuse, without changing anything.

    Raises:
        ConfigurationError: a database that does not answer, or was made by a newer version.
    """
    if _is_missing(engine):
        folder = Path(engine.url.database or "").parent
        if not folder.is_dir():
            raise _unusable(FileNotFoundError(folder))
        return
    try:
        current = _version_of(engine)
    except (SQLAlchemyError, CommandError) as error:
        raise _unusable(error) from None
    _refuse_newer(ScriptDirectory.from_config(_config()), current)


def _is_missing(engine: Engine) -> bool:
    """Whether connecting would make the database, as it does with a file."""
    file = engine.url.database or ""
    if engine.dialect.name != "sqlite" or file.startswith("file:"):
        return False
    return not Path(file).exists() or Path(file).stat().st_size == 0


def _version_of(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return _current(connection)


def _upgrade(connection: Connection) -> None:
    config, current = _config(), _current(connection)
    scripts = ScriptDirectory.from_config(config)
    _refuse_newer(scripts, current)
    if current == scripts.get_current_head():
        return
    config.attributes["connection"] = connection
    if current is None and inspect(connection).has_table("tasks"):
        # Made before versions were written down: these are the tables of the first one.
        command.stamp(config, _FIRST)
    command.upgrade(config, "head")


def _begin_alone(connection: Connection) -> None:
    """Begin a transaction that waits for any other one that upgrades."""
    if connection.dialect.name == "sqlite":
        # Outside of a transaction, or it does nothing. A table that others refer to could not be
        # replaced by its successor otherwise.
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
        # The pool must not hand it out again like this.
        connection.detach()
        connection.execution_options(secagg_writes=True)
        connection.begin()
    else:
        # Each query sees what others have committed meanwhile.
        connection.execution_options(isolation_level="READ COMMITTED")
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK_ID})"))


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(scripts: ScriptDirectory, current: str | None) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    if current is not None and current not in known:
        raise ConfigurationError(
            f"expected a store of version {scripts.get_current_head()} or older; got version "
            f"{current}, made by a newer server; run that one, or restore a backup"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "secagg_server:migrations")
    return config


def _unusable(error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"expected a database that answers at store_url; got {type(error).__name__}; check that it "
        "runs, that it may be changed and that a file's folder is writable"
    )
