"""One run: everybody starts, things go wrong, the task ends, and the oracle looks at what is left.

It is a function of its `Run`: the same one gives the same order of everything, to the message.
"""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import asyncio
import atexit
import contextlib
import datetime
import functools
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cohort
from clocks import EPOCH
from servers import Killed
from structlog.testing import capture_logs

from secagg.certificates import Kit, Role
from secagg.enrolment import Enrolment, Member
from secagg.errors import SecaggError
from secagg.parameters import NormCheck, Plan
from secagg.rpc.gatekeeper import metadata
from secagg.sketches import Sketch, sketch
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import operator_service_pb2_grpc
from secagg_bench.processes import provisioned
from secagg_client.kits import ClientKit
from secagg_server.states import TaskState
from secagg_server.tasks import TaskSpec
from simulation.clients import Client
from simulation.faults import KEY_HOLDER, SERVER, At, Die, Fault, Lie, Run
from simulation.loop import Owner, VirtualLoop, begin
from simulation.network import AsyncChannel, BlockingChannel, Caller, Network, RpcFailure
from simulation.oracle import Oracle
from simulation.patches import patched
from simulation.services import KeyHolderProcess, Process, ServerProcess

__all__ = ["MOST_CLIENTS", "Report", "World", "simulate"]

MOST_CLIENTS = 8
DEADLINE_S = 30.0
ATTEMPTS = 6
_LONGEST_S = 2 * 3600.0
_LOOK_S = 10.0
_RESTART_S = 5.0
_SWEEP_S = 3700.0
_OF_THE_KEY_HOLDER = {
    "key-stored",
    "round-recorded",
    "upload-admitted",
    "sketch-judged",
    "verdicts-given",
    "release-recorded",
    "release-key-erased",
    "round-closed",
}


@dataclass(frozen=True)
class Report:
    """What came of a run.

    Attributes:
        violations: what did not hold; empty if all is well.
        operations: messages and events, by kind; calls that were told "not yet" are not among
            them.
        injected: faults that really happened, by kind.
        rounds: attempts, by how they ended.
        ended: how the task did.
        seconds: of virtual time.
    """

    violations: tuple[str, ...]
    operations: Counter[str]
    injected: Counter[str]
    rounds: Counter[str]
    ended: str
    seconds: float


def simulate(run: Run) -> Report:
    """Everything that happens in a run."""
    fast = "/dev/shm"  # noqa: S108 - a folder of its own is made there
    where = fast if os.access(fast, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="secagg-", dir=where) as folder:
        loop = VirtualLoop()
        try:
            asyncio.set_event_loop(loop)
            return World(run, Path(folder), loop).live()
        finally:
            asyncio.set_event_loop(None)
            loop.close()


