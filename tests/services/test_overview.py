"""What the operator's page is given: what the store says, bounded, and nothing of anybody."""

from __future__ import annotations

import datetime
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import pytest
from postgres import Postgres, running
from sqlalchemy import event, insert, update
from stores import migrated

from secagg.accounting import Budget
from secagg.audit import client_hash
from secagg.context import RoundContext
from secagg.errors import StorageError, reasons
from secagg.instruments import Meter
from secagg.parameters import IntegerSegment, Privacy
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.rpc.metrics import CALL_LIMIT, QUEUE_DEPTH, READY
from secagg_server import overview
from secagg_server.metrics import METRICS
from secagg_server.overview import Overview
from secagg_server.page import page_routes
from secagg_server.schema import AuditRow, RoundRow, TaskRow, UploadRow
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.stopping import Stop
from secagg_server.store import RoundKey, Store
from secagg_server.tasks import TaskSpec

AUDIT_KEY = b"k" * 32
DIGEST = bytes(range(32))
PLAN = cohort.mixed_plan()
SOON = datetime.datetime(2031, 5, 17, 12, 30, tzinfo=datetime.UTC)
NAMES = [f"clinic-{index}" for index in range(8)]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with running() as started:
        yield started


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        with closing(Store(migrated(tmp_path / "store.sqlite3"), AUDIT_KEY)) as opened:
            yield opened
        return
    postgres: Postgres = request.getfixturevalue("server")
    with postgres.database() as name, closing(Store(postgres.url(name), AUDIT_KEY)) as opened:
        yield opened


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Store]:
    """A store in SQLite, where it makes no difference."""
    with closing(Store(migrated(tmp_path / "store.sqlite3"), AUDIT_KEY)) as opened:
        yield opened


