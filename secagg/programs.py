"""Where the programs start: a missing extra is one line and an exit code, not a traceback.

Loads nothing but errors before it starts one. Each program names its own extra, which brings all
that it needs, whichever package was missed first.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

from secagg.errors import ConfigurationError
from secagg.extras import missing

__all__ = ["bench", "client", "key_holder", "secagg", "server"]


def secagg() -> None:
    """The `secagg` command."""
    _start("secagg", "cli")


def server() -> None:
    """The `secagg-server` command."""
    _start("secagg_server", "server")


def key_holder() -> None:
    """The `secagg-keyholder` command."""
    _start("secagg_keyholder", "keyholder")


def client() -> None:
    """The `secagg-client` command."""
    _start("secagg_client", "client")


def bench() -> None:
    """The `secagg-bench` command."""
    _start("secagg_bench.suite", "bench")


def _start(package: str, extra: str) -> None:
    # Nothing ends the first process of a container by default. Services heed it in their own way
    # once they serve.
    signal.signal(signal.SIGTERM, _leave)
    try:
        import_module(f"{package}.cli").app()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name.startswith("secagg"):
            raise  # no extra brings our own modules
        line = f"{ConfigurationError.reason}: {missing(name, extra)}"
        print(line, file=sys.stderr)
        raise SystemExit(ConfigurationError.exit_code) from None


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
