"""Processes full of clients, each over a connection of its own, by mutual TLS.

`Uploaders` go in two steps, so that what is measured is the uploads alone: first all of them are
encrypted and put into outboxes, one after another; then, at a word, all are sent at once, each in a
thread. `Rounders` go through a whole round, one client after another: what a client fetches,
encrypts and sends is timed, and nothing is kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from secagg.encryptor import encrypt_quantized
from secagg.errors import RoundError, SecaggError
from secagg.quantize import quantize
from secagg.rpc.retry import RetryPolicy
from secagg.sampling import Stream
from secagg.wire.codec import upload_to_bytes
from secagg_bench.load.members import contribution, quantized
from secagg_bench.processes import Services
from secagg_client.outbox import Kept, Outbox
from secagg_client.session import ClientKit, ClientSession

__all__ = ["Rounders", "Sent", "Turn", "Uploaders", "all_turns"]

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


@dataclass(frozen=True, slots=True)
class Turn:
    """What a client took in a round.

    Attributes:
        fetch_s: to read its kit, connect, ask for the round and download the model.
        encrypt_s: to quantise, encrypt, seal and sign.
        upload_s: to send it all and be told that it was accepted.
        cpu_s: processor time of all that.
        accepted_at: when it was told so, on this machine's monotonic clock.
        upload_bytes: what it sent.
        refused: why it was not taken; empty where it was.
    """

    fetch_s: float = 0.0
    encrypt_s: float = 0.0
    upload_s: float = 0.0
    cpu_s: float = 0.0
    accepted_at: float = 0.0
    upload_bytes: int = 0
    refused: str = ""


@dataclass
class _Process:
    """Such a process, seen from the one that started it.

    Attributes:
        within: a command that runs another in a place of its own, in front of it.
    """

    services: Services
    task_id: str
    clients: Sequence[int]
    folder: Path
    log: Path
    within: Sequence[str] = ()
    _process: subprocess.Popen[str] = field(init=False, repr=False)
    _way: ClassVar[str]

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
                [*self.within, sys.executable, "-m", __name__, self._way, json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def send(self) -> None:
        """The word."""
        stdin = cast(TextIO, self._process.stdin)
        stdin.write("\n")
        stdin.flush()

    def stop(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        line = cast(TextIO, self._process.stdout).readline()
        if not line:
            said = self.log.read_text("utf-8", errors="replace")[-2000:]
            raise SecaggError(
                f"expected clients that go on; they ended, and their log says: {said}"
            )
        return line

    def _sums(self) -> list[NDArray[np.int64]]:
        """What its clients' integers add up to, computed in the clear, by segment."""
        folder = _sums_folder(self.folder, self.clients)
        return [np.load(path) for path in sorted(folder.glob("*.npy"))]


def _sums_folder(folder: Path, clients: Sequence[int]) -> Path:
    return folder / f"sums-{clients[0]}"


class Uploaders(_Process):
    """A process whose clients encrypt first, and then all send at once."""

    _way = "at once"

    def encrypted(self) -> list[NDArray[np.int64]]:
        """Wait until all is encrypted; what it adds up to, computed in the clear."""
        self._line()
        return self._sums()

    def sent(self) -> list[Sent]:
        """Wait for what became of all uploads."""
        found = [Sent(**each) for each in json.loads(self._line())]
        self._process.wait()
        return found


class Rounders(_Process):
    """A process whose clients go through a round one after another, beginning at a word."""

    _way = "in turn"

    def ready(self) -> None:
        """Wait until they could begin."""
        self._line()

    def turns(self) -> Iterator[Turn]:
        """What each client took, as soon as it is done; whoever is refused is the last."""
        for _ in self.clients:
            turn = Turn(**json.loads(self._line()))
            yield turn
            if turn.refused:
                return

    def added(self) -> list[NDArray[np.int64]]:
        """What it all adds up to, computed in the clear; after the last turn."""
        self._line()
        self._process.wait()
        return self._sums()


