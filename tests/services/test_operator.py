"""What operators ask of the server: tasks, results, and everything that is refused."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import numpy as np
import pytest
import structlog
from google.protobuf.message import Message
from key_holders import LocalKeyHolder
from serving import loop_thread, serving
from stores import migrated

from secagg import audit
from secagg.accounting import Budget
from secagg.enrolment import OpenEnrolment
from secagg.errors import (
    AuditError,
    ClosedError,
    ConfigurationError,
    DuplicateError,
    MalformedError,
    PlanError,
)
from secagg.optimisers import Optimiser
from secagg.parameters import MIN_COHORT, FloatSegment, IntegerSegment, LowRank, Privacy
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.rpc import channels
from secagg.rpc.status import from_rpc_error
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as aggregation
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg.wire.v1 import operator_service_pb2_grpc, plan_pb2
from secagg_server.blobs import BlobStore
from secagg_server.cli import _learning, _plain
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.operator import Operator
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService, OperatorService
from secagg_server.states import RoundState, TaskState
from secagg_server.stopping import Stop
from secagg_server.store import Store
from secagg_server.tasks import AdaptiveClip, TaskSpec
from secagg_server.verdicts import VerdictDesk


@dataclass
class Office:
    """A server's admin listener, a client of it, and where its files are."""

    operator: Operator
    stub: operator_service_pb2_grpc.OperatorServiceStub
    folder: Path
    blobs: BlobStore
    store: Store
    roster: cohort.ChangingRoster
    rounds: OpenRounds

    def ask(self, method: str, request: Message) -> Any:  # noqa: ANN401 - any response
        try:
            return getattr(self.stub, method)(request, timeout=20)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def create(self, parts: Iterable[pb.CreateTaskRequest]) -> pb.CreateTaskResponse:
        try:
            return self.stub.CreateTask(iter(parts), timeout=20)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def files(self) -> set[Path]:
        return {path for path in self.folder.glob("[ms]*/**/*") if path.suffix in (".f32", ".i64")}


@pytest.fixture
def office(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Office]:
    data = tmp_path / "a" / "b" / "data"
    blobs = BlobStore(data)
    store, clock = Store(migrated(tmp_path / "store.sqlite3")), SystemClock()
    roster = cohort.ChangingRoster(OpenEnrolment())
    rounds = OpenRounds(clock)
    coordinator = Coordinator(store, blobs, rounds, LocalKeyHolder(), clock, roster)
    min_clients = getattr(request, "param", MIN_COHORT)

    def add(server: grpc.aio.Server) -> None:
        service = OperatorService(store, blobs, coordinator, roster, min_clients)
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(service, server)

    with (
        loop_thread() as thread,
        serving(thread, add) as address,
        channels.channel(address, None) as channel,
        closing(Operator(address, None)) as operator,
    ):
        stub = operator_service_pb2_grpc.OperatorServiceStub(channel)
        yield Office(operator, stub, tmp_path, blobs, store, roster, rounds)
        thread.run(coordinator.stop())
    store.close()


MOMENT = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def task(**changes: int) -> TaskSpec:
    spec = TaskSpec("task", cohort.mixed_plan(), 2, 600_000, 3, 6)
    return replace(spec, **changes)


def first(**changes: object) -> pb.CreateTaskRequest:
    """The first message of a task that differs from a good one in these fields."""
    message = task().to_wire()
    for name, value in changes.items():
        setattr(message, name, value)
    return pb.CreateTaskRequest(spec=message)


def model(*data: bytes) -> list[pb.CreateTaskRequest]:
    return [pb.CreateTaskRequest(model_data=part) for part in data]


GOOD_MODEL = codec.model_to_bytes(np.arange(11, dtype=np.float32))


def test_a_task_with_its_model_is_created_and_listed(office: Office) -> None:
    office.operator.create_task(task(), GOOD_MODEL)
    (status,) = office.operator.tasks()
    assert TaskSpec.from_wire(status.spec) == task()
    assert (status.state, status.rounds_done, status.model_version) == (pb.TASK_STATE_RUNNING, 0, 0)
    assert office.blobs.model("task", 0) == GOOD_MODEL


def test_without_a_model_the_task_starts_from_zeros(office: Office) -> None:
    office.operator.create_task(task())
    assert office.blobs.model("task", 0) == bytes(44)


