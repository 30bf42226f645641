"""Files for their owner alone: written whole or not at all, and on disk before a call returns."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["flush", "locked", "make_folder", "open_to_others", "remove_drafts", "write"]

_DRAFT = ".draft"


def write(path: Path, data: bytes | memoryview) -> None:
    """Put a file in place in one step, mode 0600; missing folders are made.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    make_folder(path.parent)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=".", suffix=_DRAFT, delete=False
    ) as file:
        draft = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
            flush(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Make a folder of mode 0700, and those above it, unless they are there.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        make_folder(folder.parent)
        # Somebody else may make it at the same moment.
        folder.mkdir(mode=0o700, exist_ok=True)
        flush(folder.parent)


def remove_drafts(folder: Path) -> None:
    """Remove what a killed program was about to write here or below; it may hold secrets.

    Raises:
        OSError: a draft cannot be removed.
    """
    for draft in folder.rglob(f".*{_DRAFT}"):
        draft.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other programs that lock this folder waiting.

    Raises:
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_to_others(status: os.stat_result) -> bool:
    """Whether anybody but its owner can read or change a file of secrets.

    One that root owns may be readable by its group, unless root itself asks: only an administrator
    can have lent it, as Kubernetes lends Secrets to a pod. PostgreSQL has the same rule for
    ``ssl_key_file``.
    """
    lent = status.st_uid == 0 and os.geteuid() != 0
    return bool(status.st_mode & (0o037 if lent else 0o077))


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