class World:
    """Processes, network, disks, clocks and people of one run."""

    def __init__(self, run: Run, folder: Path, loop: VirtualLoop) -> None:
        self.run, self.folder, self.loop = run, folder, loop
        self.kits, self.passphrase = _federation()
        self.addresses = {SERVER: "127.0.0.1:7400", KEY_HOLDER: "127.0.0.1:7500"}
        self.rosters = {role: cohort.ChangingRoster(_enrolment()) for role in self.addresses}
        self.attempts = ATTEMPTS
        self.full: set[str] = set()
        self.aborted = self.ended = False
        self.operations: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._machine = Owner()
        self._forgetful = set[str]()
        self._revoked: dict[tuple[str, str], float] = {}
        self._wall_s = 0.0
        self._drawn: Counter[str] = Counter()
        self._passed: Counter[str] = Counter()
        self._dying = {
            (each.failpoint, each.nth): each for each in run.happenings if isinstance(each, Die)
        }
        self.processes: dict[str, Process | None] = {SERVER: None, KEY_HOLDER: None}
        self._down: dict[str, asyncio.Event] = {}
        self._sketches: dict[Any, Sketch] = {}
        self.oracle = Oracle(self)
        faults = [each for each in run.happenings if isinstance(each, Fault)]
        self.network = Network(faults, self.delay, self.oracle)
        self.clients = [Client(self, index) for index in range(run.clients)]
        for each in run.happenings:
            # Without a check nothing is beyond a norm.
            harmless = run.plan != "checked" and isinstance(each, Lie) and "norm" in each.what
            if isinstance(each, Lie) and each.client < run.clients and not harmless:
                self.clients[each.client].lies[each.round_number] = each.what
                if each.what == "two uploads":
                    self._forgetful.add(self.clients[each.client].name)
        self.task = _task(run)
        self.has_model = self.task.model is not None

    # --- what the machine is asked ------------------------------------------------------------

    def delay(self, label: str) -> float:
        """Seconds that a message takes."""
        return 0.001 * 300 ** self._draw(label) if self.run.seed else 0.1

    def pause_s(self) -> float:
        """Seconds that a thread gives way for; mostly none."""
        drawn = self._draw("pause") if self.run.seed else 0.0
        return 0.0 if drawn < 0.7 else 0.001 * 100 ** ((drawn - 0.7) / 0.3)

    def _draw(self, label: str) -> float:
        self._drawn[label] += 1
        return random.Random(f"{self.run.seed} {label} {self._drawn[label]}").random()

    def utc(self) -> datetime.datetime:
        """The time of day at the server and at the key holder."""
        return EPOCH + datetime.timedelta(seconds=self.loop.time() + self._wall_s)

    def kit(self, name: str) -> Kit:
        """The server's kit."""
        return Kit.load(self.kits / name, Role.SERVER)

    def server_channel(self, _address: str, kit: Kit) -> AsyncChannel:
        """The server's connection to the key holder."""
        return AsyncChannel(self.network, Caller("server", kit.certificate))

    def client_channel(self, _address: str, kit: Kit) -> BlockingChannel:
        """A client's connection."""
        return BlockingChannel(self.network, Caller(kit.folder.name, kit.certificate))

    def sketch(self, context: Any, name: bytes, chunks: Any, key: bytes, direction: Any) -> Sketch:
        """Computed once: server and client compute the same one, and again after a restart."""
        asked = (context.id.digest, name, key, direction is None)
        if asked not in self._sketches:
            self._sketches[asked] = sketch(context, name, chunks, key, direction)
        return self._sketches[asked]

    def passed(self, failpoint: str) -> None:
        """A process passes a failpoint, and dies there if it is time."""
        self._passed[failpoint] += 1
        if failpoint == "round-finished":
            self.loop.call_soon(self.look)
        dying = self._dying.get((failpoint, self._passed[failpoint]))
        if dying is None or self.network.calm:
            return
        role = KEY_HOLDER if failpoint in _OF_THE_KEY_HOLDER else SERVER
        self.count(f"die at {failpoint}")
        self.kill(role, dying.down_s)
        raise Killed

    def is_revoked(self, name: str) -> bool:
        """Whether anybody refuses this client."""
        return any((role, name) in self._revoked for role in self.rosters)

    def has_lost_its_disk(self, name: str) -> bool:
        """Whether a client does not know any more what it has sent; "two uploads" is as good."""
        return name in self._forgetful

    def revoked_at(self, role: str, name: str) -> float:
        """When somebody began to refuse this client; infinite if never."""
        return self._revoked.get((role, name), float("inf"))

    def has_ended(self) -> bool:
        """Whether the task has, by the server's own record."""
        server = self.processes[SERVER]
        if not isinstance(server, ServerProcess) or server.dead:
            return False
        with contextlib.suppress(SecaggError):
            return server.store.task("task").state is not TaskState.RUNNING
        return False

    # --- a run --------------------------------------------------------------------------------

    def live(self) -> Report:
        """From the start to the end."""
        self.loop.set_exception_handler(lambda _loop, _context: None)
        with patched(self), capture_logs() as logged:
            try:
                self.loop.run_until_complete(self._live())
            finally:
                self.loop.run_until_complete(self._end())
        self.oracle.logged(logged)
        rounds, ended = self._outcome
        return Report(
            tuple(self.oracle.violations),
            self.operations + self.network.messages,
            self.injected + self.network.injected,
            rounds,
            ended,
            self.loop.time(),
        )

    async def _live(self) -> None:
        self._outcome: tuple[Counter[str], str] = (Counter(), "nothing")
        for role in self.processes:
            await self._start(role)
        await self._create()
        late = {
            each.client: each.second
            for each in self.run.happenings
            if isinstance(each, At) and each.what == "a client comes late"
        }
        for client in self.clients:
            self.loop.call_later(late.get(client.index, 0), client.start)
        events = [
            begin(self._happens(each), self._machine)
            for each in self.run.happenings
            if isinstance(each, At)
        ]
        while not (self.has_ended() and (all(e.done() for e in events))):
            await asyncio.sleep(_LOOK_S)
            if self.loop.time() > _LONGEST_S:
                self.oracle.violated("the task does not end")
                break
        await self._calm()
        server, key_holder = self.processes[SERVER], self.processes[KEY_HOLDER]
        assert isinstance(server, ServerProcess)
        assert isinstance(key_holder, KeyHolderProcess)
        self._watched(lambda: self.oracle.finish(server, key_holder))
        rows = server.store.rounds("task")
        task = server.store.task("task")
        self._outcome = (
            Counter(f"{row.state} {row.reason.partition(':')[0]}".strip() for row in rows),
            f"{task.state} {task.reason.partition(':')[0]}".strip(),
        )

    async def _calm(self) -> None:
        """Faults stop, everything runs again, and everybody has time to come to an end."""
        self.network.calm = True
        self.full.clear()
        for _ in range(100):
            await asyncio.sleep(_LOOK_S)
            up = all(p is not None and not p.dead for p in self.processes.values())
            over = all(c.gone or not c.started for c in self.clients)
            if up and self.has_ended() and over:
                break
        else:
            self.oracle.violated("somebody does not come to an end")
        self.ended = True
        self.look()
        await asyncio.sleep(_SWEEP_S)

    async def _end(self) -> None:
        self.ended = True
        for client in self.clients:
            await client.crash()
        for process in self.processes.values():
            if process is not None:
                process.vanish()
                await process.gone()
        rest = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)

    async def _start(self, role: str) -> None:
        """Start a program, again and again if it does not start."""
        while not self.ended:
            try:
                process = ServerProcess(self) if role == SERVER else KeyHolderProcess(self)
            except (SecaggError, OSError):
                await asyncio.sleep(_RESTART_S)
                continue
            except Killed:
                await asyncio.sleep(_RESTART_S)
                continue
            self.processes[role] = process
            return

    def kill(self, role: str, down_s: float) -> None:
        """End a program on the spot, and start it again later."""
        process = self.processes[role]
        if process is None or process.dead:
            return
        self.look()
        process.vanish()
        list(process.cancel())

        async def again() -> None:
            await process.gone()
            await asyncio.sleep(down_s)
            await self._start(role)

        begin(again(), self._machine)

    async def _stop(self, role: str, down_s: float) -> None:
        process = self.processes[role]
        if process is None or process.dead:
            return
        await process.stop()
        await process.gone()
        await asyncio.sleep(down_s)
        await self._start(role)

    def look(self) -> None:
        """Have the oracle look at the disks."""
        server, key_holder = self.processes[SERVER], self.processes[KEY_HOLDER]
        self._watched(lambda: self.oracle.look(server, key_holder))  # type: ignore[arg-type]

    def _watched(self, look: Callable[[], None]) -> None:
        try:
            look()
        except SecaggError:
            pass  # out of order just now
        except Exception as error:  # whatever it is
            self.oracle.violated(f"what is on the disks cannot be read: {error!r}")

    # --- the operator -------------------------------------------------------------------------

    @functools.cached_property
    def _operator(self) -> operator_service_pb2_grpc.OperatorServiceStub:
        kit = _any_kit(self.kits / "operators" / "admin", self.kits)
        channel: Any = AsyncChannel(self.network, Caller("admin", kit))
        return operator_service_pb2_grpc.OperatorServiceStub(channel)

    async def _asks(self, ask: Callable[[], Any]) -> Any:
        """What the operator asks until it is answered."""
        while True:
            try:
                return await ask()
            except RpcFailure as failure:
                if failure.code().name not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    raise
            await asyncio.sleep(1.0)

    async def _create(self) -> None:
        async def requests() -> Any:
            yield pb.CreateTaskRequest(spec=self.task.to_wire())

        options = {"metadata": metadata(), "timeout": 60.0}
        await self._asks(lambda: self._operator.CreateTask(requests(), **options))

    async def _abort(self) -> None:
        self.aborted = True
        request = pb.AbortTaskRequest(task_id="task")
        options = {"metadata": metadata(), "timeout": 30.0}
        await self._asks(lambda: self._operator.AbortTask(request, **options))

    # --- what happens -------------------------------------------------------------------------

    def count(self, what: str) -> None:
        """Something that goes wrong, or an event, has happened."""
        self.operations[what] += 1
        self.injected[what] += 1

    async def _happens(self, each: At) -> None:
        await asyncio.sleep(each.second + (0.5 * self._draw("event") if self.run.seed else 0.0))
        if self.network.calm:
            return
        self.count(each.what)
        client = self.clients[each.client % len(self.clients)]
        name = each.what
        if name == "kill the server":
            self.kill(SERVER, each.number)
        elif name == "kill the key holder":
            self.kill(KEY_HOLDER, each.number)
        elif name == "kill both":
            self.kill(SERVER, each.number)
            self.kill(KEY_HOLDER, each.number)
        elif name == "stop the server":
            await self._stop(SERVER, each.number)
        elif name.startswith("crash a client"):
            await client.crash()
            if name.endswith("outbox"):
                client.forget()
                self._forgetful.add(client.name)
            await asyncio.sleep(each.number)
            client.start()
        elif name == "a client leaves":
            client.gone = True
            await client.crash()
        elif name == "withdraw":
            await client.withdraw()
        elif name == "rotate a key":
            await self._rotate(client, each.number)
        elif name.startswith("revoke"):
            roles = {"server": [SERVER], "holder": [KEY_HOLDER]}.get(name.split()[-1])
            for role in roles or [KEY_HOLDER, SERVER]:
                self._revoke(role, client.name)
        elif name.endswith("full"):
            await self._full(name.removesuffix(" full"), each.number)
        elif name.endswith("locked"):
            await self._locked(name.removesuffix(" locked"), each.number)
        elif name == "clock jumps":
            self._wall_s += (each.number - 30) * 60
        elif name == "abort the task":
            await self._abort()

    async def _rotate(self, client: Client, number: int) -> None:
        fresh = cohort.identity(100 + client.index)
        old = client.kit.identity
        if fresh.public == old.public:
            return
        for role, roster in self.rosters.items():
            del role
            _replace(roster, client.name, signing_keys=(fresh.public, old.public))
        client.kit = ClientKit(client.kit.tls, fresh)
        await client.crash()
        await asyncio.sleep(number)
        client.start()

    def _revoke(self, role: str, name: str) -> None:
        self._revoked.setdefault((role, name), self.loop.time())
        _replace(self.rosters[role], name, revoked=True)

    async def _full(self, what: str, seconds: float) -> None:
        self.full.add(what)
        await asyncio.sleep(seconds)
        self.full.discard(what)

    async def _locked(self, what: str, seconds: float) -> None:
        names = {"store": "server/store.sqlite3", "ledger": "keyholder/ledger.sqlite3"}
        connection = sqlite3.connect(self.folder / names[what], isolation_level=None)
        try:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(seconds)
        finally:
            connection.close()


