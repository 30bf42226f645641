"""Challenges and verdicts over the wire: what clients are given, when, and who gets it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import pytest
from desks import Desk, desk_for
from federations import CLIENTS, client_kit, key_holder_identity, shared, site
from key_holders import durable_rounds
from serving import LoopThread, loop_thread, serving

from secagg.challenges import commitment
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    MalformedError,
    MismatchError,
    NotReadyError,
    ReceiptError,
    SecaggError,
)
from secagg.parameters import IntegerSegment, NormCheck
from secagg.planner import make_plan
from secagg.receipts import SigningKey
from secagg.recheck import require_asked
from secagg.rpc import channels
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.status import from_rpc_error, retry_delay_s
from secagg.upload import Upload
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, key_holder_service_pb2_grpc, round_pb2
from secagg.wire.v1 import key_holder_service_pb2 as holding_pb
from secagg_keyholder.service import KeyHolderService
from secagg_server.key_holder import KeyHolderClient
from secagg_server.services import AggregationService
from secagg_server.states import RoundState
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

PLAN = make_plan(
    [IntegerSegment("counts", cohort.COUNTS, 1 << 20, cohort.COUNTS_NORM)],
    max_clients=4,
    norm_check=NormCheck(sketches=8),
)
SECRET = b"what all challenges follow from."
KEY_HOLDER = SigningKey.from_bytes(bytes(32))
ATTEMPT = ("task", 1, 1)
Stub = aggregation_service_pb2_grpc.AggregationServiceStub


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A round with a norm check."""
    made = desk_for(PLAN, tmp_path, SECRET)
    yield made
    made.store.close()


@pytest.fixture
def stub(desk: Desk) -> Iterator[Stub]:
    with served(desk) as made:
        yield made


@contextlib.contextmanager
def served(desk: Desk) -> Iterator[Stub]:
    def add(server: grpc.aio.Server) -> None:
        verdicts = VerdictDesk(desk.store, desk.roster, SECRET)
        service = AggregationService(desk.store, desk.blobs, desk.rounds, desk.intake, verdicts)
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(service, server)

    with (
        loop_thread() as thread,
        serving(thread, add) as address,
        channels.channel(address, None) as channel,
    ):
        yield Stub(channel)


def failure(call: Any, request: object) -> grpc.RpcError:  # noqa: ANN401 - a method of a stub
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return caught.value


def error_of(call: Any, request: object) -> SecaggError:  # noqa: ANN401 - a method of a stub
    return from_rpc_error(failure(call, request))


def of(context: RoundContext, index: int) -> pb.GetVerdictRequest:
    """Client i asks for its verdict."""
    return pb.GetVerdictRequest(
        context=codec.context_id_to_wire(context.id), client_key=cohort.identity(index).public
    )


def answered(stub: Stub, index: int) -> pb.GetRoundResponse:
    """The round, as client i is given it."""
    request = pb.GetRoundRequest(task_id="task", client_key=cohort.identity(index).public)
    return stub.GetRound(request, timeout=20)


def sent(desk: Desk, stub: Stub, index: int) -> Upload:
    """Client i's upload, accepted."""
    upload = cohort.encrypted(desk.context, index, answered(stub, index).challenge_commitment)
    desk.send(upload)
    return upload


def verdict_on(upload: Upload, *, accepted: bool = True) -> Verdict:
    return Verdict.sign(KEY_HOLDER, upload.admission.receipt, bytes(32), accepted=accepted)


# --- the commitment -------------------------------------------------------------------------------


def test_a_round_comes_with_a_commitment_for_the_callers_own_key(stub: Stub) -> None:
    first, again, other = (answered(stub, index).challenge_commitment for index in (0, 0, 1))
    assert len(first) == 32
    assert first == again != other


@pytest.mark.parametrize("size", [0, 31, 33])
def test_without_a_key_of_the_right_size_there_is_no_commitment(stub: Stub, size: int) -> None:
    request = pb.GetRoundRequest(task_id="task", client_key=bytes(size))
    error = error_of(stub.GetRound, request)
    assert type(error) is MalformedError
    assert "client_key of 32 bytes that the receipt will be signed with" in str(error)
    assert f"bytes={size}" in str(error)


