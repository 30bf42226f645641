"""What must hold whatever goes wrong: who is in a sum, how often, and that nothing ever changes.

It believes what was observed on the network and what lies on the disks, and nothing that a service
says of itself: a client's value names it in the sum, with how often it is there.
"""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from secagg import audit
from secagg.audit import Entry
from secagg.context import RoundContext
from secagg.errors import reasons
from secagg.release import Release
from secagg.rpc.status import from_rpc_error
from secagg.wire.codec import sums_from_bytes
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import key_holder_service_pb2 as key_holder_pb
from secagg.wire.v1 import round_pb2
from secagg_server.schema import UploadRow
from secagg_server.states import FINAL, RoundState, TaskState, UploadState
from simulation.clients import SAYS_ROUND, quantized
from simulation.faults import CLIENT_METHODS, KEY_HOLDER, SERVER
from simulation.network import Call, RpcFailure
from simulation.services import KeyHolderProcess, ServerProcess

if TYPE_CHECKING:
    from simulation.world import World

__all__ = ["Oracle"]

Attempt = tuple[int, int]

_MAY_ABORT = {
    "ABORTED",
    "QUORUM_NOT_REACHED",
    "RELEASE_REFUSED",
    "STORAGE_UNAVAILABLE",
    "UNAVAILABLE",
}
_MAY_REFUSE = {
    "beyond the norm": {"NORM_REFUSED"},
    "off the grid": {"NORM_REFUSED", "OFF_GRID"},
    "noise": {"NORM_REFUSED", "OFF_GRID"},
    "broken seal": {"INVALID_SEAL"},
}