def test_a_model_in_many_pieces_arrives_whole(office: Office) -> None:
    office.create([first(), *model(GOOD_MODEL[:7], GOOD_MODEL[7:40], GOOD_MODEL[40:])])
    assert office.blobs.model("task", 0) == GOOD_MODEL


def test_creating_the_same_task_again_changes_nothing(office: Office) -> None:
    for _ in range(2):
        office.operator.create_task(task(), GOOD_MODEL)
    assert len(office.operator.tasks()) == 1
    assert len(office.operator.task("task").rounds) == 1


@pytest.mark.parametrize("other", [task(rounds=3), task(max_attempts=2), task(target_clients=5)])
def test_a_different_task_of_the_same_id_is_refused(office: Office, other: TaskSpec) -> None:
    office.operator.create_task(task(), GOOD_MODEL)
    with pytest.raises(DuplicateError):
        office.operator.create_task(other, GOOD_MODEL)
    with pytest.raises(DuplicateError):
        office.operator.create_task(task())
    assert office.blobs.model("task", 0) == GOOD_MODEL


@pytest.mark.parametrize(
    "task_id", ["../../escaped", "..", ".", "", "a/b", "x" * 65, "a\0b", "ABSOLUTE"]
)
def test_a_hostile_task_id_is_refused_and_writes_nothing(office: Office, task_id: str) -> None:
    name = str(office.folder / "absolute") if task_id == "ABSOLUTE" else task_id
    with pytest.raises((ConfigurationError, MalformedError), match="task id"):
        office.create([first(task_id=name), *model(GOOD_MODEL)])
    assert office.files() == set()
    assert office.operator.tasks() == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"round_deadline_ms": 99}, "round_deadline_ms=99"),
        ({"max_attempts": 0}, "max_attempts=0"),
        ({"max_attempts": 101}, "max_attempts=101"),
        ({"target_clients": 2}, "target_clients=2"),
        ({"target_clients": 7}, "target_clients=7"),
    ],
)
def test_a_number_out_of_its_range_is_refused(
    office: Office, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigurationError, match=text):
        office.create([first(**changes)])
    assert office.files() == set()


def test_a_plan_that_cannot_be_exact_is_refused(office: Office) -> None:
    message = task().to_wire()
    message.plan.segments[1].integers.max_abs = 1 << 60
    with pytest.raises(PlanError):
        office.create([pb.CreateTaskRequest(spec=message)])


def test_a_task_without_a_plan_is_refused(office: Office) -> None:
    message = task().to_wire()
    message.ClearField("plan")
    with pytest.raises(PlanError):
        office.create([pb.CreateTaskRequest(spec=message)])


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [pb.CreateTaskRequest()],
        model(GOOD_MODEL),
        [first(), first()],
        [first(), pb.CreateTaskRequest()],
        [first(), *model(GOOD_MODEL), first()],
    ],
    ids=["nothing", "empty", "no spec", "two specs", "empty model part", "spec after model"],
)
def test_messages_in_another_order_are_malformed(
    office: Office, parts: list[pb.CreateTaskRequest]
) -> None:
    with pytest.raises(MalformedError):
        office.create(parts)
    assert office.operator.tasks() == []
    assert office.files() == set()


NAN = codec.model_to_bytes(np.full(11, np.nan, dtype=np.float32))


@pytest.mark.parametrize(
    "data",
    [GOOD_MODEL[:-1], GOOD_MODEL[:-4], GOOD_MODEL + b"\0", GOOD_MODEL * 2, NAN],
    ids=["a byte short", "a value short", "a byte long", "twice", "NaN"],
)
def test_a_model_of_the_wrong_size_or_values_is_malformed(office: Office, data: bytes) -> None:
    with pytest.raises(MalformedError):
        office.create([first(), *model(data)])
    assert office.operator.tasks() == []
    assert office.files() == set()


def test_an_endless_model_is_cut_off(office: Office) -> None:
    sent = 0

    def endless() -> Iterator[pb.CreateTaskRequest]:
        nonlocal sent
        yield first()
        while sent < 2000:
            sent += 1
            yield pb.CreateTaskRequest(model_data=bytes(100_000))

    with pytest.raises(MalformedError, match="got more"):
        office.create(endless())
    assert sent < 1000