@pytest.mark.parametrize("size", [0, 31, 32])
def test_without_a_check_no_key_is_needed_and_none_committed_to(tmp_path: Path, size: int) -> None:
    desk = desk_for(cohort.counts_plan(), tmp_path)
    with contextlib.closing(desk.store), served(desk) as stub:
        request = pb.GetRoundRequest(task_id="task", client_key=bytes(size))
        assert stub.GetRound(request, timeout=20).challenge_commitment == b""


def test_a_receipt_that_commits_to_anothers_challenge_leaves_nothing(
    desk: Desk, stub: Stub
) -> None:
    before = desk.files()
    foreign = cohort.encrypted(desk.context, 0, answered(stub, 1).challenge_commitment)
    opening = pb.OpenUploadRequest(admission=codec.admission_to_wire(foreign.admission))
    assert type(error_of(stub.OpenUpload, opening)) is ReceiptError
    assert desk.store.upload(desk.context.id, cohort.identity(0).public.hex()) is None
    assert desk.files() == before
    sent(desk, stub, 0)


# --- the verdict ----------------------------------------------------------------------------------


def test_a_verdict_is_not_ready_before_it_is_recorded(desk: Desk, stub: Stub) -> None:
    upload = sent(desk, stub, 0)
    for step in (lambda: None, desk.close_round):
        step()
        raised = failure(stub.GetVerdict, of(desk.context, 0))
        assert type(from_rpc_error(raised)) is NotReadyError
        assert retry_delay_s(raised) == pytest.approx(0.2)
    desk.store.record_verdicts(ATTEMPT, [verdict_on(upload)], "WHY")
    stub.GetVerdict(of(desk.context, 0), timeout=20)


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("state", ["CHECKING", "SUMMING", "DONE", "ABORTED"])
def test_a_verdict_comes_with_the_key_that_was_committed_to_and_what_the_round_started_from(
    desk: Desk, stub: Stub, state: str, accepted: bool
) -> None:
    upload = sent(desk, stub, 0)
    desk.close_round()
    given = verdict_on(upload, accepted=accepted)
    desk.store.record_verdicts(ATTEMPT, [given], "NORM_REFUSED: too much")
    to_state(desk, state)
    answer = stub.GetVerdict(of(desk.context, 0), timeout=20)
    verdict = codec.verdict_from_wire(answer.verdict)
    assert verdict == given
    verdict.verify(desk.context.id, [KEY_HOLDER.public])
    assert commitment(answer.challenge_key) == upload.admission.receipt.challenge_commitment
    assert (answer.direction, answer.model_version) == (False, 0)


def to_state(desk: Desk, state: str) -> None:
    if state == "ABORTED":
        desk.store.abort_round(ATTEMPT, "WHY")
    elif state != "CHECKING":
        desk.store.advance(ATTEMPT, RoundState.SUMMING)
    if state == "DONE":
        desk.store.advance(ATTEMPT, RoundState.RELEASING)
        times = {"aggregate_ms": 0.0, "release_ms": 0.0}
        desk.store.finish_round(ATTEMPT, bytes(32), 3, has_model=True, **times)


@pytest.mark.parametrize("state", ["SUMMING", "DONE", "ABORTED"])
def test_a_round_that_went_on_or_ended_without_a_verdict_has_none(
    desk: Desk, stub: Stub, state: str
) -> None:
    """Such as on an upload whose seal was refused, or one that was never complete."""
    sent(desk, stub, 0)
    desk.close_round()
    to_state(desk, state)
    error = error_of(stub.GetVerdict, of(desk.context, 0))
    assert (type(error), "without one" in str(error)) == (ClosedError, True)


def test_a_client_without_an_upload_has_no_verdict(desk: Desk, stub: Stub) -> None:
    sent(desk, stub, 0)
    assert type(error_of(stub.GetVerdict, of(desk.context, 1))) is ClosedError


