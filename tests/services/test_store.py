"""The contract of the store, on SQLite and PostgreSQL alike, and what may be configured instead."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import cohort
import pytest
import stores
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from postgres import Postgres, running
from sqlalchemy import Connection, insert, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from secagg.audit import client_hash, read_entries, verify
from secagg.context import RoundContext
from secagg.errors import ClosedError, ConfigurationError, DuplicateError, UnavailableError
from secagg.parameters import Plan
from secagg.receipts import SigningKey
from secagg.upload import Admission
from secagg.verdicts import Verdict
from secagg.wire.codec import admission_to_wire
from secagg_server import audit_log, transactions
from secagg_server.schema import Base, UploadRow
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import RoundKey, RoundRow, Store, UploadCounts
from secagg_server.tasks import TaskSpec

DIGEST = bytes(range(32))
AUDIT_KEY = b"k" * 32
KEY_HOLDER = SigningKey.from_bytes(bytes(32))
KEY = ("task", 1, 1)
CLOSES_AT = datetime(2031, 5, 17, 12, 30, 0, 250_000, UTC)
STEPS = ("COLLECTING", "CHECKING", "SUMMING", "RELEASING")
UNKNOWN = ("task", 9, 9)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def migrated(server: Postgres) -> Iterator[str]:
    """A PostgreSQL database to copy: the store's tables, and nothing in them."""
    with server.database() as name:
        Store(server.url(name)).close()
        yield name


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(server: Postgres, migrated: str) -> Iterator[str]:
    """A PostgreSQL database that is emptied for each test: making one takes many times longer."""
    with server.database(migrated) as database:
        yield database


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with the store's tables; nothing is in them."""
    if kind == "sqlite":
        return stores.migrated(tmp_path / "store.sqlite3")
    server: Postgres = request.getfixturevalue("server")
    database = request.getfixturevalue("shared")
    others = f"FROM pg_stat_activity WHERE datname = '{database}'"
    server.execute(
        f"SELECT pg_terminate_backend(pid) {others}",
        f"ALTER DATABASE {database} RESET ALL",
    )
    emptied = ("TRUNCATE tasks, rounds, uploads, audit", "UPDATE heartbeat SET beat = 0")
    server.execute(*emptied, database=database)
    return server.url(database)


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of its own, without tables."""
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.sqlite3"
        return
    server: Postgres = request.getfixturevalue("server")
    with server.database() as name:
        yield server.url(name)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store whose log must be whole after the test."""
    with closing(Store(url, AUDIT_KEY)) as opened:
        yield opened
        log(opened)


def log(store: Store) -> list[tuple[str, dict[str, Any]]]:
    """Events and details of a log whose chain holds."""
    entries = store.audit(limit=100_000)
    verify(entries)
    return [(entry.event, json.loads(entry.details)) for entry in entries]


def rows(store: Store) -> dict[str, Any]:
    """Everything in the store."""
    with store.database.engine.connect() as connection:
        tables = Base.metadata.sorted_tables
        return {table.name: connection.execute(select(table)).all() for table in tables}


def name(index: int) -> str:
    return f"clinic-{index}"


def task(task_id: str = "task", plan: Plan | None = None, rounds: int = 3) -> TaskSpec:
    plan = plan or cohort.mixed_plan()
    return TaskSpec(task_id, plan, rounds, 1000, 2, plan.max_clients)


def context(number: int = 1, attempt: int = 1, plan: Plan | None = None) -> RoundContext:
    return cohort.round_context(
        plan or cohort.mixed_plan(), task_id="task", round_number=number, attempt=attempt
    )


def opened(store: Store, key: RoundKey, round_key: bytes = b"round key") -> None:
    store.open_round(
        key, round_key=round_key, identity=b"identity", signature=b"signature", closes_at=CLOSES_AT
    )


def created(store: Store) -> RoundKey:
    store.create_task(task(), DIGEST)
    return store.create_round("task", 1).key


def collecting(store: Store, plan: Plan | None = None) -> RoundContext:
    """A store with a task whose first round collects."""
    store.create_task(task(plan=plan), DIGEST)
    found = context(plan=plan)
    opened(store, store.create_round("task", 1).key, found.round_key)
    return found


def announced(store: Store, found: RoundContext, index: int, nonce: int = 0) -> Admission:
    admission = cohort.noise_upload(found, index, nonce).admission
    store.open_upload(found, admission, name(index))
    return admission


def accepted(store: Store, found: RoundContext, index: int) -> Admission:
    admission = announced(store, found, index)
    store.accept_upload(found, name(index))
    return admission


def advance_to(store: Store, key: RoundKey, state: str) -> None:
    """From collecting on."""
    for step in STEPS[1 : STEPS.index(state) + 1]:
        store.advance(key, RoundState(step))


def to_releasing(store: Store, key: RoundKey) -> None:
    opened(store, key)
    advance_to(store, key, "RELEASING")


def finish(store: Store, key: RoundKey, *, has_model: bool = True) -> int:
    return store.finish_round(key, DIGEST, 4, aggregate_ms=1.5, release_ms=2.5, has_model=has_model)


# --- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\0", "a\0b", "a" * 65, "../x"])
def test_what_no_task_can_be_called_is_unknown(store: Store, name: str) -> None:
    """Not every database takes any text; whoever asks for it is told the same by all."""
    with pytest.raises(ConfigurationError, match="expected a task id"):
        store.task(name)
    with pytest.raises(ConfigurationError, match="expected a task id"):
        store.tasks(after=name)


def test_a_new_task_runs_and_has_done_nothing(store: Store) -> None:
    row = store.create_task(task(), DIGEST)
    assert (row.state, row.rounds_done, row.model_version, row.reason) == (
        TaskState.RUNNING,
        0,
        0,
        "",
    )
    assert store.task("task").task_spec() == task()


def test_creating_the_same_task_again_changes_nothing(store: Store) -> None:
    first = store.create_task(task(), DIGEST)
    store.end_task("task", TaskState.FAILED, "WHY")
    before = rows(store)
    again = store.create_task(task(), DIGEST)
    assert (again.created_at, again.state) == (first.created_at, TaskState.FAILED)
    assert rows(store) == before


@pytest.mark.parametrize(
    "other",
    [
        task(rounds=4),
        task(plan=cohort.mixed_plan(max_clients=7)),
        replace(task(), round_deadline_ms=1001),
        replace(task(), max_attempts=3),
        replace(task(), target_clients=4),
    ],
    ids=["rounds", "plan", "deadline", "attempts", "target"],
)
def test_a_different_task_of_the_same_id_is_refused(store: Store, other: TaskSpec) -> None:
    store.create_task(task(), DIGEST)
    before = rows(store)
    with pytest.raises(DuplicateError, match="'task' exists"):
        store.create_task(other, DIGEST)
    assert rows(store) == before


def test_the_same_task_with_another_initial_model_is_refused(store: Store) -> None:
    store.create_task(task(), DIGEST)
    with pytest.raises(DuplicateError):
        store.create_task(task(), bytes(32))


def test_a_task_that_was_never_created_does_not_exist(store: Store) -> None:
    store.create_task(task(), DIGEST)
    assert [store.task_exists(name) for name in ("task", "Task", "other", "")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.task("other"),
        lambda store: store.tasks(after="other"),
        lambda store: store.end_task("other", TaskState.FAILED, "WHY"),
        lambda store: store.create_round("other", 1),
    ],
    ids=["task", "tasks", "end", "round"],
)
def test_an_unknown_task_is_refused(store: Store, call: Callable[[Store], object]) -> None:
    store.create_task(task(), DIGEST)
    before = rows(store)
    with pytest.raises(ConfigurationError, match="'other'"):
        call(store)
    assert rows(store) == before


def test_pages_of_tasks_are_oldest_first_and_leave_none_out(store: Store) -> None:
    names = ["b", "a", "c", "z", "d"]
    for task_id in names:
        store.create_task(task(task_id), DIGEST)
    pages, after = [], ""
    while page := [row.task_id for row in store.tasks(after, limit=2)]:
        pages.append(page)
        after = page[-1]
    assert pages == [["b", "a"], ["c", "z"], ["d"]]
    assert [row.task_id for row in store.tasks()] == names


def test_tasks_of_the_same_moment_are_paged_by_name(store: Store) -> None:
    for task_id in ("b", "c", "a", "d"):
        store.create_task(task(task_id), DIGEST)
    with store.database.engine.begin() as connection:
        connection.execute(text("UPDATE tasks SET created_at = '2031-05-17 12:30:00.000000'"))
    assert [row.task_id for row in store.tasks(limit=3)] == ["a", "b", "c"]
    assert [row.task_id for row in store.tasks("b")] == ["c", "d"]


