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

import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.context import NO_MODEL, RoundContext
from secagg.errors import QuorumError, SecaggError
from secagg.logs import where
from secagg.parameters import FloatSegment
from secagg.release import Release
from secagg.residues import ResidueSum, widen
from secagg.upload import Admission
from secagg.wire.codec import model_digest, model_from_bytes, model_to_bytes, sums_to_bytes
from secagg_server.blobs import BlobStore
from secagg_server.clock import Clock
from secagg_server.key_holder import KeyHolderStub
from secagg_server.rounds import OpenRound, OpenRounds
from secagg_server.states import RoundState, TaskState
from secagg_server.store import RoundRow, Store
from secagg_server.tasks import TaskSpec

__all__ = ["Coordinator"]

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

    def resume(self) -> None:
        """Continue every running task after a start; half-finished attempts are abandoned."""
        for row in self._store.tasks():
            if row.state is TaskState.RUNNING:
                self._store.abort_open_rounds(row.task_id, "RESTARTED: the server was restarted")
                self.start(row.task_spec())

    def start(self, spec: TaskSpec) -> None:
        """Run a task unless it is running."""
        if spec.task_id not in self._running:
            self._running[spec.task_id] = asyncio.create_task(self._run(spec))

    async def abort(self, task_id: str) -> None:
        """End a task by order of the operator."""
        self._store.end_task(task_id, TaskState.FAILED, "ABORTED: ended by the operator")
        self._store.abort_open_rounds(task_id, "ABORTED: ended by the operator")
        await self._cancel(task_id)

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
            for number in range(self._store.task(spec.task_id).rounds_done + 1, spec.rounds + 1):
                await self._round(spec, number)
            self._store.end_task(spec.task_id, TaskState.FINISHED)
        except SecaggError as error:
            self._store.end_task(spec.task_id, TaskState.FAILED, _reason(error))
        except Exception as error:  # a task must never die silently
            _LOG.error("task_failed", error=type(error).__name__, at=where(error))
            self._store.end_task(spec.task_id, TaskState.FAILED, "INTERNAL: see the server's log")
        finally:
            self._running.pop(spec.task_id, None)

    async def _round(self, spec: TaskSpec, number: int) -> None:
        for attempt in range(1, spec.max_attempts + 1):
            row = self._store.create_round(spec.task_id, number)
            try:
                await self._attempt(spec, row)
            except SecaggError as error:
                self._store.abort_round(row.key, _reason(error))
                _LOG.warning("round_aborted", round=number, attempt=row.attempt, why=error.reason)
                if attempt == spec.max_attempts:
                    raise
            else:
                return

    async def _attempt(self, spec: TaskSpec, row: RoundRow) -> None:
        version = self._store.task(spec.task_id).model_version
        context = await self._open(spec, row, version)
        try:
            await self._collect(spec, row, context, version)
            manifest = await self._check(row, context)
            residues, aggregate_ms = await self._sum(row, context, manifest)
            released, release_ms = await self._release(row, context, manifest, residues)
            await self._apply(spec, row, released, aggregate_ms, release_ms)
        except BaseException:
            with contextlib.suppress(SecaggError):
                await self._key_holder.close_round(context)
            raise
        finally:
            self._rounds.close(spec.task_id)
            self._blobs.drop_round(context.id)

    async def _open(self, spec: TaskSpec, row: RoundRow, version: int) -> RoundContext:
        model = self._blobs.model(spec.task_id, version) if spec.model else b""
        context = await self._key_holder.open_round(
            spec.plan,
            task_id=spec.task_id,
            round_number=row.round_number,
            attempt=row.attempt,
            model_digest=model_digest(model) if spec.model else NO_MODEL,
        )
        self._store.advance(row.key, RoundState.COLLECTING, round_key=context.round_key)
        return context

    async def _collect(
        self, spec: TaskSpec, row: RoundRow, context: RoundContext, version: int
    ) -> None:
        deadline = self._clock.now() + spec.round_deadline_ms / 1000
        current = OpenRound(spec, context, version, deadline)
        self._rounds.open(current)
        await self._clock.wait(current.filled, deadline)
        self._rounds.close(spec.task_id)
        self._store.advance(row.key, RoundState.CHECKING)

    async def _check(self, row: RoundRow, context: RoundContext) -> list[Admission]:
        """The manifest: every accepted upload that the key holder does not refuse."""
        admissions = self._store.accepted(context)
        _check_quorum(context, len(admissions))
        refused = await self._key_holder.judge(context, admissions)
        for upload_digest, reason in refused.items():
            self._store.reject_upload(context, upload_digest, reason)
        manifest = [a for a in admissions if a.receipt.upload_digest not in refused]
        _check_quorum(context, len(manifest))
        self._store.advance(row.key, RoundState.SUMMING)
        return manifest

    async def _sum(
        self, row: RoundRow, context: RoundContext, manifest: list[Admission]
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
        self,
        row: RoundRow,
        context: RoundContext,
        manifest: list[Admission],
        residues: NDArray[np.uint64],
    ) -> tuple[Release, float]:
        self._store.advance(row.key, RoundState.RELEASING)
        names = [admission.receipt.upload_digest for admission in manifest]
        started = time.perf_counter()
        answer = await self._key_holder.release(context, names, residues)
        elapsed_ms = (time.perf_counter() - started) * 1000
        release = Release(context.plan, context.rotation, answer.contributors, answer.sums)
        return release, elapsed_ms

    async def _apply(
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
            data = model_to_bytes(release.applied_to(self._model(spec, spec.model, version)))
            self._blobs.put_model(spec.task_id, version + 1, data)
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
