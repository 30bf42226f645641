"""Ports of our own: what else runs on the machine must neither stop a test nor answer it."""

from __future__ import annotations

import contextlib
import socket

__all__ = ["free_addresses"]


def free_addresses(count: int) -> list[str]:
    """Loopback addresses that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes]