class Oracle:
    """Everything that was promised so far, and whether it holds.

    Attributes:
        violations: what did not hold, in words.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.violations: list[str] = []
        self._contexts: dict[Attempt, RoundContext] = {}
        self._honest: dict[Attempt, set[str]] = defaultdict(set)
        self._liars: dict[Attempt, dict[str, str]] = defaultdict(dict)
        self._promised: dict[Attempt, dict[str, bytes]] = defaultdict(dict)
        self._withdrawn: dict[Attempt, set[str]] = defaultdict(set)
        self._judged_at: dict[Attempt, float] = {}
        self._announced: dict[tuple[str, Attempt], bytes] = {}
        self._changed_below = False
        self._changed_above = False
        self._releases_hit: set[Attempt] = set()
        self._sums: dict[int, bytes] = {}
        self._rows: dict[Attempt, tuple[Any, ...]] = {}
        self._models: dict[int, bytes] = {}
        self._releases: dict[Attempt, tuple[bytes, int, bytes]] = {}
        self._heads: dict[str, list[Entry]] = {SERVER: [], KEY_HOLDER: []}

    def violated(self, what: str) -> None:
        """Note what must not have happened."""
        self.violations.append(f"{what} (second {self._world.loop.time():.1f})")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violated(what)

    # --- what is observed ---------------------------------------------------------------------

    def contributes(self, name: str, context: RoundContext) -> None:
        """An honest client is about to encrypt, or to send what it has encrypted."""
        attempt = (context.id.round_number, context.id.attempt)
        self._contexts[attempt] = context
        self._honest[attempt].add(name)

    def lies(self, name: str, context: RoundContext, what: str) -> None:
        """A client is about to send something else."""
        attempt = (context.id.round_number, context.id.attempt)
        self._contexts[attempt] = context
        self._liars[attempt][name] = what
        self._world.count(what)

    def accuses(self, name: str) -> None:
        """A client says that the server cheats: true only of what the network has changed."""
        self._require(self._changed_above, f"{name} accuses an honest server")

    def arrived(self, call: Call) -> None:
        """A handler begins; what it does may last, whatever becomes of its answer."""
        with contextlib.suppress(DecodeError):
            if call.name == "JudgeUploads":
                asked = key_holder_pb.JudgeUploadsRequest.FromString(call.requests[0])
                self._judged_at.setdefault(_attempt(asked.context), self._world.loop.time())

    def answered(
        self,
        call: Call,
        requests: list[Any],
        answers: list[bytes],
        failure: RpcFailure | None,
        changed: bool,
    ) -> None:
        """A call was answered, whether or not its answer arrives."""
        above = call.name in CLIENT_METHODS
        self._changed_above |= changed and above
        self._changed_below |= changed and not above
        if call.name == "OpenUpload" and not changed:
            sent = pb.OpenUploadRequest.FromString(call.requests[0])
            self._check_only_upload(call.caller.name, sent.admission.receipt)
        if failure is not None:
            self._check_error(call, failure, changed)
            return
        asked = requests[0]
        if call.name == "CommitUpload":
            self._promise(call.caller.name, asked)
        elif call.name == "WithdrawUpload":
            self._withdrawn[_attempt(asked.context)].add(call.caller.name)
        elif call.name == "OpenUpload":
            answer = pb.OpenUploadResponse.FromString(answers[0])
            if answer.state == round_pb2.UPLOAD_STATE_ACCEPTED:
                self._promise(call.caller.name, asked.admission.receipt)

    def _promise(self, name: str, upload: Any) -> None:
        """A client was told "accepted"."""
        promised = self._promised[_attempt(upload.context)]
        first = promised.setdefault(name, upload.upload_digest)
        self._require(first == upload.upload_digest, f"two uploads of {name} were accepted")

    def _check_only_upload(self, name: str, receipt: Any) -> None:
        """One round, one ciphertext of a client, unless it has lost its disk, or lies."""
        attempt = _attempt(receipt.context)
        sent = self._announced.setdefault((name, attempt), receipt.upload_digest)
        honest = name not in self._liars[attempt] and not self._world.has_lost_its_disk(name)
        same = sent == receipt.upload_digest
        self._require(same or not honest, f"{name} encrypted twice for {attempt}")

    def harmed(self, call: Call) -> None:
        """A call is about to meet a fault, before anything of it is changed."""
        if call.name == "Release":
            asked = key_holder_pb.ReleaseRequest.FromString(call.requests[0])
            self._releases_hit.add(_attempt(asked.manifest.context))

    def tampered(self, call: Call) -> None:
        """An answer is changed on its way."""
        above = call.name in CLIENT_METHODS
        self._changed_above |= above
        self._changed_below |= not above

    def _check_error(self, call: Call, failure: RpcFailure, changed: bool) -> None:
        """Nothing but our own reasons crosses the wire; a connection may break without one."""
        if failure.code().name == "UNAVAILABLE" and not failure.trailing_metadata():
            return
        if failure.code().name == "DEADLINE_EXCEEDED":
            return
        if changed and failure.details() == "Exception deserializing request!":
            return
        reason = from_rpc_error(failure).reason
        known = reason in reasons() and reason != "INTERNAL"
        self._require(known, f"{call.name} fails with {failure} {failure.__cause__!r}")
        text = failure.details()
        for client in self._world.clients:
            self._require(client.name not in text, f"{call.name}: an error names a client: {text}")

    # --- what lies on the disks ---------------------------------------------------------------

    def look(self, server: ServerProcess | None, key_holder: KeyHolderProcess | None) -> None:
        """Compare what the processes that run have on their disks with all that was seen before."""
        if key_holder is not None and not key_holder.dead:
            self._look_at_releases(key_holder)
            self._look_at_log(KEY_HOLDER, _entries(key_holder))
        if server is not None and not server.dead:
            self._look_at_rounds(server)
            self._look_at_log(SERVER, _all(server))

    def _look_at_log(self, whose: str, entries: list[Entry]) -> None:
        before = self._heads[whose]
        try:
            audit.verify(entries)
        except Exception as error:  # whatever is wrong with it
            self.violated(f"the {whose}'s audit log: {error}")
        self._require(entries[: len(before)] == before, f"the {whose}'s audit log was rewritten")
        self._heads[whose] = entries

    def _look_at_releases(self, key_holder: KeyHolderProcess) -> None:
        rows = key_holder.ledger._database.rows(
            "SELECT round_number, attempt, manifest, contributors, sums FROM rounds"
            " WHERE state = 'RELEASED'"
        )
        rounds = Counter(row[0] for row in rows)
        self._require(max(rounds.values(), default=1) == 1, "a round was released twice")
        for number, attempt, manifest, contributors, sums in rows:
            known = self._releases.get((number, attempt))
            if known is not None:
                now = (manifest, contributors, sums or known[2])
                self._require(now == known, f"the release of round {number} changed")
            elif sums is not None:
                self._releases[number, attempt] = (manifest, contributors, sums)
        self._require({row[:2] for row in rows} >= self._releases.keys(), "a release was forgotten")

    def _look_at_rounds(self, server: ServerProcess) -> None:
        rows = server.store.rounds("task") if server.store.task_exists("task") else []
        done = [row for row in rows if row.state is RoundState.DONE]
        numbers = Counter(row.round_number for row in done)
        self._require(max(numbers.values(), default=1) == 1, "a round is done twice")
        for row in done:
            attempt = (row.round_number, row.attempt)
            now = (row.sums_sha256, row.contributors, row.model_version)
            if attempt not in self._rows:
                self._rows[attempt] = now
                self._judge_sum(server, attempt)
            self._require(now == self._rows[attempt], f"the record of {attempt} changed")
            data = server.blobs.sums("task", row.round_number)
            kept = self._sums.setdefault(row.round_number, data)
            self._require(data == kept, f"the sums of round {row.round_number} changed")
        self._require(
            {(r.round_number, r.attempt) for r in done} >= self._rows.keys(),
            "a round that was done no longer is",
        )
        if self._world.has_model and server.store.task_exists("task"):
            for version in range(server.store.task("task").model_version + 1):
                data = server.blobs.model("task", version)
                kept = self._models.setdefault(version, data)
                self._require(data == kept, f"model version {version} changed")

    def _judge_sum(self, server: ServerProcess, attempt: Attempt) -> None:
        """The sum of an attempt that is done: exactly those who should be in it, once each."""
        context = self._contexts[attempt]
        plan, data = context.plan, server.blobs.sums("task", attempt[0])
        sums = sums_from_bytes(data, plan)
        contributors = self._rows[attempt][1]
        counts = Release(plan, context.rotation, contributors, sums).total("counts").tolist()
        names = [client.name for client in self._world.clients]
        times = {name: counts[i] for i, name in enumerate(names) if counts[i]}
        row = self._rows[attempt]
        label = f"round {attempt[0]}, attempt {attempt[1]}"
        self._require(set(times.values()) <= {1}, f"{label}: somebody counts {times} times")
        self._require(
            counts[SAYS_ROUND] == attempt[0] * len(times), f"{label}: another round's values"
        )
        self._require(row[1] == sum(times.values()), f"{label}: {row[1]} contributors, {times}")
        self._require(row[1] >= plan.min_clients, f"{label}: below the minimum, {row[1]}")
        recorded = self._releases.get(attempt)
        self._require(
            recorded is not None and recorded[1:] == (row[1], data),
            f"{label}: not what the key holder has recorded",
        )
        present, honest = set(times), self._honest[attempt]
        self._require(
            present <= honest - self._liars[attempt].keys(),
            f"{label}: {present - honest} did not contribute, "
            f"{present & self._liars[attempt].keys()} lied",
        )
        gone = present & self._withdrawn[attempt]
        self._require(not gone, f"{label}: {gone} withdrew in time, and is in the sum")
        judged = self._judged_at.get(attempt, 0.0)
        late = {n for n in present if self._world.revoked_at(KEY_HOLDER, n) < judged}
        self._require(not late, f"{label}: {late} was revoked in time, and is in the sum")
        self._look_for_the_lost(server, attempt, present)
        clear = [
            [part.summand for part in quantized(context, names.index(name))]
            for name in sorted(present)
        ]
        wanted = [sum(parts[1:], start=parts[0]) for parts in zip(*clear, strict=True)]
        exact = all(np.array_equal(a, b) for a, b in zip(sums, wanted, strict=True))
        self._require(exact, f"{label}: the sum is not the sum over {sorted(present)}")

    def _look_for_the_lost(
        self, server: ServerProcess, attempt: Attempt, present: set[str]
    ) -> None:
        """Whoever was told "accepted" is in the sum, or out of it for a reason on record."""
        refused = {
            row.client: row.reason.partition(":")[0]
            for row in _uploads(server, attempt)
            if row.state is UploadState.REJECTED
        }
        for name in self._promised[attempt].keys() - present:
            allowed = set(_MAY_REFUSE.get(self._liars[attempt].get(name, ""), set()))
            if name in self._withdrawn[attempt]:
                allowed.add("WITHDRAWN")
            if self._world.revoked_at(KEY_HOLDER, name) < float("inf"):
                allowed |= {"REVOKED", "NOT_ENROLLED"}
            reason = refused.get(name)
            excused = reason in allowed or (self._changed_below and reason is not None)
            self._require(
                excused, f"round {attempt}: {name} was accepted, and is lost; reason={reason}"
            )

    # --- the end ------------------------------------------------------------------------------

    def finish(self, server: ServerProcess, key_holder: KeyHolderProcess) -> None:
        """After faults have stopped and the task has ended: how, and what is left on the disks."""
        self.look(server, key_holder)
        task, rows = server.store.task("task"), server.store.rounds("task")
        if task.state is TaskState.FAILED:
            aborted = self._world.aborted
            newest = max((row.round_number for row in rows), default=0)
            used_up = sum(row.round_number == newest for row in rows) >= self._world.attempts
            self._require(aborted or used_up, f"the task failed early: {task.reason}")
            changed = self._changed_below and "serializing" in task.reason
            own = changed or "INTERNAL" not in task.reason
            self._require(own, f"the task failed: {task.reason}")
        self._require(task.state is not TaskState.RUNNING, "the task never ended")
        self._require(all(row.state in FINAL for row in rows), "a round never ended")
        for entry in _all(server):
            if entry.event == "round-voided":
                details = json.loads(entry.details)
                attempt = (details["round"], details["attempt"])
                self._require(self._may_void(attempt), f"round {attempt} was voided for nothing")
        for row in rows:
            attempt = (row.round_number, row.attempt)
            done = row.state is RoundState.DONE
            expected = done or self._changed_below or self._may_fail(attempt, row.reason)
            self._require(expected, f"attempt {attempt} failed: {row.reason}")
        self._require_tidy(server, key_holder)

    def _may_fail(self, attempt: Attempt, reason: str) -> bool:
        """An attempt comes to nothing for want of clients, or of a key holder, and no other way."""
        return reason.partition(":")[0] in _MAY_ABORT or self._may_void(attempt)

    def _may_void(self, attempt: Attempt) -> bool:
        """A sum that was handed over is lost only with the answer to it, or a revoked client."""
        judged_at = self._judged_at.get(attempt, float("inf"))
        revoked_at = (self._world.revoked_at(KEY_HOLDER, name) for name in self._honest[attempt])
        revoked = any(judged_at <= at < float("inf") for at in revoked_at)
        return revoked or attempt in self._releases_hit

    def _require_tidy(self, server: ServerProcess, key_holder: KeyHolderProcess) -> None:
        folder = self._world.folder
        chunks = [p for p in (folder / "server" / "uploads").rglob("*") if p.is_file()]
        self._require(not chunks, f"{len(chunks)} chunks of closed rounds are left")
        drafts = list(folder.rglob("*.draft"))
        self._require(not drafts, f"drafts are left: {drafts}")
        keys = [p.name for p in (folder / "keyholder" / "round-keys").glob("*.key")]
        still_open = {f"{row.round_key_id.hex()}.key" for row in key_holder.ledger.open_rounds()}
        self._require(set(keys) <= still_open, "round keys of closed rounds are left")
        seals = key_holder.ledger._database.rows(
            """SELECT count(*) FROM admissions JOIN rounds USING (task_id, round_number, attempt)
                WHERE state != 'OPEN' AND admission IS NOT NULL"""
        )
        self._require(seals == [(0,)], "seals of closed rounds are left")

    def logged(self, entries: Iterable[Any]) -> None:
        """What the services have logged."""
        names = [client.name for client in self._world.clients]
        for entry in entries:
            event = entry.get("event", "")
            if event in ("unexpected_error", "task_failed"):
                self.violated(f"a service fails unexpectedly: {entry}")
            text = repr(entry)
            if any(name in text for name in names):
                self.violated(f"a log names a client: {text}")


def _attempt(context: Any) -> Attempt:
    return context.round_number, context.attempt


def _uploads(server: ServerProcess, attempt: Attempt) -> list[UploadRow]:
    def rows(session: Any) -> list[UploadRow]:
        found = session.query(UploadRow).filter_by(round_number=attempt[0], attempt=attempt[1])
        return list(found)

    return server.store.database.read(rows)


def _all(server: ServerProcess) -> list[Entry]:
    return list(server.store.audit(limit=1_000_000))


def _entries(key_holder: KeyHolderProcess) -> list[Entry]:
    rows = key_holder.ledger._database.rows(
        "SELECT sequence, time, event, details, previous, hash FROM audit ORDER BY sequence"
    )
    return [Entry(*row) for row in rows]
