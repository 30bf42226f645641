"""Uploads over the wire, and what clients are told of rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import grpc.aio
import pytest
from desks import Desk, desk_for
from serving import loop_thread, serving

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    MalformedError,
    NotReadyError,
    RoundError,
    SecaggError,
)
from secagg.rpc import channels
from secagg.rpc.status import from_rpc_error
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc, round_pb2
from secagg_server.services import AggregationService
from secagg_server.states import TaskState
from secagg_server.verdicts import VerdictDesk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A round whose uploads have one chunk."""
    made = desk_for(cohort.mixed_plan(max_clients=3), tmp_path)
    yield made
    made.store.close()


# --- over the wire ------------------------------------------------------------------------------


@pytest.fixture
def stub(desk: Desk) -> Iterator[aggregation_service_pb2_grpc.AggregationServiceStub]:
    def add(server: grpc.aio.Server) -> None:
        verdicts = VerdictDesk(desk.store, desk.roster, bytes(32))
        service = AggregationService(desk.store, desk.blobs, desk.rounds, desk.intake, verdicts)
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(service, server)

    with (
        loop_thread() as thread,
        serving(thread, add) as address,
        channels.channel(address, None) as channel,
    ):
        yield aggregation_service_pb2_grpc.AggregationServiceStub(channel)


def error_of(call: Any, request: object) -> SecaggError:  # noqa: ANN401 - a method of a stub
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return from_rpc_error(caught.value)


def chunk_request(desk: Desk, upload: Upload) -> pb.PutChunkRequest:
    return pb.PutChunkRequest(
        context=codec.context_id_to_wire(desk.context.id),
        client_key=upload.admission.receipt.client_key,
        upload_digest=upload.admission.receipt.upload_digest,
        data=upload.payload,
    )


HOSTILE_IDS = ["../../../escaped", "/tmp/escaped", "..", ".", "a/../../escaped", "task\0", ""]  # noqa: S108


@pytest.mark.parametrize("task_id", HOSTILE_IDS)
def test_a_hostile_task_id_never_reaches_the_disk(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    task_id: str,
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    upload = cohort.noise_upload(desk.context, 0)
    admission = codec.admission_to_wire(upload.admission)
    admission.receipt.context.task_id = task_id
    chunk = chunk_request(desk, upload)
    chunk.context.task_id = task_id
    commit = pb.CommitUploadRequest(
        context=chunk.context, client_key=chunk.client_key, upload_digest=chunk.upload_digest
    )
    for call, request in [
        (stub.OpenUpload, pb.OpenUploadRequest(admission=admission)),
        (stub.PutChunk, chunk),
        (stub.CommitUpload, commit),
        (stub.GetModel, pb.GetModelRequest(task_id=task_id)),
        (stub.GetRound, pb.GetRoundRequest(task_id=task_id)),
    ]:
        kinds = (MalformedError, ClosedError, ConfigurationError)
        assert isinstance(error_of(call, request), kinds)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()  # noqa: S108


@pytest.mark.parametrize("size", [0, 31, 33, 64])
@pytest.mark.parametrize("field", ["client_key", "upload_digest"])
def test_names_of_the_wrong_size_are_refused(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    field: str,
    size: int,
) -> None:
    request = chunk_request(desk, cohort.noise_upload(desk.context, 0))
    setattr(request, field, bytes(size))
    error = error_of(stub.PutChunk, request)
    assert (type(error), field in str(error)) == (MalformedError, True)


def test_an_upload_goes_over_the_wire_and_the_answers_say_where_it_stands(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    upload = cohort.noise_upload(desk.context, 0)
    opening = pb.OpenUploadRequest(admission=codec.admission_to_wire(upload.admission))
    answer = stub.OpenUpload(opening, timeout=20)
    assert answer == pb.OpenUploadResponse(
        state=round_pb2.UPLOAD_STATE_RECEIVING, missing_chunks=[0]
    )
    chunk = chunk_request(desk, upload)
    stub.PutChunk(chunk, timeout=20)
    commit = pb.CommitUploadRequest(
        context=chunk.context, client_key=chunk.client_key, upload_digest=chunk.upload_digest
    )
    assert stub.CommitUpload(commit, timeout=20).state == round_pb2.UPLOAD_STATE_ACCEPTED
    again = stub.OpenUpload(opening, timeout=20)
    assert again == pb.OpenUploadResponse(state=round_pb2.UPLOAD_STATE_ACCEPTED)


def test_the_round_is_handed_out_with_all_that_a_client_needs(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    answer = stub.GetRound(pb.GetRoundRequest(task_id="task"), timeout=20)
    found = codec.round_context_from_wire(answer.context, answer.plan, answer.round_key)
    assert found == desk.context
    assert (answer.remaining_ms, answer.rounds_total, answer.model_version) == (60_000, 3, 0)


@pytest.mark.parametrize("done", [(1, 1), (1, 2), (2, 0)])
def test_a_client_that_is_done_with_the_round_is_asked_to_wait(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub, done: tuple[int, int]
) -> None:
    request = pb.GetRoundRequest(task_id="task", after_round=done[0], after_attempt=done[1])
    assert type(error_of(stub.GetRound, request)) is NotReadyError


def test_between_rounds_clients_are_asked_to_wait(
    desk: Desk, stub: aggregation_service_pb2_grpc.AggregationServiceStub
) -> None:
    desk.close_round()
    assert type(error_of(stub.GetRound, pb.GetRoundRequest(task_id="task"))) is NotReadyError


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        (TaskState.FINISHED, ClosedError, "finished"),
        (TaskState.FAILED, RoundError, "QUORUM: too few"),
    ],
)
def test_a_task_that_has_ended_says_never_again_and_why(
    desk: Desk,
    stub: aggregation_service_pb2_grpc.AggregationServiceStub,
    state: TaskState,
    kind: type[SecaggError],
    text: str,
) -> None:
    desk.store.end_task("task", state, "QUORUM: too few")
    error = error_of(stub.GetRound, pb.GetRoundRequest(task_id="task"))
    assert type(error) is kind
    assert text in str(error)


def test_the_commit_that_fills_the_target_wakes_the_coordinator(desk: Desk) -> None:
    current = replace(desk.rounds.require(desk.context.id), filled=asyncio.Event())
    desk.rounds.open(current)
    desk.rounds.note_upload(desk.context.id, 2)
    assert not current.filled.is_set()
    desk.rounds.note_upload(replace(desk.context.id, attempt=9), 3)
    assert not current.filled.is_set()
    desk.rounds.note_upload(desk.context.id, 3)
    assert current.filled.is_set()