def test_a_model_for_a_task_without_one_is_malformed(office: Office) -> None:
    spec = replace(task(), plan=cohort.counts_plan())
    with pytest.raises(MalformedError):
        office.operator.create_task(spec, GOOD_MODEL)


def test_an_unknown_task_is_refused_by_every_method(office: Office) -> None:
    for call in (
        lambda: office.operator.task("nothing"),
        lambda: office.operator.abort_task("nothing"),
        lambda: office.operator.sums("nothing", 1),
    ):
        with pytest.raises(ConfigurationError, match="'nothing'"):
            call()


@pytest.mark.parametrize("number", [0, 1, 2, (1 << 32) - 1])
def test_sums_of_a_round_that_is_not_done_are_refused(office: Office, number: int) -> None:
    office.operator.create_task(task())
    with pytest.raises(ClosedError, match="no result"):
        office.operator.sums("task", number)


def test_ending_a_task_twice_is_ending_it_once(office: Office) -> None:
    office.operator.create_task(task())
    for _ in range(2):
        office.operator.abort_task("task")
    answer = office.operator.task("task")
    assert answer.task.state == pb.TASK_STATE_FAILED
    assert answer.task.reason.startswith("ABORTED")
    assert all(record.reason.startswith("ABORTED") for record in answer.rounds)


def test_a_task_that_was_ended_is_not_started_by_creating_it_again(office: Office) -> None:
    office.operator.create_task(task())
    office.operator.abort_task("task")
    rounds = len(office.operator.task("task").rounds)
    assert office.create([first()]).state == pb.TASK_STATE_FAILED
    assert len(office.operator.task("task").rounds) == rounds


def test_operators_hear_of_no_client(office: Office) -> None:
    """Records count clients; the messages have no field that could name one."""
    fields = {
        field.name
        for message in (pb.RoundRecord, pb.TaskStatus, pb.GetSumsResponse)
        for field in message.DESCRIPTOR.fields
    }
    assert not {name for name in fields if "key" in name or "client" in name}


# --- pages ----------------------------------------------------------------------------------------


def paged(office: Office, method: str, field: str, request: Any) -> list[list[Any]]:  # noqa: ANN401 - of either method
    """Every page, the last one without a token."""
    pages = []
    while True:
        answer = office.ask(method, request)
        pages.append(list(getattr(answer, field)))
        if not answer.next_page_token:
            return pages
        assert len(pages[-1]) == request.page_size
        request.page_token = answer.next_page_token


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_pages_of_tasks_are_all_of_them_once_oldest_first(office: Office, size: int) -> None:
    names = ["b", "a", "d", "c", "e"]
    for name in names:
        office.store.create_task(replace(task(), task_id=name), bytes(32))
    pages = paged(office, "ListTasks", "tasks", pb.ListTasksRequest(page_size=size))
    assert [status.spec.task_id for page in pages for status in page] == names
    assert all(len(page) <= size for page in pages)


def test_the_operator_reads_every_page_of_tasks(office: Office) -> None:
    names = [f"task-{number}" for number in range(205)]
    for name in names:
        office.store.create_task(replace(task(), task_id=name), bytes(32))
    assert len(office.ask("ListTasks", pb.ListTasksRequest(page_size=1 << 31)).tasks) == 200
    assert [status.spec.task_id for status in office.operator.tasks()] == names


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7])
def test_pages_of_rounds_are_all_attempts_once_in_order(office: Office, size: int) -> None:
    office.store.create_task(task(), bytes(32))
    attempts = [(1, 1), (1, 2), (1, 3), (2, 1), (10, 1), (10, 2)]
    for number, _ in attempts:
        office.store.create_round("task", number)
    pages = paged(office, "GetTask", "rounds", pb.GetTaskRequest(task_id="task", page_size=size))
    found = [(record.round_number, record.attempt) for page in pages for record in page]
    assert found == attempts
    records = office.operator.task("task").rounds
    assert [(record.round_number, record.attempt) for record in records] == attempts


