"""A client's session against in-process services: honest ones, broken ones, and liars."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import numpy as np
import pytest
from clocks import FakeTime
from key_holders import LocalKeyHolder
from serving import LoopThread, loop_thread, serving

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    InputError,
    MalformedError,
    QuorumError,
    RoundError,
    SecaggError,
    UnavailableError,
)
from secagg.parameters import FloatSegment, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.rpc.retry import RetryPolicy
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc
from secagg_client.session import ClientSession, CurrentRound
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService
from secagg_server.states import TaskState
from secagg_server.store import Store
from secagg_server.tasks import TaskSpec

Abort = grpc.aio.ServicerContext[Any, Any]
METHODS = ("GetRound", "GetModel", "OpenUpload", "PutChunk", "CommitUpload")


class Gate(AggregationService):
    """The real service; tests change its answers on their way out, or lose them."""

    def __init__(self, *parts: Any) -> None:  # noqa: ANN401 - what the service takes
        super().__init__(*parts)
        self.calls: Counter[str] = Counter()
        self.lost: set[tuple[str, int]] = set()
        self.change: Callable[[Any], None] = lambda _answer: None


def _guarded(method: str) -> Callable[..., Any]:
    real = getattr(AggregationService, method)

    async def guarded(self: Gate, request: Any, context: Abort) -> Any:  # noqa: ANN401
        answer = await real(self, request, context)
        self.calls[method] += 1
        if (method, self.calls[method]) in self.lost:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        self.change(answer)
        return answer

    return guarded


for _method in METHODS:
    setattr(Gate, _method, _guarded(_method))


@dataclass
class Site:
    """A server with an in-process key holder, over gRPC."""

    address: str
    thread: LoopThread
    store: Store
    blobs: BlobStore
    coordinator: Coordinator
    gate: Gate
    key_holder: LocalKeyHolder

    def create(self, spec: TaskSpec, model: bytes | None = None) -> None:
        data = bytes(spec.model_bytes) if model is None else model
        if spec.model:
            self.blobs.put_model(spec.task_id, 0, data)
        self.store.create_task(spec, codec.model_digest(data))
        self.thread.run(self._start(spec))

    async def _start(self, spec: TaskSpec) -> None:
        self.coordinator.start(spec)

    def session(self, index: int) -> ClientSession:
        return session_at(self.address, index)

    def sums(self, plan: Plan, number: int = 1) -> tuple[np.ndarray[Any, Any], ...]:
        return codec.sums_from_bytes(self.blobs.sums("task", number), plan)


def session_at(address: str, index: int, **changes: Any) -> ClientSession:  # noqa: ANN401
    time = FakeTime()
    # Fake time gives up on an unreachable server at once; "not ready" really waits, a little.
    retry = RetryPolicy(total_s=20, sleep=lambda s: _nap(time, s), clock=time.clock)
    return ClientSession(
        address,
        "task",
        cohort.identity(index),
        **{"rounding": lambda context: cohort.rounding(context, index), "retry": retry} | changes,
    )


def _nap(time: FakeTime, seconds: float) -> None:
    import threading

    time.sleep(seconds)
    threading.Event().wait(0.002)  # lets the in-process server run


@contextmanager
def site_at(folder: Path) -> Iterator[Site]:
    store = Store(f"sqlite:///{folder}/store.sqlite3")
    blobs, clock = BlobStore(folder / "blobs"), SystemClock()
    rounds, key_holder = OpenRounds(clock), LocalKeyHolder()
    coordinator = Coordinator(store, blobs, rounds, key_holder, clock)
    gate = Gate(store, blobs, rounds, Intake(store, blobs, rounds))

    def add(server: grpc.aio.Server) -> None:
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(gate, server)

    with loop_thread() as thread, serving(thread, add) as address:
        yield Site(address, thread, store, blobs, coordinator, gate, key_holder)
        thread.run(coordinator.stop())
    store.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


def task(plan: Plan | None = None, **changes: int) -> TaskSpec:
    """A task that waits long for its clients, and closes once three have come."""
    spec = TaskSpec("task", plan or cohort.mixed_plan(), 1, 600_000, 2, 3)
    return replace(spec, **changes)


def contribute(current: CurrentRound, index: int) -> None:
    values = cohort.contribution(current.context.plan, index)
    current.contribute(values, samples=cohort.samples(index))


def take_part(session: ClientSession, index: int, rounds: int = 1) -> CurrentRound:
    """Contribute to the next rounds; the last of them."""
    for current in session.rounds():
        contribute(current, index)
        if current.number == rounds:
            return current
    raise AssertionError("the task ended early")


def others_take_part(site: Site, *indexes: int) -> None:
    for index in indexes:
        with site.session(index) as session:
            take_part(session, index)


def wait_for_end(site: Site, index: int) -> None:
    """Returns once the task has finished."""
    with site.session(index) as session:
        list(session.rounds())


def exact(site: Site, current: CurrentRound, indexes: list[int]) -> None:
    found = site.sums(current.context.plan)
    for one, other in zip(found, cohort.clear_sums(current.context, indexes), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the good way -----------------------------------------------------------------------------


def test_clients_contribute_until_the_task_ends_and_the_sum_is_exact(site: Site) -> None:
    site.create(task())
    others_take_part(site, 0, 1)
    with site.session(2) as session:
        seen = []
        for current in session.rounds():
            contribute(current, 2)
            seen.append(current)
    assert [current.number for current in seen] == [1]
    exact(site, seen[0], [0, 1, 2])
    assert seen[0].rounds_total == 1


def test_the_cost_is_that_of_the_payload(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        cost = current.contribute(cohort.contribution(current.context.plan, 0), samples=5)
    assert cost.upload_bytes == current.context.plan.payload_bytes
    assert min(cost.quantize_s, cost.encrypt_s, cost.upload_s) > 0


def large_plan(tensors: int) -> Plan:
    shapes = [
        TensorSpec(f"layer.{i:03}.attention.weight", (300_000 // tensors,)) for i in range(tensors)
    ]
    return make_plan([FloatSegment("update", tuple(shapes), 1.0)], max_clients=5)


@pytest.mark.parametrize("tensors", [1, 300])
def test_a_model_of_several_pieces_arrives_whole(site: Site, tensors: int) -> None:
    spec = task(large_plan(tensors))
    assert spec.model is not None
    assert spec.model_bytes > codec.PIECE_BYTES
    values = np.arange(spec.model.parameters, dtype=np.float32)
    site.create(spec, codec.model_to_bytes(values))
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        arrays = [current.model.tensors[tensor.name] for tensor in spec.model.tensors]
        latest = session.latest_model()
    np.testing.assert_array_equal(np.concatenate(arrays), values)
    assert (current.model.version, latest.version) == (0, 0)
    assert latest.tensors.keys() == current.model.tensors.keys()


def test_the_latest_model_is_the_one_the_last_round_made(site: Site) -> None:
    site.create(task())
    others_take_part(site, 0, 1, 2)
    wait_for_end(site, 0)
    with site.session(0) as session:
        latest = session.latest_model()
    flat = np.concatenate([latest.tensors[t.name].reshape(-1) for t in cohort.TENSORS])
    assert latest.version == 1
    np.testing.assert_array_equal(flat, np.frombuffer(site.blobs.model("task", 1), "<f4"))


def test_a_task_without_a_model_hands_out_none(site: Site) -> None:
    site.create(task(cohort.counts_plan()))
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        assert (current.model.version, current.model.tensors) == (0, {})
        with pytest.raises(ConfigurationError):
            session.latest_model()


def test_an_aborted_attempt_is_followed_by_another_for_the_same_client(site: Site) -> None:
    site.key_holder.fail("judge", QuorumError("expected more"))
    site.create(task())
    others_take_part(site, 0, 1)
    with site.session(2) as session:
        attempts = []
        for current in session.rounds():
            attempts.append((current.number, current.context.id.attempt))
            contribute(current, 2)
            if len(attempts) == 1:
                continue
            for index in (0, 1):
                with site.session(index) as other:
                    contribute(next(iter(other.rounds())), index)
    assert attempts == [(1, 1), (1, 2)]
    exact(site, current, [0, 1, 2])


# --- refusals ---------------------------------------------------------------------------------


def test_an_unknown_task_is_refused(site: Site) -> None:
    with site.session(0) as session, pytest.raises(ConfigurationError, match="'task'"):
        next(session.rounds())


def test_a_failed_task_says_why(site: Site) -> None:
    site.create(task())
    site.store.end_task("task", TaskState.FAILED, "QUORUM_NOT_REACHED: too few")
    with site.session(0) as session, pytest.raises(RoundError, match="too few") as caught:
        next(session.rounds())
    assert type(caught.value) is RoundError


def test_bad_data_is_refused_before_anything_is_sent(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        values = cohort.contribution(current.context.plan, 0)
        for damage in (
            {"counts": values["counts"][:-1]},
            {"counts": values["counts"] * 2**40},
            {"update": {"b": 1.0}},
        ):
            with pytest.raises(InputError):
                current.contribute(values | damage, samples=1)
        with pytest.raises(InputError):
            current.contribute(values, samples=0)
    assert site.gate.calls["OpenUpload"] == 0


def test_a_second_different_contribution_is_refused(site: Site) -> None:
    site.create(task())
    with site.session(0) as session:
        current = next(iter(session.rounds()))
        contribute(current, 0)
        with pytest.raises(DuplicateError):
            contribute(current, 0)


def test_contributing_too_late_is_refused(site: Site) -> None:
    site.create(task())
    with site.session(5) as late:
        current = next(iter(late.rounds()))
        others_take_part(site, 0, 1, 2)
        wait_for_end(site, 0)
        with pytest.raises(ClosedError):
            contribute(current, 5)
    exact(site, current, [0, 1, 2])


def test_repeatable_rounding_is_refused_off_loopback() -> None:
    with pytest.raises(ConfigurationError, match="repeatable"):
        session_at("192.168.1.2:7400", 0)


def test_a_remote_server_is_refused_whatever_the_rounding() -> None:
    with pytest.raises(ConfigurationError, match="plaintext"):
        session_at("192.168.1.2:7400", 0, rounding=None)


def test_a_server_that_is_not_there_is_given_up(site: Site) -> None:
    with session_at("127.0.0.1:1", 0) as session, pytest.raises(UnavailableError):
        next(session.rounds())


def test_the_session_needs_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, secagg_client.session as s; "
        "assert not {'torch', 'pandas', 'sqlalchemy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- answers that are lost ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [(method, 1) for method in METHODS] + [("PutChunk", 2), ("PutChunk", 3)], ids=str
)
def test_a_lost_answer_leaves_exactly_one_contribution(site: Site, lost: tuple[str, int]) -> None:
    spec = task(cohort.long_plan() if lost[0] == "PutChunk" else None)
    site.create(spec)
    site.gate.lost.add(lost)
    with site.session(0) as session:
        current = take_part(session, 0)
    assert site.gate.calls[lost[0]] > lost[1]
    assert site.store.counts(("task", 1, 1)).accepted == 1
    others_take_part(site, 1, 2)
    wait_for_end(site, 1)
    exact(site, current, [0, 1, 2])


def test_every_answer_lost_once_leaves_exactly_one_contribution(site: Site) -> None:
    site.create(task())
    site.gate.lost |= {(method, 1) for method in METHODS}
    with site.session(0) as session:
        current = take_part(session, 0)
    others_take_part(site, 1, 2)
    wait_for_end(site, 1)
    exact(site, current, [0, 1, 2])


def test_losing_the_answer_to_the_commit_that_closes_the_round_is_no_refusal(site: Site) -> None:
    """The round closes the moment it is full; a client whose contribution is in the sum must not
    be told that nothing of it is."""
    site.create(task())
    others_take_part(site, 0, 1)
    site.gate.lost.add(("CommitUpload", 3))
    with site.session(2) as session:
        current = take_part(session, 2)
    wait_for_end(site, 0)
    exact(site, current, [0, 1, 2])


def test_an_answer_that_is_lost_for_ever_is_given_up(site: Site) -> None:
    site.create(task())
    site.gate.lost |= {("CommitUpload", n) for n in range(1, 1000)}
    with site.session(0) as session, pytest.raises(UnavailableError):
        take_part(session, 0)


def test_after_half_of_the_chunks_only_the_rest_is_sent(site: Site) -> None:
    site.create(task(cohort.long_plan()))
    with site.session(0) as first:
        current = next(iter(first.rounds()))
        upload = cohort.encrypted(current.context, 0)
        site.gate.lost |= {("PutChunk", n) for n in range(2, 1000)}
        with pytest.raises(UnavailableError):
            first.send(current.context, upload)
    site.gate.lost.clear()
    site.gate.calls.clear()
    with site.session(0) as again:
        again.send(current.context, upload)
        again.send(current.context, upload)
    # The second chunk was stored although its answers were lost.
    assert site.gate.calls["PutChunk"] == 1
    assert site.store.counts(("task", 1, 1)).accepted == 1


# --- servers that lie ---------------------------------------------------------------------------


def lying(site: Site, kind: type, change: Callable[[Any], None]) -> None:
    site.gate.change = lambda answer: change(answer) if isinstance(answer, kind) else None


def another_round_key(answer: pb.GetRoundResponse) -> None:
    answer.round_key = cohort.round_context(cohort.mixed_plan()).round_key


def another_key_by_its_name(answer: pb.GetRoundResponse) -> None:
    """A key of the server's own, with a context that names it: the key holder finds out."""
    foreign = cohort.round_context(cohort.mixed_plan(), task_id="task")
    answer.round_key = foreign.round_key
    answer.context.round_key_id = foreign.id.round_key_id