def test_a_round_that_never_was_has_no_verdict(desk: Desk, stub: Stub) -> None:
    request = of(desk.context, 0)
    request.context.round_number = 7
    assert type(error_of(stub.GetVerdict, request)) is ClosedError


def test_a_verdict_that_was_forgotten_is_closed(desk: Desk, stub: Stub) -> None:
    upload = sent(desk, stub, 0)
    desk.close_round()
    desk.store.record_verdicts(ATTEMPT, [verdict_on(upload)], "WHY")
    desk.store.abort_round(ATTEMPT, "WHY")
    ended = desk.store.round(ATTEMPT).ended_at
    assert ended is not None
    stub.GetVerdict(of(desk.context, 0), timeout=20)
    desk.store.drop_admissions(ended.replace(year=ended.year + 1))
    assert type(error_of(stub.GetVerdict, of(desk.context, 0))) is ClosedError


def test_where_the_plan_has_no_check_there_are_no_verdicts(tmp_path: Path) -> None:
    desk = desk_for(cohort.counts_plan(), tmp_path)
    with contextlib.closing(desk.store), served(desk) as stub:
        desk.send(cohort.encrypted(desk.context, 0))
        assert type(error_of(stub.GetVerdict, of(desk.context, 0))) is ConfigurationError


def test_an_unknown_task_has_no_verdicts(desk: Desk, stub: Stub) -> None:
    request = of(desk.context, 0)
    request.context.task_id = "other"
    assert type(error_of(stub.GetVerdict, request)) is ConfigurationError


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_of_the_wrong_size_is_refused(desk: Desk, stub: Stub, size: int) -> None:
    request = of(desk.context, 0)
    request.client_key = bytes(size)
    assert type(error_of(stub.GetVerdict, request)) is MalformedError


def test_a_verdict_is_for_the_context_it_was_made_in(desk: Desk, stub: Stub) -> None:
    upload = sent(desk, stub, 0)
    desk.close_round()
    desk.store.record_verdicts(ATTEMPT, [verdict_on(upload)], "WHY")
    request = of(desk.context, 0)
    request.context.model_digest = b"m" * 32
    assert type(error_of(stub.GetVerdict, request)) is ContextError


# --- between server and key holder ----------------------------------------------------------------


class Chatty(KeyHolderService):
    """A key holder that answers GetVerdicts with what it is told to."""

    answers: list[holding_pb.GetVerdictsResponse]

    async def GetVerdicts(self, request: Any, context: Any) -> Any:  # noqa: ANN401
        for answer in self.answers:
            yield answer


def given(count: int) -> holding_pb.GetVerdictsResponse:
    context = cohort.round_context(PLAN, task_id="task")
    receipt = encrypt_quantized(
        context, cohort.quantized(context, 0), cohort.identity(0), bytes(31) + b"c"
    ).admission.receipt
    verdict = codec.verdict_to_wire(Verdict.sign(KEY_HOLDER, receipt, bytes(32), accepted=True))
    return holding_pb.GetVerdictsResponse(verdicts=[verdict] * count)


def stateless() -> holding_pb.GetVerdictsResponse:
    answer = given(1)
    answer.verdicts[0].state = round_pb2.VERDICT_STATE_UNSPECIFIED
    return answer


def cut_short() -> holding_pb.GetVerdictsResponse:
    answer = given(1)
    answer.verdicts[0].signature = bytes(63)
    return answer


UNPLANNED: dict[str, Callable[[], list[holding_pb.GetVerdictsResponse]]] = {
    "too many": lambda: [given(PLAN.max_clients + 1)],
    "too many in all": lambda: [given(1)] * (PLAN.max_clients + 1),
    "an empty message": lambda: [given(1), given(0)],
    "no verdict": lambda: [stateless()],
    "cut short": lambda: [cut_short()],
}


@pytest.mark.parametrize("answers", UNPLANNED)
def test_verdicts_that_no_plan_allows_are_refused(answers: str, tmp_path: Path) -> None:
    context = cohort.round_context(PLAN, task_id="task")
    with asked(tmp_path, UNPLANNED[answers]()) as (thread, client), pytest.raises(MalformedError):
        thread.run(client.verdicts(context))


