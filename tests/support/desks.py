"""A server's intake for one collecting round, without coordinator and network."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import cohort
from clocks import EPOCH, ManualClock
from stores import migrated

from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import OpenEnrolment
from secagg.instruments import SILENT, Meter
from secagg.parameters import Plan
from secagg.upload import Upload
from secagg_server.blobs import BlobStore
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import RoundState, UploadState
from secagg_server.store import Store, round_key
from secagg_server.tasks import TaskSpec

__all__ = ["ENDORSED", "Desk", "desk_for"]

ENDORSED = Endorsement(bytes(32), bytes(64))


@dataclass
class Desk:
    """A server's intake for one collecting round of task "task"."""

    store: Store
    blobs: BlobStore
    rounds: OpenRounds
    intake: Intake
    context: RoundContext
    root: Path
    roster: cohort.ChangingRoster
    caller: str | None = None
    secret: bytes = bytes(32)

    def announce(self, upload: Upload) -> tuple[UploadState, list[int]]:
        return self.intake.open(upload.admission, self.caller)

    def put(self, upload: Upload, index: int, data: bytes | None = None) -> None:
        receipt = upload.admission.receipt
        payload = cohort.chunk(upload, index) if data is None else data
        self.intake.put_chunk(
            receipt.context, receipt.client_key, receipt.upload_digest, index, payload, self.caller
        )

    def commit(self, upload: Upload) -> None:
        receipt = upload.admission.receipt
        self.intake.commit(receipt.context, receipt.client_key, receipt.upload_digest, self.caller)

    def send(self, upload: Upload) -> None:
        _, missing = self.announce(upload)
        for index in missing:
            self.put(upload, index)
        self.commit(upload)

    def accepted(self) -> int:
        return self.store.counts(("task", 1, 1)).accepted

    def open_round(self, spec: TaskSpec, context: RoundContext) -> None:
        closes_at = EPOCH + datetime.timedelta(minutes=1)
        signed = {"identity": ENDORSED.identity, "signature": ENDORSED.signature}
        self.store.open_round(
            round_key(context), round_key=context.round_key, closes_at=closes_at, **signed
        )
        checked = context.plan.norm_check is not None
        challenger = Challenger(context, self.secret) if checked else None
        self.rounds.open(OpenRound(spec, context, ENDORSED, 0, 60.0, challenger=challenger))

    def close_round(self) -> None:
        self.rounds.close("task")
        self.store.advance(("task", 1, 1), RoundState.CHECKING)

    def stored(self, upload: Upload, index: int) -> bytes:
        return self.blobs.chunk(self.context.id, upload.admission.receipt.upload_digest, index)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())


def desk_for(plan: Plan, folder: Path, secret: bytes = bytes(32), meter: Meter = SILENT) -> Desk:
    """A desk with an open round, whose challenges follow from the secret."""
    store = Store(migrated(folder / "store.sqlite3"), meter=meter)
    blobs, rounds = BlobStore(folder / "blobs"), OpenRounds(ManualClock())
    spec = TaskSpec("task", plan, 3, 60_000, 2, plan.max_clients)
    context = cohort.round_context(plan, task_id="task")
    store.create_task(spec, bytes(32))
    store.create_round("task", 1)
    roster = cohort.ChangingRoster(OpenEnrolment())
    intake = Intake(store, blobs, rounds, roster, meter=meter)
    desk = Desk(store, blobs, rounds, intake, context, folder / "blobs", roster, secret=secret)
    desk.open_round(spec, context)
    return desk
