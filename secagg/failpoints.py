"""Points at which a process can be made to die, for crash tests and nothing else.

A process started with ``SECAGG_FAILPOINT=<name>`` sends itself SIGKILL when it reaches that point:
no handler runs and nothing is flushed. The variable is read once, on import. An unknown name in it
raises ValueError there and then, so that a crash test that names no point can never pass.
"""

from __future__ import annotations

import os
import signal

__all__ = ["NAMES", "failpoint"]

NAMES = frozenset(
    {
        # the server, in the order of a round
        "round-created",
        "round-opened",
        "upload-announced",
        "chunk-stored",
        "upload-accepted",
        "sketch-submitted",
        "verdicts-recorded",
        "uploads-judged",
        "sum-ready",
        "release-received",
        "optimiser-stored",
        "model-stored",
        "round-finished",
        # the key holder, likewise
        "key-stored",
        "round-recorded",
        "upload-admitted",
        "sketch-judged",
        "verdicts-given",
        "release-recorded",
        "release-key-erased",
        "round-closed",
    }
)


def failpoint(name: str) -> None:
    """Kill this process if it was started to die here.

    Raises:
        ValueError: no point has this name, whatever the process was started for.
    """
    if _known(name) == _armed:
        os.kill(os.getpid(), signal.SIGKILL)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"expected one of the failpoints {sorted(NAMES)}; got {name!r}")
    return name


# Empty counts as not set: that is how a Compose file leaves a variable out.
_armed = _known(os.environ["SECAGG_FAILPOINT"]) if os.environ.get("SECAGG_FAILPOINT") else None