@pytest.mark.parametrize(
    "token",
    ["x", "1", "1.", ".1", "1.1.1", "-1.1", "1.1 ", "１.１", "1.1\n", "9" * 40 + ".1", "\0"],
)
def test_a_token_that_no_page_gave_is_refused(office: Office, token: str) -> None:
    office.store.create_task(task(), bytes(32))
    with pytest.raises(MalformedError, match="next_page_token"):
        office.ask("GetTask", pb.GetTaskRequest(task_id="task", page_token=token))
    with pytest.raises(ConfigurationError):
        office.ask("ListTasks", pb.ListTasksRequest(page_token=token))


def test_a_token_beyond_the_end_is_an_empty_page(office: Office) -> None:
    office.store.create_task(task(), bytes(32))
    office.store.create_round("task", 1)
    request = pb.GetTaskRequest(task_id="task", page_token="9" * 9 + ".9")
    answer = office.ask("GetTask", request)
    assert (list(answer.rounds), answer.next_page_token) == ([], "")


# --- the server's floor ---------------------------------------------------------------------------


@pytest.mark.parametrize("office", [5], indirect=True)
@pytest.mark.parametrize("minimum", [3, 4])
def test_a_plan_below_the_servers_floor_is_refused(office: Office, minimum: int) -> None:
    spec = replace(task(), plan=cohort.mixed_plan(min_clients=minimum))
    with pytest.raises(ConfigurationError, match=f"min_clients=5.*got min_clients={minimum}"):
        office.operator.create_task(spec)
    assert office.operator.tasks() == []
    assert office.files() == set()


@pytest.mark.parametrize("office", [5], indirect=True)
def test_a_plan_at_the_servers_floor_is_created(office: Office) -> None:
    office.operator.create_task(replace(task(), plan=cohort.mixed_plan(min_clients=5)))
    assert len(office.operator.tasks()) == 1


# --- the audit log --------------------------------------------------------------------------------


def test_the_exported_log_is_the_stores_and_verifies(office: Office) -> None:
    office.operator.create_task(task())
    office.operator.abort_task("task")
    found = list(office.operator.audit())
    assert found == list(office.store.audit())
    assert {"task-created", "task-ended"} <= {entry.event for entry in found}
    assert audit.verify(found) == found[-1]
    with pytest.raises(AuditError):
        audit.verify(found[1:])
    with pytest.raises(AuditError):
        audit.verify([*found[:-1], replace(found[-1], event="task-forgotten")])


def test_a_long_log_is_exported_whole(office: Office) -> None:
    """More entries than one read of the store takes."""
    office.store.create_task(task(), bytes(32))
    for _ in range(1100):
        office.store.create_round("task", 1)
    found = list(office.operator.audit())
    assert [entry.sequence for entry in found] == list(range(1, 1102))
    assert audit.verify(found) == found[-1]


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_the_log_is_exported_from_any_entry_on(office: Office, after: int) -> None:
    office.store.create_task(task(), bytes(32))
    for _ in range(3):
        office.store.create_round("task", 1)
    assert list(office.operator.audit(after)) == list(office.store.audit())[after:]


# --- what is no longer kept -----------------------------------------------------------------------


def private(epsilon: float, noise: float = 1.0, clip: float = 2.0, **changes: Any) -> TaskSpec:  # noqa: ANN401
    """A task with a budget; rho is a little under 1/2 a release at a noise multiplier of 1."""
    plan = make_plan(
        [FloatSegment("update", cohort.TENSORS, clip, 10, clip_bit=True)],
        max_clients=6,
        privacy=Privacy("distributed", noise, epsilon, 1e-5),
    )
    return replace(task(), plan=plan, **changes)


def test_a_budget_without_room_for_one_release_is_refused_with_numbers_that_work(
    office: Office,
) -> None:
    with pytest.raises(ConfigurationError, match="epsilon of at least") as caught:
        office.operator.create_task(private(1.0))
    assert office.operator.tasks() == []
    assert office.files() == set()
    number = re.search(r"epsilon of at least ([\d.]+)", str(caught.value))
    assert number is not None
    note = office.operator.create_task(private(float(number[1])))
    assert note == (
        "the privacy budget has room for 1 of 2 rounds; the task will finish after them"
    )
    noise = re.search(r"noise_multiplier of at least ([\d.]+)", str(caught.value))
    assert noise is not None
    office.operator.create_task(private(1.0, float(noise[1]), task_id="other"))