def test_a_task_ends_once(store: Store) -> None:
    store.create_task(task(), DIGEST)
    store.end_task("task", TaskState.FAILED, "first")
    store.end_task("task", TaskState.FINISHED, "second")
    row = store.task("task")
    assert (row.state, row.reason) == (TaskState.FAILED, "first")


# --- rounds -----------------------------------------------------------------------------------


def test_tasks_are_counted_by_state_and_those_that_run_are_found(store: Store) -> None:
    assert store.tasks_by_state() == {"RUNNING": 0, "FINISHED": 0, "FAILED": 0}
    assert store.running_tasks() == []
    for number in range(6):
        store.create_task(task(f"task-{number}"), DIGEST)
    for number, state in ((0, TaskState.FINISHED), (3, TaskState.FAILED), (4, TaskState.FINISHED)):
        store.end_task(f"task-{number}", state)
    assert store.tasks_by_state() == {"RUNNING": 3, "FINISHED": 2, "FAILED": 1}
    assert [row.task_id for row in store.running_tasks()] == ["task-1", "task-2", "task-5"]


def test_attempts_that_go_on_are_counted_by_state(store: Store) -> None:
    nothing = dict.fromkeys(("CREATED", "COLLECTING", "CHECKING", "SUMMING", "RELEASING"), 0)
    nothing["AUDITING"] = 0
    assert store.open_rounds_by_state() == nothing
    for task_id in ("task", "other", "ended"):
        store.create_task(task(task_id), DIGEST)
    store.create_round("other", 1)
    first = store.create_round("task", 1).key
    store.abort_round(first, "QUORUM_NOT_REACHED: text")
    second = store.create_round("task", 1).key
    opened(store, second)
    assert store.open_rounds_by_state() == nothing | {"CREATED": 1, "COLLECTING": 1}
    advance_to(store, second, "RELEASING")
    assert store.open_rounds_by_state() == nothing | {"CREATED": 1, "RELEASING": 1}
    finish(store, second)
    store.create_round("ended", 1)
    store.end_task("ended", TaskState.FAILED)
    assert store.open_rounds_by_state() == nothing | {"CREATED": 1}


def test_counting_open_attempts_costs_nothing_for_those_that_have_ended(tmp_path: Path) -> None:
    """However many there are: somebody asks every few seconds. In steps of SQLite's machine."""
    with closing(Store(stores.migrated(tmp_path / "store.sqlite3"))) as store:
        store.create_task(task("old"), DIGEST)
        store.end_task("old", TaskState.FINISHED)
        store.create_task(task("new"), DIGEST)
        store.create_round("new", 1)
        before = steps(store, store.open_rounds_by_state)
        with store.database.engine.begin() as connection:
            done = [
                {
                    "task_id": "old",
                    "round_number": number,
                    "attempt": 1,
                    "state": RoundState.DONE,
                    "created_at": CLOSES_AT,
                }
                for number in range(1, 500)
            ]
            connection.execute(insert(RoundRow), done)
        assert steps(store, store.open_rounds_by_state) <= before + 50
        assert store.open_rounds_by_state()[RoundState.CREATED] == 1


