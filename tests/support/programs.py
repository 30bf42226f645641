"""The real programs on ports that stay theirs: what a test kills starts again as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cohort
import numpy as np

from secagg import audit
from secagg.context import RoundContext
from secagg.errors import ClosedError
from secagg.optimisers import Optimiser
from secagg.parameters import NormCheck
from secagg.quantize import flatten
from secagg.release import Release
from secagg.rpc.retry import RetryPolicy
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.processes import Program, Services, provisioned
from secagg_client.session import ClientKit, ClientSession, CurrentRound
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = [
    "CLIENTS",
    "KEY_HOLDER",
    "SERVER",
    "Clients",
    "Machine",
    "exact",
    "free_port",
    "session",
    "task",
]

KEY_HOLDER, SERVER = "keyholder", "server"
CLIENTS = range(3)
TASK_ID = "task"
DEADLINE_MS = 60_000
_LOGS = {KEY_HOLDER: "ledger.sqlite3", SERVER: "server.sqlite3"}
_JOIN_S = 60.0
_POLL_S = 0.02


def task(rounds: int, *, deadline_ms: int = DEADLINE_MS, max_attempts: int = 5) -> TaskSpec:
    """Rounds close as soon as all clients have contributed; uploads are checked for their norm.

    The server's optimiser has a state, so that a round which is done twice would show in the model.
    """
    plan = cohort.mixed_plan(norm_check=NormCheck())
    spec = TaskSpec(TASK_ID, plan, rounds, deadline_ms, max_attempts, len(CLIENTS))
    return replace(spec, optimiser=Optimiser("adam"))


def free_port() -> int:
    """A port that no connection is given by chance while its owner is away."""
    for port in random.sample(range(15_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("expected a free port")


class Machine:
    """Kits, data and both programs in one folder; everything stops when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kits = provisioned(folder, len(CLIENTS))
        self.key_holder = f"127.0.0.1:{free_port()}"
        self.server = f"127.0.0.1:{free_port()}"
        self.admin = f"127.0.0.1:{free_port()}"
        self._running: dict[str, Program] = {}

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._running.values():
            program.stop()

    def command(self, name: str) -> list[str]:
        """Module and command line of a program."""
        arguments = ["--ready-file", str(self.folder / f"{name}.ready")]
        arguments += ["--kit", str(self.kits / name), "--monitor-listen", "127.0.0.1:0"]
        if name == KEY_HOLDER:
            arguments += ["--listen", self.key_holder, "--state-dir", str(self.folder / name)]
            arguments += ["--passphrase-file", str(self.kits / "custodians" / "passphrase")]
        else:
            arguments += ["--listen", self.server, "--admin-listen", self.admin]
            arguments += ["--key-holder", self.key_holder, "--data-dir", str(self.folder / name)]
        return [f"secagg_{name}.cli", "run", *arguments]

    def start(self, name: str, failpoint: str = "") -> Program:
        """Start a program, which dies when it reaches the failpoint, and wait until it listens."""
        ready, log = self.folder / f"{name}.ready", self.folder / f"{name}.log"
        ready.unlink(missing_ok=True)
        module, *arguments = self.command(name)
        environment = {"SECAGG_FAILPOINT": failpoint}
        program = self._running[name] = Program(module, arguments, log, environment)
        program.wait_for(ready.exists)
        return program

    def program(self, name: str) -> Program:
        """A program as it was started last."""
        return self._running[name]

    def environment(self) -> dict[str, str]:
        """For a process that imports what tests do."""
        return os.environ | {"PYTHONPATH": str(Path(__file__).parent)}

    def kill(self, *names: str) -> None:
        """SIGKILL, to all of them at once."""
        for name in names:
            self._running[name].process.kill()
        for name in names:
            assert self._running[name].process.wait(10) == -signal.SIGKILL

    def stop(self) -> list[int]:
        """Ask both programs to stop; their exit codes."""
        return [program.stop() for program in self._running.values()]

    def services(self) -> Services:
        """Where everything is."""
        programs = tuple(self._running.values())
        return Services(self.server, self.admin, self.key_holder, self.kits, programs)

    @contextlib.contextmanager
    def operator(self) -> Iterator[Operator]:
        """A connection as the operator."""
        with contextlib.closing(self.services().operator()) as operator:
            yield operator

    def client_kit(self, index: int) -> ClientKit:
        """Client i's kit."""
        return ClientKit.load(self.services().client_kit(index))

    def outbox(self, index: int) -> Path:
        """Where client i keeps what it has encrypted."""
        return self.folder / f"client-{index}"

    def entries(self, name: str) -> list[audit.Entry]:
        """A program's audit log, verified from its first entry to its last."""
        entries = list(audit.read_entries(self.folder / name / _LOGS[name]))
        assert audit.verify(entries) == entries[-1]
        return entries


