"""What running programs take of the machine, read from /proc; no figure comes from themselves."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Vitals", "family", "folder_bytes", "used", "vitals"]

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
    if "VmRSS" not in status:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))  # nobody has waited for it
    return Vitals(
        rss=_kilobytes(status["VmRSS"]),
        peak=_kilobytes(status["VmHWM"]),
        fds=len(list((folder / "fd").iterdir())),
        threads=int(status["Threads"]),
        cpu_s=sum(_times(pid)[:2]) / _TICKS,
    )


def used(pid: int) -> float:
    """Seconds of processor time of a process and of all that it has started, ended ones too.

    Raises:
        OSError: it has ended.
    """
    total = sum(_times(pid))
    for each in family(pid):
        with contextlib.suppress(OSError):
            total += sum(_times(each))
    return total / _TICKS


def _times(pid: int) -> list[int]:
    """Ticks in user and system mode, and the same of the ended children that it has waited for."""
    # After the command in brackets, which may hold spaces.
    stat = (_PROC / str(pid) / "stat").read_text("ascii", "replace")
    return [int(each) for each in stat.rpartition(")")[2].split()[11:15]]


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
