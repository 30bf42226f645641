"""What a service asks of the system before it serves: room for connections, and memory given back.

For programs, at their start; it holds for the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource

__all__ = ["MAX_CONNECTIONS", "most_connections", "settle_in"]

MAX_CONNECTIONS = 8192
"""Of one listener, whatever the system allows."""

_FILES = 3 * MAX_CONNECTIONS
_MMAP_THRESHOLD = 256 << 10
_ARENAS = 2
# From glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def settle_in() -> None:
    """Raise the limit on open files, as far as it may be, and have large buffers given back.

    Chunks of uploads and of models come and go in many threads. Left to itself, glibc would keep
    them in a heap of each thread, where one small object holds a large one's place: memory would
    follow the busiest moment that there ever was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # Elsewhere than on Linux with glibc there is no such call, and no need for it.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_ARENA_MAX, _ARENAS)


def most_connections() -> int:
    """Connections that one listener takes: a third of the files that the process may open.

    Two listeners leave the last third for the disk, the database and the other side.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft // 3))