def test_a_budget_that_is_short_is_told_and_logged_and_one_that_is_not_is_not(
    office: Office,
) -> None:
    with structlog.testing.capture_logs() as logs:
        assert "1 of 2 rounds" in office.operator.create_task(private(6.0))
        assert office.operator.create_task(private(8.0, task_id="just")) == ""
        assert office.operator.create_task(private(100.0, task_id="rich")) == ""
        assert office.operator.create_task(task(task_id="exact")) == ""
    (short,) = [entry for entry in logs if entry["event"] == "budget_short"]
    assert (short["rounds"], short["releases"], short["log_level"]) == (2, 1, "warning")


def test_where_a_task_stands_with_its_budget_is_shown(office: Office) -> None:
    spec = private(20.0)
    office.store.create_task(spec, bytes(32))
    rho = release_rho(spec.plan)
    budget = Budget(20.0, 1e-5)
    for number in (1, 2):
        shown = office.operator.task("task").task.privacy
        assert shown.mode == plan_pb2.PRIVACY_MODE_DISTRIBUTED
        assert (shown.noise_multiplier, shown.epsilon, shown.delta) == (1.0, 20.0, 1e-5)
        assert shown.epsilon_spent == budget.spent((number - 1) * rho)
        assert shown.releases_left == budget.left((number - 1) * rho, rho)
        finish(office, number, rho=rho)
    assert office.operator.tasks()[0].privacy.epsilon_spent == budget.spent(rho + rho)


def test_the_clip_norm_of_the_task_and_of_each_round_is_shown(office: Office) -> None:
    spec = private(20.0, adaptive_clip=AdaptiveClip())
    office.store.create_task(spec, bytes(32))
    assert office.operator.task("task").task.clip == 2.0
    finish(office, 1, clip=1.75)
    finish(office, 2, clip=1.5)
    answer = office.operator.task("task")
    assert answer.task.clip == 1.5
    assert [record.clip for record in answer.rounds] == [2.0, 1.75]
    assert answer.task.spec.adaptive_clip.rate == AdaptiveClip().rate


def test_a_task_without_privacy_or_model_shows_neither(office: Office) -> None:
    office.operator.create_task(replace(task(), plan=cohort.counts_plan()))
    answer = office.operator.task("task")
    assert not answer.task.HasField("privacy")
    assert not answer.task.spec.HasField("adaptive_clip")
    assert answer.task.clip == 0.0


@pytest.mark.parametrize(
    ("quantile", "rate"), [(0.0, 0.2), (1.0, 0.2), (0.5, 0.0), (0.5, 2.0), (float("nan"), 0.2)]
)
def test_an_adaptive_clip_norm_out_of_its_range_is_refused(
    quantile: float, rate: float, office: Office
) -> None:
    message = private(20.0).to_wire()
    message.adaptive_clip.quantile, message.adaptive_clip.rate = quantile, rate
    with pytest.raises(ConfigurationError, match="adaptive clip norm"):
        office.create([pb.CreateTaskRequest(spec=message)])
    message = task().to_wire()
    message.adaptive_clip.quantile, message.adaptive_clip.rate = 0.5, 0.2
    with pytest.raises(ConfigurationError, match="clip bit"):
        office.create([pb.CreateTaskRequest(spec=message)])
    assert office.operator.tasks() == []


def learning() -> TaskSpec:
    """With an optimiser, and criteria that any round can meet."""
    return replace(task(), optimiser=Optimiser("adam", 0.05), stop=Stop(2, least_change=0.01))


@pytest.mark.parametrize(
    ("part", "name", "value", "kind"),
    [
        ("optimiser", "name", 0, MalformedError),
        ("optimiser", "learning_rate", float("inf"), ConfigurationError),
        ("optimiser", "tau", -1.0, ConfigurationError),
        ("stop", "patience", 0, ConfigurationError),
        ("stop", "least_change", float("nan"), ConfigurationError),
        ("stop", "figure", "update", ConfigurationError),
    ],
)
def test_an_optimiser_or_criteria_out_of_range_are_refused(
    part: str, name: str, value: float | str, kind: type[Exception], office: Office
) -> None:
    message = learning().to_wire()
    setattr(getattr(message, part), name, value)
    with pytest.raises(kind):
        office.create([pb.CreateTaskRequest(spec=message)])
    assert office.operator.tasks() == []


