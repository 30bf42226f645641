"""Sizes at the edge: one message, its headers, and streams that do not end."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import pytest
from federations import Site, forged, kit, new_federation, site
from google.protobuf.message import Message
from serving import LoopThread, loop_thread, serving

from secagg.certificates import Kit, Role
from secagg.context import RoundContext
from secagg.errors import (
    MalformedError,
    NotEnrolledError,
    RevokedError,
    SecaggError,
    UnavailableError,
    WrongRoleError,
)
from secagg.parameters import RING_DEGREE
from secagg.rpc import channels
from secagg.rpc.deadlines import DEADLINES_S
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.status import from_rpc_error, translated
from secagg.wire.codec import MAX_MESSAGE_BYTES, context_id_to_wire
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc as aggregation
from secagg.wire.v1 import (
    key_holder_service_pb2,
    key_holder_service_pb2_grpc,
    operator_service_pb2,
    operator_service_pb2_grpc,
)
from secagg_server.tasks import TaskSpec

# What gRPC generates has no types.
Call = Any


class Sized(aggregation.AggregationServiceServicer):
    """Takes chunks, and answers with what the test put into ``answer``."""

    def __init__(self) -> None:
        self.answer = pb.GetModelResponse()

    @translated
    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        return self.answer

    @translated
    async def PutChunk(self, request: pb.PutChunkRequest, context: object) -> pb.PutChunkResponse:
        return pb.PutChunkResponse()


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def sized() -> Sized:
    return Sized()


@pytest.fixture
def address(thread: LoopThread, sized: Sized) -> Iterator[str]:
    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(sized, server)

    with serving(thread, add) as at:
        yield at


@pytest.fixture
def stub(address: str) -> Iterator[aggregation.AggregationServiceStub]:
    with channels.channel(address, None) as channel:
        yield aggregation.AggregationServiceStub(channel)


def failure(call: Callable[..., Any], request: object, **how: Any) -> grpc.RpcError:  # noqa: ANN401
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20, **how)
    return caught.value


# --- one message ---------------------------------------------------------------------------------


def sized_chunk(size: int) -> pb.PutChunkRequest:
    request = pb.PutChunkRequest(data=bytes(size - 8))
    request.data = bytes(size - 8 + size - request.ByteSize())
    assert request.ByteSize() == size
    return request


def sized_piece(size: int) -> pb.GetModelResponse:
    answer = pb.GetModelResponse(data=bytes(size - 8))
    answer.data = bytes(size - 8 + size - answer.ByteSize())
    assert answer.ByteSize() == size
    return answer


def wide_open(address: str) -> grpc.Channel:
    """A client that does not keep the limits."""
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_metadata_size", 1 << 20),
        ("grpc.absolute_max_metadata_size", 1 << 20),
    ]
    return grpc.insecure_channel(address, options=options)


def test_a_request_of_exactly_the_limit_passes(stub: Call) -> None:
    stub.PutChunk(sized_chunk(MAX_MESSAGE_BYTES), timeout=20)


def test_a_client_does_not_send_a_request_over_the_limit(stub: Call) -> None:
    error = failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_server_refuses_a_request_over_the_limit(address: str) -> None:
    with wide_open(address) as channel:
        stub = aggregation.AggregationServiceStub(channel)
        error = failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES + 1))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stub.PutChunk(sized_chunk(MAX_MESSAGE_BYTES), timeout=20)


def test_an_answer_over_the_limit_reaches_neither_kind_of_client(
    address: str, sized: Sized
) -> None:
    sized.answer = sized_piece(MAX_MESSAGE_BYTES + 1)
    for connect in (lambda to: channels.channel(to, None), wide_open):
        with connect(address) as channel:
            stub = aggregation.AggregationServiceStub(channel)
            error = failure(stub.GetModel, pb.GetModelRequest())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_refuses_an_answer_over_the_limit(thread: LoopThread, sized: Sized) -> None:
    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        aggregation.add_AggregationServiceServicer_to_server(sized, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    sized.answer = sized_piece(MAX_MESSAGE_BYTES + 1)
    server, port = thread.run(start())
    try:
        with channels.channel(f"127.0.0.1:{port}", None) as channel:
            stub = aggregation.AggregationServiceStub(channel)
            error = failure(stub.GetModel, pb.GetModelRequest())
    finally:
        thread.run(server.stop(None))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_answer_of_exactly_the_limit_passes(sized: Sized, stub: Call) -> None:
    sized.answer = sized_piece(MAX_MESSAGE_BYTES)
    assert stub.GetModel(pb.GetModelRequest(), timeout=20) == sized.answer


def test_a_limit_of_grpcs_own_is_permanent(address: str) -> None:
    with wide_open(address) as channel:
        stub = aggregation.AggregationServiceStub(channel)
        error = from_rpc_error(failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES + 1)))
    assert type(error) is SecaggError


@pytest.mark.parametrize("size", [32 * 1024, 256 * 1024])
def test_a_server_does_not_take_headers_without_end(size: int, address: str) -> None:
    with wide_open(address) as channel:
        stub = aggregation.AggregationServiceStub(channel)
        error = failure(stub.GetModel, pb.GetModelRequest(), metadata=(("x-filler", "x" * size),))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.GetModel(pb.GetModelRequest(), timeout=20) == pb.GetModelResponse()


# --- streams that do not end ---------------------------------------------------------------------

MEBIBYTE = 1 << 20
# Whoever sends is ahead of whoever refuses by what the connection holds: gRPC widens its window to
# what a fast link takes, so that this is a matter of bytes, several mebibytes of them.
WINDOW = 32 * MEBIBYTE


class Endless:
    """Sends the first messages, then the last of them again and again; counts what was asked."""

    def __init__(self, *messages: Message, at_most: int = 2000) -> None:
        self.messages = messages
        self.asked = 0
        self.at_most = at_most

    def __iter__(self) -> Iterator[Message]:
        for message in self.messages:
            self.asked += 1
            yield message
        while self.asked < self.at_most:
            self.asked += 1
            yield self.messages[-1]

    @property
    def asked_bytes(self) -> int:
        first = [message.ByteSize() for message in self.messages]
        return sum(first[: self.asked]) + first[-1] * max(self.asked - len(first), 0)


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def made(thread: LoopThread, tmp_path: Path) -> Iterator[Site]:
    with site(thread, tmp_path / "site", new_federation(tmp_path / "federation")) as running:
        yield running


def streamed(
    address: str, own: Kit, method: Callable[[grpc.Channel], Call], sent: Endless
) -> SecaggError:
    """What an endless stream is refused with; the memory of both sides must stay flat."""
    with channels.channel(address, own) as channel:
        work = method(channel)
        before = resident_bytes()

        def call() -> None:
            answer = work(iter(sent), timeout=60, metadata=metadata())
            if hasattr(answer, "__next__"):
                list(answer)

        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert resident_bytes() - before < 128 * MEBIBYTE, "of 2000 that would be sent"
    return from_rpc_error(caught.value)


def creating(channel: grpc.Channel) -> Call:
    return operator_service_pb2_grpc.OperatorServiceStub(channel).CreateTask


def releasing(channel: grpc.Channel) -> Call:
    return key_holder_service_pb2_grpc.KeyHolderServiceStub(channel).Release


def auditing(channel: grpc.Channel) -> Call:
    return key_holder_service_pb2_grpc.KeyHolderServiceStub(channel).AuditNoise


def model_piece() -> operator_service_pb2.CreateTaskRequest:
    return operator_service_pb2.CreateTaskRequest(model_data=bytes(MEBIBYTE))


def residues(size: int = MEBIBYTE) -> key_holder_service_pb2.ReleaseRequest:
    return key_holder_service_pb2.ReleaseRequest(residues=bytes(size))


def low_bits(size: int = MEBIBYTE) -> key_holder_service_pb2.AuditNoiseRequest:
    return key_holder_service_pb2.AuditNoiseRequest(low_bits=bytes(size))


INTRUDERS: dict[str, tuple[Callable[[Site], Kit], type[SecaggError]]] = {
    "revoked operator": (lambda made: _revoked(made, "admin"), RevokedError),
    "client": (lambda made: kit(made.federation, "alice"), WrongRoleError),
    "client that nobody enrolled": (
        lambda made: forged(made.federation, Role.CLIENT, "mallory"),
        WrongRoleError,
    ),
}


def _revoked(made: Site, name: str) -> Kit:
    old = kit(made.federation, name)
    made.federation.revoke(name)
    return old


@pytest.mark.parametrize("who", INTRUDERS)
def test_whoever_may_not_create_tasks_is_cut_before_the_stream_is_read(
    who: str, made: Site
) -> None:
    make, kind = INTRUDERS[who]
    sent = Endless(model_piece())
    assert type(streamed(made.admin, make(made), creating, sent)) is kind
    assert sent.asked_bytes <= WINDOW
    assert made.left_behind() == {}


@pytest.mark.parametrize("method", [releasing, auditing], ids=["Release", "AuditNoise"])
@pytest.mark.parametrize("name", ["alice", "admin", "key-holder", "replaced server"])
def test_whoever_may_not_ask_the_key_holder_is_cut_before_the_stream_is_read(
    name: str, method: Callable[[grpc.Channel], Call], made: Site
) -> None:
    own = kit(made.federation, "server" if name == "replaced server" else name)
    if name == "replaced server":
        made.federation.rotate_server(revoke_old=True)
    sent = Endless(residues() if method is releasing else low_bits())
    expected = RevokedError if name == "replaced server" else WrongRoleError
    assert type(streamed(made.key_holder, own, method, sent)) is expected
    assert sent.asked_bytes <= WINDOW


@pytest.mark.parametrize("who", ["revoked", "unenrolled"])
def test_a_client_that_may_not_call_has_its_chunk_refused_unread(who: str, made: Site) -> None:
    if who == "revoked":
        own = _revoked(made, "alice")
    else:
        own = forged(made.federation, Role.CLIENT, "mallory")
    with channels.channel(made.server, own) as channel:
        stub = aggregation.AggregationServiceStub(channel)
        kind = RevokedError if who == "revoked" else NotEnrolledError
        before, chunks = 0, 400
        for number in range(-50, chunks):
            if number == 0:  # the buffers of both sides are as large as they get
                before = resident_bytes()
            error = failure(stub.PutChunk, sized_chunk(MAX_MESSAGE_BYTES), metadata=metadata())
            assert type(from_rpc_error(error)) is kind
        # What other tests left running may hold a hundred megabytes more by now.
        assert resident_bytes() - before < chunks * MAX_MESSAGE_BYTES / 4
    assert made.left_behind() == {}


def spec(made_for: str = "task") -> TaskSpec:
    return TaskSpec(made_for, cohort.mixed_plan(), 1, 600_000, 2, 3)


def test_a_model_larger_than_the_tasks_is_cut_at_once(made: Site) -> None:
    first = operator_service_pb2.CreateTaskRequest(spec=spec().to_wire())
    sent = Endless(first, model_piece())
    error = streamed(made.admin, kit(made.federation, "admin"), creating, sent)
    assert type(error) is MalformedError
    assert f"initial model of {spec().model_bytes} bytes; got more" in str(error)
    assert sent.asked_bytes <= spec().model_bytes + WINDOW
    assert made.left_behind() == {}


@pytest.mark.parametrize("repeated", ["spec", "nothing"])
def test_a_task_of_many_specifications_is_cut_at_once(repeated: str, made: Site) -> None:
    first = operator_service_pb2.CreateTaskRequest(spec=spec().to_wire())
    other = first if repeated == "spec" else operator_service_pb2.CreateTaskRequest()
    sent = Endless(first, other)
    error = streamed(made.admin, kit(made.federation, "admin"), creating, sent)
    assert type(error) is MalformedError
    assert made.left_behind() == {}


def opened(made: Site) -> RoundContext:
    """An open round of 70 polynomials: not quite 2 MB."""
    plan = cohort.long_plan()
    asked = made.dialling.open_round(
        plan, task_id="task", round_number=1, attempt=1, model_digest=bytes(32)
    )
    context, _ = made.thread.run(asked)
    return context


def manifest(context: RoundContext, digests: list[bytes]) -> key_holder_service_pb2.ReleaseRequest:
    return key_holder_service_pb2.ReleaseRequest(
        manifest=key_holder_service_pb2.Manifest(
            context=context_id_to_wire(context.id), upload_digests=digests
        )
    )


def test_a_sum_larger_than_the_plans_is_cut_at_once(made: Site) -> None:
    context = opened(made)
    sent = Endless(manifest(context, [bytes(32)]), residues(256 * 1024))
    error = streamed(made.key_holder, kit(made.federation, "server"), releasing, sent)
    assert type(error) is MalformedError
    assert f"expected {context.plan.payload_bytes} bytes in all; got more" in str(error)
    assert sent.asked_bytes <= context.plan.payload_bytes + WINDOW


def test_an_audited_upload_larger_than_the_plans_is_cut_at_once(made: Site) -> None:
    context = opened(made)
    first = key_holder_service_pb2.AuditNoiseRequest(
        upload=key_holder_service_pb2.NamedUpload(
            context=context_id_to_wire(context.id), upload_digest=bytes(32)
        )
    )
    sent = Endless(first, low_bits(256 * 1024))
    error = streamed(made.key_holder, kit(made.federation, "server"), auditing, sent)
    # Four bytes for each coefficient.
    size = context.plan.blocks * RING_DEGREE * 4
    assert type(error) is MalformedError
    assert f"expected {size} bytes in all; got more" in str(error)
    assert sent.asked_bytes <= size + WINDOW


def checking(channel: grpc.Channel) -> Call:
    return key_holder_service_pb2_grpc.KeyHolderServiceStub(channel).CheckSum


def summed_low_bits(size: int) -> key_holder_service_pb2.CheckSumRequest:
    return key_holder_service_pb2.CheckSumRequest(low_bits=bytes(size))


def first_of_check(context: RoundContext) -> key_holder_service_pb2.CheckSumRequest:
    return key_holder_service_pb2.CheckSumRequest(manifest=manifest(context, [bytes(32)]).manifest)


def test_low_bits_of_a_sum_larger_than_the_plans_are_cut_at_once(made: Site) -> None:
    context = opened(made)
    sent = Endless(first_of_check(context), summed_low_bits(256 * 1024))
    error = streamed(made.key_holder, kit(made.federation, "server"), checking, sent)
    size = context.plan.blocks * RING_DEGREE * 4
    assert type(error) is MalformedError
    assert f"expected {size} bytes in all; got more" in str(error)
    assert sent.asked_bytes <= size + WINDOW


def test_low_bits_before_their_manifest_are_cut_at_once(made: Site) -> None:
    sent = Endless(summed_low_bits(MEBIBYTE))
    error = streamed(made.key_holder, kit(made.federation, "server"), checking, sent)
    assert type(error) is MalformedError
    assert sent.asked_bytes <= WINDOW


def test_a_manifest_of_more_uploads_than_the_cohort_is_cut_at_once(made: Site) -> None:
    context = opened(made)
    sent = Endless(manifest(context, [bytes(32)] * 5))
    error = streamed(made.key_holder, kit(made.federation, "server"), releasing, sent)
    assert type(error) is MalformedError
    assert f"at most {context.plan.max_clients} uploads" in str(error)


def test_a_sum_before_its_manifest_is_cut_at_once(made: Site) -> None:
    sent = Endless(residues())
    error = streamed(made.key_holder, kit(made.federation, "server"), releasing, sent)
    assert type(error) is MalformedError
    assert sent.asked_bytes <= WINDOW


def test_a_stream_of_nothing_is_cut_at_once(made: Site) -> None:
    context = opened(made)
    sent = Endless(manifest(context, [bytes(32)]), residues(0), at_most=10**9)
    error = streamed(made.key_holder, kit(made.federation, "server"), releasing, sent)
    assert type(error) is MalformedError
    assert "empty" in str(error)
    # gRPC reads ahead by bytes, and these messages have hardly any.
    assert sent.asked < 1_000_000


def test_a_manifest_without_end_is_cut_by_its_deadline(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEADLINES_S, "Release", 0.2)
    context = opened(made)
    sent = Endless(manifest(context, [bytes(32)]), manifest(context, []), at_most=10**9)
    error = streamed(made.key_holder, kit(made.federation, "server"), releasing, sent)
    assert type(error) is UnavailableError