def steps(store: Store, work: Callable[[], object]) -> int:
    """What a query costs."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    with store.database.engine.connect() as connection:
        database = connection.connection.dbapi_connection
    database.set_progress_handler(count, 1)
    work()
    database.set_progress_handler(None, 1)
    assert counted, "expected another query on the same connection"
    return counted


def test_attempts_are_counted_within_a_round(store: Store) -> None:
    store.create_task(task(), DIGEST)
    store.create_task(task("other"), DIGEST)
    made = [store.create_round("task", number) for number in (1, 1, 2, 1)]
    made.append(store.create_round("other", 1))
    assert [row.key for row in made] == [
        ("task", 1, 1),
        ("task", 1, 2),
        ("task", 2, 1),
        ("task", 1, 3),
        ("other", 1, 1),
    ]
    assert [row.key[1:] for row in store.rounds("task")] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert {row.state for row in store.rounds("task")} == {RoundState.CREATED}
    assert [store.attempts("task", number) for number in (1, 2, 3)] == [3, 1, 0]


def test_pages_of_rounds_are_in_order_and_leave_none_out(store: Store) -> None:
    store.create_task(task(), DIGEST)
    for number in (1, 1, 2, 10, 10):
        store.create_round("task", number)
    pages, after = [], (0, 0)
    while page := [row.key[1:] for row in store.rounds("task", after, 2)]:
        pages.append(page)
        after = page[-1]
    assert pages == [[(1, 1), (1, 2)], [(2, 1), (10, 1)], [(10, 2)]]


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.round(UNKNOWN),
        lambda store: opened(store, UNKNOWN),
        lambda store: store.advance(UNKNOWN, RoundState.CHECKING),
        lambda store: store.set_audited(UNKNOWN),
        lambda store: store.record_manifest(UNKNOWN, [DIGEST]),
        lambda store: finish(store, UNKNOWN),
        lambda store: store.void_round(UNKNOWN, "WHY"),
        lambda store: store.abort_round(UNKNOWN, "WHY"),
        lambda store: announced(store, context(9, 9), 0),
        lambda store: store.accept_upload(context(9, 9), name(0)),
        lambda store: store.record_verdicts(UNKNOWN, [], "WHY"),
    ],
    ids=[
        "round",
        "open",
        "advance",
        "audited",
        "manifest",
        "finish",
        "void",
        "abort",
        "announce",
        "accept",
        "verdicts",
    ],
)
def test_an_unknown_round_is_refused(store: Store, call: Callable[[Store], object]) -> None:
    collecting(store)
    before = rows(store)
    with pytest.raises(ConfigurationError, match="round 9, attempt 9"):
        call(store)
    assert rows(store) == before


@pytest.mark.parametrize("selected", [None, [], ["b", "a"]])
def test_who_is_drawn_for_an_attempt_is_kept(store: Store, selected: list[str] | None) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1, selected).key
    assert store.round(key).selected_clients == selected


def test_an_opened_round_keeps_its_key_its_signature_and_its_deadline(store: Store) -> None:
    found = collecting(store)
    store.advance(KEY, RoundState.CHECKING)
    row = store.round(KEY)
    assert (row.state, row.round_key) == (RoundState.CHECKING, found.round_key)
    assert (row.round_key_identity, row.round_key_signature) == (b"identity", b"signature")
    assert row.closes_at == CLOSES_AT


def test_a_round_that_is_not_open_has_neither_key_nor_deadline(store: Store) -> None:
    row = store.round(created(store))
    assert (row.round_key, row.round_key_identity, row.round_key_signature) == (b"", b"", b"")
    assert (row.closes_at, row.ended_at, row.audited) == (None, None, False)


def test_a_round_is_opened_once(store: Store) -> None:
    collecting(store)
    before = rows(store)
    with pytest.raises(ClosedError):
        opened(store, KEY, b"another key")
    assert rows(store) == before


@pytest.mark.parametrize("state", ["CREATED", "CHECKING", "DONE"])
def test_a_step_that_is_not_in_the_table_changes_nothing(store: Store, state: str) -> None:
    key = created(store)
    before = rows(store)
    with pytest.raises(ClosedError):
        store.advance(key, RoundState(state))
    assert rows(store) == before


def test_steps_with_methods_of_their_own_are_refused(store: Store) -> None:
    """Such a round would collect without a key, or end without an end."""
    key = created(store)
    for state in (RoundState.COLLECTING, RoundState.ABORTED):
        with pytest.raises(ValueError, match=r"CHECKING.*got"):
            store.advance(key, state)
    to_releasing(store, key)
    with pytest.raises(ValueError, match="got DONE"):
        store.advance(key, RoundState.DONE)
    assert store.round(key).state is RoundState.RELEASING


def test_moments_come_back_as_utc_whatever_zone_they_were_given_in(
    store: Store, kind: str, url: str, request: pytest.FixtureRequest
) -> None:
    if kind == "postgresql":
        database = make_url(url).database
        server: Postgres = request.getfixturevalue("server")
        server.execute(f"ALTER DATABASE {database} SET timezone = 'Asia/Kathmandu'")
    key = created(store)
    tokyo = CLOSES_AT.astimezone(timezone(timedelta(hours=9)))
    with closing(Store(url)) as other:
        before = datetime.now(UTC)
        other.open_round(key, round_key=b"", identity=b"", signature=b"", closes_at=tokyo)
        other.abort_round(key, "WHY")
        row = other.round(key)
        assert (row.closes_at, row.closes_at.tzinfo if row.closes_at else None) == (CLOSES_AT, UTC)
        assert row.ended_at is not None
        assert before <= row.ended_at <= datetime.now(UTC)
        assert {row.created_at.tzinfo, other.task("task").created_at.tzinfo} == {UTC}


def test_a_moment_without_a_zone_is_refused(store: Store) -> None:
    key = created(store)
    with pytest.raises(Exception, match="expected a time with its zone"):
        store.open_round(
            key, round_key=b"", identity=b"", signature=b"", closes_at=datetime(2031, 5, 17)
        )
    assert store.round(key).state is RoundState.CREATED


def test_finishing_records_release_model_and_progress_together(store: Store) -> None:
    key = created(store)
    to_releasing(store, key)
    assert finish(store, key) == 1
    row, progress = store.round(key), store.task("task")
    assert (row.state, row.sums_sha256, row.contributors) == (RoundState.DONE, DIGEST, 4)
    assert (row.model_version, row.aggregate_ms, row.release_ms) == (1, 1.5, 2.5)
    assert row.ended_at is not None
    assert (progress.rounds_done, progress.model_version) == (1, 1)


def test_finishing_a_task_without_a_model_makes_no_version(store: Store) -> None:
    key = created(store)
    to_releasing(store, key)
    assert finish(store, key, has_model=False) == 0
    assert (store.task("task").rounds_done, store.task("task").model_version) == (1, 0)


@pytest.mark.parametrize("state", ["CREATED", "COLLECTING", "CHECKING", "SUMMING"])
def test_finishing_too_early_changes_neither_round_nor_task(store: Store, state: str) -> None:
    key = created(store)
    if state != "CREATED":
        opened(store, key)
        advance_to(store, key, state)
    before = rows(store)
    with pytest.raises(ClosedError):
        finish(store, key)
    assert rows(store) == before


@pytest.mark.parametrize("end", ["finish", "abort", "void"])
def test_a_round_that_has_ended_cannot_be_finished_or_voided(store: Store, end: str) -> None:
    key = created(store)
    to_releasing(store, key)
    ends: dict[str, Callable[[], object]] = {
        "finish": lambda: finish(store, key),
        "abort": lambda: store.abort_round(key, "WHY"),
        "void": lambda: store.void_round(key, "WHY"),
    }
    ends[end]()
    before = rows(store)
    for again in ("finish", "void"):
        with pytest.raises(ClosedError):
            ends[again]()
    ends["abort"]()
    store.abort_open_rounds("task", "WHY")
    assert rows(store) == before


def test_a_void_round_counts_as_done_and_makes_no_model(store: Store) -> None:
    key = created(store)
    to_releasing(store, key)
    store.void_round(key, "RELEASE_REFUSED: why")
    row, progress = store.round(key), store.task("task")
    assert (row.state, row.reason) == (RoundState.ABORTED, "RELEASE_REFUSED: why")
    assert (progress.rounds_done, progress.model_version) == (1, 0)


RHO, CLIP = 0.1 + 0.2, 1 / 3  # of which no database may lose a bit


def spend(store: Store, number: int, *, clip: float | None = None, void: bool = False) -> None:
    key = store.create_round("task", number).key
    to_releasing(store, key)
    if void:
        store.void_round(key, "WHY", RHO)
        return
    store.finish_round(
        key,
        DIGEST,
        4,
        aggregate_ms=1.5,
        release_ms=2.5,
        has_model=True,
        rho=RHO,
        clip=clip,
    )


def test_what_releases_cost_adds_up_over_done_and_void_rounds(store: Store) -> None:
    store.create_task(task(), DIGEST)
    assert store.task("task").rho_spent == 0.0
    total = 0.0
    for number, void in enumerate([False, True, False], start=1):
        spend(store, number, void=void)
        total += RHO
        assert store.task("task").rho_spent == total
    store.abort_round(store.create_round("task", 4).key, "WHY")
    assert store.task("task").rho_spent == total


def test_a_clip_norm_is_that_of_all_later_rounds_until_the_next_one(store: Store) -> None:
    store.create_task(task(), DIGEST)
    assert store.task("task").clip is None
    spend(store, 1, clip=CLIP)
    spend(store, 2, void=True)
    waiting = store.create_round("task", 3).key
    store.abort_round(waiting, "WHY")
    spend(store, 3, clip=2 * CLIP)
    assert [(row.key[1:], row.clip) for row in store.rounds("task")] == [
        ((1, 1), None),
        ((2, 1), CLIP),
        ((3, 1), CLIP),
        ((3, 2), CLIP),
    ]
    assert store.task("task").clip == 2 * CLIP
    assert store.create_round("task", 4).clip == 2 * CLIP


def test_a_round_that_cannot_be_finished_costs_and_changes_nothing(store: Store) -> None:
    store.create_task(task(), DIGEST)
    spend(store, 1, clip=CLIP)
    key = ("task", 1, 1)
    for again in (
        lambda: store.finish_round(
            key, DIGEST, 4, aggregate_ms=1, release_ms=1, has_model=True, rho=RHO, clip=9.0
        ),
        lambda: store.void_round(key, "WHY", RHO),
    ):
        with pytest.raises(ClosedError):
            again()
    progress = store.task("task")
    assert (progress.rho_spent, progress.clip) == (RHO, CLIP)


def test_the_log_has_cost_and_clip_norm_exactly(store: Store) -> None:
    store.create_task(task(), DIGEST)
    spend(store, 1, clip=CLIP)
    spend(store, 2, void=True)
    found = {event: details for event, details in log(store) if "rho" in details}
    assert set(found) == {"round-finished", "round-voided"}
    assert [float.fromhex(details["rho"]) for details in found.values()] == [RHO, RHO]
    assert float.fromhex(found["round-finished"]["clip"]) == CLIP


def test_aborting_again_keeps_the_first_reason_and_time(store: Store) -> None:
    key = created(store)
    store.abort_round(key, "first")
    before = rows(store)
    store.abort_round(key, "second")
    assert store.round(key).reason == "first"
    assert rows(store) == before


def test_aborting_open_rounds_leaves_other_tasks_alone(store: Store) -> None:
    for task_id in ("task", "other"):
        store.create_task(task(task_id), DIGEST)
        store.create_round(task_id, 1)
        store.create_round(task_id, 2)
    store.abort_open_rounds("task", "WHY")
    assert [row.state for row in store.rounds("task")] == [RoundState.ABORTED] * 2
    assert [row.state for row in store.rounds("other")] == [RoundState.CREATED] * 2


def test_the_noise_audit_is_noted_once(store: Store) -> None:
    key = created(store)
    store.set_audited(key)
    before = rows(store)
    store.set_audited(key)
    assert store.round(key).audited
    assert rows(store) == before


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(reason=st.text(), data=st.binary(max_size=300))
@example(reason="WHY: \0 and more", data=b"\0")
def test_whatever_text_and_bytes_say_they_come_back(store: Store, reason: str, data: bytes) -> None:
    """But for the one character that not every database keeps."""
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    store.open_round(key, round_key=data, identity=data, signature=data, closes_at=CLOSES_AT)
    store.abort_round(key, reason)
    row = store.round(key)
    assert row.reason == reason.replace("\0", "\ufffd")
    assert {row.round_key, row.round_key_identity, row.round_key_signature} == {data}
    ((event, details),) = log(store)[-1:]
    assert event == "round-aborted"
    assert details["reason"] in ("OTHER", reason.split(":")[0])


# --- uploads ----------------------------------------------------------------------------------


def test_announcing_the_same_upload_again_tells_its_state(store: Store) -> None:
    found = collecting(store)
    admission = cohort.noise_upload(found, 0).admission
    assert store.open_upload(found, admission, name(0)) is UploadState.RECEIVING
    before = rows(store)
    assert store.open_upload(found, admission, name(0)) is UploadState.RECEIVING
    assert rows(store) == before
    store.accept_upload(found, name(0))
    assert store.open_upload(found, admission, name(0)) is UploadState.ACCEPTED
    assert store.counts(KEY) == UploadCounts(1, 0)


def test_a_second_different_upload_is_refused_and_the_first_stands(store: Store) -> None:
    found = collecting(store)
    first = announced(store, found, 0, nonce=1)
    before = rows(store)
    with pytest.raises(DuplicateError, match="the first one stands"):
        announced(store, found, 0, nonce=2)
    assert store.upload(found.id, name(0)) == (first.receipt.upload_digest, UploadState.RECEIVING)
    assert rows(store) == before


def test_a_client_with_two_keys_has_one_upload(store: Store) -> None:
    """Who somebody is, is the name it is enrolled by: keys are rotated."""
    found = collecting(store)
    announced(store, found, 0)
    with pytest.raises(DuplicateError, match="the first one stands"):
        store.open_upload(found, cohort.noise_upload(found, 1).admission, name(0))


def test_another_clients_upload_is_refused(store: Store) -> None:
    found = collecting(store)
    admission = announced(store, found, 0)
    before = rows(store)
    with pytest.raises(DuplicateError, match="another client"):
        store.open_upload(found, admission, name(1))
    assert rows(store) == before


@pytest.mark.parametrize(
    ("state", "number", "attempt", "client"),
    [
        ("RECEIVING", 1, 2, 0),
        ("ACCEPTED", 2, 1, 0),
        ("ACCEPTED", 3, 1, 1),
        ("REJECTED", 1, 2, 1),
        ("REJECTED", 2, 1, 0),
    ],
)
def test_an_upload_of_another_round_is_refused_for_ever(
    store: Store, state: str, number: int, attempt: int, client: int
) -> None:
    found = collecting(store)
    admission = announced(store, found, 0)
    if state == "ACCEPTED":
        store.accept_upload(found, name(0))
    if state == "REJECTED":
        store.reject_upload(found, admission.receipt.upload_digest, "WHY")
    store.abort_round(KEY, "WHY")
    store.drop_admissions(datetime.now(UTC) + timedelta(days=1))
    while (key := store.create_round("task", number).key) != ("task", number, attempt):
        pass
    opened(store, key)
    before = rows(store)
    with pytest.raises(DuplicateError, match="made for this round"):
        store.open_upload(context(number, attempt), admission, name(client))
    assert rows(store) == before


def test_an_upload_of_another_task_is_refused(store: Store) -> None:
    admission = announced(store, collecting(store), 0)
    store.create_task(task("other"), DIGEST)
    opened(store, store.create_round("other", 1).key)
    other = cohort.round_context(cohort.mixed_plan(), task_id="other")
    with pytest.raises(DuplicateError, match="made for this round"):
        store.open_upload(other, admission, name(0))


def test_uploads_of_different_attempts_are_different(store: Store) -> None:
    found = collecting(store)
    announced(store, found, 0)
    store.abort_round(KEY, "WHY")
    opened(store, store.create_round("task", 1).key)
    later = context(attempt=2)
    announced(store, later, 0, nonce=1)
    store.accept_upload(later, name(0))
    assert store.counts(KEY) == UploadCounts(0, 0)
    assert store.counts(("task", 1, 2)) == UploadCounts(1, 0)


def test_a_client_without_an_upload_has_none(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    assert store.upload(found.id, name(1)) is None
    with pytest.raises(ClosedError, match="announce it first"):
        store.accept_upload(found, name(1))


@pytest.mark.parametrize("state", ["CHECKING", "ABORTED"])
def test_nothing_is_accepted_once_the_round_has_closed(store: Store, state: str) -> None:
    found = collecting(store)
    announced(store, found, 0)
    if state == "ABORTED":
        store.abort_round(KEY, "WHY")
    else:
        store.advance(KEY, RoundState(state))
    before = rows(store)
    with pytest.raises(ClosedError, match="has closed"):
        store.accept_upload(found, name(0))
    assert rows(store) == before


def test_accepting_again_changes_nothing_even_when_the_round_is_full_and_closed(
    store: Store,
) -> None:
    found = collecting(store, cohort.counts_plan(max_clients=3))
    for index in range(3):
        accepted(store, found, index)
    store.advance(KEY, RoundState.CHECKING)
    before = rows(store)
    store.accept_upload(found, name(1))
    assert rows(store) == before


def test_an_upload_that_was_refused_is_never_accepted(store: Store) -> None:
    found = collecting(store)
    admission = announced(store, found, 0)
    store.reject_upload(found, admission.receipt.upload_digest, "INVALID_SEAL")
    with pytest.raises(ClosedError):
        store.accept_upload(found, name(0))
    assert store.counts(KEY) == UploadCounts(0, 1)


def test_no_more_than_the_largest_cohort_is_accepted(store: Store) -> None:
    found = collecting(store, cohort.counts_plan(max_clients=3))
    for index in range(3):
        accepted(store, found, index)
    with pytest.raises(ClosedError, match="full"):
        accepted(store, found, 3)
    assert store.counts(KEY) == UploadCounts(3, 0)


def test_a_refused_upload_is_counted_as_such_and_not_summed(store: Store) -> None:
    found = collecting(store)
    admissions = [accepted(store, found, index) for index in range(4)]
    refused = admissions[2].receipt
    store.reject_upload(found, refused.upload_digest, "INVALID_SEAL")
    before = rows(store)
    store.reject_upload(found, refused.upload_digest, "ANOTHER")
    assert rows(store) == before
    assert store.counts(KEY) == UploadCounts(3, 1)
    left = {admission.receipt.client_key for admission in store.accepted(found)}
    assert left == {cohort.identity(index).public for index in (0, 1, 3)}
    assert store.open_upload(found, admissions[2], name(2)) is UploadState.REJECTED


def test_refusing_an_upload_leaves_other_attempts_alone(store: Store) -> None:
    found = collecting(store)
    admission = accepted(store, found, 0)
    opened(store, store.create_round("task", 1).key)
    before = rows(store)
    store.reject_upload(context(attempt=2), admission.receipt.upload_digest, "WHY")
    assert rows(store) == before


def test_accepted_uploads_come_back_whole_and_ordered_by_digest(store: Store) -> None:
    found = collecting(store)
    admissions = [accepted(store, found, index) for index in range(5)]
    announced(store, found, 5)
    ordered = sorted(admissions, key=lambda admission: admission.receipt.upload_digest)
    assert store.accepted(found) == ordered


def test_the_counts_of_all_attempts_are_those_of_each(store: Store) -> None:
    found = collecting(store)
    for index in range(3):
        accepted(store, found, index)
    store.reject_upload(found, store.accepted(found)[0].receipt.upload_digest, "WHY")
    announced(store, found, 3)
    second = store.create_round("task", 1).key
    opened(store, store.create_round("task", 2).key)
    accepted(store, context(2), 4)
    store.create_task(task("other"), DIGEST)
    store.create_round("other", 1)
    counted = store.all_counts("task")
    assert counted == {
        KEY: UploadCounts(2, 1),
        second: UploadCounts(0, 0),
        ("task", 2, 1): UploadCounts(1, 0),
    }
    assert counted == {key: store.counts(key) for key in counted}
    assert store.all_counts("nothing") == {}


def test_retention_forgets_admissions_and_nothing_else(store: Store) -> None:
    found = collecting(store)
    for index in range(3):
        accepted(store, found, index)
    store.reject_upload(found, store.accepted(found)[0].receipt.upload_digest, "WHY")
    counts, known = store.counts(KEY), store.upload(found.id, name(1))
    store.abort_round(KEY, "WHY")
    ended = store.round(KEY).ended_at
    assert ended is not None
    assert store.drop_admissions(ended) == 0
    assert len(store.accepted(found)) == 2
    moment = ended + timedelta(microseconds=1)
    assert store.drop_admissions(moment) == 3
    assert store.accepted(found) == []
    assert (store.counts(KEY), store.upload(found.id, name(1))) == (counts, known)
    before = rows(store)
    assert store.drop_admissions(moment) == 0
    assert rows(store) == before


def test_retention_leaves_rounds_that_go_on_alone(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    assert store.drop_admissions(datetime.now(UTC) + timedelta(days=1)) == 0
    assert len(store.accepted(found)) == 1


# --- verdicts ---------------------------------------------------------------------------------


def verdict(found: RoundContext, index: int, *, accepted: bool = True) -> Verdict:
    """A signed verdict on an upload of noise."""
    receipt = cohort.noise_upload(found, index).admission.receipt
    return Verdict.sign(KEY_HOLDER, receipt, DIGEST, accepted=accepted)


def test_verdicts_are_kept_as_they_were_signed_and_refuse_whom_they_refuse(store: Store) -> None:
    found = collecting(store)
    for index in range(4):
        accepted(store, found, index)
    announced(store, found, 4)
    advance_to(store, KEY, "CHECKING")
    assert not store.norms_judged(KEY)
    signed = [verdict(found, index, accepted=index != 2) for index in range(3)]
    store.record_verdicts(KEY, signed, "NORM_REFUSED: too much")
    assert store.norms_judged(KEY)
    for index in range(3):
        assert store.verdict(found.id, name(index)) == (RoundState.CHECKING, signed[index])
    assert store.verdict(found.id, name(3)) == (RoundState.CHECKING, None)
    assert store.verdict(found.id, name(5)) is None
    assert store.counts(KEY) == UploadCounts(3, 1)
    refused = store.upload(found.id, name(2))
    assert refused is not None
    assert refused[1] is UploadState.REJECTED
    *_, (rejected, why), (judged, counts) = log(store)
    assert (rejected, why["reason"]) == ("upload-rejected", "NORM_REFUSED")
    assert (judged, counts) == ("norms-judged", {**ATTEMPT, "accepted": 2, "refused": 1})


def test_verdicts_of_one_attempt_say_nothing_of_another(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    store.record_verdicts(KEY, [verdict(found, 0)], "WHY")
    store.create_round("task", 1)
    assert not store.norms_judged(("task", 1, 2))


def test_verdicts_are_kept_all_together_or_not_at_all(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    before = rows(store)
    with pytest.raises(KeyError):
        store.record_verdicts(KEY, [verdict(found, 0), verdict(found, 1)], "WHY")
    assert rows(store) == before


def test_retention_forgets_verdicts_with_their_receipts(store: Store) -> None:
    found = collecting(store)
    for index in range(2):
        accepted(store, found, index)
    store.record_verdicts(KEY, [verdict(found, index) for index in range(2)], "WHY")
    store.abort_round(KEY, "WHY")
    assert store.drop_admissions(datetime.now(UTC) + timedelta(days=1)) == 2
    assert store.verdict(found.id, name(0)) == (RoundState.ABORTED, None)
    assert not store.norms_judged(KEY)


def test_the_version_that_an_attempt_started_from_is_that_of_the_last_release_before_it(
    store: Store,
) -> None:
    """Attempts that came to nothing and void rounds move no model."""
    collecting(store)
    store.abort_round(KEY, "WHY")
    store.create_round("task", 1)
    again = ("task", 1, 2)
    to_releasing(store, again)
    finish(store, again)
    store.create_round("task", 2)
    store.void_round(("task", 2, 1), "WHY")
    store.create_round("task", 3)
    opened(store, ("task", 3, 1))
    started = {
        (number, attempt): store.started_from(context(number, attempt).id)
        for number, attempt in ((1, 1), (1, 2), (2, 1), (3, 1))
    }
    assert started == {(1, 1): 0, (1, 2): 0, (2, 1): 1, (3, 1): 1}


# --- the log ----------------------------------------------------------------------------------


class Change(NamedTuple):
    """A method that changes the store, the round's state before it, and what the log says then."""

    state: str
    make: Callable[[Store, RoundContext], object]
    event: str
    details: dict[str, Any]


