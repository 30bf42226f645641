"""The rounds a key holder knows: which may be opened, which are open, which were released.

What it has promised outlives it: every answer is recorded in the `Ledger` before it leaves, and the
private half of an open round's key lies in the `RoundKeys` folder, outside database and backups,
until the round is released or abandoned. One round of a task is open at a time, and a released
round is never opened again: the same inputs must not be summed twice over different cohorts.

A release is recorded, with what it costs in privacy, before its first byte leaves, and reads the
same ever after. The key holder's noise is drawn when the sum is opened: a crash between the two
draws other noise the next time, for a release that nobody has seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg.context import ContextId, RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import Roster
from secagg.errors import (
    ClosedError,
    DuplicateError,
    IdentityError,
    OffGridError,
    ReleaseError,
    UnavailableError,
    UploadError,
)
from secagg.instruments import SILENT, Meter
from secagg.keyholder import MAX_REFUSALS, KeyHolder
from secagg.parameters import Plan
from secagg.receipts import SigningKey
from secagg.rpc.metrics import OPERATIONS
from secagg.sealing import RoundKeyPair
from secagg.sketches import Sketch
from secagg.transcript import digest
from secagg.upload import Admission
from secagg.verdicts import Verdict as NormVerdict
from secagg.wire.codec import (
    admission_from_wire,
    admission_to_wire,
    parse,
    plan_from_wire,
    plan_to_wire,
    sums_to_bytes,
)
from secagg.wire.v1 import plan_pb2, round_pb2
from secagg_keyholder.ledger import Ledger, OpenedRound, Verdict
from secagg_keyholder.policy import DEFAULT_ATTEMPTS, Policy
from secagg_keyholder.vault import RoundKeys

__all__ = ["DEFAULT_ATTEMPTS", "Policy", "ReleasedBytes", "Rounds"]


@dataclass(frozen=True, slots=True)
class ReleasedBytes:
    """A release as it was recorded: little-endian int64 in the plan's order, with its noise."""

    sums: bytes = field(repr=False)
    contributors: int


