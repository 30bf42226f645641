"""Whole rounds: the real server and key holder, and clients by gRPC and mutual TLS, on one machine.

Each client has a kit and a connection of its own: it asks for the round, downloads the model,
quantises, encrypts, uploads, and is told that this was accepted. A few processes go through them
all, each one client at a time, as real clients come at different times, and at low priority, as
they are other machines. The sums that the operator gets must be exactly those of the clients'
integers, computed in the clear; else there are no rows.

For each size of a cohort, server and key holder start anew. A first small round, with the norm
check if a system has it, is left out, for what is loaded late. On lines, server and key holder
share one host, and the clients another; what there is of a line, they have one after another.

Data are in the temporary folder, which is to be on a real disk: every chunk is flushed to it, and
all uploads of a round lie there until they are summed.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.context import rotation_string
from secagg.errors import RoundError
from secagg.parameters import NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.release import Release
from secagg.wire.codec import MODEL_VALUE_BYTES, sums_from_bytes
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_bench.load.members import update_of
from secagg_bench.load.uploaders import Rounders, all_turns
from secagg_bench.load.uploads import Watch, ended
from secagg_bench.load.vitals import used
from secagg_bench.network.hosts import Hosts, unable
from secagg_bench.network.wire import Line
from secagg_bench.processes import Services, running_services
from secagg_bench.suite.rows import UNITS, Metric, Row
from secagg_bench.suite.scenarios import Access, Rounds, Setup
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

__all__ = ["check_exact", "line_of", "measured"]

ROUND_TRIPS = 5
"""What a client waits for at the very least: TCP, TLS, the round, the model, and the last word."""

_SERVER, _CLIENTS = "server", "clients"
_DEADLINE_MS = 24 * 3600 * 1000
_FIRST_CLIENTS, _FIRST_PARAMETERS = 3, 4096
_POLL_S = 0.02
_TENTHS = 10

OnProgress = Callable[[str], None]


def measured(
    scenario: Rounds, machine: str, say: OnProgress, *, first_seed: int = 1
) -> Iterator[Row]:
    """The rows of a scenario, as they are measured; none where it cannot be, which is told.

    Args:
        machine: what it runs on, for the rows.
        say: told how far it has come.
        first_seed: of the first repetition; those that follow count on.

    Raises:
        RoundError: an upload was refused, or a sum is not exactly that of the clients' integers.
        SecaggError: a program did not start, or ended.
    """
    if why := _hindrance(scenario):
        say(f"{scenario.name} is not measured: {why}")
        return
    row = {
        "scenario": scenario.name,
        "version": _version(),
        "parameters": scenario.parameters,
        "machine": machine,
    }
    for clients in scenario.clients:
        with _place(scenario, say) as place:
            takers = scenario.takers(clients)
            for setup in {each.norm_check: each for each in takers}.values():
                place.first_round(setup)
            for seed in range(first_seed, first_seed + scenario.repetitions):
                for setup in takers:
                    found = place.round(setup, scenario.parameters, clients)
                    figures = row | {"system": setup.name, "clients": clients, "seed": seed}
                    for metric, value in found.items():
                        yield Row.model_validate(
                            figures | {"metric": metric, "value": value, "unit": UNITS[metric]}
                        )


def _hindrance(scenario: Rounds) -> str:
    """Why it cannot be measured here; empty if it can be."""
    if not Path("/proc/self/stat").exists():
        return "what programs take is read from Linux's /proc"
    return unable() if scenario.has_lines else ""


def check_exact(sums: Sequence[NDArray[np.int64]], clear: Sequence[NDArray[np.int64]]) -> None:
    """Whether sums are exactly what the clients' integers add up to.

    Args:
        sums, clear: int64 (values,) for each segment.

    Raises:
        RoundError: they are not.
    """
    wrong = sum(
        int(np.count_nonzero(one != other)) if one.shape == other.shape else one.size
        for one, other in zip(sums, clear, strict=True)
    )
    if wrong:
        raise RoundError(
            f"expected exactly the sum of the clients' integers; {wrong} of "
            f"{sum(one.size for one in sums)} differ; nothing of this round may be believed"
        )


def line_of(access: Access) -> Line:
    """What a wire does with each direction of a line."""
    rate = access.megabits_s and access.megabits_s * 1e6 / 8
    return Line(delay_s=access.round_trip_ms / 2000, bytes_per_s=rate)


@dataclass
class _Place:
    """Running programs, and where their clients are.

    Attributes:
        within: a command in front of a client's process, which puts it there.
        hosts: those that a wire connects, if any.
        processes: of clients.
        title: of the scenario, for progress.
    """

    services: Services
    operator: Operator
    within: Sequence[str]
    hosts: Hosts | None
    folder: Path
    processes: int
    title: str
    say: OnProgress
    _tasks: int = 0

    def first_round(self, setup: Setup) -> None:
        """One that is not measured."""
        self._line(None)
        self._played(setup, _FIRST_PARAMETERS, _FIRST_CLIENTS, lambda _done: None)

    def round(self, setup: Setup, parameters: int, clients: int) -> dict[Metric, float]:
        """One round of all clients.

        Raises:
            RoundError: an upload was refused, or the sum is not exact.
        """
        title = f"{self.title}: {setup.name}, {parameters:,} parameters, {clients} clients"
        told = 0

        def tell(done: int) -> None:
            nonlocal told
            if (tenths := done * _TENTHS // clients) > told:
                told = tenths
                self.say(f"{title}: {done} accepted")

        self.say(title)
        self._line(setup.access)
        found = self._played(setup, parameters, clients, tell)
        if setup.access is not None:
            size = found[Metric.UPLOAD] + MODEL_VALUE_BYTES * parameters
            found[Metric.LEAST] = clients * setup.access.least_s(int(size), ROUND_TRIPS)
        return found

    def _line(self, access: Access | None) -> None:
        if self.hosts is not None:
            self.hosts.degrade(_CLIENTS, _SERVER, line_of(access or Access()))

    def _played(
        self, setup: Setup, parameters: int, clients: int, tell: Callable[[int], None]
    ) -> dict[Metric, float]:
        plan, key_holder, server = _plan(setup, parameters), *self._pids
        self._tasks += 1
        task = f"round-{self._tasks}"
        watch = Watch(server, key_holder)
        self.operator.create_task(TaskSpec(task, plan, 1, _DEADLINE_MS, 1, clients))
        with self._clients(task, clients) as processes:
            self._wait_until_open(task)
            used_before = used(server), used(key_holder)
            with watch.watching():
                began = time.monotonic()
                turns = list(all_turns(processes, tell))
                sums, contributors = self._sums(task, plan)
                over = time.monotonic()
            used_after = used(server), used(key_holder)
            clear = [sum(parts) for parts in zip(*(one.added() for one in processes), strict=True)]
        if contributors != clients:
            raise RoundError(f"expected {clients} contributors; got {contributors}")
        check_exact(sums, clear)
        release = Release(plan, rotation_string(task, 1, plan), contributors, tuple(sums))
        return {
            Metric.ROUND: over - began,
            Metric.FETCHING: sum(turn.fetch_s for turn in turns),
            Metric.ENCRYPTING: sum(turn.encrypt_s for turn in turns),
            Metric.UPLOADING: sum(turn.upload_s for turn in turns),
            Metric.CONCLUDING: over - max(turn.accepted_at for turn in turns),
            Metric.CLIENTS_CPU: sum(turn.cpu_s for turn in turns),
            Metric.SERVER_CPU: used_after[0] - used_before[0],
            Metric.KEY_HOLDER_CPU: used_after[1] - used_before[1],
            Metric.SERVER_MEMORY: float(watch.most["server_all_rss"]),
            Metric.KEY_HOLDER_MEMORY: float(watch.most["key_holder_all_rss"]),
            Metric.UPLOAD: float(max(turn.upload_bytes for turn in turns)),
            Metric.ERROR: _error(release, parameters, clients),
        }

    @property
    def _pids(self) -> tuple[int, int]:
        """Of the key holder and the server."""
        key_holder, server = (program.process.pid for program in self.services.programs)
        return key_holder, server

    @contextlib.contextmanager
    def _clients(self, task: str, clients: int) -> Iterator[list[Rounders]]:
        """Processes of clients that could begin."""
        folder, log = self.folder / "clients", self.folder / "clients.log"
        shares = np.array_split(np.arange(clients), min(self.processes, clients))
        with contextlib.ExitStack() as stack:
            processes = []
            for share in shares:
                one = Rounders(self.services, task, share.tolist(), folder, log, self.within)
                stack.callback(one.stop)
                processes.append(one)
            for one in processes:
                one.ready()
            yield processes
        shutil.rmtree(folder)

    def _wait_until_open(self, task: str) -> None:
        """Wait for the key holder's round key: no client is to wait for it."""
        while True:
            answer = self.operator.task(task)
            if answer.task.state != pb.TASK_STATE_RUNNING:
                raise RoundError(
                    f"expected a round that opens; the task ended: {answer.task.reason}"
                )
            if any(row.state == round_pb2.ROUND_STATE_COLLECTING for row in answer.rounds):
                return
            time.sleep(_POLL_S)

    def _sums(self, task: str, plan: Plan) -> tuple[Sequence[NDArray[np.int64]], int]:
        """What the operator gets, once it is there, and of how many."""
        answer = ended(self.operator, task)
        if answer.task.state != pb.TASK_STATE_FINISHED:
            raise RoundError(f"expected a task that finishes; it failed: {answer.task.reason}")
        data, contributors = self.operator.sums(task, 1)
        return sums_from_bytes(data, plan), contributors


