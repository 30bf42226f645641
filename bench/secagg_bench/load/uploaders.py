"""A process full of clients, each in a thread and over a connection of its own, by mutual TLS.

In two steps, so that what is measured is the uploads alone: first all of them are encrypted and put
into outboxes, one after another; then, at a word, all are sent at once, as a client sends them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import SecaggError
from secagg.rpc.retry import RetryPolicy
from secagg_bench.load.members import quantized
from secagg_bench.processes import Services
from secagg_client.outbox import Kept, Outbox
from secagg_client.session import ClientKit, ClientSession

__all__ = ["Sent", "Uploaders"]

PATIENCE_S = 600.0
NICENESS = 10
"""Clients stand for other machines: they must not take the processor from the server."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one client's upload.

    Attributes:
        seconds: from the word to the last answer.
        waits: how often it was told to wait, or found nobody.
        refused: why it was not taken; empty where it was.
    """

    client: int
    seconds: float
    waits: int
    refused: str


@dataclass
class Uploaders:
    """Such a process, seen from the one that started it."""

    services: Services
    task_id: str
    clients: Sequence[int]
    folder: Path
    log: Path
    _process: subprocess.Popen[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        asked = {
            "server": self.services.server,
            "kits": str(self.services.kits),
            "task": self.task_id,
            "clients": list(self.clients),
            "folder": str(self.folder),
        }
        with self.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", __name__, json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def encrypted(self) -> list[NDArray[np.int64]]:
        """Wait until all is encrypted; what it adds up to, computed in the clear."""
        self._line()
        return [np.load(path) for path in sorted(self._sums.glob("*.npy"))]

    @property
    def _sums(self) -> Path:
        return self.folder / f"sums-{self.clients[0]}"

    def send(self) -> None:
        """The word."""
        stdin = cast(TextIO, self._process.stdin)
        stdin.write("\n")
        stdin.flush()

    def sent(self) -> list[Sent]:
        """Wait for what became of all uploads."""
        found = [Sent(**each) for each in json.loads(self._line())]
        self._process.wait()
        return found

    def stop(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        line = cast(TextIO, self._process.stdout).readline()
        if not line:
            raise SecaggError(f"expected clients that go on; they ended, see {self.log.name}")
        return line


class _Clients:
    """The same, from within."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._server, self._task = asked["server"], asked["task"]
        self._kits, self._folder = Path(asked["kits"]), Path(asked["folder"])
        self._numbers: list[int] = asked["clients"]
        self._sums: list[NDArray[np.int64]] = []

    def encrypt(self) -> None:
        """Put everybody's upload into its outbox, and write down their sum."""
        for number in self._numbers:
            with self._session(number, time.sleep) as session:
                current = next(iter(session.rounds()))
            kit, context = self._kit(number), current.context
            parts = quantized(context, number)
            upload = encrypt_quantized(context, parts, kit.identity, current.commitment)
            self._outbox(number).save(Kept(context, current.key_holder, upload))
            self._add([part.summand for part in parts], context)
        folder = self._folder / f"sums-{self._numbers[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        for place, total in enumerate(self._sums):
            np.save(folder / f"{place}.npy", total)

    def _add(self, parts: list[NDArray[np.int64]], context: RoundContext) -> None:
        if not self._sums:
            self._sums = [np.zeros_like(part) for part in parts]
        for total, part in zip(self._sums, parts, strict=True):
            total += part

    def send(self, wait: Callable[[], object]) -> list[Sent]:
        """Send everything at once, once ``wait`` has returned."""
        sent: list[Sent] = []
        threads = [
            threading.Thread(target=self._send, args=(number, kept, sent), daemon=True)
            for number in self._numbers
            if (kept := self._outbox(number).latest())
        ]
        wait()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        return sent

    def _send(self, number: int, kept: Kept, sent: list[Sent]) -> None:
        waits, started, refused = 0, time.monotonic(), ""

        def nap(seconds: float) -> None:
            nonlocal waits
            waits += 1
            time.sleep(seconds)

        try:
            with self._session(number, nap) as session:
                session.send(kept.context, kept.upload)
        except Exception as error:  # of whatever kind: it is the result
            refused = getattr(error, "reason", type(error).__name__)
        sent.append(Sent(number, time.monotonic() - started, waits, refused))

    def _session(self, number: int, nap: Callable[[float], None]) -> ClientSession:
        retry = RetryPolicy(sleep=nap)
        return ClientSession(self._server, self._task, self._kit(number), retry=retry)

    def _kit(self, number: int) -> ClientKit:
        return ClientKit.load(self._kits / "clients" / f"client-{number + 1}")

    def _outbox(self, number: int) -> Outbox:
        return Outbox(self._folder / f"client-{number}", self._task)


def _main(asked: str) -> None:
    os.nice(NICENESS)
    clients = _Clients(json.loads(asked))
    clients.encrypt()
    print("encrypted", flush=True)
    sent = clients.send(sys.stdin.readline)
    fields = ("client", "seconds", "waits", "refused")
    print(json.dumps([{name: getattr(one, name) for name in fields} for one in sent]), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