def another_plan(answer: pb.GetRoundResponse) -> None:
    answer.plan.max_clients += 1


def a_smaller_quorum(answer: pb.GetRoundResponse) -> None:
    answer.plan.min_clients = 2


def a_finer_quantiser(answer: pb.GetRoundResponse) -> None:
    answer.plan.segments[0].floats.bits = 16


def another_task(answer: pb.GetRoundResponse) -> None:
    answer.context.task_id = "other"


def no_context(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("context")


def no_plan(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("plan")


def no_key(answer: pb.GetRoundResponse) -> None:
    answer.ClearField("round_key")


ROUND_LIES = [another_round_key, another_plan, a_smaller_quorum, a_finer_quantiser, another_task]
ROUND_LIES += [no_context, no_plan, no_key]


@pytest.mark.parametrize("lie", ROUND_LIES, ids=lambda lie: lie.__name__)
def test_a_round_that_does_not_fit_together_is_refused(
    site: Site, lie: Callable[[Any], None]
) -> None:
    site.create(task())
    lying(site, pb.GetRoundResponse, lie)
    with site.session(0) as session, pytest.raises(SecaggError) as caught:
        next(session.rounds())
    assert isinstance(caught.value, (ContextError, MalformedError, ConfigurationError))
    assert site.gate.calls["OpenUpload"] == 0


def test_a_key_of_the_servers_own_opens_nothing_that_counts(site: Site) -> None:
    """The client cannot tell, but its receipt names the false key and is refused."""
    site.create(task())
    lying(site, pb.GetRoundResponse, another_key_by_its_name)
    with site.session(0) as session, pytest.raises(ContextError, match="round_key_id"):
        take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0


def another_model(answer: pb.GetModelResponse) -> None:
    """Consistent in itself, but not what the round names."""
    answer.data = np.ones(len(answer.data) // 4, dtype="<f4").tobytes()
    answer.model_digest = hashlib.sha256(answer.data).digest()


def another_byte(answer: pb.GetModelResponse) -> None:
    answer.data = b"\1" + answer.data[1:]


def another_digest(answer: pb.GetModelResponse) -> None:
    answer.model_digest = bytes(32)


def a_shorter_model(answer: pb.GetModelResponse) -> None:
    answer.data = answer.data[:-4]


def another_total(answer: pb.GetModelResponse) -> None:
    answer.total_bytes += 4


def other_names(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].name = "other"


def other_shapes(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].shape[:] = [2, 3]


def no_tensors(answer: pb.GetModelResponse) -> None:
    answer.ClearField("tensors")


def huge_tensors(answer: pb.GetModelResponse) -> None:
    answer.tensors[0].shape[:] = [1 << 40, 1 << 40]


MODEL_LIES = [another_model, another_byte, another_digest, a_shorter_model, another_total]
MODEL_LIES += [other_names, other_shapes, no_tensors, huge_tensors]


@pytest.mark.parametrize("lie", MODEL_LIES, ids=lambda lie: lie.__name__)
def test_a_model_that_the_round_does_not_name_is_refused(
    site: Site, lie: Callable[[Any], None]
) -> None:
    site.create(task())
    lying(site, pb.GetModelResponse, lie)
    with site.session(0) as session, pytest.raises((ContextError, MalformedError)):
        next(session.rounds())


def test_a_model_that_is_not_finite_is_refused_even_if_the_round_names_it(site: Site) -> None:
    values = np.zeros(11, dtype=np.float32)
    values[3] = np.nan
    site.create(task(), codec.model_to_bytes(values))
    with site.session(0) as session, pytest.raises(MalformedError, match="finite"):
        next(session.rounds())


def test_a_server_cannot_feed_a_client_for_ever(site: Site) -> None:
    """The plan says how large the model is, before the first piece is asked for."""
    site.create(task())

    def endless(answer: pb.GetModelResponse) -> None:
        answer.chunk_count = 200
        answer.total_bytes = 200 * codec.PIECE_BYTES
        answer.data = bytes(codec.PIECE_BYTES)

    original = site.gate._model
    site.gate._model = lambda request: original(  # type: ignore[method-assign]
        pb.GetModelRequest(task_id=request.task_id, version=request.version)
    )
    lying(site, pb.GetModelResponse, endless)
    with site.session(0) as session, pytest.raises((ContextError, MalformedError)):
        next(session.rounds())
    assert site.gate.calls["GetModel"] <= 2


def test_a_round_that_the_client_is_done_with_is_not_taken_again(site: Site) -> None:
    """A server that repeats a round, with a context of its own, asks for the same update twice."""
    site.create(task())
    with site.session(0) as session:
        rounds = session.rounds()
        first = next(rounds)
        repeated = pb.GetRoundResponse(
            context=codec.context_id_to_wire(first.context.id),
            plan=codec.plan_to_wire(first.context.plan),
            round_key=first.context.round_key,
        )
        ask = session._next_round
        session._next_round = lambda _done: repeated  # type: ignore[method-assign]
        with pytest.raises(SecaggError):
            next(rounds)
        session._next_round = ask  # type: ignore[method-assign]


def test_missing_chunks_that_the_upload_does_not_have_are_not_sent(site: Site) -> None:
    site.create(task())

    def greedy(answer: pb.OpenUploadResponse) -> None:
        answer.missing_chunks.extend([1, 2, (1 << 32) - 1])

    lying(site, pb.OpenUploadResponse, greedy)
    with site.session(0) as session, pytest.raises(SecaggError):
        take_part(session, 0)
    assert site.store.counts(("task", 1, 1)).accepted == 0
