"""The contract of the store, on SQLite files, and what may be configured instead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cohort
import pytest

from secagg.context import RoundContext
from secagg.errors import ClosedError, ConfigurationError, DuplicateError
from secagg.parameters import Plan
from secagg.receipts import Receipt
from secagg.upload import Admission
from secagg_server.states import RoundState, TaskState, UploadState
from secagg_server.store import RoundKey, Store, UploadCounts
from secagg_server.tasks import TaskSpec

DIGEST = bytes(range(32))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path}/store.sqlite3")
    yield opened
    opened.close()


def task(task_id: str = "task", plan: Plan | None = None, rounds: int = 3) -> TaskSpec:
    plan = plan or cohort.mixed_plan()
    return TaskSpec(task_id, plan, rounds, 1000, 2, plan.max_clients)


def context(number: int = 1, attempt: int = 1, plan: Plan | None = None) -> RoundContext:
    return cohort.round_context(
        plan or cohort.mixed_plan(), task_id="task", round_number=number, attempt=attempt
    )


def collecting(store: Store, plan: Plan | None = None) -> RoundContext:
    """A store with a task whose first round collects."""
    store.create_task(task(plan=plan), DIGEST)
    row = store.create_round("task", 1)
    found = context(plan=plan)
    store.advance(row.key, RoundState.COLLECTING, round_key=found.round_key)
    return found


def accepted(store: Store, found: RoundContext, index: int) -> Admission:
    admission = cohort.noise_upload(found, index).admission
    store.open_upload(found, admission)
    store.accept_upload(found, admission.receipt.client_key)
    return admission


def to_releasing(store: Store, key: RoundKey) -> None:
    for state in ("COLLECTING", "CHECKING", "SUMMING", "RELEASING"):
        store.advance(key, RoundState(state))


def finish(store: Store, key: RoundKey, *, has_model: bool = True) -> int:
    return store.finish_round(key, DIGEST, 4, aggregate_ms=1.5, release_ms=2.5, has_model=has_model)


# --- tasks ------------------------------------------------------------------------------------


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
    again = store.create_task(task(), DIGEST)
    assert (again.created_at.replace(tzinfo=None), again.state) == (
        first.created_at.replace(tzinfo=None),
        TaskState.FAILED,
    )
    assert len(store.tasks()) == 1


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
    with pytest.raises(DuplicateError, match="'task' exists"):
        store.create_task(other, DIGEST)
    assert store.task("task").task_spec() == task()


def test_the_same_task_with_another_initial_model_is_refused(store: Store) -> None:
    store.create_task(task(), DIGEST)
    with pytest.raises(DuplicateError):
        store.create_task(task(), bytes(32))


def test_an_unknown_task_is_refused(store: Store) -> None:
    with pytest.raises(ConfigurationError, match="'other'"):
        store.task("other")


def test_tasks_come_oldest_first(store: Store) -> None:
    for name in ("b", "a", "c"):
        store.create_task(task(name), DIGEST)
    assert [row.task_id for row in store.tasks()] == ["b", "a", "c"]


def test_a_task_ends_once(store: Store) -> None:
    store.create_task(task(), DIGEST)
    store.end_task("task", TaskState.FAILED, "first")
    store.end_task("task", TaskState.FINISHED, "second")
    row = store.task("task")
    assert (row.state, row.reason) == (TaskState.FAILED, "first")


# --- rounds -----------------------------------------------------------------------------------


def test_attempts_are_counted_within_a_round(store: Store) -> None:
    store.create_task(task(), DIGEST)
    store.create_task(task("other"), DIGEST)
    rows = [store.create_round("task", number) for number in (1, 1, 2, 1)]
    rows.append(store.create_round("other", 1))
    assert [row.key for row in rows] == [
        ("task", 1, 1),
        ("task", 1, 2),
        ("task", 2, 1),
        ("task", 1, 3),
        ("other", 1, 1),
    ]
    assert [row.key[1:] for row in store.rounds("task")] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    assert {row.state for row in store.rounds("task")} == {RoundState.CREATED}


def test_advancing_keeps_the_round_key(store: Store) -> None:
    found = collecting(store)
    store.advance(("task", 1, 1), RoundState.CHECKING)
    (row,) = store.rounds("task")
    assert (row.state, row.round_key) == (RoundState.CHECKING, found.round_key)


def test_a_step_that_is_not_in_the_table_changes_nothing(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    for state in (RoundState.CHECKING, RoundState.DONE, RoundState.CREATED):
        with pytest.raises(ClosedError):
            store.advance(key, state, round_key=b"never")
    (row,) = store.rounds("task")
    assert (row.state, row.round_key) == (RoundState.CREATED, b"")


def test_finishing_records_release_model_and_progress_together(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    assert finish(store, key) == 1
    (row,), progress = store.rounds("task"), store.task("task")
    assert (row.state, row.sums_sha256, row.contributors) == (RoundState.DONE, DIGEST, 4)
    assert (row.model_version, row.aggregate_ms, row.release_ms) == (1, 1.5, 2.5)
    assert row.ended_at is not None
    assert (progress.rounds_done, progress.model_version) == (1, 1)


def test_finishing_a_task_without_a_model_makes_no_version(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    assert finish(store, key, has_model=False) == 0
    assert (store.task("task").rounds_done, store.task("task").model_version) == (1, 0)


@pytest.mark.parametrize("steps", range(4))
def test_finishing_too_early_changes_neither_round_nor_task(store: Store, steps: int) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    for state in ("COLLECTING", "CHECKING", "SUMMING")[:steps]:
        store.advance(key, RoundState(state))
    with pytest.raises(ClosedError):
        finish(store, key)
    assert (store.task("task").rounds_done, store.task("task").model_version) == (0, 0)
    assert store.rounds("task")[0].sums_sha256 == b""


def test_a_round_is_finished_once(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    finish(store, key)
    with pytest.raises(ClosedError):
        finish(store, key)
    assert store.task("task").model_version == 1


def test_an_aborted_round_cannot_be_finished(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    store.abort_round(key, "WHY")
    with pytest.raises(ClosedError):
        finish(store, key)
    assert store.task("task").model_version == 0


def test_aborting_again_keeps_the_first_reason_and_time(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    store.abort_round(key, "first")
    ended = store.rounds("task")[0].ended_at
    store.abort_round(key, "second")
    (row,) = store.rounds("task")
    assert (row.state, row.reason, row.ended_at) == (RoundState.ABORTED, "first", ended)


def test_a_finished_round_cannot_be_aborted(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    finish(store, key)
    store.abort_round(key, "WHY")
    store.abort_open_rounds("task", "WHY")
    assert store.rounds("task")[0].state is RoundState.DONE


def test_aborting_open_rounds_leaves_other_tasks_alone(store: Store) -> None:
    for name in ("task", "other"):
        store.create_task(task(name), DIGEST)
        store.create_round(name, 1)
    store.abort_open_rounds("task", "WHY")
    assert store.rounds("task")[0].state is RoundState.ABORTED
    assert store.rounds("other")[0].state is RoundState.CREATED


# --- uploads ----------------------------------------------------------------------------------


def test_announcing_the_same_upload_again_tells_its_state(store: Store) -> None:
    found = collecting(store)
    admission = cohort.noise_upload(found, 0).admission
    assert store.open_upload(found, admission) is UploadState.RECEIVING
    assert store.open_upload(found, admission) is UploadState.RECEIVING
    store.accept_upload(found, admission.receipt.client_key)
    assert store.open_upload(found, admission) is UploadState.ACCEPTED
    assert store.counts(("task", 1, 1)) == UploadCounts(1, 0)


def test_a_second_different_upload_is_refused_and_the_first_stands(store: Store) -> None:
    found = collecting(store)
    first, second = (cohort.noise_upload(found, 0, nonce).admission for nonce in (1, 2))
    store.open_upload(found, first)
    with pytest.raises(DuplicateError, match="the first one stands"):
        store.open_upload(found, second)
    name = (first.receipt.upload_digest, UploadState.RECEIVING)
    assert store.upload(found.id, first.receipt.client_key) == name


def test_uploads_of_different_attempts_are_different(store: Store) -> None:
    found = collecting(store)
    store.abort_round(("task", 1, 1), "WHY")
    key = store.create_round("task", 1).key
    store.advance(key, RoundState.COLLECTING)
    later = context(attempt=2)
    store.open_upload(found, cohort.noise_upload(found, 0).admission)
    accepted(store, later, 0)
    assert store.counts(("task", 1, 1)) == UploadCounts(0, 0)
    assert store.counts(("task", 1, 2)) == UploadCounts(1, 0)


def test_a_client_without_an_upload_has_none(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    assert store.upload(found.id, cohort.identity(1).public) is None


@pytest.mark.parametrize("state", ["CHECKING", "ABORTED"])
def test_nothing_is_accepted_once_the_round_has_closed(store: Store, state: str) -> None:
    found = collecting(store)
    admission = cohort.noise_upload(found, 0).admission
    store.open_upload(found, admission)
    store.advance(("task", 1, 1), RoundState(state))
    with pytest.raises(ClosedError, match="has closed"):
        store.accept_upload(found, admission.receipt.client_key)
    assert store.counts(("task", 1, 1)).accepted == 0


def test_no_more_than_the_largest_cohort_is_accepted(store: Store) -> None:
    found = collecting(store, cohort.counts_plan(max_clients=3))
    for index in range(3):
        accepted(store, found, index)
    with pytest.raises(ClosedError, match="full"):
        accepted(store, found, 3)
    assert store.counts(("task", 1, 1)) == UploadCounts(3, 0)


def test_a_refused_upload_is_counted_as_such_and_not_summed(store: Store) -> None:
    found = collecting(store)
    admissions = [accepted(store, found, index) for index in range(4)]
    refused = admissions[2].receipt
    store.reject_upload(found, refused.upload_digest, "INVALID_SEAL")
    assert store.counts(("task", 1, 1)) == UploadCounts(3, 1)
    left = {admission.receipt.client_key for admission in store.accepted(found)}
    assert left == {cohort.identity(index).public for index in (0, 1, 3)}
    assert store.open_upload(found, admissions[2]) is UploadState.REJECTED


def test_refusing_an_upload_leaves_other_attempts_alone(store: Store) -> None:
    """Attempts differ in their keys, so digests differ; the same one twice is a replay."""
    found = collecting(store)
    admission = accepted(store, found, 0)
    store.advance(store.create_round("task", 1).key, RoundState.COLLECTING)
    store.reject_upload(context(attempt=2), admission.receipt.upload_digest, "WHY")
    assert store.counts(("task", 1, 1)) == UploadCounts(1, 0)


def test_accepted_uploads_come_back_whole_and_ordered_by_digest(store: Store) -> None:
    found = collecting(store)
    admissions = [accepted(store, found, index) for index in range(5)]
    ordered = sorted(admissions, key=lambda admission: admission.receipt.upload_digest)
    assert store.accepted(found) == ordered


def test_announced_uploads_that_were_not_completed_are_not_accepted(store: Store) -> None:
    found = collecting(store)
    accepted(store, found, 0)
    store.open_upload(found, cohort.noise_upload(found, 1).admission)
    assert len(store.accepted(found)) == 1


# --- threads, restarts, addresses ---------------------------------------------------------------


def race(count: int, work: Callable[[int], None]) -> list[Exception]:
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


def test_threads_never_accept_more_than_the_largest_cohort(store: Store) -> None:
    found = collecting(store, cohort.counts_plan(max_clients=4))
    for index in range(12):
        store.open_upload(found, cohort.noise_upload(found, index).admission)
    raised = race(12, lambda i: store.accept_upload(found, cohort.identity(i).public))
    assert [type(error) for error in raised] == [ClosedError] * 8
    assert store.counts(("task", 1, 1)) == UploadCounts(4, 0)


def test_threads_that_announce_different_uploads_of_one_client_leave_one(store: Store) -> None:
    found = collecting(store)
    offers = [cohort.noise_upload(found, 0, nonce).admission for nonce in range(8)]
    raised = race(8, lambda index: store.open_upload(found, offers[index]))
    assert [type(error) for error in raised] == [DuplicateError] * 7


def test_threads_that_create_attempts_get_one_each(store: Store) -> None:
    store.create_task(task(), DIGEST)
    assert race(8, lambda _: store.create_round("task", 1)) == []
    assert [row.attempt for row in store.rounds("task")] == list(range(1, 9))


def test_threads_that_finish_a_round_make_one_model_version(store: Store) -> None:
    store.create_task(task(), DIGEST)
    key = store.create_round("task", 1).key
    to_releasing(store, key)
    raised = race(6, lambda _: finish(store, key))
    assert [type(error) for error in raised] == [ClosedError] * 5
    assert store.task("task").model_version == 1


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.sqlite3"
    first = Store(url)
    found = collecting(first)
    admissions = [accepted(first, found, index) for index in range(3)]
    refused = admissions[0].receipt
    first.reject_upload(found, refused.upload_digest, "INVALID_SEAL")
    for state in ("CHECKING", "SUMMING", "RELEASING"):
        first.advance(("task", 1, 1), RoundState(state))
    finish(first, ("task", 1, 1))
    first.create_round("task", 2)
    first.close()

    second = Store(url)
    try:
        assert second.task("task").task_spec() == task()
        assert second.task("task").model_version == 1
        rows = second.rounds("task")
        assert [row.key[1:] for row in rows] == [(1, 1), (2, 1)]
        assert (rows[0].state, rows[0].round_key) == (RoundState.DONE, found.round_key)
        assert set(second.accepted(found)) == set(admissions[1:])
        assert second.counts(("task", 1, 1)) == UploadCounts(2, 1)
    finally:
        second.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused_or_shared_by_all_threads(url: str) -> None:
    """The services use the store from many threads; one database for each would be none."""
    try:
        opened = Store(url)
    except ConfigurationError:
        return
    try:
        opened.create_task(task(), DIGEST)
        assert race(4, lambda _: opened.task("task")) == []
    finally:
        opened.close()


def test_two_servers_on_one_file_see_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.sqlite3"
    first, second = Store(url), Store(url)
    try:
        first.create_task(task(), DIGEST)
        assert second.task("task").task_spec() == task()
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite",
        "nosuchdatabase://host/x",
        "sqlite+nosuchdriver:///x",
        "sqlite:////nonexistent/folder/x.sqlite3",
        "postgresql://u:p@host:port/x",
    ],
)
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="store_url"):
        Store(url)


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Store("nosuchdatabase://user:hunter2@host/x")
    assert "hunter2" not in str(caught.value)


def test_errors_of_the_database_name_no_client(store: Store) -> None:
    """SQLAlchemy quotes parameters unless it is told not to, and errors end up in logs."""
    found = context()
    admission = cohort.noise_upload(found, 0).admission
    with pytest.raises(Exception, match="FOREIGN KEY") as caught:
        store.open_upload(found, admission)
    receipt: Receipt = admission.receipt
    for secret in (receipt.client_key, receipt.signature, admission.sealed_seed):
        assert secret.hex() not in str(caught.value)
        assert repr(secret)[2:10] not in str(caught.value)
