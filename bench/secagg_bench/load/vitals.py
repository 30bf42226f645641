"""What running programs take of the machine, read from /proc; no figure comes from themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Vitals", "family", "folder_bytes", "vitals"]

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Vitals:
    """One process at one moment.

    Attributes:
        rss, peak: bytes of memory that it has now, and had at most.
        fds, threads: how many are open, and run.
        cpu_s: processor time that it has used.
    """

    rss: int
    peak: int
    fds: int
    threads: int
    cpu_s: float


def vitals(pid: int) -> Vitals:
    """A process of ours as it is now.

    Raises:
        OSError: it has ended.
    """
    folder = _PROC / str(pid)
    status = dict(
        line.split(":", 1)
        for line in (folder / "status").read_text("ascii", "replace").splitlines()
    )
    # After the command in brackets, which may hold spaces; utime and stime.
    used = (folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[11:13]
    return Vitals(
        rss=_kilobytes(status["VmRSS"]),
        peak=_kilobytes(status["VmHWM"]),
        fds=len(list((folder / "fd").iterdir())),
        threads=int(status["Threads"]),
        cpu_s=sum(map(int, used)) / _TICKS,
    )


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def family(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, while they run."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in (_PROC / str(pid) / "task").iterdir():
            for child in (thread / "children").read_text("ascii").split():
                found += [int(child), *family(int(child))]
    return found


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what is removed meanwhile does not count."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _sizes(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False).st_size