def shown(store: Store, meter: Meter | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(seen_by(store, meter).document())
    return found


def seen_by(store: Store, meter: Meter | None = None) -> Overview:
    return Overview(store, meter or Meter(METRICS), AUDIT_KEY)


def task(task_id: str = "task", rounds: int = 3) -> TaskSpec:
    return TaskSpec(task_id, PLAN, rounds, 1000, 2, PLAN.max_clients)


def opened(store: Store, task_id: str = "task", number: int = 1) -> RoundContext:
    key = store.create_round(task_id, number).key
    context = cohort.round_context(PLAN, task_id=task_id, round_number=number, attempt=key[2])
    store.open_round(
        key,
        round_key=context.round_key,
        identity=b"identity",
        signature=b"signature",
        closes_at=SOON,
    )
    return context


def key_of(context: RoundContext) -> RoundKey:
    return context.id.task_id, context.id.round_number, context.id.attempt


def announced(store: Store, context: RoundContext, index: int) -> bytes:
    nonce = 100 * context.id.round_number + context.id.attempt
    admission = cohort.noise_upload(context, index, nonce).admission
    store.open_upload(context, admission, NAMES[index])
    return admission.receipt.upload_digest


def accepted(store: Store, context: RoundContext, *indexes: int) -> None:
    for index in indexes:
        announced(store, context, index)
        store.accept_upload(context, NAMES[index])


def refused(store: Store, context: RoundContext, index: int, reason: str) -> None:
    store.reject_upload(context, announced(store, context, index), reason)


def released(store: Store, context: RoundContext) -> None:
    for state in (RoundState.CHECKING, RoundState.SUMMING, RoundState.RELEASING):
        store.advance(key_of(context), state)
    store.finish_round(
        key_of(context),
        DIGEST,
        3,
        aggregate_ms=1.5,
        release_ms=2.5,
        has_model=True,
        figure=0.123456,
        change=0.654321,
        clip=0.777777,
    )


def hashed(index: int) -> str:
    return client_hash(AUDIT_KEY, NAMES[index])


# --- what is in it -------------------------------------------------------------------------------


def test_an_empty_server_has_nothing_to_show(plain: Store) -> None:
    found = shown(plain)
    assert found["tasks"] == found["rounds"] == found["clients"] == []
    assert (found["verdicts"], found["accepted"], found["clients_seen"]) == ({}, 0, 0)
    assert [minute["uploads"] for minute in found["traffic"]] == [0] * overview.MINUTES


def test_rounds_are_told_with_what_came(store: Store) -> None:
    store.create_task(task(), DIGEST)
    first = opened(store)
    accepted(store, first, 0, 1, 2)
    refused(store, first, 3, "NORM_REFUSED: beyond 1.25 by clinic-3")
    refused(store, first, 4, "INVALID_SEAL: text")
    released(store, first)
    second = opened(store, number=2)
    accepted(store, second, 0)
    store.abort_round(key_of(second), "QUORUM_NOT_REACHED: expected 3 clients")
    third = opened(store, number=2)
    accepted(store, third, 0)
    announced(store, third, 5)
    refused(store, third, 3, "NORM_REFUSED: again")
    found = shown(store)
    rounds = {(row["round"], row["attempt"]): row for row in found["rounds"]}
    assert list(rounds) == [(2, 2), (2, 1), (1, 1)], "the newest first"
    wanted = {
        (1, 1): ("DONE", "", 3, 0, {"NORM_REFUSED": 1, "INVALID_SEAL": 1}, 3),
        (2, 1): ("ABORTED", "QUORUM_NOT_REACHED", 1, 0, {}, 0),
        (2, 2): ("COLLECTING", "", 1, 1, {"NORM_REFUSED": 1}, 0),
    }
    names = ("state", "reason", "accepted", "receiving", "refused", "contributors")
    assert {key: tuple(row[name] for name in names) for key, row in rounds.items()} == wanted
    assert (rounds[1, 1]["add_ms"], rounds[1, 1]["open_ms"]) == (1.5, 2.5)
    assert rounds[2, 2]["ended"] is None
    assert datetime.datetime.fromisoformat(rounds[2, 2]["closes"]) == SOON
    assert found["verdicts"] == {"NORM_REFUSED": 2, "INVALID_SEAL": 1}
    assert found["accepted"] == 5


def test_clients_are_told_by_their_hash_those_with_refusals_first(plain: Store) -> None:
    plain.create_task(task(), DIGEST)
    first = opened(plain)
    accepted(plain, first, 0, 1, 2)
    refused(plain, first, 3, "NORM_REFUSED: x")
    released(plain, first)
    second = opened(plain, number=2)
    accepted(plain, second, 0, 1, 3)
    found = shown(plain)
    clients = {row["client"]: row for row in found["clients"]}
    assert next(iter(clients)) == hashed(3)
    assert clients.keys() == {hashed(index) for index in range(4)}
    assert clients[hashed(3)]["refused"] == {"NORM_REFUSED": 1}
    assert {name: row["accepted"] for name, row in clients.items()} == {
        hashed(0): 2,
        hashed(1): 2,
        hashed(2): 1,
        hashed(3): 1,
    }
    assert clients[hashed(2)]["round"] == 1, "last seen"
    assert clients[hashed(0)]["round"] == 2
    assert (found["clients_seen"], found["uploads_read"]) == (4, 7)


def test_tasks_are_told_with_their_progress_and_why_they_ended(plain: Store) -> None:
    for number, task_id in enumerate(("one", "two", "three"), start=1):
        plain.create_task(task(task_id, rounds=number), DIGEST)
    plain.end_task("one", TaskState.FINISHED, "CONVERGED: accuracy did not rise above 0.4213")
    plain.end_task("three", TaskState.FAILED, "whatever <b>somebody</b> wrote")
    rows = {row["task"]: row for row in shown(plain)["tasks"]}
    assert next(iter(rows)) == "two", "what runs comes first"
    names = ("state", "reason", "rounds", "rounds_done")
    assert {key: tuple(row[name] for name in names) for key, row in rows.items()} == {
        "one": ("FINISHED", "CONVERGED", 1, 0),
        "two": ("RUNNING", "", 2, 0),
        "three": ("FAILED", "OTHER", 3, 0),
    }
    assert rows["one"]["upload_bytes"] == PLAN.payload_bytes
    assert rows["one"]["privacy"] is None


def test_budgets_are_told_as_the_server_counts_them(plain: Store) -> None:
    privacy = Privacy("release", 4.0, 3.0, 1e-6)
    plan = make_plan([IntegerSegment("counts", 4, 9, 10.0)], max_clients=6, privacy=privacy)
    spec = TaskSpec("counted", plan, 50, 1000, 2, 6)
    plain.create_task(spec, DIGEST)
    rho = release_rho(plan)
    key = plain.create_round("counted", 1).key
    plain.open_round(key, round_key=b"k", identity=b"i", signature=b"s", closes_at=SOON)
    for state in (RoundState.CHECKING, RoundState.SUMMING, RoundState.RELEASING):
        plain.advance(key, state)
    plain.finish_round(key, DIGEST, 3, aggregate_ms=1.0, release_ms=1.0, has_model=False, rho=rho)
    (row,) = shown(plain)["tasks"]
    budget = Budget(3.0, 1e-6)
    assert row["privacy"]["epsilon"] == 3.0
    assert math.isclose(row["privacy"]["spent"], budget.spent(rho))
    assert row["privacy"]["releases_left"] == budget.left(rho, rho) > 0


def test_what_the_meter_knows_is_told_and_what_it_does_not_is_null(plain: Store) -> None:
    meter = Meter(METRICS)
    found = shown(plain, meter)
    assert (found["waiting"], found["calls"], found["ready"], found["enrolled"]) == (
        *(None, None),
        *(False, None),
    )

    def broken() -> float:
        raise StorageError("hunter2")

    meter.set(QUEUE_DEPTH, 3)
    meter.set(READY, 1.0)
    meter.watch(CALL_LIMIT, broken)
    found = shown(plain, meter)
    assert (found["waiting"], found["ready"], found["call_limit"]) == (3, True, None)


def test_uploads_of_each_minute_are_those_of_the_audit_log(store: Store) -> None:
    looks = seen_by(store)
    store.create_task(task(), DIGEST)
    context = opened(store)

    def total(name: str) -> int:
        return sum(minute[name] for minute in json.loads(looks.document())["traffic"])

    assert total("uploads") == 0
    accepted(store, context, 0, 1)
    assert (total("uploads"), total("bytes")) == (2, 2 * PLAN.payload_bytes)
    refused(store, context, 3, "NORM_REFUSED: x")
    accepted(store, context, 2)
    for _ in range(2):
        assert (total("uploads"), total("refused")) == (3, 1), "each is counted once"
    # A restart forgets nothing.
    again = json.loads(seen_by(store).document())["traffic"]
    assert sum(minute["uploads"] for minute in again) == 3


def test_what_changes_in_a_round_that_goes_on_is_seen_at_the_next_look(plain: Store) -> None:
    plain.create_task(task(), DIGEST)
    looks, context = seen_by(plain), opened(plain)
    for wanted in range(4):
        (row,) = json.loads(looks.document())["rounds"]
        assert row["accepted"] == wanted
        accepted(plain, context, wanted)


# --- what is not in it ---------------------------------------------------------------------------


def test_no_name_no_statistic_and_no_key_is_in_it(plain: Store) -> None:
    spec = replace(task(), stop=Stop(2, least_change=0.5))
    plain.create_task(spec, DIGEST)
    context = opened(plain)
    accepted(plain, context, 0, 1, 2)
    refused(plain, context, 3, "NORM_REFUSED: 0.31415926 is beyond; clinic-3")
    released(plain, context)
    plain.end_task("task", TaskState.FINISHED, "accuracy 0.99887766 was reached by clinic-1")
    document = seen_by(plain).document().decode()
    assert hashed(0) in document
    for secret in (
        *NAMES,
        "0.123456",  # the figure, and what follows it
        "0.654321",
        "0.777777",
        "0.31415926",
        "0.99887766",
        AUDIT_KEY.hex(),
        DIGEST.hex(),
        context.round_key.hex(),
        cohort.identity(0).public.hex(),
        "signature",
    ):
        assert secret not in document, secret


# --- however much there is -----------------------------------------------------------------------


def filled(store: Store, tasks: int, rounds: int, uploads: int) -> None:
    """Tasks that are over, and some that run, with the same number of rounds and uploads each."""
    spec = task().to_wire().SerializeToString()
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    at = [began + datetime.timedelta(seconds=number) for number in range(tasks)]
    with store.database.engine.begin() as connection:
        connection.execute(
            insert(TaskRow),
            [
                {
                    "task_id": f"task-{number}",
                    "spec": spec,
                    "initial_model_digest": b"",
                    "created_at": at[number],
                    "state": TaskState.RUNNING if number % 100 == 0 else TaskState.FINISHED,
                }
                for number in range(tasks)
            ],
        )
        connection.execute(
            insert(RoundRow),
            [
                {
                    "task_id": f"task-{number}",
                    "round_number": round_number,
                    "attempt": 1,
                    "state": RoundState.DONE,
                    "created_at": at[number],
                    "ended_at": at[number],
                }
                for number in range(tasks)
                for round_number in range(1, rounds + 1)
            ],
        )
        connection.execute(
            insert(UploadRow),
            [
                {
                    "task_id": f"task-{number}",
                    "round_number": round_number,
                    "attempt": 1,
                    "client": f"clinic-{index}",
                    "client_key": b"",
                    "upload_digest": f"{number} {round_number} {index}".encode(),
                    "state": UploadState.ACCEPTED,
                }
                for number in range(tasks)
                for round_number in range(1, rounds + 1)
                for index in range(uploads)
            ],
        )


def statements(store: Store, work: Callable[[], object]) -> int:
    """How many queries some work makes."""
    made: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        made.append(statement)

    event.listen(store.database.engine, "before_cursor_execute", note)
    work()
    event.remove(store.database.engine, "before_cursor_execute", note)
    return len(made)


def test_a_look_is_as_large_and_as_dear_however_much_is_on_record(
    plain: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MAX_UPLOADS", 50)
    filled(plain, 201, 21, 4)
    looks = seen_by(plain)
    first = statements(plain, looks.document)
    found = json.loads(looks.document())
    assert len(found["tasks"]) == overview.MAX_TASKS
    assert [row["task"] for row in found["tasks"][:4]] == [
        "task-200",
        "task-100",
        "task-0",
        "task-199",
    ]
    assert len(found["rounds"]) == overview.MAX_ROUNDS
    assert (found["uploads_read"], len(found["clients"]), found["clients_seen"]) == (50, 4, 4)
    assert first < 200
    # What is long over was counted once.
    assert statements(plain, looks.document) < first - overview.MAX_ROUNDS + 5


def test_a_log_that_has_grown_much_is_read_from_its_end_and_says_what_is_not_known(
    plain: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "MAX_ENTRIES", 10)
    plain.create_task(task(), DIGEST)
    now = datetime.datetime.now(datetime.UTC)
    at = [now - datetime.timedelta(minutes=5 - number // 10) for number in range(50)]
    with plain.database.engine.begin() as connection:
        connection.execute(
            insert(AuditRow),
            [
                {
                    "sequence": 2 + number,
                    "time": f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}",
                    "event": "upload-accepted",
                    "details": '{"task":"task"}',
                    "previous": b"",
                    "hash": b"",
                }
                for number, moment in enumerate(at)
            ],
        )
    minutes = shown(plain)["traffic"]
    assert sum("uploads" in minute for minute in minutes) <= 6
    assert sum(minute.get("uploads", 0) for minute in minutes) == 10
    assert "uploads" not in minutes[0]


def test_a_task_of_another_version_and_a_hostile_name_break_nothing(plain: Store) -> None:
    plain.create_task(task(), DIGEST)
    opened(plain)
    hostile = '<img src=x onerror="alert(1)">'
    with plain.database.engine.begin() as connection:
        connection.execute(
            insert(TaskRow).values(
                task_id=hostile,
                spec=b"\xff\xff",
                initial_model_digest=b"",
                created_at=datetime.datetime.now(datetime.UTC),
                reason="</script><script>alert(2)</script>",
            )
        )
        connection.execute(update(RoundRow).values(reason="<b>"))
    found = shown(plain)
    names = [row["task"] for row in found["tasks"]]
    assert names == [hostile, "task"]
    assert [row["reason"] for row in found["tasks"]] == ["OTHER", ""]
    assert found["rounds"][0]["reason"] == "OTHER"


def test_a_store_that_does_not_answer_is_said_and_the_next_look_counts_nothing_twice(
    plain: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.create_task(task(), DIGEST)
    accepted(plain, opened(plain), 0)
    looks = seen_by(plain)
    read = plain.database.read

    def lost(work: Callable[..., Any]) -> Any:  # noqa: ANN401
        read(work)  # and then the answer does not come
        raise StorageError("expected a database")

    monkeypatch.setattr(plain.database, "read", lost)
    with pytest.raises(StorageError):
        looks.document()
    monkeypatch.undo()
    traffic = json.loads(looks.document())["traffic"]
    assert sum(minute["uploads"] for minute in traffic) == 1


def test_looking_makes_no_writer_wait_or_try_again(store: Store) -> None:
    """Those who look and those who write go on beside one another."""
    store.create_task(task(rounds=5), DIGEST)
    context, looks = opened(store), seen_by(store)
    stop = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not stop.is_set():
            (row,) = json.loads(looks.document())["rounds"]
            seen.append(row["accepted"])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for index in range(6):
            accepted(store, context, index)
    finally:
        stop.set()
        looking.join(30)
    assert seen == sorted(seen)
    (row,) = json.loads(looks.document())["rounds"]
    assert row["accepted"] == 6


# --- the page ------------------------------------------------------------------------------------


def test_the_page_comes_with_the_program_and_names_nothing_elsewhere(plain: Store) -> None:
    routes = page_routes(seen_by(plain))
    assert set(routes) == {"/", "/page.css", "/page.js", "/icon.svg", "/overview.json"}
    for path, route in routes.items():
        assert route.readers == ("operator",), path
        answer = route.make()
        assert answer.body, path
        if path != "/overview.json":
            text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
            assert "//" not in text.replace("// ", ""), f"{path} names another place"
            assert "innerHTML" not in text
            assert "style=" not in text
            assert "onclick" not in text
    assert json.loads(routes["/overview.json"].make().body)["tasks"] == []


def test_reasons_that_the_page_explains_are_reasons(plain: Store) -> None:
    script = page_routes(seen_by(plain))["/page.js"].make().body.decode()
    table = script.partition("const REASONS = {")[2].partition("};")[0]
    explained = {line.strip().partition(":")[0] for line in table.strip().splitlines()}
    assert explained
    assert explained <= {*reasons(), "WITHDRAWN", "CONVERGED"}
    states = functools.reduce(
        lambda found, name: (
            found
            | set(
                script.partition(f"const {name} = {{")[2].split("};")[0].replace(":", " ").split()
            )
        ),
        ("ROUND_STATES", "TASK_STATES"),
        set[str](),
    )
    assert {*RoundState, *TaskState} <= states