def test_verdicts_in_several_messages_come_back_whole(tmp_path: Path) -> None:
    context = cohort.round_context(PLAN, task_id="task")
    with asked(tmp_path, [given(1), given(PLAN.max_clients - 1)]) as (thread, client):
        assert len(thread.run(client.verdicts(context))) == PLAN.max_clients


@contextlib.contextmanager
def asked(
    folder: Path, answers: list[holding_pb.GetVerdictsResponse]
) -> Iterator[tuple[LoopThread, KeyHolderClient]]:
    service = Chatty(durable_rounds(folder))
    service.answers = answers

    def add(server: grpc.aio.Server) -> None:
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(service, server)

    async def dial(address: str) -> KeyHolderClient:
        return KeyHolderClient(address, None)

    with loop_thread() as thread, serving(thread, add) as address:
        client = thread.run(dial(address))
        yield thread, client
        thread.run(client.close())


# --- everybody at once ----------------------------------------------------------------------------


def test_a_round_over_grpc_and_nobody_gets_anothers_verdict(tmp_path: Path) -> None:
    """The real services of a federation: uploads in, sketches over, verdicts out."""
    federation = shared()
    spec = TaskSpec("task", PLAN, 1, 60_000, 1, 3)
    with loop_thread() as thread, site(thread, tmp_path, federation) as made:
        made.create(spec)
        kits = [client_kit(federation, name) for name in CLIENTS[:3]]
        uploads = []
        for index, kit in enumerate(kits):
            with calling(made.server, kit) as stub:
                key = kit.identity.public
                answer = eventually(
                    stub.GetRound, pb.GetRoundRequest(task_id="task", client_key=key)
                )
                context = codec.round_context_from_wire(
                    answer.context, answer.plan, answer.round_key
                )
                values = cohort.quantized(context, index)
                upload = encrypt_quantized(
                    context, values, kit.identity, answer.challenge_commitment
                )
                uploads.append(upload)
                send(stub, upload)
        request = pb.GetVerdictRequest(
            context=codec.context_id_to_wire(context.id), client_key=kits[0].identity.public
        )
        with calling(made.server, kits[1]) as stub:
            with pytest.raises(grpc.RpcError) as caught:
                eventually(stub.GetVerdict, request)
            assert type(from_rpc_error(caught.value)) is MismatchError
        pins = [key_holder_identity(federation).public]
        for upload, kit in zip(uploads, kits, strict=True):
            with calling(made.server, kit) as stub:
                request.client_key = kit.identity.public
                answer = eventually(stub.GetVerdict, request)
            verdict = codec.verdict_from_wire(answer.verdict)
            verdict.verify(context.id, pins)
            assert verdict.accepted
            require_asked(verdict, context, upload, answer.challenge_key)


@contextlib.contextmanager
def calling(address: str, kit: Any) -> Iterator[Stub]:  # noqa: ANN401 - a client's kit
    with channels.channel(address, kit.tls) as channel:
        yield Stub(channel)


def eventually(call: Any, request: object) -> Any:  # noqa: ANN401 - a method of a stub
    """The answer, once it is ready."""
    while True:
        try:
            return call(request, timeout=20, metadata=metadata())
        except grpc.RpcError as error:
            if not isinstance(from_rpc_error(error), NotReadyError):
                raise


def send(stub: Stub, upload: Upload) -> None:
    receipt = upload.admission.receipt
    named = {
        "context": codec.context_id_to_wire(receipt.context),
        "client_key": receipt.client_key,
        "upload_digest": receipt.upload_digest,
    }
    opening = pb.OpenUploadRequest(admission=codec.admission_to_wire(upload.admission))
    options = {"timeout": 20, "metadata": metadata()}
    stub.OpenUpload(opening, **options)
    stub.PutChunk(pb.PutChunkRequest(**named, data=upload.payload), **options)
    stub.CommitUpload(pb.CommitUploadRequest(**named), **options)
