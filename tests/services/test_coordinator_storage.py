"""A disk or a database that fails for a while costs time, and neither attempt nor upload."""

from __future__ import annotations

import asyncio
import errno
import functools
from pathlib import Path
from typing import Any

import cohort
import pytest
from servers import DEADLINE_S, Server, exactly, running, task
from serving import soon

from secagg.errors import StorageError
from secagg_server.coordinator import STORAGE_PAUSE_S
from secagg_server.states import RoundState, TaskState

FAILS = StorageError("expected the store's database to do its work; it did not")
FULL = OSError(errno.ENOSPC, "No space left on device")
TIMES = 2


def failing(owner: object, method: str, error: Exception) -> None:
    """Have the next calls of a method fail, before their effect."""
    work, left = getattr(owner, method), TIMES

    @functools.wraps(work)
    def failed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - any method
        nonlocal left
        if left:
            left -= 1
            raise error
        return work(*arguments, **options)

    setattr(owner, method, failed)


async def ended(server: Server) -> tuple[TaskState, str]:
    """How the task ended, with as much time passing as it wants to wait."""

    def over() -> bool:
        server.clock.advance(STORAGE_PAUSE_S)
        return server.store.task("task").state is not TaskState.RUNNING

    await soon(over)
    return await server.task_ended()


@pytest.mark.parametrize(
    ("part", "method", "error"),
    [
        ("store", "advance", FAILS),
        ("store", "accepted", FAILS),
        ("store", "record_manifest", FAILS),
        ("store", "finish_round", FAILS),
        ("store", "end_task", FAILS),
        ("blobs", "chunk", OSError(errno.EIO, "Input/output error")),
        ("blobs", "put_model", FULL),
        ("blobs", "put_sums", FULL),
    ],
)
def test_what_the_store_fails_in_is_done_once_it_works(
    tmp_path: Path, part: str, method: str, error: Exception
) -> None:
    async def work() -> None:
        async with running(tmp_path) as server:
            server.create(task(rounds=1))
            current = await server.collecting()
            server.send_all(current.context, range(4))
            failing(getattr(server, part), method, error)
            server.clock.advance(DEADLINE_S)
            assert await ended(server) == (TaskState.FINISHED, "")
            row = server.row(1, 1)
            assert (row.state, row.contributors, row.model_version) == (RoundState.DONE, 4, 1)
            plan = current.context.plan
            exactly(server.sums(plan, 1), cohort.clear_sums(current.context, range(4)))

    asyncio.run(work())


@pytest.mark.parametrize("method", ["create_round", "open_round"])
def test_a_round_that_cannot_begin_begins_once_the_store_works(tmp_path: Path, method: str) -> None:
    async def work() -> None:
        async with running(tmp_path) as server:
            failing(server.store, method, FAILS)
            server.create(task(rounds=1))
            for _ in range(TIMES):
                await server.clock.watched()
                assert server.newest() is None
                server.clock.advance(STORAGE_PAUSE_S)
            current = await server.collecting()
            server.send_all(current.context, range(3))
            assert await ended(server) == (TaskState.FINISHED, "")
            assert server.row(1, 1).contributors == 3

    asyncio.run(work())
