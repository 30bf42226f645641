"""Runs a task: round after round, attempt after attempt, through the states of `states`.

Collect until the deadline or until enough have come, let the key holder judge, fix the manifest,
add exactly the ciphertexts on it, have the sum opened, apply it. A client that drops out, is late
or is refused changes nothing but the cohort; too small a cohort aborts the attempt with the reason.
Memory is that of one chunk of the model, whatever the number of clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.context import NO_MODEL, RoundContext
from secagg.errors import (
    QuorumError,
    ReleaseError,
    RoundError,
    SecaggError,
    UnavailableError,
)
from secagg.logs import where
from secagg.parameters import FloatSegment
from secagg.release import Release
from secagg.residues import ResidueSum, widen
from secagg.upload import Admission
from secagg.wire.codec import model_digest, model_from_bytes, model_to_bytes, sums_to_bytes
from secagg_server.blobs import BlobStore
from secagg_server.clock import Clock
from secagg_server.key_holder import KeyHolderStub, ReleasedSums
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import FINAL, RoundState, TaskState
from secagg_server.store import RoundRow, Store
from secagg_server.tasks import TaskSpec

__all__ = ["Coordinator"]

RELEASE_ATTEMPTS = 3
_BY_OPERATOR = "ABORTED: ended by the operator"
_UNEXPECTED = "INTERNAL: see the server's log"
_LOG = structlog.get_logger(__name__)


class Coordinator:
    """Runs every task of a server, each in an asyncio task of its own."""

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        rounds: OpenRounds,
        key_holder: KeyHolderStub,
        clock: Clock,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._rounds = rounds
        self._key_holder = key_holder
        self._clock = clock
        self._running: dict[str, asyncio.Task[None]] = {}
        self._contexts: dict[str, RoundContext] = {}

    def resume(self) -> None:
        """Continue every running task after a start."""
        for row in self._store.tasks():
            if row.state is TaskState.RUNNING:
                self._abandon_collecting(row.task_id)
                self.start(row.task_spec())

    def _abandon_collecting(self, task_id: str) -> None:
        """End attempts that a restart interrupted before they had closed."""
        for row in self._store.rounds(task_id):
            if row.state in (RoundState.CREATED, RoundState.COLLECTING):
                self._store.abort_round(row.key, "RESTARTED: the server was restarted")
                self._blobs.drop_uploads(task_id)

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
        try:
            await self._settle_interrupted(spec)
            for number in range(self._store.task(spec.task_id).rounds_done + 1, spec.rounds + 1):
                await self._round(spec, number)
            self._store.end_task(spec.task_id, TaskState.FINISHED)
        except SecaggError as error:
            self._store.end_task(spec.task_id, TaskState.FAILED, _reason(error))
        except Exception as error:  # a task must never die silently
            _LOG.error("task_failed", error=type(error).__name__, at=where(error))
            self._store.abort_open_rounds(spec.task_id, _UNEXPECTED)
            await self._forget(spec.task_id)
            self._store.end_task(spec.task_id, TaskState.FAILED, _UNEXPECTED)
        finally:
            self._running.pop(spec.task_id, None)

    async def _settle_interrupted(self, spec: TaskSpec) -> None:
        """After a restart: conclude a round that had closed.

        The key holder may have released the sum just before the server died. It never opens another
        one for that round, but gives the same manifest the same answer again.
        """
        for row in self._store.rounds(spec.task_id):
            if row.state in FINAL:
                continue
            context = self._contexts[spec.task_id] = self._stored_context(spec, row)
            await self._settle(row, self._conclude(spec, row, context))

    def _stored_context(self, spec: TaskSpec, row: RoundRow) -> RoundContext:
        return RoundContext.create(
            spec.plan,
            row.round_key,
            task_id=spec.task_id,
            round_number=row.round_number,
            attempt=row.attempt,
            model_digest=self._model_digest(spec),
        )

    async def _round(self, spec: TaskSpec, number: int) -> None:
        """Attempt a round until it is done or out of attempts; those before a restart count."""
        failure: SecaggError = RoundError("expected an attempt left; a restart took the last one")
        while self._store.attempts(spec.task_id, number) < spec.max_attempts:
            row = self._store.create_round(spec.task_id, number)
            error = await self._settle(row, self._attempt(spec, row))
            if error is None:
                return
            failure = error
        raise failure

    async def _settle(self, row: RoundRow, work: Coroutine[Any, Any, None]) -> SecaggError | None:
        """Do an attempt's work and clean up after it; what went wrong, if anything did."""
        try:
            await work
        except SecaggError as error:
            self._store.abort_round(row.key, _reason(error))
            _LOG.warning(
                "round_aborted", round=row.round_number, attempt=row.attempt, why=error.reason
            )
            await self._forget(row.task_id)
            return error
        self._blobs.drop_uploads(row.task_id)
        return None

    async def _forget(self, task_id: str) -> None:
        """Let the key holder erase its secrets, and erase the uploads."""
        context = self._contexts.pop(task_id, None)
        if context is not None:
            # A key holder that cannot be reached erases them when the next round is opened.
            with contextlib.suppress(SecaggError):
                await self._key_holder.close_round(context)
        self._blobs.drop_uploads(task_id)

    async def _attempt(self, spec: TaskSpec, row: RoundRow) -> None:
        context = self._contexts[spec.task_id] = await self._open(spec, row)
        await self._collect(spec, row, context)
        await self._conclude(spec, row, context)

    async def _conclude(self, spec: TaskSpec, row: RoundRow, context: RoundContext) -> None:
        """From closed to done; repeating any part of it gives the same result."""
        manifest = await self._manifest(row, context)
        residues, aggregate_ms = await self._sum(context, manifest)
        self._reach(row, RoundState.RELEASING)
        release, release_ms = await self._release(context, manifest, residues)
        self._apply(spec, row, release, aggregate_ms, release_ms)

    def _reach(self, row: RoundRow, state: RoundState) -> None:
        """Advance to a state, unless the round was further when a restart interrupted it."""
        order = list(RoundState)
        if order.index(row.state) < order.index(state):
            self._store.advance(row.key, state)

    def _model_digest(self, spec: TaskSpec) -> bytes:
        if spec.model is None:
            return NO_MODEL
        version = self._store.task(spec.task_id).model_version
        return model_digest(self._blobs.model(spec.task_id, version))

    async def _open(self, spec: TaskSpec, row: RoundRow) -> RoundContext:
        context = await self._key_holder.open_round(
            spec.plan,
            task_id=spec.task_id,
            round_number=row.round_number,
            attempt=row.attempt,
            model_digest=self._model_digest(spec),
        )
        self._store.advance(row.key, RoundState.COLLECTING, round_key=context.round_key)
        return context

    async def _collect(self, spec: TaskSpec, row: RoundRow, context: RoundContext) -> None:
        deadline = self._clock.now() + spec.round_deadline_ms / 1000
        version = self._store.task(spec.task_id).model_version
        current = OpenRound(spec, context, version, deadline)
        self._rounds.open(current)
        await self._clock.wait(current.filled, deadline)
        self._rounds.close(spec.task_id)
        self._store.advance(row.key, RoundState.CHECKING)

    async def _manifest(self, row: RoundRow, context: RoundContext) -> list[Admission]:
        """Every accepted upload that the key holder does not refuse."""
        admissions = self._store.accepted(context)
        _check_quorum(context, len(admissions))
        if row.state in (RoundState.SUMMING, RoundState.RELEASING):
            return admissions  # judged before a restart; the refused ones are not among them
        refused = await self._key_holder.judge(context, admissions)
        for upload_digest, reason in refused.items():
            self._store.reject_upload(context, upload_digest, reason)
        manifest = [a for a in admissions if a.receipt.upload_digest not in refused]
        _check_quorum(context, len(manifest))
        self._reach(row, RoundState.SUMMING)
        return manifest

    async def _sum(
        self, context: RoundContext, manifest: list[Admission]
    ) -> tuple[NDArray[np.uint64], float]:
        started = time.perf_counter()
        residues = await asyncio.to_thread(self._add_chunks, context, manifest)
        return residues, (time.perf_counter() - started) * 1000

    def _add_chunks(self, context: RoundContext, manifest: list[Admission]) -> NDArray[np.uint64]:
        parts = []
        for index in range(context.plan.chunks):
            blocks = context.plan.chunk_blocks(index)
            running = ResidueSum(blocks)
            for admission in manifest:
                data = self._blobs.chunk(context.id, admission.receipt.upload_digest, index)
                running.add(widen(data, blocks))
            parts.append(running.value())
        return np.concatenate(parts)

    async def _release(
        self, context: RoundContext, manifest: list[Admission], residues: NDArray[np.uint64]
    ) -> tuple[Release, float]:
        names = [admission.receipt.upload_digest for admission in manifest]
        started = time.perf_counter()
        answer = await self._released(context, names, residues)
        elapsed_ms = (time.perf_counter() - started) * 1000
        release = Release(context.plan, context.rotation, answer.contributors, answer.sums)
        return release, elapsed_ms

    async def _released(
        self, context: RoundContext, names: list[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """Ask until an answer arrives: a lost answer is the same one the second time."""
        for _ in range(RELEASE_ATTEMPTS - 1):
            with contextlib.suppress(UnavailableError):
                return await self._key_holder.release(context, names, residues)
        return await self._key_holder.release(context, names, residues)

    def _apply(
        self,
        spec: TaskSpec,
        row: RoundRow,
        release: Release,
        aggregate_ms: float,
        release_ms: float,
    ) -> None:
        """Store sums and the next model, then record both in one transaction."""
        version = self._store.task(spec.task_id).model_version
        if spec.model:
            try:
                model = release.applied_to(self._model(spec, spec.model, version))
            except ReleaseError as error:
                # Released once, never again: the round is lost, the task goes on.
                self._store.void_round(row.key, _reason(error))
                return
            self._blobs.put_model(spec.task_id, version + 1, model_to_bytes(model))
        self._blobs.put_sums(spec.task_id, row.round_number, sums_to_bytes(release.sums))
        version = self._store.finish_round(
            row.key,
            bytes.fromhex(release.sha256),
            release.contributors,
            aggregate_ms=aggregate_ms,
            release_ms=release_ms,
            has_model=spec.model is not None,
        )
        _LOG.info(
            "round_done",
            round=row.round_number,
            attempt=row.attempt,
            contributors=release.contributors,
            model_version=version,
        )

    def _model(self, spec: TaskSpec, segment: FloatSegment, version: int) -> NDArray[np.float32]:
        return model_from_bytes(self._blobs.model(spec.task_id, version), segment.parameters)


def _check_quorum(context: RoundContext, uploads: int) -> None:
    if uploads < context.plan.min_clients:
        raise QuorumError(
            f"expected at least min_clients={context.plan.min_clients} accepted uploads at the "
            f"deadline; got {uploads}; a longer deadline or more clients would help"
        )


def _reason(error: SecaggError) -> str:
    return f"{error.reason}: {error}"
