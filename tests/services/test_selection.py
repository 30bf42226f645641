"""Rounds for clients that are drawn by lot: who is drawn, and what everybody else is told."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cohort
import pytest
from key_holders import LocalKeyHolder
from servers import DEADLINE_S, breathe, exactly, running, scenario, task
from serving import loop_thread, serving

from secagg.enrolment import Enrolment, OpenEnrolment, Roster
from secagg.errors import ClosedError, ConfigurationError, NotEnrolledError, NotReadyError
from secagg.wire.v1 import operator_service_pb2_grpc
from secagg_server.operator import Operator
from secagg_server.rounds import OpenRound
from secagg_server.services import OperatorService
from secagg_server.states import RoundState, TaskState
from secagg_server.task_files import read_task
from secagg_server.tasks import TaskSpec

ENROLLED = range(10)
REVOKED = (2, 7)
ACTIVE = {cohort.name_of(index) for index in ENROLLED if index not in REVOKED}


def drawing(selected: int, **changes: int) -> TaskSpec:
    return task(selected_clients=selected, target_clients=3, **changes)


def enrolled() -> Enrolment:
    return cohort.enrolment(ENROLLED, revoked=REVOKED)


def drawn(current: OpenRound) -> frozenset[str]:
    assert current.selected is not None
    return current.selected


def indexes(names: frozenset[str]) -> list[int]:
    return [index for index in range(64) if cohort.name_of(index) in names]


# --- who is drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("selected", "size"), [(3, 3), (5, 5), (7, 7), (8, 8), (9, 8), (1000, 8)])
def test_as_many_are_drawn_as_wanted_from_those_who_may_take_part(
    selected: int, size: int, tmp_path: Path
) -> None:
    async def work() -> None:
        async with running(tmp_path, roster=enrolled()) as server:
            server.create(drawing(selected))
            current = await server.collecting()
            assert len(drawn(current)) == size
            assert drawn(current) <= ACTIVE
            assert server.row(1, 1).selected_clients == sorted(drawn(current))
            (entry,) = server.events("round-created")
            assert f'"selected":{size}' in entry.details
            assert not [name for name in ACTIVE if name in entry.details]

    asyncio.run(work())


@scenario
async def test_every_attempt_is_drawn_anew_and_everybody_comes_up(folder: Path) -> None:
    """By chance alone, a client is left out of all the attempts once in 10**9 runs."""
    async with running(folder, roster=enrolled()) as server:
        server.create(drawing(3, max_attempts=50))
        seen = []
        # The key holder agrees to ten attempts on a model.
        for attempt in range(1, 11):
            seen.append(drawn(await server.collecting(1, attempt)))
            server.clock.advance(DEADLINE_S)
        coordinator = server.coordinator
        seen += [frozenset(coordinator._drawn(drawing(3)) or []) for _ in range(40)]
        assert len(set(seen[:10])) > 1
        assert frozenset().union(*seen) == ACTIVE


@scenario
async def test_a_client_that_is_revoked_is_not_drawn_for_the_next_attempt(folder: Path) -> None:
    roster = cohort.ChangingRoster(cohort.enrolment(range(5)))
    async with running(folder, roster=roster) as server:
        server.create(drawing(5))
        assert len(drawn(await server.collecting(1, 1))) == 5
        roster.enrolment = cohort.enrolment(range(6), revoked=[0, 3])
        server.clock.advance(DEADLINE_S)
        names = drawn(await server.collecting(1, 2))
        assert names == {cohort.name_of(index) for index in (1, 2, 4, 5)}


@scenario
async def test_without_a_draw_everybody_may_come(folder: Path) -> None:
    async with running(folder, roster=enrolled()) as server:
        server.create(task())
        current = await server.collecting()
        assert current.selected is None
        assert server.row(1, 1).selected_clients is None
        for index in (0, 5, 9):
            assert server.rounds.newest("task", (0, 0), cohort.name_of(index)) is current


@scenario
async def test_a_draw_outlives_a_restart(folder: Path) -> None:
    key_holder = LocalKeyHolder(enrolled())
    async with running(folder, key_holder, roster=enrolled()) as server:
        server.create(drawing(4))
        names = drawn(await server.collecting())
    async with running(folder, key_holder, roster=enrolled()) as server:
        server.coordinator.resume()
        assert drawn(await server.collecting()) == names


# --- what the others are told ---------------------------------------------------------------------


@scenario
async def test_the_round_is_done_by_those_who_were_drawn_alone(folder: Path) -> None:
    async with running(folder, roster=enrolled()) as server:
        server.create(drawing(4, rounds=1))
        current = await server.collecting()
        context, names = current.context, drawn(current)
        for index in set(ENROLLED) - set(REVOKED) - set(indexes(names)):
            name = cohort.name_of(index)
            with pytest.raises(NotReadyError, match="drawn"):
                server.rounds.newest("task", (0, 0), name)
            # Whoever learns of the round elsewhere does not get in either.
            for caller in (None, name):
                with pytest.raises(ClosedError, match="drawn"):
                    server.intake.open(cohort.encrypted(context, index).admission, caller)
            assert server.store.upload(context.id, name) is None
        taking_part = indexes(names)[:3]
        for index in taking_part:
            name = cohort.name_of(index)
            assert server.rounds.newest("task", (0, 0), name) is current
            server.send(context, cohort.encrypted(context, index), name)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, taking_part))


@scenario
async def test_nobody_without_a_name_is_drawn(folder: Path) -> None:
    async with running(folder, roster=enrolled()) as server:
        server.create(drawing(8))
        context = (await server.collecting()).context
        for name in (None, "", "client-20", "client-2"):
            with pytest.raises(NotReadyError):
                server.rounds.newest("task", (0, 0), name)
        with pytest.raises(NotEnrolledError):
            server.intake.open(cohort.encrypted(context, 20).admission)


@scenario
async def test_a_client_that_is_not_drawn_now_may_be_drawn_next(folder: Path) -> None:
    async with running(folder, roster=enrolled()) as server:
        server.create(drawing(4, rounds=2))
        first = await server.collecting(1)
        for index in indexes(drawn(first))[:3]:
            server.send(first.context, cohort.encrypted(first.context, index))
        second = await server.collecting(2)
        # The draw is of this round: whoever was in the last one is not let in for it.
        for name in ACTIVE:
            if name in drawn(second):
                assert server.rounds.newest("task", (1, 1), name) is second
            else:
                with pytest.raises(NotReadyError, match="drawn"):
                    server.rounds.newest("task", (1, 1), name)


@scenario
async def test_an_upload_of_somebody_drawn_and_then_revoked_is_left_out(folder: Path) -> None:
    roster = cohort.ChangingRoster(cohort.enrolment(range(5)))
    async with running(folder, roster=roster) as server:
        server.create(task(selected_clients=5, target_clients=5, rounds=1))
        context = (await server.collecting()).context
        server.send_all(context, range(4))
        await breathe()
        roster.enrolment = cohort.enrolment(range(5), revoked=[1])
        server.clock.advance(DEADLINE_S)
        assert await server.task_ended() == (TaskState.FINISHED, "")
        assert server.row(1, 1).contributors == 3
        exactly(server.sums(context.plan, 1), cohort.clear_sums(context, [0, 2, 3]))


@scenario
async def test_with_too_few_enrolled_the_attempt_is_aborted(folder: Path) -> None:
    roster = cohort.ChangingRoster(cohort.enrolment(range(4)))
    async with running(folder, roster=roster) as server:
        server.create(drawing(3))
        await server.collecting(1, 1)
        roster.enrolment = cohort.enrolment(range(4), revoked=range(4))
        server.clock.advance(DEADLINE_S)
        assert drawn(await server.collecting(1, 2)) == frozenset()
        server.clock.advance(DEADLINE_S)
        row = await server.ended(1, 2)
        assert (row.state, row.reason.partition(":")[0]) == (
            RoundState.ABORTED,
            "QUORUM_NOT_REACHED",
        )


# --- what an operator may ask for -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("roster", "created"),
    [
        (OpenEnrolment(), False),
        (cohort.enrolment(range(0)), False),
        (cohort.enrolment(range(2)), False),
        (cohort.enrolment(range(10), revoked=range(2, 10)), False),
        (cohort.enrolment(range(3)), True),
    ],
    ids=["no enrolment", "nobody", "two", "two not revoked", "three"],
)
def test_a_task_that_draws_needs_enough_to_draw_from(
    roster: Roster, created: bool, tmp_path: Path
) -> None:
    with loop_thread() as thread:

        async def start() -> object:
            context = running(tmp_path, roster=roster)
            return context, await context.__aenter__()

        context, server = thread.run(start())  # type: ignore[misc]

        def add(listener) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
            service = OperatorService(server.store, server.blobs, server.coordinator, roster)
            operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(service, listener)

        with serving(thread, add) as address, closing(Operator(address, None)) as operator:
            if created:
                operator.create_task(drawing(3))
            else:
                with pytest.raises(ConfigurationError, match="enrolled clients to draw from"):
                    operator.create_task(drawing(3))
            assert len(operator.tasks()) == created
            # Without a draw, nobody needs to be known in advance.
            operator.create_task(replace(task(), task_id="other"))
        thread.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("selected", [1, 2, 3, 4])
def test_fewer_drawn_than_wanted_can_never_be_enough(selected: int) -> None:
    with pytest.raises(ConfigurationError, match=f"selected_clients={selected}"):
        task(selected_clients=selected, target_clients=5)


TASK_FILE = """
task_id = "drawn"
max_clients = 6
target_clients = 4
{}
[[integers]]
name = "counts"
size = 3
max_abs = 5
"""


def read(folder: Path, line: str) -> TaskSpec:
    file = folder / "task.toml"
    file.write_text(TASK_FILE.format(line))
    return read_task(file)


@pytest.mark.parametrize(("line", "selected"), [("", 0), ("selected_clients = 5", 5)])
def test_a_task_file_says_how_many_are_drawn(line: str, selected: int, tmp_path: Path) -> None:
    spec = read(tmp_path, line)
    assert spec.selected_clients == selected
    assert TaskSpec.from_wire(spec.to_wire()) == spec


@pytest.mark.parametrize(
    "line",
    ["selected_clients = 3", "selected_clients = -1", 'selected_clients = "all"', "selected = 5"],
)
def test_a_task_file_that_draws_an_impossible_number_is_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        read(tmp_path, line)
