"""A federation whose every program has a host of its own, and what must hold after any fault."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from secagg import audit
from secagg.certificates import Kit, Role
from secagg.context import rotation_string
from secagg.errors import SecaggError
from secagg.provision import Federation as Kits
from secagg.release import Release
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.network.hosts import Hosts
from secagg_bench.network.participant import CLIENTS, plan, voices
from secagg_bench.processes import Program
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["CLIENT_HOSTS", "KEY_HOLDER", "SERVER", "Federation", "NotAsExpectedError", "federation"]

SERVER, KEY_HOLDER = "server", "keyholder"
CLIENT_HOSTS = tuple(f"client-{index}" for index in range(CLIENTS))
_SERVER_PORT, _ADMIN_PORT, _KEY_HOLDER_PORT = 7400, 7401, 7402
_LOGS = {KEY_HOLDER: "ledger.sqlite3", SERVER: "server.sqlite3"}
_KEYS = {KEY_HOLDER: ("task_id", "round_number"), SERVER: ("task", "round")}
_POLL_S = 0.02
_START_S = 240.0  # on a machine that does other things
_DIRTY = ("Traceback", "unexpected_error", "task_failed", "storage_failed")


class NotAsExpectedError(Exception):
    """Something did not come about in time."""


@dataclass
class Federation:
    """Running services, each on its host, and the clients of one task after another.

    Attributes:
        hosts: where everything runs.
        folder: kits, data and logs.
        operator: a connection that faults do not reach.
    """

    hosts: Hosts
    folder: Path
    operator: Operator
    services: dict[str, Program]
    _clients: dict[str, Program] = field(default_factory=dict)
    _starts: int = 0

    def start_clients(self) -> None:
        """Start all clients, which wait for tasks."""
        self._starts += 1
        self._tasks.touch()
        (self.folder / "outbox").mkdir(exist_ok=True)
        for index, name in enumerate(CLIENT_HOSTS):
            words = [f"{self.hosts[SERVER].address}:{_SERVER_PORT}", str(self._tasks), str(index)]
            words += [str(self.folder / "kits" / "clients" / name)]
            words += [str(self.folder / "outbox" / name)]
            log = self.folder / f"{name}-{self._starts}.log"
            module = "secagg_bench.network.participant"
            self._clients[name] = self.hosts[name].run(module, words, log)
        self.wait("all clients are here", lambda: self.said("here", "") == CLIENTS, _START_S)

    def stop_clients(self) -> None:
        """End all clients."""
        for client in self._clients.values():
            client.stop()

    @property
    def _tasks(self) -> Path:
        return self.folder / f"tasks-{self._starts}"

    def create(self, task: str, *, rounds: int, deadline_s: float) -> None:
        """Create a task; its rounds close when all clients have contributed."""
        spec = TaskSpec(task, plan(), rounds, round(deadline_s * 1000), 5, CLIENTS)
        self.operator.create_task(spec)

    def join(self, task: str) -> None:
        """Let all clients take part in a task."""
        with self._tasks.open("a", encoding="utf-8") as file:
            file.write(f"{task}\n")

    def wait(self, what: str, condition: Callable[[], bool], limit_s: float = 240.0) -> None:
        """Wait until something holds.

        Raises:
            NotAsExpectedError: it does not in time.
        """
        give_up_at = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > give_up_at:
                raise NotAsExpectedError(f"expected that {what}; not so within {limit_s:g} s")
            time.sleep(_POLL_S)

    def task(self, task: str) -> pb.GetTaskResponse:
        """A task with its rounds."""
        return self.operator.task(task)

    def finished(self, task: str) -> bool:
        """Whether a task has ended, in whatever way, for its clients too."""
        ended = self.task(task).task.state != pb.TASK_STATE_RUNNING
        gone = any(client.process.poll() is not None for client in self._clients.values())
        return ended and (gone or self.said("ended", task) == CLIENTS)

    def said(self, event: str, task: str) -> int:
        """How often clients have said something of a task."""
        return sum(_text(each).count(f"{event}: {task}\n") for each in self._clients.values())

    def violations(self, task: str, contributors: list[list[int]]) -> Iterator[str]:
        """What is not as it must be after a task.

        Args:
            contributors: who must be in the sum of each round.
        """
        answer = self.task(task)
        if answer.task.state != pb.TASK_STATE_FINISHED:
            yield f"the task ended as {answer.task.state}: {answer.task.reason}"
        done = [row for row in answer.rounds if row.state == round_pb2.ROUND_STATE_DONE]
        if [row.round_number for row in done] != list(range(1, len(contributors) + 1)):
            yield f"rounds done: {[row.round_number for row in done]}"
        for row, wanted in zip(done, contributors, strict=False):
            yield from self._counted(task, row.round_number, wanted)
        yield from self._recorded(task, done)
        for name, program in [*self.services.items(), *self._clients.items()]:
            log = _text(program)
            yield from (f"{name} logged {word}" for word in _DIRTY if word in log)
            if name in self.services:
                yield from (f"{name} named a client" for each in CLIENT_HOSTS if each in log)
        for name, client in self._clients.items():
            if client.process.poll() is not None:
                yield f"{name} ended with {client.process.poll()}"

    def _counted(self, task: str, number: int, wanted: list[int]) -> Iterator[str]:
        data, contributors = self.operator.sums(task, number)
        rotation = rotation_string(task, number, plan())
        release = Release(plan(), rotation, contributors, sums_from_bytes(data, plan()))
        found = voices(release.total())
        if found != [int(index in wanted) for index in range(CLIENTS)]:
            yield f"round {number} counted its clients {found} times, not {wanted} once each"
        if contributors != len(wanted):
            yield f"round {number} is said to be of {contributors}"

    def _recorded(self, task: str, done: list[pb.RoundRecord]) -> Iterator[str]:
        """By the audit logs too, whose chains hold: accepted, admitted and released once each."""
        try:
            served, held = (self._entries(name, task) for name in (SERVER, KEY_HOLDER))
        except SecaggError as error:
            yield str(error)
            return
        for row in done:
            wanted = (row.round_number, row.attempt)
            for log, event, times in (
                (served, "upload-accepted", row.contributors),
                (served, "round-finished", 1),
                (held, "round-opened", 1),
                (held, "upload-admitted", row.contributors),
                (held, "norm-judged", row.contributors),
                (held, "round-released", 1),
            ):
                if (found := log[event, *wanted]) != times:
                    yield f"{event} of round {wanted} is logged {found} times, not {times}"

    def _entries(self, name: str, task: str) -> Counter[tuple[str, int, int]]:
        """How often a service has recorded something of an attempt: event, round, attempt."""
        entries = list(audit.read_entries(self.folder / name / _LOGS[name]))
        audit.verify(entries)
        task_key, round_key = _KEYS[name]
        found = [(entry.event, json.loads(entry.details)) for entry in entries]
        return Counter(
            (event, each[round_key], each["attempt"])
            for event, each in found
            if each.get(task_key) == task and "attempt" in each
        )


def _text(program: Program) -> str:
    return program.log.read_text(encoding="utf-8", errors="replace")


def _command_lines(hosts: Hosts, folder: Path) -> dict[str, list[str]]:
    """What is said to each service about where things are."""
    here, key_holder = hosts[SERVER].address, f"{hosts[KEY_HOLDER].address}:{_KEY_HOLDER_PORT}"
    passphrase = folder / "kits" / "custodians" / "passphrase"
    held = ["--listen", key_holder, "--state-dir", str(folder / KEY_HOLDER)]
    served = ["--listen", f"{here}:{_SERVER_PORT}", "--admin-listen", f"{here}:{_ADMIN_PORT}"]
    return {
        KEY_HOLDER: [*held, "--passphrase-file", str(passphrase)],
        SERVER: [*served, "--key-holder", key_holder, "--data-dir", str(folder / SERVER)],
    }


@contextlib.contextmanager
def federation(folder: Path, *, seed: int = 0) -> Iterator[Federation]:
    """Hosts with running services; everything ends with it.

    Raises:
        OSError: there can be no hosts here.
        UnavailableError: a service did not start.
    """
    kits = folder / "kits"
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Hosts(SERVER, KEY_HOLDER, *CLIENT_HOSTS, seed=seed))
        Kits.create(
            kits,
            server_hosts=(hosts[SERVER].address, "127.0.0.1"),
            key_holder_hosts=(hosts[KEY_HOLDER].address,),
            clients=CLIENT_HOSTS,
        )
        services = {}
        for name, words in _command_lines(hosts, folder).items():
            log, ready = folder / f"{name}.log", folder / f"{name}.ready"
            words += ["--kit", str(kits / name), "--ready-file", str(ready)]
            words += ["--monitor-listen", "off"]
            services[name] = hosts[name].run(f"secagg_{name}.cli", ["run", *words], log)
            stack.callback(services[name].stop)
            services[name].wait_for(ready.exists, _START_S)
        door = stack.enter_context(hosts.entrance(SERVER, _ADMIN_PORT))
        kit = Kit.load(kits / "operators" / "admin", Role.OPERATOR)
        operator = stack.enter_context(contextlib.closing(Operator(door, kit)))
        running = Federation(hosts, folder, operator, services)
        stack.callback(running.stop_clients)
        running.start_clients()
        yield running
