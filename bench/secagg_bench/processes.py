"""Provisions a federation, starts the real programs as processes, and always stops them again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from secagg.certificates import Kit, Role
from secagg.errors import UnavailableError
from secagg.provision import Federation
from secagg_server.operator import Operator

__all__ = ["Program", "Services", "provisioned", "running_services"]

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.02


class Program:
    """One of our programs as a child process, its output in a log file.

    Args:
        module: what ``python -m`` runs.
        arguments: its command line.
        log: file that receives standard output and error.
        environment: variables on top of this process's.
        within: a command that runs another in a place of its own, in front of ours.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        within: Sequence[str] = (),
    ) -> None:
        self.log = log
        # One thread each: the programs share the machine's few cores, and sums of floats must not
        # depend on how many threads computed them.
        variables = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        variables |= dict(environment or {})
        with log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [*within, sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
            )

    def wait_for(self, ready: Callable[[], bool], limit_s: float = START_TIMEOUT_S) -> None:
        """Wait until the program is ready.

        Raises:
            UnavailableError: it ended, or took too long; the message has the end of its log.
        """
        give_up_at = time.monotonic() + limit_s
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
    """A running key holder and server of one federation.

    Attributes:
        server, admin, key_holder: their addresses, ``host:port``.
        kits: the federation's folder, see `Federation`.
        programs: the processes.
        monitor: address of the server's monitor, which has the operator's page.
    """

    server: str
    admin: str
    key_holder: str
    kits: Path
    programs: tuple[Program, ...]
    monitor: str = ""

    def client_kit(self, number: int) -> Path:
        """The folder of client ``number``, from 0."""
        return self.kits / "clients" / f"client-{number + 1}"

    def operator(self) -> Operator:
        """A connection as the operator."""
        return Operator(self.admin, Kit.load(self.kits / "operators" / "admin", Role.OPERATOR))


def provisioned(folder: Path, clients: int, address: str = LOOPBACK) -> Path:
    """Kits for one machine, below ``folder``, made at the first call; their folder.

    Args:
        address: at which the server is found, beside loopback.
    """
    kits = folder / "federation"
    if not kits.exists():
        hosts = tuple(dict.fromkeys(("localhost", LOOPBACK, address)))
        names = [f"client-{number + 1}" for number in range(clients)]
        Federation.create(kits, server_hosts=hosts, key_holder_hosts=hosts, clients=names)
    return kits


def _start(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
) -> tuple[Program, dict[str, str]]:
    ready = folder / f"{module.partition('.')[0]}.ready"
    ready.unlink(missing_ok=True)
    log = folder / f"{module.partition('.')[0]}.log"
    words = ["run", "--ready-file", str(ready), *arguments]
    program = Program(module, words, log, environment, within=within)
    try:
        program.wait_for(ready.exists)
    except UnavailableError:
        program.stop()
        raise
    addresses: dict[str, str] = json.loads(ready.read_text(encoding="utf-8"))
    return program, addresses


@contextlib.contextmanager
def running_services(
    folder: Path,
    clients: int,
    *,
    key_holder_port: int = 0,
    environment: Mapping[str, str] | None = None,
    address: str = LOOPBACK,
    within: Sequence[str] = (),
) -> Iterator[Services]:
    """A key holder and a server on free ports, over mutual TLS.

    Args:
        folder: for kits, data and logs.
        clients: how many to enrol.
        environment: variables on top of this process's, such as further settings.
        address: where the server listens; the key holder, and the server's monitor, are on
            loopback.
        within: a command that runs another in a place of its own, in front of both.

    Raises:
        UnavailableError: one of them did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kits = provisioned(folder, clients, address)
    with contextlib.ExitStack() as stack:
        arguments = ["--listen", f"{LOOPBACK}:{key_holder_port}", "--kit", str(kits / "keyholder")]
        arguments += ["--passphrase-file", str(kits / "custodians" / "passphrase")]
        arguments += ["--state-dir", str(folder / "keyholder"), "--monitor-listen", "off"]
        key_holder, opened = _start("secagg_keyholder.cli", arguments, folder, environment, within)
        stack.callback(key_holder.stop)
        arguments = ["--listen", f"{address}:0", "--admin-listen", f"{address}:0"]
        arguments += ["--kit", str(kits / "server"), "--data-dir", str(folder / "server")]
        arguments += ["--key-holder", opened["listen"], "--monitor-listen", f"{LOOPBACK}:0"]
        server, served = _start("secagg_server.cli", arguments, folder, environment, within)
        stack.callback(server.stop)
        programs = (key_holder, server)
        yield Services(
            served["listen"],
            served["admin_listen"],
            opened["listen"],
            kits,
            programs,
            served["monitor_listen"],
        )
