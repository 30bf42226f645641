"""Measurements on one core: a process of their own with one thread, pinned, that prints JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["hardware", "in_child", "machine", "pin", "timed"]

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def timed(action: Callable[[], object]) -> float:
    """Seconds of processor time that an action takes: what else the machine does is left out."""
    started = time.process_time()
    action()
    return time.process_time() - started


def in_child(module: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the child prints
    """Run a hidden command of one of our modules with one thread, and read its JSON.

    A child, since numpy reads the number of threads when it is loaded.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(  # noqa: S603 - our own module and numbers
        command, check=True, stdout=subprocess.PIPE, env=os.environ | _ONE_THREAD
    )
    return json.loads(done.stdout)


def pin() -> None:
    """Keep this process on one core, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine() -> dict[str, str]:
    """What the figures depend on, and no name of a host or a person."""
    return {
        "processor": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "tenseal": version("tenseal"),
    }


def hardware() -> str:
    """System, processor, cores and memory, as far as the system tells; no name of a host."""
    facts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} cores"]
    with contextlib.suppress(OSError):
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        facts[1:1] = re.findall(r"^model name\s*:\s*(.+)$", known, re.MULTILINE)[:1]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts.append(f"{memory / 2**30:.0f} GiB")
    return ", ".join(facts)
