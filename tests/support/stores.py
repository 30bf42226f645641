"""Stores of tests, in SQLite, that have their tables already: all migrations take a while."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from secagg_server.store import Store

__all__ = ["migrated"]


def migrated(file: Path) -> str:
    """The URL of a store in this file, which is made with the newest tables if it is not there."""
    if not file.exists():
        file.write_bytes(_empty())
    return f"sqlite:///{file}"


@functools.cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "store.sqlite3"
        Store(f"sqlite:///{file}").close()
        return file.read_bytes()
