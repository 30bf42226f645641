"""Starts the real programs as processes, and always stops them again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from secagg.errors import UnavailableError

__all__ = ["Program", "Services", "running_services"]

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.02


class Program:
    """One of our programs as a child process, its output in a log file.

    Args:
        module: what ``python -m`` runs.
        arguments: its command line.
        log: file that receives standard output and error.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        # One thread each: the programs share the machine's few cores, and sums of floats must not
        # depend on how many threads computed them.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until the program is ready.

        Raises:
            UnavailableError: it ended, or took too long; the message has the end of its log.
        """
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise UnavailableError(
                    f"expected the program to start; its log says: {self.tail()}"
                )
            time.sleep(_POLL_S)

    def tail(self) -> str:
        """The last lines of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def stop(self) -> int:
        """Ask the program to stop, and insist after a while; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass(frozen=True, slots=True)
class Services:
    """A running key holder and server.

    Attributes:
        server, admin, key_holder: their addresses, ``host:port``.
        programs: the processes.
    """

    server: str
    admin: str
    key_holder: str
    programs: tuple[Program, ...]


def _start(module: str, arguments: Sequence[str], folder: Path) -> tuple[Program, dict[str, str]]:
    ready = folder / f"{module.partition('.')[0]}.ready"
    ready.unlink(missing_ok=True)
    log = folder / f"{module.partition('.')[0]}.log"
    program = Program(module, ["run", "--ready-file", str(ready), *arguments], log)
    try:
        program.wait_for(ready.exists)
    except UnavailableError:
        program.stop()
        raise
    addresses: dict[str, str] = json.loads(ready.read_text(encoding="utf-8"))
    return program, addresses


@contextlib.contextmanager
def running_services(folder: Path, *, key_holder_port: int = 0) -> Iterator[Services]:
    """A key holder and a server on free loopback ports, with their data below ``folder``.

    Raises:
        UnavailableError: one of them did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        key_holder, opened = _start(
            "secagg_keyholder.cli", ["--listen", f"127.0.0.1:{key_holder_port}"], folder
        )
        stack.callback(key_holder.stop)
        arguments = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
        arguments += ["--key-holder", opened["listen"], "--data-dir", str(folder / "server")]
        server, served = _start("secagg_server.cli", arguments, folder)
        stack.callback(server.stop)
        yield Services(
            served["listen"], served["admin_listen"], opened["listen"], (key_holder, server)
        )