def session(machine: Machine, index: int) -> ClientSession:
    """Client i's session, which outlives programs that are away for a while."""
    return ClientSession(
        machine.server,
        TASK_ID,
        machine.client_kit(index),
        rounding=lambda context: cohort.rounding(context, index),
        retry=RetryPolicy(initial_s=0.02, longest_s=0.3, total_s=30.0),
        outbox=machine.outbox(index),
    )


@dataclass
class Clients:
    """Clients in a thread each, round after round until the task ends.

    Attributes:
        before: called before each contribution; false lets the round pass without this client.
        seen: the rounds that each client was offered: context and model version.
    """

    machine: Machine
    before: Callable[[int, CurrentRound], bool] = lambda _index, _current: True
    seen: list[list[tuple[RoundContext, int]]] = field(
        default_factory=lambda: [[] for _ in CLIENTS]
    )
    _failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._threads = [
            threading.Thread(target=self._take_part, args=(index,), daemon=True)
            for index in CLIENTS
        ]
        for thread in self._threads:
            thread.start()

    def _take_part(self, index: int) -> None:
        try:
            with session(self.machine, index) as connected:
                for current in connected.rounds():
                    self.seen[index].append((current.context, current.model.version))
                    if self.before(index, current):
                        values = cohort.contribution(current.context.plan, index)
                        with contextlib.suppress(ClosedError):
                            current.contribute(values, samples=cohort.samples(index))
        except BaseException as error:
            self._failures.append(error)

    def finish(self) -> None:
        """Wait until the task has ended for everybody, or has failed for somebody."""
        give_up_at = time.monotonic() + _JOIN_S
        while any(thread.is_alive() for thread in self._threads) and not self._failures:
            assert time.monotonic() < give_up_at, "the task does not end"
            self._threads[0].join(_POLL_S)
            self._threads[-1].join(_POLL_S)
        if self._failures:
            raise self._failures[0]


def exact(machine: Machine, rounds: int) -> pb.GetTaskResponse:
    """Every round of the task is done, once, with the sums and the model of the oracle."""
    with machine.operator() as operator:
        answer = operator.task(TASK_ID)
        assert answer.task.state == pb.TASK_STATE_FINISHED, answer.task.reason
        done = [row for row in answer.rounds if row.state == round_pb2.ROUND_STATE_DONE]
        numbers = list(range(1, rounds + 1))
        assert [row.round_number for row in done] == numbers
        assert [row.model_version for row in done] == numbers
        assert (answer.task.rounds_done, answer.task.model_version) == (rounds, rounds)
        assert [row.contributors for row in done] == [len(CLIENTS)] * rounds
        plan = task(rounds).plan
        contexts = [
            cohort.round_context(plan, task_id=TASK_ID, round_number=number) for number in numbers
        ]
        for context in contexts:
            data, contributors = operator.sums(TASK_ID, context.id.round_number)
            assert contributors == len(CLIENTS)
            _same_sums(data, context)
    _same_model(machine, contexts)
    return answer


def _same_sums(data: bytes, context: RoundContext) -> None:
    wanted = cohort.clear_sums(context, CLIENTS)
    for one, other in zip(sums_from_bytes(data, context.plan), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def _same_model(machine: Machine, contexts: Sequence[RoundContext]) -> None:
    segment, optimiser = task(1).model, task(1).optimiser
    assert segment is not None
    model = np.zeros(segment.parameters, dtype=np.float32)
    state = optimiser.initial(segment.parameters)
    for context in contexts:
        sums = tuple(cohort.clear_sums(context, CLIENTS))
        release = Release(context.plan, context.rotation, len(CLIENTS), sums)
        model, state = optimiser.step(model, release.flat_mean(), state)
    with session(machine, 0) as connected:
        found = connected.latest_model()
    assert found.version == len(contexts)
    np.testing.assert_array_equal(flatten(segment, found.tensors), model)