def test_how_a_model_learns_is_shown_with_each_round(office: Office) -> None:
    office.store.create_task(learning(), bytes(32))
    finish(office, 1)
    finish(office, 2, figure=0.25, change=0.5)
    answer = office.operator.task("task")
    assert TaskSpec.from_wire(answer.task.spec) == learning()
    first_round, second = answer.rounds
    assert not first_round.HasField("figure")
    assert not first_round.HasField("change")
    assert (second.figure, second.change) == (0.25, 0.5)
    assert list(_learning(_plain(answer))) == [
        "optimiser: adam, learning rate 0.05, beta1 0.9, beta2 0.99, tau 0.001",
        "stops when the model has changed by less than 0.01 in 2 rounds",
        "round 2: model changed by 0.5",
    ]


def test_how_updates_travel_and_what_a_task_stops_by_is_shown(office: Office) -> None:
    update = FloatSegment("update", cohort.TENSORS, 2.0, 10, compression=LowRank(1))
    plan = make_plan([update, IntegerSegment("hits", 2, 100)], max_clients=6)
    stop = Stop(3, figure="hits", least_gain=0.01)
    office.store.create_task(replace(task(), plan=plan, stop=stop), bytes(32))
    finish(office, 1, figure=0.25)
    assert list(_learning(_plain(office.operator.task("task")))) == [
        "optimiser: average, learning rate 1",
        "compression: 8 of 11 floats travel",
        "stops when hits has not risen by 0.01 in 3 rounds",
        "round 1: hits 0.2500",
    ]


def test_a_task_without_a_model_learns_nothing(office: Office) -> None:
    office.operator.create_task(replace(task(), plan=cohort.counts_plan()))
    assert list(_learning(_plain(office.operator.task("task")))) == []


def finish(
    office: Office,
    number: int,
    *,
    rho: float = 0.0,
    clip: float | None = None,
    figure: float | None = None,
    change: float | None = None,
) -> None:
    """A round that is done, as the coordinator records it."""
    row = office.store.create_round("task", number)
    office.store.open_round(
        row.key, round_key=bytes(32), identity=bytes(32), signature=bytes(64), closes_at=MOMENT
    )
    for state in (RoundState.CHECKING, RoundState.SUMMING, RoundState.RELEASING):
        office.store.advance(row.key, state)
    office.store.finish_round(
        row.key,
        bytes(32),
        4,
        aggregate_ms=1.0,
        release_ms=1.0,
        has_model=True,
        rho=rho,
        clip=clip,
        figure=figure,
        change=change,
    )


def test_sums_are_handed_out_until_they_are_removed(office: Office) -> None:
    office.store.create_task(task(), bytes(32))
    for number in (1, 2):
        finish(office, number)
        office.blobs.put_sums("task", number, bytes([number]) * 3_000_000)
    assert office.operator.sums("task", 1) == (b"\1" * 3_000_000, 4)
    office.blobs.drop_sums("task", 1)
    with pytest.raises(ClosedError, match="have been removed"):
        office.operator.sums("task", 1)
    assert office.operator.sums("task", 2) == (b"\2" * 3_000_000, 4)
    # What happened is still on record.
    assert [record.contributors for record in office.operator.task("task").rounds] == [4, 4]


def test_a_model_version_that_was_removed_says_so_and_the_newest_is_there(
    office: Office,
) -> None:
    office.operator.create_task(task())
    office.operator.abort_task("task")
    assert office.store.task("task").state is TaskState.FAILED
    finish(office, 2)
    office.blobs.put_model("task", 1, GOOD_MODEL)
    service = AggregationService(
        office.store,
        office.blobs,
        office.rounds,
        Intake(office.store, office.blobs, office.rounds, office.roster),
        VerdictDesk(office.store, office.roster, bytes(32)),
    )

    def fetch(**changes: Any) -> aggregation.GetModelResponse:  # noqa: ANN401 - fields
        return service._model(aggregation.GetModelRequest(task_id="task", **changes))

    before = fetch(version=0)
    office.blobs.drop_model("task", 0)
    with pytest.raises(ClosedError, match="version=0 is not; take a newer one"):
        fetch(version=0)
    with pytest.raises(ConfigurationError, match="up to 1"):
        fetch(version=2)
    newest = fetch(latest=True)
    assert (newest.version, newest.data, before.data) == (1, GOOD_MODEL, bytes(44))
