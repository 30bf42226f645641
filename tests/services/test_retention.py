"""What the server forgets with time, and what it must never forget."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import replace
from pathlib import Path

import cohort
import numpy as np
import pytest
from clocks import ManualClock
from servers import (
    DEADLINE_S,
    Server,
    breathe,
    exactly,
    running,
    scenario,
    task,
)
from serving import soon
from sqlalchemy import update

from secagg import audit
from secagg.context import RoundContext
from secagg.errors import DuplicateError
from secagg.upload import Upload
from secagg_server.retention import keep_tidy, sweep
from secagg_server.schema import RoundRow, UploadRow
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import RoundKey

LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
THEN = datetime.datetime(2030, 6, 1, tzinfo=datetime.UTC)


async def done(
    server: Server, number: int, *, attempt: int = 1, honest: int = 3
) -> tuple[RoundContext, list[Upload]]:
    """A round that these clients took part in, ended."""
    context = (await server.collecting(number, attempt)).context
    uploads = [cohort.encrypted(context, index) for index in range(honest)]
    for upload in uploads:
        server.send(context, upload)
    server.clock.advance(DEADLINE_S)
    await server.ended(number, attempt)
    return context, uploads


def ended_at(server: Server, key: RoundKey, moment: datetime.datetime) -> None:
    """Let a round have ended at another moment than now."""
    named = (
        RoundRow.task_id == key[0],
        RoundRow.round_number == key[1],
        RoundRow.attempt == key[2],
    )
    server.store.database.write(
        lambda session: session.execute(update(RoundRow).where(*named).values(ended_at=moment))
    )


def receipts(server: Server) -> dict[tuple[int, int], int]:
    """Receipts that are kept, by round and attempt."""

    def kept(session) -> list[UploadRow]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        return list(session.query(UploadRow).filter(UploadRow.admission.is_not(None)))

    found: dict[tuple[int, int], int] = {}
    for row in server.store.database.read(kept):
        key = (row.round_number, row.attempt)
        found[key] = found.get(key, 0) + 1
    return found


def files(server: Server) -> set[str]:
    """Models and sums on the disk."""
    found = [path for path in server.folder.glob("[ms]*/**/*") if path.suffix in (".f32", ".i64")]
    return {path.name for path in found}


def snapshot(server: Server) -> object:
    return (
        {path: path.read_bytes() for path in server.folder.rglob("*") if path.is_file()},
        receipts(server),
        list(server.store.audit()),
    )


@scenario
async def test_what_belongs_to_rounds_that_ended_before_the_moment_goes(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=4))
        contexts = [(await done(server, number))[0] for number in (1, 2, 3)]
        for number in (1, 2, 3):
            ended_at(server, ("task", number, 1), THEN + (number - 3) * DAY)
        assert files(server) == {f"{n}.f32" for n in range(4)} | {f"{n}.i64" for n in (1, 2, 3)}
        assert sweep(server.store, server.blobs, THEN) == 6
        # The models that rounds 1 and 2 started from; 2 is what round 3 started from.
        assert files(server) == {"2.f32", "3.f32", "3.i64"}
        assert receipts(server) == {(3, 1): 3}
        exactly(server.sums(contexts[2].plan, 3), cohort.clear_sums(contexts[2], range(3)))
        audit.verify(server.store.audit())
        (entry,) = server.events("retained-dropped")
        assert '"uploads":6' in entry.details


@scenario
async def test_the_newest_model_stays_however_old_it_is(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=2))
        for number in (1, 2):
            await done(server, number)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        newest = server.model(2)
        sweep(server.store, server.blobs, THEN + 10_000 * DAY)
        assert files(server) == {"2.f32"}
        np.testing.assert_array_equal(server.model(2), newest)
        assert receipts(server) == {}


@scenario
async def test_the_first_model_stays_while_no_round_has_moved_it(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await done(server, 1, honest=2)  # too few
        await server.collecting(1, 2)
        sweep(server.store, server.blobs, THEN)
        assert files(server) == {"0.f32"}


@scenario
async def test_sums_stay_when_only_an_earlier_attempt_at_their_round_is_old(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await done(server, 1, honest=2)
        context, _ = await done(server, 1, attempt=2)
        ended_at(server, ("task", 1, 1), THEN - DAY)
        ended_at(server, ("task", 1, 2), THEN + DAY)
        sweep(server.store, server.blobs, THEN)
        assert files(server) == {"0.f32", "1.f32", "1.i64"}
        assert receipts(server) == {(1, 2): 3}
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, range(3)))


@scenario
async def test_a_round_that_ended_at_the_very_moment_is_kept(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await done(server, 1)
        ended_at(server, ("task", 1, 1), THEN)
        assert sweep(server.store, server.blobs, THEN) == 0
        assert "1.i64" in files(server)
        assert sweep(server.store, server.blobs, THEN + datetime.timedelta(microseconds=1)) == 3
        assert "1.i64" not in files(server)


@scenario
async def test_a_running_round_loses_nothing_and_ends_with_its_sum(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=2))
        await done(server, 1)
        context = (await server.collecting(2)).context
        half = cohort.encrypted(context, 3)
        server.send_all(context, range(3))
        server.intake.open(half.admission)
        kept = server.upload_files()
        sweep(server.store, server.blobs, THEN + 10_000 * DAY)
        assert server.upload_files() == kept != []
        assert receipts(server) == {(2, 1): 4}
        assert server.row(2, 1).state is RoundState.COLLECTING
        server.send(context, half)
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        exactly(server.sums(context.plan, 2), cohort.clear_sums(context, range(4)))


@scenario
async def test_an_upload_whose_receipt_was_dropped_is_known_for_ever(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        context, uploads = await done(server, 1)
        sweep(server.store, server.blobs, THEN)
        assert receipts(server) == {}
        following = (await server.collecting(2)).context
        for index, upload in enumerate(uploads):
            with pytest.raises(DuplicateError, match="another round"):
                server.send(following, cohort.replayed(following, index, upload))
            key, name = cohort.identity(index).public, upload.admission.receipt.upload_digest
            known = server.store.upload(context.id, key.hex())
            assert known == (name, UploadState.ACCEPTED)
        assert server.store.counts(("task", 1, 1)).accepted == 3


@scenario
async def test_sweeping_twice_changes_nothing(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=2))
        for number in (1, 2):
            await done(server, number)
        await server.task_ended()
        await server.tidied()
        assert sweep(server.store, server.blobs, THEN) == 6
        before = snapshot(server)
        assert sweep(server.store, server.blobs, THEN) == 0
        assert sweep(server.store, server.blobs, THEN - 100 * DAY) == 0
        assert snapshot(server) == before


@scenario
async def test_nothing_is_swept_where_nothing_is_old_or_nothing_is(folder: Path) -> None:
    async with running(folder) as server:
        assert sweep(server.store, server.blobs, THEN) == 0
        server.create(task(rounds=1))
        await done(server, 1)
        await server.task_ended()
        await server.tidied()
        before = snapshot(server)
        assert sweep(server.store, server.blobs, LONG_AGO) == 0
        assert snapshot(server) == before


@scenario
async def test_chunks_that_a_crash_left_behind_go_once_the_task_has_ended(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        context, uploads = await done(server, 1)
        await server.task_ended()
        name = uploads[0].admission.receipt.upload_digest
        server.blobs.put_chunk(context.id, name, 0, b"left behind")
        sweep(server.store, server.blobs, LONG_AGO)
        await server.tidied()
        assert "1.i64" in files(server)


@scenario
async def test_a_task_without_a_model_keeps_and_drops_sums_alone(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(cohort.counts_plan(), rounds=1))
        await done(server, 1)
        assert files(server) == {"1.i64"}
        sweep(server.store, server.blobs, THEN)
        assert files(server) == set()


@scenario
async def test_every_task_of_more_than_one_page_is_swept(folder: Path) -> None:
    async with running(folder) as server:
        plan = cohort.counts_plan()
        left = cohort.round_context(plan).id
        for number in range(201):
            name = f"task-{number}"
            server.store.create_task(replace(task(plan), task_id=name), bytes(32))
            server.store.end_task(name, TaskState.FINISHED)
            server.blobs.put_chunk(replace(left, task_id=name), bytes(32), 0, b"left behind")
        sweep(server.store, server.blobs, THEN)
        await server.tidied()


@scenario
async def test_the_server_sweeps_at_its_start_and_every_hour(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await done(server, 1)
        clock = ManualClock(THEN)
        ended_at(server, ("task", 1, 1), THEN - 7 * DAY + datetime.timedelta(minutes=30))
        work = asyncio.create_task(keep_tidy(server.store, server.blobs, clock, 7.0))
        await clock.watched()
        assert "1.i64" in files(server)
        clock.advance(3599.0)
        await breathe()
        assert "1.i64" in files(server)
        clock.advance(1.0)
        await soon(lambda: "1.i64" not in files(server))
        await soon(lambda: receipts(server) == {})
        await clock.watched()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work


@scenario
async def test_what_is_kept_for_minutes_is_swept_every_minute(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        await done(server, 1)
        clock, minute = ManualClock(THEN), datetime.timedelta(minutes=1)
        ended_at(server, ("task", 1, 1), THEN - 4 * minute)
        work = asyncio.create_task(keep_tidy(server.store, server.blobs, clock, 5 / (24 * 60)))
        await clock.watched()
        assert "1.i64" in files(server)
        clock.advance(61.0)
        await soon(lambda: "1.i64" not in files(server))
        await clock.watched()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
