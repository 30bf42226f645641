"""Removes what nobody needs any more: old sums, models, optimisers' state, receipts and verdicts.

The newest model of a task stays, and so does the replay index: the digest, client and state of
every upload. What has been used once must be known for as long as the server lives.
"""

from __future__ import annotations

import asyncio
import datetime

import structlog

from secagg_server.blobs import BlobStore
from secagg_server.clock import Clock
from secagg_server.states import RoundState, TaskState
from secagg_server.store import Store, TaskRow

__all__ = ["keep_tidy", "sweep"]

_EVERY_S = 3600.0
_AT_MOST_EVERY_S = 60.0
_DAY_S = 24 * 3600.0
_LOG = structlog.get_logger(__name__)


async def keep_tidy(store: Store, blobs: BlobStore, clock: Clock, days: float) -> None:
    """Sweep now, and every hour from then on; more often where less than ten hours are kept."""
    never = asyncio.Event()
    every = min(_EVERY_S, max(_AT_MOST_EVERY_S, days * _DAY_S / 10))
    while True:
        before = clock.utc() - datetime.timedelta(days=days)
        dropped = await asyncio.to_thread(sweep, store, blobs, before)
        _LOG.info("swept", receipts=dropped)
        await clock.wait(never, clock.now() + every)


def sweep(store: Store, blobs: BlobStore, before: datetime.datetime) -> int:
    """Remove what belongs to rounds that ended before a moment.

    Returns:
        Receipts that were dropped; their digests stay.
    """
    after = ""
    while page := store.tasks(after):
        for task in page:
            _sweep_task(store, blobs, task, before)
        after = page[-1].task_id
    return store.drop_admissions(before)


def _sweep_task(store: Store, blobs: BlobStore, task: TaskRow, before: datetime.datetime) -> None:
    if task.state is not TaskState.RUNNING:
        blobs.drop_uploads(task.task_id)
        blobs.drop_optimiser(task.task_id, task.model_version)
    check = task.task_spec().plan.norm_check
    past = 1 if check is None or check.min_cosine is None else 2
    for row in store.rounds(task.task_id):
        # An aborted attempt has no sums; those of its round are a later attempt's.
        if row.state is RoundState.DONE and row.ended_at and row.ended_at < before:
            blobs.drop_sums(task.task_id, row.round_number)
            # The version that a round started from, or the one before that if its uploads were
            # compared with the step between them; the newest one is nobody's past.
            if past <= row.model_version <= task.model_version:
                blobs.drop_model(task.task_id, row.model_version - past)
