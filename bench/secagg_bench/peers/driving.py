"""The benchmark's side of a worker: start it where its system is installed, and say what to do."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any

from secagg.errors import UnavailableError
from secagg_bench.peers.environments import FOLDER, interpreter

__all__ = ["Opened", "Peer", "SetUp", "Step", "Upload"]

_WORKER = Path(__file__).with_name("worker.py")
_ANSWER_LIMIT_S = 1800.0
_STOP_LIMIT_S = 10.0
_TAIL = 2000


@dataclass(frozen=True, slots=True)
class Step:
    """What one step took.

    Attributes:
        cpu_s: processor time of the worker, all threads, in seconds.
        wall_s: seconds that passed.
        parts: processor seconds of parts of it, by name.
        beside: processor seconds of what was measured with it, and is not in it.
    """

    cpu_s: float
    wall_s: float
    parts: Mapping[str, float]
    beside: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SetUp(Step):
    """The same, with the versions of the system (``system``), Python, numpy and other libraries."""

    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Upload(Step):
    """What a client did, and how many bytes it sends."""

    bytes: int


@dataclass(frozen=True, slots=True)
class Opened(Step):
    """What opening took, and what came before.

    Attributes:
        bytes: that the server handed over.
        hand_over: the server's part: making these bytes.
    """

    bytes: int
    hand_over: Step


@dataclass
class Peer:
    """One worker, as a context manager; its commands are those of `worker`.

    A worker that has failed once has ended, and answers nothing more.

    Args:
        system: a module of ``systems``.
        core: that it is to stay on; any when omitted.
        folder: of the environments.
        python: an interpreter to run it with; the one of its environment when omitted.
    """

    system: str
    core: int | None = None
    folder: Path = FOLDER
    python: Path | None = None
    _process: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)

    def __enter__(self) -> Peer:
        """Start the worker; its environment is made first, if that has to be.

        Raises:
            UnavailableError: that cannot be done.
        """
        python = self.python or interpreter(self.system, self.folder)
        command = [str(python), str(_WORKER), self.system]
        if self.core is not None:
            command += ["--core", str(self.core)]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603 - our own program, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the worker end, and insist after a while."""
        process = self._running()
        self._process = None
        try:
            process.communicate(timeout=_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        self._log.close()

    def set_up(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        clients: int,
        seed: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> SetUp:
        """Keys that last, and all that has to be loaded.

        Args:
            shapes: of the tensors of an update, by name.
            clients: of the cohort.
            seed: of the updates, until `round` has another one.
            options: of the system; see its module.

        Raises:
            UnavailableError: the worker failed; the message says why. So do all commands.
        """
        answer = self._ask(
            "set up", shapes=shapes, clients=clients, seed=seed, options=options or {}
        )
        return SetUp(**answer)

    def round(self, seed: int | None = None) -> Step:
        """Begin another round.

        Args:
            seed: of the updates from now on; those that there were when omitted.
        """
        return Step(**self._ask("round", seed=seed))

    def client(self, number: int) -> Upload:
        """Have a client protect its update."""
        return Upload(**self._ask("client", number=number))

    def add(self, number: int) -> Step:
        """Have the server take in what this client made."""
        return Step(**self._ask("add", number=number))

    def open(self) -> Opened:
        """Have the sum handed over and opened."""
        answer = self._ask("open")
        return Opened(**answer | {"hand_over": Step(**answer["hand_over"])})

    def error(self) -> float:
        """Largest absolute difference between the opened mean and the true one."""
        return float(self._ask("error")["error"])

    def peak_bytes(self) -> int:
        """Most memory that the worker, with all parties in it, held in a step of this round."""
        return int(self._ask("memory")["peak_bytes"])

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise UnavailableError(f"expected a worker for {self.system}; use it in a with block")
        return self._process

    def _ask(self, do: str, **arguments: object) -> dict[str, Any]:
        process = self._running()
        assert process.stdin and process.stdout  # noqa: S101, PT018 - both are pipes
        too_long = Timer(_ANSWER_LIMIT_S, process.kill)
        too_long.start()
        try:
            process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said last is still to be read
        finally:
            line = process.stdout.readline()
            too_long.cancel()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise UnavailableError(
                f"expected {self.system} to answer {do!r}; its worker has ended; it said last: "
                f"{self._tail()}"
            ) from None
        if "error_kind" in answer:
            raise UnavailableError(
                f"expected {self.system} to {do}; got {answer['error_kind']}: {answer['message']}"
            )
        return answer

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_TAIL:].decode("utf-8", errors="replace").strip()