class Rounds:
    """Rounds by task; call from one thread at a time for each task.

    Args:
        compute: runs heavy calculations; see `KeyHolder`.
        meter: times keys and seals; what ``compute`` runs is timed there.
    """

    def __init__(
        self,
        ledger: Ledger,
        keys: RoundKeys,
        identity: SigningKey,
        roster: Roster,
        policy: Policy,
        compute: Callable[..., Any] = lambda work, *arguments: work(*arguments),
        *,
        meter: Meter = SILENT,
    ) -> None:
        self._ledger = ledger
        self._keys = keys
        self._identity = identity
        self._roster = roster
        self._policy = policy
        self._compute = compute
        self._meter = meter
        self._live: dict[str, KeyHolder] = {}

    def recover(self) -> None:
        """After a start: erase keys nobody needs; abandon rounds that can never be opened.

        A ledger restored from a backup does not know what was released after the backup was made,
        so every round it believes to be open is abandoned.
        """
        if self._ledger.restored():
            for key_id in self._ledger.close_all_open("RESTORED"):
                self._keys.erase(key_id)
            self._ledger.clear_restored()
        still_open = {row.round_key_id: row for row in self._ledger.open_rounds()}
        for key_id, row in still_open.items():
            if self._keys.get(key_id) is None:
                self._ledger.close_round(row.id, "KEY_LOST")
        for key_id in self._keys.names() - still_open.keys():
            self._keys.erase(key_id)

    def open(
        self, plan: Plan, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> tuple[RoundContext, Endorsement]:
        """A round key for one attempt, endorsed; the same request gets the same key.

        Raises:
            ConfigurationError: the plan breaks this key holder's policy, or has another privacy
                than the task began with.
            BudgetError: the task's privacy budget has no room for a release.
            ClosedError: the round, or a later attempt, has been opened or released; or the model
                has had too many attempts.
            DuplicateError: this attempt was opened with another plan or model.
        """
        self._policy.check(plan)
        current = self._ledger.current(task_id)
        if current and (current.id.round_number, current.id.attempt) == (round_number, attempt):
            context = self._same(current, plan, model_digest)
        else:
            context = self._fresh(plan, task_id, round_number, attempt, model_digest)
        return context, Endorsement.sign(self._identity, context.id)

    def _same(self, row: OpenedRound, plan: Plan, model_digest: bytes) -> RoundContext:
        if (row.id.plan_digest, row.id.model_digest) != (plan.digest, model_digest):
            raise DuplicateError("expected the plan and model that this attempt was opened with")
        if row.state != "OPEN":
            raise _over()
        return RoundContext(row.id, plan, row.public_key)

    def _fresh(
        self, plan: Plan, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> RoundContext:
        with self._meter.timed(OPERATIONS, operation="make_key"):
            pair = RoundKeyPair()
        context = RoundContext.create(
            plan,
            pair.public,
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            model_digest=model_digest,
        )
        # The key first: a round that is recorded as open can always be opened.
        key_id = context.id.round_key_id
        self._keys.put(key_id, pair.to_bytes())
        try:
            superseded = self._ledger.open_round(
                context,
                plan_to_wire(plan).SerializeToString(),
                attempts_limit=self._policy.attempts_per_model,
            )
        except Exception:
            self._keys.erase(key_id)
            raise
        for old in superseded:
            self._keys.erase(old)
        self._ledger.drop_sums(task_id, round_number)
        self._forget(task_id)
        self._live[task_id] = self._holder(context, pair)
        return context

    def _holder(self, context: RoundContext, pair: RoundKeyPair) -> KeyHolder:
        name = context.id
        return KeyHolder(
            context.plan,
            task_id=name.task_id,
            round_number=name.round_number,
            attempt=name.attempt,
            model_digest=name.model_digest,
            pair=pair,
            roster=self._roster,
            identity=self._identity,
            compute=self._compute,
        )

    def judge(self, context: ContextId, admissions: Sequence[Admission]) -> list[str]:
        """The reason of refusal for each upload; empty where it is accepted.

        Raises:
            ClosedError, ContextError: not the open round.
        """
        holder = self._require(context)
        known = self._ledger.verdicts(context)
        new: dict[bytes, Admission] = {}
        for admission in admissions:
            if admission.receipt.upload_digest not in known:
                new.setdefault(admission.receipt.upload_digest, admission)
        if new:
            with self._meter.timed(OPERATIONS, operation="open_seals"):
                judged = [_judged(holder, admission) for admission in new.values()]
            known |= self._ledger.record_verdicts(context, judged)
        return [known[admission.receipt.upload_digest] for admission in admissions]

    def submit_sketch(self, context: ContextId, sketch: Sketch) -> None:
        """Look at an accepted upload's sketch; what was found is for :meth:`verdicts` to tell.

        Raises:
            SecaggError: see `KeyHolder.submit_sketch`.
        """
        holder = self._require(context)
        with self._lasting(context.task_id):
            finding = holder.submit_sketch(sketch)
            self._ledger.record_finding(context, sketch.upload_digest, finding)

    def verdicts(self, context: ContextId) -> list[NormVerdict]:
        """The signed verdicts on all sketches; the same ones again for as long as it is open.

        Raises:
            SecaggError: see `KeyHolder.verdicts`.
        """
        holder = self._require(context)
        with self._lasting(context.task_id):
            verdicts = holder.verdicts()
            names = [verdict.receipt.upload_digest for verdict in verdicts]
            self._ledger.record_given(context, names)
        return verdicts

    @contextlib.contextmanager
    def _lasting(self, task_id: str) -> Iterator[None]:
        """Forget what could not be recorded: memory must not know more than the disk.

        A round must not be released over verdicts that a restart would give anew.
        """
        try:
            yield
        except UnavailableError:
            self._forget(task_id)
            raise

    def plan(self, context: ContextId) -> Plan:
        """What a round computes on, open or released.

        Raises:
            ClosedError, ContextError: not the task's newest round.
        """
        return _plan(self._current(context))

    def release(
        self, context: ContextId, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedBytes:
        """Open a sum; again with the same manifest and sum: the same bytes, ever after.

        Raises:
            BudgetError: the task's privacy budget has no room for it.
            SecaggError: see `KeyHolder.release_admitted`.
        """
        self._current(context)
        name = digest("manifest", *sorted(upload_digests), residues.tobytes())
        if recorded := self._ledger.release(context):
            manifest, contributors, sums = recorded
            if manifest != name or sums is None:
                raise ClosedError("expected the manifest already released; one release a round")
            return ReleasedBytes(sums, contributors)
        holder = self._require(context)
        with self._counted(holder):
            release = holder.release_admitted(upload_digests, residues)
        sums = sums_to_bytes(release.sums)
        # On the disk before the first byte leaves; the key is of no use from here on.
        self._ledger.record_release(context, name, release.contributors, sums)
        self._keys.erase(context.round_key_id)
        self._forget(context.task_id)
        return ReleasedBytes(sums, release.contributors)

    def check(
        self, context: ContextId, upload_digests: Sequence[bytes], low: NDArray[np.uint32]
    ) -> None:
        """Look at a sum's noise alone; nothing to say about a round that is released.

        Raises:
            SecaggError: see `KeyHolder.check`.
        """
        self._current(context)
        if self._ledger.release(context) is None:
            holder = self._require(context)
            with self._counted(holder):
                holder.check(upload_digests, low)

    @contextlib.contextmanager
    def _counted(self, holder: KeyHolder) -> Iterator[None]:
        """Record a refusal; the second one closes the round."""
        before, context = holder.refusals, holder.context.id
        try:
            yield
        except ReleaseError:
            new = holder.refusals > before
            if new and self._ledger.count_refusal(context) >= MAX_REFUSALS:
                self.close(context, "REFUSED_TWICE")
            raise

    def audit(self, context: ContextId, upload_digest: bytes, low: NDArray[np.uint32]) -> str:
        """The reason why an upload fails the noise audit; empty where it passes.

        Raises:
            SecaggError: see `KeyHolder.audit`.
        """
        holder = self._require(context)
        reason = OffGridError.reason if holder.audit(upload_digest, low) else ""
        self._ledger.record_audited(context, upload_digest, reason)
        return reason

    def close(self, context: ContextId, reason: str = "ABANDONED") -> None:
        """Erase the secrets of an attempt, if it is still the current one and open."""
        current = self._ledger.current(context.task_id)
        if current is not None and current.id == context:
            self._ledger.close_round(context, reason)
            self._keys.erase(context.round_key_id)
            self._forget(context.task_id)

    def _forget(self, task_id: str) -> None:
        holder = self._live.pop(task_id, None)
        if holder is not None:
            holder.close()

    def _current(self, context: ContextId) -> OpenedRound:
        row = self._ledger.current(context.task_id)
        if row is None:
            raise ClosedError("expected an open round; this key holder has none for the task")
        row.id.require(context)
        return row

    def _require(self, context: ContextId) -> KeyHolder:
        """The open round's secrets, from memory, or from the disk after a restart."""
        row = self._current(context)
        if row.state != "OPEN":
            raise _over()
        if context.task_id not in self._live:
            self._live[context.task_id] = self._resumed(row)
        return self._live[context.task_id]

    def _resumed(self, row: OpenedRound) -> KeyHolder:
        private = self._keys.get(row.round_key_id)
        if private is None:
            raise ClosedError("expected the round's key; it is gone; open another attempt")
        context = RoundContext(row.id, _plan(row), row.public_key)
        holder = self._holder(context, RoundKeyPair.from_bytes(private))
        findings = self._ledger.findings(row.id)
        for name, _, encoded in self._ledger.admissions(row.id):
            # Whoever was not among those judged stays out, back from a revocation perhaps.
            if row.judged and name not in findings:
                continue
            # Whoever was revoked meanwhile is not admitted again.
            with contextlib.suppress(IdentityError):
                holder.admit(admission_from_wire(parse(round_pb2.Admission, encoded)))
        audited = {name: bool(reason) for name, reason in self._ledger.audited(row.id).items()}
        holder.resume(row.refusals, audited, findings, judged=row.judged)
        return holder


def _judged(holder: KeyHolder, admission: Admission) -> Verdict:
    name = admission.receipt.upload_digest
    try:
        client = holder.admit(admission)
    except (UploadError, IdentityError) as error:
        return Verdict(name, "", error.reason, None)
    return Verdict(name, client, "", admission_to_wire(admission).SerializeToString())


def _plan(row: OpenedRound) -> Plan:
    return plan_from_wire(parse(plan_pb2.Plan, row.plan))


def _over() -> ClosedError:
    return ClosedError(
        "expected a later round or attempt; this one is over; one release a round; a task that "
        "starts afresh needs an id that this key holder has not seen"
    )