def _replace(roster: cohort.ChangingRoster, name: str, **changes: Any) -> None:
    current = roster.enrolment
    assert isinstance(current, Enrolment)
    member: Member = replace(current.members[name], **changes)
    roster.enrolment = replace(
        current, serial=current.serial + 1, members={**current.members, name: member}
    )


@functools.cache
def _federation() -> tuple[Path, str]:
    """Kits for everybody, made once a process."""
    folder = tempfile.mkdtemp(prefix="secagg-federation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kits = provisioned(Path(folder), MOST_CLIENTS)
    return kits, (kits / "custodians" / "passphrase").read_text().strip()


@functools.cache
def _enrolment() -> Enrolment:
    kits, _ = _federation()
    names = [f"client-{number + 1}" for number in range(MOST_CLIENTS)]
    members = {}
    for name in names:
        key = ClientKit.load(kits / "clients" / name).identity.public
        members[name] = Member(name, (key,))
    return Enrolment(1, members, (bytes(32),))


@functools.cache
def _any_kit(folder: Path, kits: Path) -> bytes:
    return (folder / "certificate.pem").read_bytes()


@functools.cache
def _plan(kind: str) -> Plan:
    if kind == "counts":
        return cohort.counts_plan(max_clients=MOST_CLIENTS)
    check = NormCheck(sketches=8) if kind == "checked" else None
    return cohort.mixed_plan(max_clients=MOST_CLIENTS, norm_check=check)


def _task(run: Run) -> TaskSpec:
    target = min(max(run.target, 3), run.clients)
    return TaskSpec("task", _plan(run.plan), run.rounds, round(DEADLINE_S * 1000), ATTEMPTS, target)