def all_turns(processes: Sequence[Rounders], tell: Callable[[int], None]) -> Iterator[Turn]:
    """Give all the word; what their clients took, as they are done.

    Args:
        tell: told how many are done, each time.

    Raises:
        RoundError: an upload was refused.
        SecaggError: a process ended.
    """
    found: SimpleQueue[Turn | Exception] = SimpleQueue()

    def follow(one: Rounders) -> None:
        try:
            for turn in one.turns():
                found.put(turn)
        except Exception as error:  # of whatever kind: whoever waits is to know
            found.put(error)

    for one in processes:
        one.send()
        threading.Thread(target=follow, args=(one,), daemon=True).start()
    for done in range(1, sum(len(one.clients) for one in processes) + 1):
        turn = found.get()
        if isinstance(turn, Exception):
            raise turn
        if turn.refused:
            raise RoundError(f"expected uploads that are accepted; one was not: {turn.refused}")
        tell(done)
        yield turn


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
            kit = self._kit(number)
            with self._session(kit, time.sleep) as session:
                current = next(iter(session.rounds()))
            context = current.context
            parts = quantized(context, number)
            upload = encrypt_quantized(context, parts, kit.identity, current.commitment)
            self._outbox(number).save(Kept(context, current.key_holder, upload))
            self._add([part.summand for part in parts])
        self.save()

    def rounds(self) -> Iterator[Turn]:
        """Go through a round as each client, one after another, up to one that is refused."""
        for number in self._numbers:
            turn = self._round(number)
            yield turn
            if turn.refused:
                return

    def _round(self, number: int) -> Turn:
        clock = _Clock()
        try:
            kit = self._kit(number)
            with self._session(kit, time.sleep) as session:
                current = next(iter(session.rounds()))
                fetch_s, context = clock.lap(), current.context
                own = contribution(context.plan, number, current.number)
                clock.lap(counts=False)
                parts = quantize(
                    context.plan,
                    own,
                    samples=1,
                    rotation=context.rotation,
                    randomness=Stream.from_os(),
                )
                upload = encrypt_quantized(context, parts, kit.identity, current.commitment)
                encrypt_s = clock.lap()
                session.send(context, upload)
                upload_s = clock.lap()
        except SecaggError as error:
            return Turn(refused=error.reason)
        self._add([part.summand for part in parts])
        size = len(upload_to_bytes(upload))
        return Turn(fetch_s, encrypt_s, upload_s, clock.cpu_s, clock.at, size)

    def save(self) -> None:
        """Write down what everybody's integers add up to."""
        folder = _sums_folder(self._folder, self._numbers)
        folder.mkdir(parents=True, exist_ok=True)
        for place, total in enumerate(self._sums):
            np.save(folder / f"{place}.npy", total)

    def _add(self, parts: list[NDArray[np.int64]]) -> None:
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
            with self._session(self._kit(number), nap) as session:
                session.send(kept.context, kept.upload)
        except Exception as error:  # of whatever kind: it is the result
            refused = getattr(error, "reason", type(error).__name__)
        sent.append(Sent(number, time.monotonic() - started, waits, refused))

    def _session(self, kit: ClientKit, nap: Callable[[float], None]) -> ClientSession:
        retry = RetryPolicy(sleep=nap)
        return ClientSession(self._server, self._task, kit, retry=retry)

    def _kit(self, number: int) -> ClientKit:
        return ClientKit.load(self._kits / "clients" / f"client-{number + 1}")

    def _outbox(self, number: int) -> Outbox:
        return Outbox(self._folder / f"client-{number}", self._task)


class _Clock:
    """Laps of wall time, and the processor time of those that count.

    Attributes:
        at: end of the last lap.
        cpu_s: of this process so far.
    """

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.at, self._used = time.monotonic(), time.process_time()

    def lap(self, *, counts: bool = True) -> float:
        """Seconds since the last one."""
        began, used = self.at, self._used
        self.at, self._used = time.monotonic(), time.process_time()
        self.cpu_s += self._used - used if counts else 0.0
        return self.at - began


def _say(word: object) -> None:
    print(json.dumps(word), flush=True)


def _main(way: str, asked: str) -> None:
    os.nice(NICENESS)
    clients = _Clients(json.loads(asked))
    if way == Uploaders._way:
        clients.encrypt()
        _say("encrypted")
        _say([asdict(one) for one in clients.send(sys.stdin.readline)])
    else:
        _say("ready")
        sys.stdin.readline()
        for turn in clients.rounds():
            _say(asdict(turn))
        clients.save()
        _say("added")


if __name__ == "__main__":
    _main(*sys.argv[1:])
