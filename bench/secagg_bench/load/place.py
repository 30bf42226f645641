"""What the figures depend on: the machine, and no name of a host or a person."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from secagg_bench import one_core

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Processor, versions, cores and memory."""
    return {
        **one_core.machine(),
        "grpc": version("grpcio"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