@contextlib.contextmanager
def _place(scenario: Rounds, say: OnProgress) -> Iterator[_Place]:
    """Programs that have just started, in a folder that goes with them."""
    enrolled = max(*scenario.clients, _FIRST_CLIENTS)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="secagg-rounds-"))
        folder, hosts = Path(name), None
        within: Sequence[str] = ()
        say(f"{scenario.name}: starting, {enrolled} clients enrolled")
        if not scenario.has_lines:
            services = stack.enter_context(running_services(folder, enrolled))
        else:
            hosts = stack.enter_context(Hosts(_SERVER, _CLIENTS))
            host, within = hosts[_SERVER], hosts[_CLIENTS].within
            services = stack.enter_context(
                running_services(folder, enrolled, address=host.address, within=host.within)
            )
            port = int(services.admin.rpartition(":")[2])
            door = stack.enter_context(hosts.entrance(_SERVER, port))
            services = replace(services, admin=door)
        operator = stack.enter_context(contextlib.closing(services.operator()))
        yield _Place(
            *(services, operator, within, hosts, folder, scenario.processes, scenario.name, say)
        )


def _plan(setup: Setup, parameters: int) -> Plan:
    return plan_tensors(
        {"w": (parameters,)},
        max_clients=setup.max_clients,
        clip=1.0,
        bits=setup.bits,
        norm_check=NormCheck() if setup.norm_check else None,
    )


def _error(release: Release, parameters: int, clients: int) -> float:
    """Largest difference of the mean from that of the clients' updates."""
    total = np.zeros(parameters)
    for number in range(clients):
        total += update_of(parameters, number, 1)
    return float(np.abs(release.mean()["w"] - total / clients).max())


def _version() -> str:
    found = [f"secagg {version('secagg')}"]
    found += [f"{name} {version(name)}" for name in ("grpcio", "numpy", "tenseal")]
    return ", ".join([*found, f"Python {platform.python_version()}"])
