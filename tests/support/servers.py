"""A server without a network: its store, blobs and coordinator, on a clock that tests move."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import numpy as np
from clocks import ManualClock
from key_holders import LocalKeyHolder
from numpy.typing import NDArray
from serving import soon
from stores import migrated

from secagg.audit import Entry
from secagg.context import RoundContext
from secagg.enrolment import OpenEnrolment, Roster
from secagg.errors import UnavailableError
from secagg.instruments import SILENT, Meter
from secagg.parameters import Plan
from secagg.receipts import NO_COMMITMENT
from secagg.upload import Upload
from secagg.wire.codec import model_digest, model_to_bytes, sums_from_bytes
from secagg_server.blobs import BlobStore
from secagg_server.ciphertexts import here
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import TaskState
from secagg_server.store import RoundRow, Store, round_key
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

__all__ = [
    "DEADLINE_S",
    "DOWN",
    "START",
    "Killed",
    "Server",
    "breathe",
    "dies_at",
    "exactly",
    "running",
    "scenario",
    "task",
]

DEADLINE_S = 30.0
START = np.linspace(-1, 1, 11, dtype=np.float32)
DOWN = UnavailableError("expected an answer; the other side is unreachable")

SECRET = b"a secret that outlives a server."


class Server:
    """Everything of a server but the network."""

    def __init__(
        self,
        folder: Path,
        key_holder: LocalKeyHolder | None = None,
        *,
        roster: Roster | None = None,
        clock: ManualClock | None = None,
        meter: Meter = SILENT,
        compute: Callable[..., Any] = here,
    ) -> None:
        self.store = Store(migrated(folder / "store.sqlite3"), meter=meter)
        self.folder = folder / "blobs"
        self.blobs = BlobStore(self.folder)
        self.clock = clock or ManualClock()
        self.rounds = OpenRounds(self.clock)
        self.roster = roster or OpenEnrolment()
        self.key_holder = key_holder or LocalKeyHolder(self.roster)
        self.intake = Intake(self.store, self.blobs, self.rounds, self.roster, meter=meter)
        self.verdicts = VerdictDesk(self.store, self.roster, SECRET)
        self.coordinator = Coordinator(
            *(self.store, self.blobs, self.rounds, self.key_holder, self.clock, self.roster),
            compute=compute,
            secret=SECRET,
            meter=meter,
        )

    def create(self, spec: TaskSpec) -> None:
        """Create and start a task, as the operator's service does."""
        model = model_to_bytes(START) if spec.model else b""
        if spec.model:
            self.blobs.put_model(spec.task_id, 0, model)
        self.store.create_task(spec, model_digest(model))
        self.coordinator.start(spec)

    async def collecting(self, number: int = 1, attempt: int = 1) -> OpenRound:
        """The round, once it collects."""
        await soon(lambda: self.newest() == (number, attempt))
        await self.clock.watched()
        return self.open_round()

    def open_round(self) -> OpenRound:
        """The task's open round, as the coordinator opened it."""
        return self.rounds._open["task"]

    def newest(self) -> tuple[int, int] | None:
        """Round and attempt that collect now."""
        found = self.rounds._open.get("task")
        return found and (found.context.id.round_number, found.context.id.attempt)

    def send(self, context: RoundContext, upload: Upload, caller: str | None = None) -> None:
        """What the service does for a client that uploads."""
        _, missing = self.intake.open(upload.admission, caller)
        receipt = upload.admission.receipt
        named = (context.id, receipt.client_key, receipt.upload_digest)
        for index in missing:
            self.intake.put_chunk(*named, index, cohort.chunk(upload, index), caller)
        self.intake.commit(*named, caller)
        accepted = self.store.counts(round_key(context)).accepted
        self.rounds.note_upload(context.id, accepted)

    def send_all(self, context: RoundContext, indexes: Iterable[int]) -> None:
        """The honest uploads of these clients."""
        for index in indexes:
            self.send(context, cohort.encrypted(context, index, self.commitment(index)))

    def commitment(self, index: int) -> bytes:
        """What client i's receipt holds of its challenge in the open round."""
        current = self.rounds._open.get("task")
        if current is None or current.challenger is None:
            return NO_COMMITMENT
        return current.challenger.commitment(cohort.identity(index).public)

    async def ended(self, number: int = 1, attempt: int = 1) -> RoundRow:
        """The attempt's record, once it has ended."""
        await soon(lambda: self.row(number, attempt).ended_at is not None)
        return self.row(number, attempt)

    def row(self, number: int, attempt: int) -> RoundRow:
        """The attempt's record; one that says nothing when there is none."""
        rows = [r for r in self.store.rounds("task") if r.key[1:] == (number, attempt)]
        return rows[0] if rows else RoundRow(ended_at=None)

    async def task_ended(self) -> tuple[TaskState, str]:
        """How the task ended, and why."""
        await soon(lambda: self.store.task("task").state is not TaskState.RUNNING)
        row = self.store.task("task")
        return row.state, row.reason

    def sums(self, plan: Plan, number: int) -> tuple[NDArray[np.int64], ...]:
        """A round's stored sums."""
        return sums_from_bytes(self.blobs.sums("task", number), plan)

    def model(self, version: int) -> NDArray[np.float32]:
        """A stored model version."""
        return np.frombuffer(self.blobs.model("task", version), "<f4")

    async def tidied(self) -> None:
        """Wait until no chunk is left: they go just after a round has ended."""
        await soon(lambda: self.upload_files() == [])

    def upload_files(self) -> list[Path]:
        """Every chunk on the disk; chunks may be on their way out meanwhile."""
        walked = os.walk(self.folder / "uploads")
        return [Path(folder) / name for folder, _, names in walked for name in names]

    def events(self, name: str) -> list[Entry]:
        """The audit log's entries of one kind."""
        return [entry for entry in self.store.audit() if entry.event == name]


@asynccontextmanager
async def running(folder: Path, *arguments: Any, **options: Any) -> AsyncIterator[Server]:  # noqa: ANN401 - a server's
    """A server over a folder; see `Server` for the arguments. In the end it is stopped."""
    server = Server(folder, *arguments, **options)
    try:
        yield server
    finally:
        await server.coordinator.stop()
        server.store.close()


def task(plan: Plan | None = None, **changes: int) -> TaskSpec:
    """Two rounds of the mixed plan, or of another one."""
    plan = plan or cohort.mixed_plan()
    spec = TaskSpec("task", plan, 2, round(DEADLINE_S * 1000), 3, plan.max_clients)
    return replace(spec, **changes)


def scenario(work: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """A test that is a coroutine."""

    def test(tmp_path: Path) -> None:
        asyncio.run(work(tmp_path))

    test.__name__, test.__doc__ = work.__name__, work.__doc__
    return test


async def breathe() -> None:
    """Let everything that can run, run for a while."""
    for _ in range(50):
        await asyncio.sleep(0)


def exactly(found: Iterable[NDArray[np.int64]], wanted: Iterable[NDArray[np.int64]]) -> None:
    """The same integers, segment by segment."""
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


class Killed(BaseException):
    """Stands for the process ending on the spot."""


def dies_at(owner: object, method: str, *, done: bool, call: int = 1) -> None:
    """Kill the process at one call of a blocking method: before its effect, or right after it."""
    work, calls = getattr(owner, method), 0

    @functools.wraps(work)
    def dying(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - any method
        nonlocal calls
        calls += 1
        if calls < call:
            return work(*arguments, **options)
        if done:
            work(*arguments, **options)
        raise Killed

    setattr(owner, method, dying)