PLAN = cohort.mixed_plan()
ATTEMPT = {"task": "task", "round": 1, "attempt": 1}
SECRET = "CODE: clinic-0 sent 42"  # noqa: S105 - a reason's text, which the log must not have


def upload_digest(index: int) -> str:
    """Uploads of noise are the same in every round."""
    return cohort.noise_upload(context(), index).admission.receipt.upload_digest.hex()


def named(index: int) -> dict[str, str]:
    return {"client": client_hash(AUDIT_KEY, name(index)), "upload": upload_digest(index)}


CHANGES = {
    "create_task": Change(
        "COLLECTING",
        lambda store, _: store.create_task(task("other", PLAN), DIGEST),
        "task-created",
        {"task": "other", "plan": PLAN.digest.hex()},
    ),
    "end_task": Change(
        "COLLECTING",
        lambda store, _: store.end_task("task", TaskState.FAILED, SECRET),
        "task-ended",
        {"task": "task", "state": "FAILED", "reason": "CODE"},
    ),
    "create_round": Change(
        "COLLECTING",
        lambda store, _: store.create_round("task", 1),
        "round-created",
        {**ATTEMPT, "attempt": 2, "selected": None},
    ),
    "create_round of some": Change(
        "COLLECTING",
        lambda store, _: store.create_round("task", 7, [name(0), name(1)]),
        "round-created",
        {**ATTEMPT, "round": 7, "selected": 2},
    ),
    "open_round": Change(
        "CREATED",
        lambda store, found: opened(store, KEY, b"public key"),
        "round-opened",
        {
            **ATTEMPT,
            "round_key": "2b5ff6ad4e7e3be2a52bd6d0bf8ae1f7ea0a5bd2d0ef5e8b4e63a1e1ba8b8c55",
        },
    ),
    "advance": Change(
        "COLLECTING",
        lambda store, _: store.advance(KEY, RoundState.CHECKING),
        "round-advanced",
        {**ATTEMPT, "state": "CHECKING"},
    ),
    "set_audited": Change(
        "CHECKING", lambda store, _: store.set_audited(KEY), "round-audited", ATTEMPT
    ),
    "finish_round": Change(
        "RELEASING",
        lambda store, _: finish(store, KEY),
        "round-finished",
        {**ATTEMPT, "sums": DIGEST.hex(), "contributors": 4, "model_version": 1},
    ),
    "void_round": Change(
        "RELEASING",
        lambda store, _: store.void_round(KEY, SECRET),
        "round-voided",
        {**ATTEMPT, "reason": "CODE"},
    ),
    "abort_round": Change(
        "CHECKING",
        lambda store, _: store.abort_round(KEY, SECRET),
        "round-aborted",
        {**ATTEMPT, "reason": "CODE"},
    ),
    "abort_open_rounds": Change(
        "CHECKING",
        lambda store, _: store.abort_open_rounds("task", "clinic-0 sent 42"),
        "round-aborted",
        {**ATTEMPT, "reason": "OTHER"},
    ),
    "open_upload": Change(
        "COLLECTING",
        lambda store, found: announced(store, found, 2),
        "upload-announced",
        {**ATTEMPT, **named(2)},
    ),
    "accept_upload": Change(
        "COLLECTING",
        lambda store, found: store.accept_upload(found, name(1)),
        "upload-accepted",
        {**ATTEMPT, **named(1)},
    ),
    "reject_upload": Change(
        "CHECKING",
        lambda store, found: store.reject_upload(found, bytes.fromhex(upload_digest(0)), SECRET),
        "upload-rejected",
        {**ATTEMPT, **named(0), "reason": "CODE"},
    ),
    "record_verdicts": Change(
        "CHECKING",
        lambda store, found: store.record_verdicts(KEY, [verdict(found, 0)], SECRET),
        "norms-judged",
        {**ATTEMPT, "accepted": 1, "refused": 0},
    ),
    "drop_admissions": Change(
        "DONE",
        lambda store, _: store.drop_admissions(datetime.now(UTC) + timedelta(days=1)),
        "retained-dropped",
        {"task": "task", "uploads": 2},
    ),
    "record_manifest": Change(
        "CHECKING",
        lambda store, _: store.record_manifest(KEY, [DIGEST, bytes(32)]),
        "manifest-fixed",
        {**ATTEMPT, "uploads": 2, "manifest": ""},
    ),
    "record": Change(
        "COLLECTING",
        lambda store, _: store.record("started", version="1", sessions=[1, 2], quiet=None),
        "started",
        {"version": "1", "sessions": [1, 2], "quiet": None},
    ),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def before_the_change(store: Store, state: str) -> RoundContext:
    """A task whose round has this state, with an accepted and an announced upload."""
    if state == "CREATED":
        created(store)
        return context()
    found = collecting(store, PLAN)
    accepted(store, found, 0)
    announced(store, found, 1)
    advance_to(store, KEY, "RELEASING" if state == "DONE" else state)
    if state == "DONE":
        finish(store, KEY)
    return found


@every_change
def test_every_change_is_logged_once_and_names_nobody(store: Store, change: Change) -> None:
    found = before_the_change(store, change.state)
    before = log(store)
    change.make(store, found)
    *old, (event, details) = log(store)
    assert old == before
    assert event == change.event
    computed = {key for key in ("round_key", "manifest") if key in details}
    assert {**details, **dict.fromkeys(computed)} == {
        **change.details,
        **dict.fromkeys(computed),
    }
    assert all(len(bytes.fromhex(details[key])) == 32 for key in computed)
    assert "clinic" not in json.dumps(log(store))


@every_change
def test_a_change_that_cannot_be_logged_is_not_made(
    store: Store, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = before_the_change(store, change.state)
    before = rows(store)

    def torn(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(audit_log, "next_entry", torn)
    with pytest.raises(KeyboardInterrupt):
        change.make(store, found)
    assert rows(store) == before


def test_the_manifest_in_the_log_is_that_of_the_uploads_in_any_order(store: Store) -> None:
    created(store)
    digests = [bytes([index]) * 32 for index in range(4)]
    for uploads in (digests, digests[::-1], digests[1:]):
        store.record_manifest(KEY, uploads)
    first, again, other = [details for _, details in log(store)[-3:]]
    assert first == again
    assert first["manifest"] != other["manifest"]
    assert (first["uploads"], other["uploads"]) == (4, 3)


def test_aborting_many_rounds_chains_an_entry_for_each(store: Store) -> None:
    store.create_task(task(), DIGEST)
    for number in (1, 2, 3):
        store.create_round("task", number)
    store.abort_open_rounds("task", "WHY")
    aborted = [details["round"] for event, details in log(store) if event == "round-aborted"]
    assert aborted == [1, 2, 3]


def test_without_a_key_names_are_hashed_all_the_same_but_no_way_that_repeats(url: str) -> None:
    hashes = set()
    for nonce in range(2):
        with closing(Store(url)) as store:
            found = collecting(store) if nonce == 0 else context()
            store.open_upload(found, cohort.noise_upload(found, 0, nonce).admission, f"c{nonce}")
            hashes.add(log(store)[-1][1]["client"])
    forgeable = {client_hash(key, f"c{n}") for key in (b"", bytes(32)) for n in range(2)}
    assert len(hashes) == 2
    assert not hashes & forgeable


def test_pages_of_the_log_are_in_order_and_leave_nothing_out(store: Store) -> None:
    for number in range(7):
        store.record("counted", number=number)
    pages, after = [], 0
    while page := store.audit(after, 3):
        pages.append([entry.sequence for entry in page])
        after = page[-1].sequence
    assert pages == [[1, 2, 3], [4, 5, 6], [7]]


def test_the_log_of_a_file_is_read_without_the_store(tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite3"
    with closing(Store(f"sqlite:///{file}")) as store:
        collecting(store)
        expected = store.audit()
    assert list(read_entries(file)) == expected


@pytest.mark.parametrize("details", [{"share": 0.5}, {"key": b"x"}, {"list": [[1]]}])
def test_details_that_have_no_exact_text_are_refused(store: Store, details: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        store.record("event", **details)
    assert store.audit() == []


# --- threads, processes and restarts ------------------------------------------------------------


def race(count: int, work: Callable[[int], object]) -> list[Exception]:
    """Run the work in threads that start together; what they raised."""
    barrier, raised = threading.Barrier(count), []

    def run(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except Exception as error:  # whatever it is, the test looks at it
            raised.append(error)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))
    return raised


@pytest.fixture
def servers(url: str) -> Iterator[Sequence[Store]]:
    """Two servers on one database."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Store(url, AUDIT_KEY))) for _ in range(2)]


def test_two_servers_see_the_same(servers: Sequence[Store]) -> None:
    servers[0].create_task(task(), DIGEST)
    assert servers[1].task("task").task_spec() == task()


def test_uploads_that_come_at_once_are_all_kept(servers: Sequence[Store]) -> None:
    plan = cohort.counts_plan(max_clients=12)
    found = collecting(servers[0], plan)
    uploads = [cohort.noise_upload(found, index).admission for index in range(12)]

    def work(index: int) -> None:
        store = servers[index % 2]
        store.open_upload(found, uploads[index], name(index))
        store.accept_upload(found, name(index))

    assert race(12, work) == []
    assert {a.receipt for a in servers[0].accepted(found)} == {a.receipt for a in uploads}
    events = [event for event, _ in log(servers[1])]
    assert (events.count("upload-announced"), events.count("upload-accepted")) == (12, 12)


def test_the_last_place_of_a_cohort_is_taken_once(servers: Sequence[Store]) -> None:
    found = collecting(servers[0], cohort.counts_plan(max_clients=4))
    for index in range(3):
        accepted(servers[0], found, index)
    for index in range(3, 9):
        announced(servers[0], found, index)
    raised = race(6, lambda index: servers[index % 2].accept_upload(found, name(3 + index)))
    assert [type(error) for error in raised] == [ClosedError] * 5
    assert servers[1].counts(KEY) == UploadCounts(4, 0)
    assert [event for event, _ in log(servers[0])].count("upload-accepted") == 4


def test_of_different_uploads_of_one_client_one_is_kept(servers: Sequence[Store]) -> None:
    found = collecting(servers[0])
    raised = race(8, lambda index: announced(servers[index % 2], found, 0, nonce=index))
    assert [type(error) for error in raised] == [DuplicateError] * 7
    log(servers[0])


def test_of_one_upload_under_many_names_one_is_kept(servers: Sequence[Store]) -> None:
    found = collecting(servers[0])
    admission = cohort.noise_upload(found, 0).admission
    raised = race(6, lambda index: servers[index % 2].open_upload(found, admission, name(index)))
    assert [type(error) for error in raised] == [DuplicateError] * 5


def test_attempts_created_at_once_get_a_number_each(servers: Sequence[Store]) -> None:
    servers[0].create_task(task(), DIGEST)
    assert race(8, lambda index: servers[index % 2].create_round("task", 1)) == []
    assert [row.attempt for row in servers[0].rounds("task")] == list(range(1, 9))
    log(servers[0])


def test_a_round_finished_by_many_makes_one_model_version(servers: Sequence[Store]) -> None:
    key = created(servers[0])
    to_releasing(servers[0], key)
    raised = race(6, lambda index: finish(servers[index % 2], key))
    assert [type(error) for error in raised] == [ClosedError] * 5
    assert servers[0].task("task").model_version == 1


APPENDS = """
import sys
from secagg_server.store import Store

print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
for number in range(25):
    store.record("written", writer=sys.argv[2], number=number)
"""


def test_an_empty_file_that_another_process_writes_to_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite does not wait by itself where its mode is to change."""
    file, looks = tmp_path / "store.sqlite3", 0
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        def slept(_seconds: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:
                other.execute("COMMIT")

        monkeypatch.setattr(transactions.time, "sleep", slept)
        with closing(Store(f"sqlite:///{file}")) as store:
            assert looks == 3
            store.record("written")


def test_an_empty_file_that_another_process_never_lets_go_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "store.sqlite3"
    monkeypatch.setattr(transactions, "LOCK_WAIT_MS", 0)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigurationError, match="expected a database that answers"):
            Store(f"sqlite:///{file}")


def test_processes_that_start_on_an_empty_database_write_one_chain(empty_url: str) -> None:
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", APPENDS, empty_url, writer],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            for writer in "abc"
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.close()
        assert [writer.wait() for writer in writers] == [0, 0, 0]
    with closing(Store(empty_url)) as store:
        written = [details for _, details in log(store)]
    for name_ in "abc":
        numbers = [details["number"] for details in written if details["writer"] == name_]
        assert numbers == list(range(25))
    assert len(written) == 75


CREATES_FOR_EVER = """
import sys
from secagg_server.store import Store

store = Store(sys.argv[1])
while True:
    print(store.create_round("task", 1).attempt, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_was_told_is_kept(store: Store, url: str) -> None:
    store.create_task(task(), DIGEST)
    command = [sys.executable, "-c", CREATES_FOR_EVER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(20)]
        writer.kill()
        told += [int(line) for line in writer.stdout]
    store.ping()  # queues behind whatever the process left unfinished
    with closing(Store(url)) as reopened:
        kept = [row.attempt for row in reopened.rounds("task")]
        logged = [details["attempt"] for _, details in log(reopened)[1:]]
    assert told == list(range(1, len(told) + 1))
    assert kept == logged == list(range(1, len(kept) + 1))
    assert len(told) <= len(kept) <= len(told) + 1


def test_everything_is_there_after_reopening(url: str) -> None:
    with closing(Store(url, AUDIT_KEY)) as first:
        found = collecting(first)
        admissions = [accepted(first, found, index) for index in range(3)]
        first.reject_upload(found, admissions[0].receipt.upload_digest, "INVALID_SEAL")
        advance_to(first, KEY, "RELEASING")
        finish(first, KEY)
        first.create_round("task", 2)
        before = rows(first)
    with closing(Store(url, AUDIT_KEY)) as second:
        assert rows(second) == before
        assert second.task("task").task_spec() == task()
        assert set(second.accepted(found)) == set(admissions[1:])


# --- databases that do not do their work --------------------------------------------------------


@contextmanager
def write_lock(url: str) -> Iterator[Connection]:
    """Another program that holds the write lock until its connection is closed."""
    with closing(Store(url)) as store:
        writers = store.database.engine.execution_options(secagg_writes=True)
        with writers.connect() as connection:
            connection.begin()
            yield connection


@pytest.fixture
def impatient(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store that waits for locks for a millisecond at a time, and not at all between."""
    monkeypatch.setattr(transactions, "_pause", lambda attempt: None)
    monkeypatch.setattr(transactions, "LOCK_WAIT_MS", 1)
    with closing(Store(url)) as store:
        yield store


def test_a_store_that_stays_locked_is_unavailable_and_can_still_be_read(
    impatient: Store, url: str
) -> None:
    impatient.create_task(task(), DIGEST)
    before = rows(impatient)
    with write_lock(url):
        for change in (impatient.ping, lambda: impatient.create_round("task", 1)):
            with pytest.raises(UnavailableError, match="not locked"):
                change()
        assert impatient.task("task").state is TaskState.RUNNING
        assert rows(impatient) == before
    impatient.ping()


def test_a_lock_that_is_released_in_time_is_waited_for(
    impatient: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []
    with write_lock(url) as holder:

        def pause(attempt: int) -> None:
            pauses.append(attempt)
            if attempt == 2:
                holder.close()

        monkeypatch.setattr(transactions, "_pause", pause)
        impatient.create_task(task(), DIGEST)
    assert pauses == [0, 1, 2]
    assert log(impatient) == [("task-created", {"plan": PLAN.digest.hex(), "task": "task"})]


class DriverError(Exception):
    """What a driver raises, with PostgreSQL's code of what went wrong."""

    def __init__(self, code: str) -> None:
        super().__init__("clinic-0 is in the way")
        self.sqlstate = code


def failing(codes: list[str]) -> Callable[[Session], str]:
    def work(session: Session) -> str:
        session.execute(text("UPDATE heartbeat SET beat = beat + 1"))
        if codes:
            raise OperationalError("SELECT secret", {"who": "clinic-0"}, DriverError(codes.pop()))
        return "done"

    return work


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "23505"])
def test_transactions_that_lose_to_others_are_tried_again(
    store: Store, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_pause", lambda attempt: None)
    assert store.database.write(failing([code] * (transactions.ATTEMPTS - 1))) == "done"
    assert rows(store)["heartbeat"] == [(1, 1)]
    with pytest.raises(UnavailableError):
        store.database.write(failing([code] * transactions.ATTEMPTS))
    assert rows(store)["heartbeat"] == [(1, 1)]


@pytest.mark.parametrize("code", ["57P01", "53100", "25006", "08006"])
def test_what_trying_again_cannot_help_is_tried_once_and_tells_nothing(
    store: Store, code: str
) -> None:
    codes = [code] * 3
    with pytest.raises(UnavailableError) as caught:
        store.database.write(failing(codes))
    assert len(codes) == 2
    assert not [word for word in ("clinic", "SELECT", "://", "who") if word in str(caught.value)]
    assert rows(store)["heartbeat"] == [(1, 0)]


def test_a_change_that_the_tables_refuse_names_no_client(store: Store) -> None:
    """Databases quote values when a constraint is violated, and errors end up in logs."""
    admission = cohort.noise_upload(context(), 0).admission

    def add(session: Session) -> None:
        session.add(
            UploadRow(
                task_id="task",
                round_number=9,
                attempt=9,
                client=name(0),
                client_key=admission.receipt.client_key,
                upload_digest=admission.receipt.upload_digest,
                admission=admission_to_wire(admission).SerializeToString(),
            )
        )

    with pytest.raises(RuntimeError, match="IntegrityError") as caught:
        store.database.write(add)
    assert name(0) not in str(caught.value)
    assert caught.value.__suppress_context__


def test_transactions_are_serialised_and_durable(store: Store, kind: str) -> None:
    promises = {
        "sqlite": ("PRAGMA synchronous", 2),
        "postgresql": ("SHOW transaction_isolation", "serializable"),
    }
    question, answer = promises[kind]
    for run in (store.database.read, store.database.write):
        assert run(lambda session: session.scalar(text(question))) == answer


@contextmanager
def read_only(kind: str, url: str, request: pytest.FixtureRequest) -> Iterator[Store]:
    """A store whose database takes no changes."""
    if kind == "sqlite":
        reading = f"sqlite:///file:{make_url(url).database}?mode=ro&uri=true"
    else:
        server: Postgres = request.getfixturevalue("server")
        database = make_url(url).database
        server.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        reading = url
    with closing(Store(reading, migrate=False)) as store:
        yield store


def test_a_store_that_may_not_be_written_is_unavailable_and_can_still_be_read(
    store: Store, kind: str, url: str, request: pytest.FixtureRequest
) -> None:
    store.create_task(task(), DIGEST)
    with read_only(kind, url, request) as other:
        assert other.task("task").state is TaskState.RUNNING
        for change in (other.ping, lambda: other.create_round("task", 1)):
            with pytest.raises(UnavailableError, match="may be written"):
                change()
        assert other.rounds("task") == []


PINGS_A_FULL_DISK = """
import resource, sys
from secagg.errors import SecaggError
from secagg_server.store import Store

store = Store(sys.argv[1])
store.ping()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    store.ping()
except SecaggError as error:
    print(error.reason)
"""


def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.sqlite3"
    command = [sys.executable, "-c", PINGS_A_FULL_DISK, url]
    assert subprocess.check_output(command, text=True) == "STORAGE_UNAVAILABLE\n"
    with closing(Store(url)) as store:
        assert rows(store)["heartbeat"] == [(1, 1)]


def test_pings_write_and_leave_nothing_behind(store: Store) -> None:
    seen = set()
    for _ in range(6):
        store.ping()
        ((_, beat),) = rows(store)["heartbeat"]
        seen.add(beat)
    assert seen == {0, 1}
    assert store.audit() == []


@pytest.mark.parametrize("damage", ["DELETE FROM heartbeat", "DROP TABLE heartbeat"])
def test_a_store_that_has_lost_its_heartbeat_is_unavailable(empty_url: str, damage: str) -> None:
    with closing(Store(empty_url)) as store:
        with store.database.engine.begin() as connection:
            connection.execute(text(damage))
        with pytest.raises(UnavailableError):
            store.ping()


def test_a_database_server_that_goes_away_is_unavailable_until_it_is_back(
    server: Postgres, migrated: str
) -> None:
    with server.database(migrated) as database, closing(Store(server.url(database))) as store:
        store.create_task(task(), DIGEST)
        calls = [store.ping, store.tasks, lambda: store.create_round("task", 1)]
        with server.stopped():
            for call in calls * 2:
                with pytest.raises(UnavailableError) as caught:
                    call()
                assert not [w for w in ("://", "INSERT", "SELECT") if w in str(caught.value)]
            with pytest.raises(ConfigurationError, match="store_url"):
                Store(server.url(database))
        for call in calls:
            call()
        with server.stopped():
            pass
        store.ping()  # over a connection that does not know yet
        assert [event for event, _ in log(store)] == ["task-created", "round-created"]


def test_a_connection_that_is_cut_within_a_transaction_leaves_nothing(
    server: Postgres, migrated: str
) -> None:
    with server.database(migrated) as database, closing(Store(server.url(database))) as store:
        before = rows(store)

        def cut(session: Session) -> None:
            session.execute(text("UPDATE heartbeat SET beat = 7"))
            backend = session.scalar(text("SELECT pg_backend_pid()"))
            server.execute(f"SELECT pg_terminate_backend({backend}, 5000)")
            session.execute(text("SELECT 1"))

        with pytest.raises(UnavailableError):
            store.database.write(cut)
        assert rows(store) == before


# --- versions -----------------------------------------------------------------------------------

# As the tables were before versions were written down; databases differ in the names of types.
OLD_TABLES = """
CREATE TABLE tasks (task_id VARCHAR NOT NULL, spec {bytes} NOT NULL,
  initial_model_digest {bytes} NOT NULL, state {taskstate} NOT NULL, reason VARCHAR NOT NULL,
  rounds_done INTEGER NOT NULL, model_version INTEGER NOT NULL, created_at {moment} NOT NULL,
  PRIMARY KEY (task_id));
CREATE TABLE rounds (task_id VARCHAR NOT NULL, round_number INTEGER NOT NULL,
  attempt INTEGER NOT NULL, state {roundstate} NOT NULL, reason VARCHAR NOT NULL,
  round_key {bytes} NOT NULL, contributors INTEGER NOT NULL, sums_sha256 {bytes} NOT NULL,
  model_version INTEGER NOT NULL, aggregate_ms {number} NOT NULL,
  release_ms {number} NOT NULL, created_at {moment} NOT NULL, ended_at {moment},
  PRIMARY KEY (task_id, round_number, attempt));
CREATE TABLE uploads (task_id VARCHAR NOT NULL, round_number INTEGER NOT NULL,
  attempt INTEGER NOT NULL, client_key {bytes} NOT NULL, upload_digest {bytes} NOT NULL,
  admission {bytes} NOT NULL, state {uploadstate} NOT NULL, reason VARCHAR NOT NULL,
  PRIMARY KEY (task_id, round_number, attempt, client_key),
  FOREIGN KEY(task_id, round_number, attempt)
    REFERENCES rounds (task_id, round_number, attempt),
  UNIQUE (task_id, round_number, attempt, upload_digest))"""
OLD_TYPES = """
CREATE TYPE taskstate AS ENUM ('RUNNING', 'FINISHED', 'FAILED');
CREATE TYPE roundstate AS ENUM ('CREATED', 'COLLECTING', 'CHECKING', 'SUMMING', 'RELEASING',
  'DONE', 'ABORTED');
CREATE TYPE uploadstate AS ENUM ('RECEIVING', 'ACCEPTED', 'REJECTED')"""
OLD_WORDS = {
    "sqlite": {
        "bytes": "BLOB",
        "number": "DOUBLE",
        "moment": "DATETIME",
        "taskstate": "VARCHAR(8)",
        "roundstate": "VARCHAR(10)",
        "uploadstate": "VARCHAR(9)",
    },
    "postgresql": {
        "bytes": "BYTEA",
        "number": "DOUBLE PRECISION",
        "moment": "TIMESTAMP",
        "taskstate": "taskstate",
        "roundstate": "roundstate",
        "uploadstate": "uploadstate",
    },
}


def connected(url: str) -> transactions.Database:
    """A database without the store's knowledge of it."""
    return transactions.Database(url)


@pytest.fixture
def old(empty_url: str, kind: str) -> str:
    """A database as the first version made it: a round that is done, and one that collects."""
    script = OLD_TABLES.format(**OLD_WORDS[kind])
    if kind == "postgresql":
        script = f"{OLD_TYPES};{script}"
    with closing(connected(empty_url)) as database, database.engine.begin() as connection:
        for statement in script.split(";"):
            connection.execute(text(statement))
        _insert_old_rows(connection)
    return empty_url


def _insert_old_rows(connection: Connection) -> None:
    moment = "2026-01-02 03:04:05.600000"
    encoded = task().to_wire().SerializeToString(deterministic=True)
    connection.execute(
        text("INSERT INTO tasks VALUES ('task', :spec, :model, 'RUNNING', '', 1, 1, :moment)"),
        {"spec": encoded, "model": DIGEST, "moment": moment},
    )
    for number, state, ended in ((1, "DONE", moment), (2, "COLLECTING", None)):
        found = context(number)
        connection.execute(
            text(
                "INSERT INTO rounds VALUES ('task', :number, 1, :state, '', :key, 0, :sums, 1, "
                "1.5, 2.5, :moment, :ended)"
            ),
            {
                "number": number,
                "state": state,
                "key": b"key",
                "sums": DIGEST,
                "moment": moment,
                "ended": ended,
            },
        )
        for index in range(3):
            admission = cohort.noise_upload(found, index, nonce=number).admission
            connection.execute(
                text(
                    "INSERT INTO uploads VALUES ('task', :number, 1, :key, :digest, :admission, "
                    ":state, :reason)"
                ),
                {
                    "number": number,
                    "key": admission.receipt.client_key,
                    "digest": admission.receipt.upload_digest,
                    "admission": admission_to_wire(admission).SerializeToString(),
                    "state": ("ACCEPTED", "RECEIVING", "REJECTED")[index],
                    "reason": "WHY" if index == 2 else "",
                },
            )


def tables(url: str) -> dict[str, Any]:
    """What a database says of its tables: columns, keys, constraints and indexes."""
    with closing(connected(url)) as database:
        found = inspect(database.engine)
        return {
            table: {
                "columns": [
                    (column["name"], str(column["type"]), column["nullable"], column["default"])
                    for column in sorted(found.get_columns(table), key=lambda item: item["name"])
                ],
                "key": sorted(found.get_pk_constraint(table)["constrained_columns"]),
                "references": [
                    (key["constrained_columns"], key["referred_table"], key["referred_columns"])
                    for key in found.get_foreign_keys(table)
                ],
                "unique": [item["column_names"] for item in found.get_unique_constraints(table)],
                "indexes": sorted(
                    (str(item["name"]), item["column_names"])
                    for item in found.get_indexes(table)
                    if "duplicates_constraint" not in item
                ),
            }
            for table in sorted(found.get_table_names())
        }


def set_version(url: str, version: str) -> None:
    with closing(connected(url)) as database, database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": version})


@pytest.mark.parametrize("source", ["empty_url", "old"])
def test_migrations_make_exactly_the_tables_that_the_store_uses(
    source: str, kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(source)
    with closing(Store(url)) as store, store.database.engine.connect() as connection:
        found = MigrationContext.configure(connection)
        assert compare_metadata(found, Base.metadata) == []
    migrated = tables(url)
    with closing(connected(url)) as database, database.engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert migrated == tables(url)


def test_an_old_store_keeps_its_data(old: str) -> None:
    with closing(Store(old)) as store:
        assert store.task("task").task_spec() == task()
        assert store.task("task").created_at == datetime(2026, 1, 2, 3, 4, 5, 600_000, UTC)
        assert [(row.key, row.state) for row in store.rounds("task")] == [
            (KEY, RoundState.DONE),
            (("task", 2, 1), RoundState.COLLECTING),
        ]
        assert _new_columns(store.round(KEY)) == (None, b"", b"", None, False, None)
        assert (store.task("task").rho_spent, store.task("task").clip) == (0.0, None)
        assert store.counts(KEY) == UploadCounts(1, 1)
        expected = cohort.noise_upload(context(), 0, nonce=1).admission.receipt
        (kept,) = store.accepted(context())
        assert kept.receipt.upload_digest == expected.upload_digest
        client = cohort.identity(1).public.hex()
        assert store.upload(context(2).id, client) is not None
        assert store.audit() == []


def _new_columns(row: RoundRow) -> tuple[object, ...]:
    return (
        row.closes_at,
        row.round_key_identity,
        row.round_key_signature,
        row.selected_clients,
        row.audited,
        row.clip,
    )


def test_an_old_store_goes_on_where_it_was(old: str) -> None:
    with closing(Store(old)) as store:
        found, client = context(2), cohort.identity(1).public.hex()
        store.accept_upload(found, client)
        assert store.counts(("task", 2, 1)) == UploadCounts(2, 1)
        replayed = cohort.noise_upload(context(), 0, nonce=1).admission
        with pytest.raises(DuplicateError, match="made for this round"):
            store.open_upload(found, replayed, name(0))
        store.abort_open_rounds("task", "WHY")
        assert store.drop_admissions(datetime.now(UTC) + timedelta(days=1)) == 6
    with closing(Store(old)) as again:
        assert [event for event, _ in log(again)] == [
            "upload-accepted",
            "round-aborted",
            "retained-dropped",
        ]


def test_an_upgrade_that_fails_leaves_the_old_store_as_it_was(old: str) -> None:
    with closing(connected(old)) as database, database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE audit (somebody VARCHAR)"))
    before = tables(old)
    with pytest.raises(ConfigurationError, match="store_url"):
        Store(old)
    assert tables(old) == before


@pytest.mark.parametrize("migrate", [True, False])
def test_a_store_of_a_newer_version_is_refused_and_left_alone(
    empty_url: str, migrate: bool
) -> None:
    Store(empty_url).close()
    set_version(empty_url, "9999")
    with pytest.raises(ConfigurationError, match=r"9999.*newer"):
        Store(empty_url, migrate=migrate)
    with closing(connected(empty_url)) as database, database.engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


def test_looking_at_a_database_without_tables_makes_none(
    empty_url: str, kind: str, tmp_path: Path
) -> None:
    Store(empty_url, migrate=False).close()
    assert list(tmp_path.iterdir()) == []
    assert kind == "sqlite" or tables(empty_url) == {}


def test_looking_at_an_old_store_changes_nothing(old: str) -> None:
    before = tables(old)
    Store(old, migrate=False).close()
    assert tables(old) == before


def test_looking_at_a_store_that_is_up_to_date_is_enough_to_use_it(store: Store, url: str) -> None:
    store.create_task(task(), DIGEST)
    with closing(Store(url, migrate=False)) as looking:
        assert looking.task_exists("task")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("nothing of the kind" * 100)
    for migrate in (True, False):
        with pytest.raises(ConfigurationError, match="store_url"):
            Store(f"sqlite:///{file}", migrate=migrate)
    assert file.read_text() == "nothing of the kind" * 100


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    """The services use the store from many threads; one database for each would be none."""
    with pytest.raises(ConfigurationError, match="a database in memory forgets"):
        Store(url)


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite",
        "nosuchdatabase://host/x",
        "mysql://host/x",
        "sqlite+nosuchdriver:///x",
        "postgresql+psycopg2://host/x",
        "sqlite:////nonexistent/folder/x.sqlite3",
        "postgresql://u:hunter2@host:port/x",
        "postgresql://u:hunter2@127.0.0.1:1/x",
    ],
)
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str, migrate: bool) -> None:
    with pytest.raises(ConfigurationError, match=r"store_url|version none") as caught:
        Store(url, migrate=migrate)
    assert "hunter2" not in str(caught.value)
