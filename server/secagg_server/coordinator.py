"""Runs a task: round after round, attempt after attempt, through the states of `states`.

Collect until the deadline or until enough have come, let the key holder judge, fix the manifest,
add exactly the ciphertexts on it, have the sum opened, apply it. A client that drops out, is late
or is refused changes nothing but the cohort; too small a cohort aborts the attempt with the reason.
A task with a privacy budget ends early where that has no room for another release, and one with
stop criteria where they are met.
Memory is that of one chunk of the model, whatever the number of clients.

Whatever state a crash leaves an attempt in, the next start goes on from there: every step gives
the same result when it is done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.context import NO_MODEL, RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import Roster
from secagg.errors import (
    BudgetError,
    ReleaseError,
    RoundError,
    SecaggError,
    StorageError,
)
from secagg.failpoints import failpoint
from secagg.instruments import SILENT, Meter
from secagg.logs import where
from secagg.planner import noise_headroom
from secagg.release import Release
from secagg.upload import Admission
from secagg.wire.codec import model_digest, sums_to_bytes
from secagg_server.blobs import BlobStore
from secagg_server.ciphertexts import Ciphertexts, here
from secagg_server.clock import Clock
from secagg_server.judging import check_quorum
from secagg_server.key_holder import KeyHolderStub, ReleasedSums, patiently
from secagg_server.learning import figure, following_clip, move_model
from secagg_server.metrics import HEADROOM
from secagg_server.norms import NormJudge
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.spending import loss, require_room, spent_in_full
from secagg_server.states import FINAL, RoundState, TaskState
from secagg_server.store import RoundRow, Store
from secagg_server.tasks import TaskSpec

__all__ = ["RESTART_GRACE_S", "Coordinator"]

RESTART_GRACE_S = 10.0
"""Seconds that a round collects at least after a restart, so that clients can come back."""

STORAGE_PAUSE_S = 5.0
"""Seconds until a task goes on after the disk or the database has failed it."""

_BY_OPERATOR = "ABORTED: ended by the operator"
_UNEXPECTED = "INTERNAL: see the server's log"
_CONVERGED = "CONVERGED"
# How far an attempt has come; an audit goes back to summing.
_ORDER = (
    RoundState.CREATED,
    RoundState.COLLECTING,
    RoundState.CHECKING,
    RoundState.SUMMING,
    RoundState.RELEASING,
)
_LOG = structlog.get_logger(__name__)


class Coordinator:
    """Runs every task of a server, each in an asyncio task of its own.

    Args:
        roster: whom clients are drawn from.
        compute: runs calculations that hold the interpreter's lock, such as in another process;
            called from threads.
        secret: 32 bytes that outlive the process, so that an upload that is sketched or audited
            again after a restart has the challenge and the dither it had before; fresh ones when
            omitted.
        workers: calculations that ``compute`` runs at the same time.
        meter: takes what the store does not know of rounds: what they compute, and their headroom.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        rounds: OpenRounds,
        key_holder: KeyHolderStub,
        clock: Clock,
        roster: Roster,
        compute: Callable[..., Any] = here,
        secret: bytes | None = None,
        workers: int = 1,
        *,
        meter: Meter = SILENT,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._rounds = rounds
        self._key_holder = key_holder
        self._clock = clock
        self._roster = roster
        secret = secret or os.urandom(32)
        self._meter = meter
        self._ciphertexts = Ciphertexts(blobs, compute, secret, meter)
        # While one sketch travels, the next is computed.
        at_once = max(2, workers)
        self._norms = NormJudge(store, blobs, self._ciphertexts, key_holder, secret, at_once)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._contexts: dict[str, RoundContext] = {}

    def resume(self) -> None:
        """Continue every running task after a start."""
        after = ""
        while page := self._store.tasks(after):
            for row in page:
                if row.state is TaskState.RUNNING:
                    self.start(row.task_spec())
            after = page[-1].task_id

    def start(self, spec: TaskSpec) -> None:
        """Run a task unless it is running."""
        if spec.task_id not in self._running:
            self._running[spec.task_id] = asyncio.create_task(self._run(spec))

    async def abort(self, task_id: str) -> None:
        """End a task by order of the operator."""
        self._store.end_task(task_id, TaskState.FAILED, _BY_OPERATOR)
        await self._cancel(task_id)
        self._store.abort_open_rounds(task_id, _BY_OPERATOR)
        await self._forget(task_id)

    async def stop(self) -> None:
        """Stop running tasks; they continue after the next start."""
        for task_id in list(self._running):
            await self._cancel(task_id)

    async def _cancel(self, task_id: str) -> None:
        running = self._running.pop(task_id, None)
        self._rounds.close(task_id)
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def _run(self, spec: TaskSpec) -> None:
        """Run a task to its end; where the disk or the database fails, go on once it works."""
        try:
            while True:
                with contextlib.suppress(StorageError, OSError):
                    return await self._to_its_end(spec)
                self._rounds.close(spec.task_id)
                _LOG.error("storage_failed", next_try_s=STORAGE_PAUSE_S)
                await self._clock.wait(asyncio.Event(), self._clock.now() + STORAGE_PAUSE_S)
        finally:
            self._running.pop(spec.task_id, None)

    async def _to_its_end(self, spec: TaskSpec) -> None:
        try:
            failure = await self._settle_interrupted(spec)
            reason = ""
            for number in range(self._store.task(spec.task_id).rounds_done + 1, spec.rounds + 1):
                if reason := await asyncio.to_thread(self._learned, spec):
                    _LOG.info("stopped_early", rounds=number - 1)
                    break
                row = self._store.task(spec.task_id)
                await asyncio.to_thread(require_room, spec, row)
                await self._round(spec, number, failure)
            self._store.end_task(spec.task_id, TaskState.FINISHED, reason)
        except (StorageError, OSError):
            raise
        except BudgetError:
            # As planned: what there was to spend has been spent, by this account or by that of the
            # key holder, and no other attempt would change that.
            row = self._store.task(spec.task_id)
            reason = await asyncio.to_thread(spent_in_full, spec, row)
            self._store.end_task(spec.task_id, TaskState.FINISHED, reason)
            _LOG.info("budget_spent", rounds=row.rounds_done)
        except SecaggError as error:
            self._store.end_task(spec.task_id, TaskState.FAILED, _reason(error))
        except Exception as error:  # a task must never die silently
            _LOG.error("task_failed", error=type(error).__name__, at=where(error))
            self._store.abort_open_rounds(spec.task_id, _UNEXPECTED)
            await self._forget(spec.task_id)
            self._store.end_task(spec.task_id, TaskState.FAILED, _UNEXPECTED)

    def _learned(self, spec: TaskSpec) -> str:
        """Why a task needs no other round, for its record; empty if it does."""
        if spec.stop is None:
            return ""
        reason = spec.stop.reason(self._store.outcomes(spec.task_id))
        return f"{_CONVERGED}: {reason}" if reason else ""

    async def _settle_interrupted(self, spec: TaskSpec) -> SecaggError | None:
        """After a restart: go on with the attempt that it interrupted; what went wrong, if any.

        The key holder may have released the sum just before the server died. It never opens another
        one for that round, but gives the same manifest the same answer again.
        """
        failure = None
        for row in self._store.rounds(spec.task_id):
            if row.state not in FINAL:
                failure = await self._settle(row, self._attempt(spec, row))
        return failure

    async def _round(self, spec: TaskSpec, number: int, failure: SecaggError | None) -> None:
        """Attempt a round until it is done or out of attempts; those before a restart count.

        Args:
            failure: of an attempt that a restart interrupted; it may have been the last one.
        """
        failure = failure or RoundError("expected an attempt left; a restart took the last one")
        while self._store.attempts(spec.task_id, number) < spec.max_attempts:
            row = self._store.create_round(spec.task_id, number, self._drawn(spec))
            failpoint("round-created")
            error = await self._settle(row, self._attempt(spec, row))
            if error is None:
                return
            failure = error
        raise failure

    def _drawn(self, spec: TaskSpec) -> list[str] | None:
        """Clients for one attempt, drawn anew each time: whoever dropped out is not waited for."""
        if not spec.selected_clients:
            return None
        enrolled = self._roster.active()
        wanted = min(spec.selected_clients, len(enrolled))
        return sorted(random.SystemRandom().sample(enrolled, wanted))

    async def _settle(self, row: RoundRow, work: Coroutine[Any, Any, None]) -> SecaggError | None:
        """Do an attempt's work and clean up after it; what went wrong, if anything did.

        Raises:
            BudgetError: the key holder will not open another sum of this task.
        """
        try:
            await work
        except StorageError:
            raise  # the attempt goes on from where it stands
        except SecaggError as error:
            self._store.abort_round(row.key, _reason(error))
            _LOG.warning(
                "round_aborted", round=row.round_number, attempt=row.attempt, why=error.reason
            )
            await self._forget(row.task_id)
            if isinstance(error, BudgetError):
                raise
            return error
        self._contexts.pop(row.task_id, None)
        await asyncio.to_thread(self._blobs.drop_uploads, row.task_id)
        return None

    async def _forget(self, task_id: str) -> None:
        """Let the key holder erase its secrets, and erase the uploads."""
        context = self._contexts.pop(task_id, None)
        if context is not None:
            # A key holder that cannot be reached erases them when the next round is opened.
            with contextlib.suppress(SecaggError):
                await self._key_holder.close_round(context)
        await asyncio.to_thread(self._blobs.drop_uploads, task_id)

    async def _attempt(self, spec: TaskSpec, row: RoundRow) -> None:
        """One attempt, from wherever it stands."""
        if row.state is not RoundState.CREATED and not row.endorsed:
            raise RoundError(
                "expected a round whose key is endorsed; a server of 0.1 opened this one; it is "
                "attempted again"
            )
        if row.state is RoundState.CREATED:
            await self._open(spec, row)
            row = self._store.round(row.key)
            await self._collect(spec, row, grace_s=0.0)
        elif row.state is RoundState.COLLECTING:
            await self._collect(spec, row, grace_s=RESTART_GRACE_S)
        context = self._contexts[spec.task_id] = self._stored_context(spec, row)
        await self._conclude(spec, row, context)

    def _stored_context(self, spec: TaskSpec, row: RoundRow) -> RoundContext:
        return RoundContext.create(
            spec.plan_at(row.clip),
            row.round_key,
            task_id=spec.task_id,
            round_number=row.round_number,
            attempt=row.attempt,
            model_digest=self._model_digest(spec),
        )

    def _model_digest(self, spec: TaskSpec) -> bytes:
        if spec.model is None:
            return NO_MODEL
        version = self._store.task(spec.task_id).model_version
        return model_digest(self._blobs.model(spec.task_id, version))

    async def _open(self, spec: TaskSpec, row: RoundRow) -> None:
        model = await asyncio.to_thread(self._model_digest, spec)
        context, endorsement = await patiently(
            lambda: self._key_holder.open_round(
                spec.plan_at(row.clip),
                task_id=spec.task_id,
                round_number=row.round_number,
                attempt=row.attempt,
                model_digest=model,
            )
        )
        self._contexts[spec.task_id] = context
        self._store.open_round(
            row.key,
            round_key=context.round_key,
            identity=endorsement.identity,
            signature=endorsement.signature,
            closes_at=self._clock.utc() + datetime.timedelta(milliseconds=spec.round_deadline_ms),
        )
        failpoint("round-opened")

    async def _collect(self, spec: TaskSpec, row: RoundRow, grace_s: float) -> None:
        """Let uploads in until enough have come, or until the deadline; at least for the grace."""
        context = self._contexts[spec.task_id] = self._stored_context(spec, row)
        left_s = (row.closes_at - self._clock.utc()).total_seconds() if row.closes_at else 0.0
        # A clock that was set back must not let a round collect for longer than it may.
        left_s = min(max(left_s, grace_s), spec.round_deadline_ms / 1000)
        # Nothing is awaited before it is open: clients that come back after a restart must find it.
        current = OpenRound(
            spec,
            context,
            Endorsement(row.round_key_identity, row.round_key_signature),
            self._store.task(spec.task_id).model_version,
            self._clock.now() + left_s,
            frozenset(json.loads(row.selected)) if row.selected else None,
            self._norms.challenger(spec, context),
        )
        self._rounds.open(current)
        self._rounds.note_upload(context.id, self._store.counts(row.key).accepted)
        await self._clock.wait(current.filled, current.deadline)
        self._rounds.close(spec.task_id)
        self._store.advance(row.key, RoundState.CHECKING)

    async def _conclude(self, spec: TaskSpec, row: RoundRow, context: RoundContext) -> None:
        """From closed to done; repeating any part of it gives the same result."""
        row = self._store.round(row.key)
        if row.state is RoundState.AUDITING:
            manifest = await self._audited(row, context)
        else:
            manifest = await self._judged(spec, row, context)
        try:
            residues, aggregate_ms = await self._checked_sum(row, context, manifest)
        except ReleaseError:
            row = self._store.round(row.key)
            if row.audited:
                raise
            self._store.advance(row.key, RoundState.AUDITING)
            manifest = await self._audited(row, context)
            row = self._store.round(row.key)
            residues, aggregate_ms = await self._checked_sum(row, context, manifest)
        names = [admission.receipt.upload_digest for admission in manifest]
        started = time.perf_counter()
        try:
            answer = await self._released(context, names, residues)
        except StorageError:
            raise  # asked again, for the same sum
        except SecaggError as error:
            # The key holder has had the sum. At another attempt, its verdicts could choose a cohort
            # without somebody, and from two sums over the same updates it could read that one off.
            self._store.void_round(row.key, _reason(error), loss(context.plan))
            _LOG.warning("round_void", round=row.round_number, why=error.reason)
            await self._forget(row.task_id)
            return
        release_ms = (time.perf_counter() - started) * 1000
        failpoint("release-received")
        release = Release(context.plan, context.rotation, answer.contributors, answer.sums)
        await asyncio.to_thread(self._apply, spec, row, release, aggregate_ms, release_ms)

    async def _checked_sum(
        self, row: RoundRow, context: RoundContext, manifest: list[Admission]
    ) -> tuple[NDArray[np.uint64], float]:
        """The sum, once the key holder has seen that its noise is within the guard.

        The sum itself is sent only then, and once: from two sums of one round, the key holder could
        read a client that is in one of them. Also what adding took, in milliseconds.

        Raises:
            ReleaseError: it would not open.
        """
        started = time.perf_counter()
        names = [admission.receipt.upload_digest for admission in manifest]
        residues = await asyncio.to_thread(self._ciphertexts.total, context, names)
        aggregate_ms = (time.perf_counter() - started) * 1000
        failpoint("sum-ready")
        self._reach(row, RoundState.RELEASING)
        low = await asyncio.to_thread(self._ciphertexts.low_bits, context, residues, *names)
        await patiently(lambda: self._key_holder.check_sum(context, names, low))
        return residues, aggregate_ms

    async def _released(
        self, context: RoundContext, names: list[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """A lost answer is the same one the second time."""
        return await patiently(lambda: self._key_holder.release(context, names, residues))

    def _reach(self, row: RoundRow, state: RoundState) -> None:
        """Advance to a state, unless the round was further when a restart interrupted it."""
        if row.state not in _ORDER or _ORDER.index(row.state) < _ORDER.index(state):
            self._store.advance(row.key, state)

    async def _judged(
        self, spec: TaskSpec, row: RoundRow, context: RoundContext
    ) -> list[Admission]:
        """Every accepted upload that the key holder does not refuse, for its form or its norm."""
        admissions = await asyncio.to_thread(self._store.accepted, context)
        check_quorum(context, len(admissions))
        if row.state in (RoundState.SUMMING, RoundState.RELEASING):
            return admissions  # judged before a restart; the refused ones are not among them
        refused = await patiently(lambda: self._key_holder.judge(context, admissions))
        kept = await asyncio.to_thread(self._left, context, admissions, refused)
        kept = await self._norms.accepted(spec, row, context, kept)
        return await asyncio.to_thread(self._fixed, row, context, kept)

    async def _audited(self, row: RoundRow, context: RoundContext) -> list[Admission]:
        """Every accepted upload that passes the noise audit, after a sum was refused."""
        refused: dict[bytes, str] = {}
        admissions = await asyncio.to_thread(self._store.accepted, context)
        for admission in admissions:
            name = admission.receipt.upload_digest
            low = await asyncio.to_thread(self._ciphertexts.low_bits_of, context, name)
            if reason := await self._audit_one(context, name, low):
                refused[name] = reason
        self._store.set_audited(row.key)
        _LOG.warning("noise_audit", round=row.round_number, named=len(refused))
        # Audited before a restart: whoever was named then may be left out already.
        if not refused and not row.audited:
            raise ReleaseError(
                "expected the sum to open under its manifest; it does not, and the noise audit "
                "names nobody; the round is collected again"
            )
        kept = await asyncio.to_thread(self._left, context, admissions, refused)
        return await asyncio.to_thread(self._fixed, row, context, kept)

    async def _audit_one(self, context: RoundContext, name: bytes, low: NDArray[np.uint32]) -> str:
        return await patiently(lambda: self._key_holder.audit(context, name, low))

    def _left(
        self,
        context: RoundContext,
        admissions: Sequence[Admission],
        refused: Mapping[bytes, str],
    ) -> list[Admission]:
        """What was not refused, if it is enough; the others are left out for good."""
        for upload_digest, reason in refused.items():
            self._store.reject_upload(context, upload_digest, reason)
        kept = [a for a in admissions if a.receipt.upload_digest not in refused]
        check_quorum(context, len(kept))
        return kept

    def _fixed(
        self, row: RoundRow, context: RoundContext, manifest: list[Admission]
    ) -> list[Admission]:
        """Record the manifest, if it is of enough uploads."""
        check_quorum(context, len(manifest))
        self._store.record_manifest(row.key, [a.receipt.upload_digest for a in manifest])
        self._store.advance(row.key, RoundState.SUMMING)
        failpoint("uploads-judged")
        return manifest

    def _apply(
        self,
        spec: TaskSpec,
        row: RoundRow,
        release: Release,
        aggregate_ms: float,
        release_ms: float,
    ) -> None:
        """Store sums and the next model, then record both in one transaction."""
        change, version = None, self._store.task(spec.task_id).model_version
        if spec.model:
            try:
                change = move_model(self._blobs, spec, version, release)
            except ReleaseError as error:
                # Released once, never again: the round is lost, the task goes on.
                self._store.void_round(row.key, _reason(error), loss(release.plan))
                return
        self._blobs.put_sums(spec.task_id, row.round_number, sums_to_bytes(release.sums))
        version = self._store.finish_round(
            row.key,
            bytes.fromhex(release.sha256),
            release.contributors,
            aggregate_ms=aggregate_ms,
            release_ms=release_ms,
            has_model=spec.model is not None,
            rho=loss(release.plan),
            clip=following_clip(spec, row.clip, release),
            figure=figure(spec, release),
            change=change,
        )
        self._meter.record(HEADROOM, noise_headroom(release.plan, release.contributors))
        failpoint("round-finished")
        _LOG.info(
            "round_done",
            round=row.round_number,
            attempt=row.attempt,
            contributors=release.contributors,
            model_version=version,
        )


def _reason(error: SecaggError) -> str:
    return f"{error.reason}: {error}"
