"""Fuzz target: what clients and operators send to the server, over a real store and real blobs.

An input is a program: calls in any order, each made from a real upload and then changed. After it,
whatever counts as accepted must be exactly what its receipt signs.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from unittest import mock

import cohort
import numpy as np
from desks import Desk, desk_for
from fuzz_inputs import Choices, Target, refusable
from fuzz_protobuf import mutated
from google.protobuf.message import Message
from sqlalchemy import delete

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    IdentityError,
    MalformedError,
    NotReadyError,
    UploadError,
)
from secagg.parameters import MODULUS, RESIDUE_BYTES, RING_DEGREE, IntegerSegment, NormCheck
from secagg.planner import make_plan
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import operator_service_pb2 as operator_pb
from secagg_server import services
from secagg_server.schema import AuditRow, UploadRow
from secagg_server.services import AggregationService, OperatorService
from secagg_server.verdicts import VerdictDesk

__all__ = ["SERVER", "Loop", "announced", "changed", "committed", "program", "put"]

_MOST_CALLS = 8
_REFUSALS = (UploadError, IdentityError, ClosedError, NotReadyError, ConfigurationError)
_M = TypeVar("_M", bound=Message)


class _Here(ThreadPoolExecutor):
    """Runs work at once, in the thread that asks: one input is one run of one thread."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class Loop:
    """An event loop that outlives single inputs, and has no other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_Here(1))
        atexit.register(self._loop.close)

    def run_once(self, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
        """What a coroutine returns; what it has started goes on with the next one."""
        return self._loop.run_until_complete(work)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
        """What a coroutine returns, once everything that it has started has ended."""
        try:
            return self.run_once(work)
        finally:
            self._loop.run_until_complete(_settled())


async def _settled() -> None:
    """Wait for what is left: generators that nobody read to their end close in tasks."""
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*left, return_exceptions=True)


def changed(choices: Choices, message: _M) -> _M | None:
    """A message as it is, or with fields or bytes changed; None where it is none any more."""
    kind = choices.number(4)
    if kind == 1:
        return mutated(message, Random(choices.number(1 << 16)))
    if kind != 2:
        return message
    data = choices.altered(message.SerializeToString(deterministic=True))
    try:
        return codec.parse(type(message), data)
    except MalformedError:
        return None


@dataclass
class _World:
    """A server with an open round, and uploads for it and for others."""

    desk: Desk
    clients: AggregationService
    operators: OperatorService
    uploads: list[Upload]

    def forget(self) -> None:
        """Back to a round to which nobody has said anything."""
        self.desk.store.database.write(_erase)
        self.desk.blobs.drop_uploads("task")


def _erase(session: Any) -> None:  # noqa: ANN401
    session.execute(delete(UploadRow))
    session.execute(delete(AuditRow))


def _world(plan: Any, folder: Path) -> _World:  # noqa: ANN401
    folder.mkdir()
    desk = desk_for(plan, folder)
    model = desk.store.task("task").task_spec().model_bytes
    desk.blobs.put_model("task", 0, bytes(model))
    verdicts = VerdictDesk(desk.store, desk.roster, desk.secret)
    clients = AggregationService(desk.store, desk.blobs, desk.rounds, desk.intake, verdicts)
    operators = OperatorService(desk.store, desk.blobs, mock.Mock(), desk.roster)
    uploads = [_upload(desk, index) for index in range(5)]
    uploads.append(_upload(desk, 0, nonce=1))  # another one of the same client
    elsewhere = cohort.round_context(plan, task_id="task", round_number=2)
    uploads.append(cohort.noise_upload(elsewhere, 1))
    return _World(desk, clients, operators, uploads)


def _upload(desk: Desk, index: int, nonce: int = 0) -> Upload:
    upload = cohort.noise_upload(desk.context, index, nonce)
    challenger = desk.rounds.require(desk.context.id).challenger
    if challenger is None:
        return upload
    receipt = upload.admission.receipt
    commitment = challenger.commitment(receipt.client_key)
    signed = type(receipt).sign(
        cohort.identity(index),
        desk.context.id,
        receipt.upload_digest,
        upload.admission.sealed_seed,
        commitment,
    )
    return Upload(type(upload.admission)(signed, upload.admission.sealed_seed), upload.payload)


@cache
def _worlds() -> tuple[Loop, tuple[_World, ...]]:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    chunked = make_plan([IntegerSegment("wide", 33 * 4096, 10**9)], max_clients=4)
    checked = cohort.mixed_plan(max_clients=3, norm_check=NormCheck())
    return Loop(), (_world(checked, folder / "checked"), _world(chunked, folder / "chunked"))


def _one(data: bytes) -> None:
    loop, worlds = _worlds()
    choices = Choices(data)
    world = choices.pick(worlds)
    try:
        for _ in range(_MOST_CALLS):
            if not choices.left:
                break
            call = choices.pick(_CALLS)
            with refusable(*_REFUSALS):
                loop.run(call(world, choices))
        _check(world)
    finally:
        world.forget()


def _check(world: _World) -> None:
    """Nothing counts that is not signed, and nothing is kept of what was never announced."""
    desk, context = world.desk, world.desk.context
    accepted = desk.store.accepted(context)
    assert len(accepted) <= context.plan.max_clients
    for admission in accepted:
        admission.verify(context)
        name, whole = admission.receipt.upload_digest, hashlib.sha256()
        for index in range(context.plan.chunks):
            whole.update(desk.blobs.chunk(context.id, name, index))
        assert whole.digest() == name
    for file in desk.files():
        if "uploads" in file.parts:
            _check_chunk(file.read_bytes())
    known = {upload.admission.receipt.upload_digest.hex() for upload in world.uploads}
    kept = {path.parent.name for path in desk.files() if "uploads" in path.parts}
    assert kept <= known, kept


def _check_chunk(data: bytes) -> None:
    """What is kept can be added: whole polynomials of residues below q."""
    octets = np.frombuffer(data, np.uint8).reshape(-1, RING_DEGREE, RESIDUE_BYTES)
    place = np.uint64(1) << np.arange(0, 8 * RESIDUE_BYTES, 8, dtype=np.uint64)
    assert (octets.astype(np.uint64) @ place).max() < MODULUS


async def announced(world: _World, choices: Choices) -> None:
    upload = choices.pick(world.uploads)
    request = pb.OpenUploadRequest(admission=codec.admission_to_wire(upload.admission))
    if found := changed(choices, request):
        await _plain(world.clients.OpenUpload)(world.clients, found, None)


async def put(world: _World, choices: Choices) -> None:
    upload, index = choices.pick(world.uploads), choices.number(3)
    data = cohort.chunk(upload, index)
    if choices.flip():
        data = choices.altered(data)
    request = pb.PutChunkRequest(**_named(upload), chunk_index=index)
    if found := changed(choices, request):
        found.data = found.data or data
        await _plain(world.clients.PutChunk)(world.clients, found, None)


async def committed(world: _World, choices: Choices) -> None:
    request = pb.CommitUploadRequest(**_named(choices.pick(world.uploads)))
    if found := changed(choices, request):
        await _plain(world.clients.CommitUpload)(world.clients, found, None)


async def _send(world: _World, choices: Choices) -> None:
    """A whole upload, as it should be."""
    upload = choices.pick(world.uploads)
    world.desk.send(upload)


async def _withdraw(world: _World, choices: Choices) -> None:
    request = pb.WithdrawUploadRequest(**_named(choices.pick(world.uploads)))
    if found := changed(choices, request):
        await _plain(world.clients.WithdrawUpload)(world.clients, found, None)


async def _ask_round(world: _World, choices: Choices) -> None:
    key = cohort.identity(0).public
    request = pb.GetRoundRequest(task_id="task", client_key=key)
    if found := changed(choices, request):
        answer = await _plain(world.clients.GetRound)(world.clients, found, None)
        assert codec.plan_from_wire(answer.plan) == world.desk.context.plan


async def _ask_model(world: _World, choices: Choices) -> None:
    if found := changed(choices, pb.GetModelRequest(task_id="task")):
        answer = await _plain(world.clients.GetModel)(world.clients, found, None)
        assert len(answer.data) == answer.total_bytes


async def _ask_verdict(world: _World, choices: Choices) -> None:
    named = _named(choices.pick(world.uploads))
    request = pb.GetVerdictRequest(context=named["context"], client_key=named["client_key"])
    if found := changed(choices, request):
        await _plain(world.clients.GetVerdict)(world.clients, found, None)


async def _operate(world: _World, choices: Choices) -> None:
    service = world.operators
    method, request = choices.pick(
        (
            (service.ListTasks, operator_pb.ListTasksRequest(page_size=1)),
            (service.GetTask, operator_pb.GetTaskRequest(task_id="task", page_size=1)),
        )
    )
    if found := changed(choices, request):
        await _plain(method)(service, found, None)


async def _export(world: _World, choices: Choices) -> None:
    service = world.operators
    method, request = choices.pick(
        (
            (service.GetSums, operator_pb.GetSumsRequest(task_id="task", round_number=1)),
            (service.ExportAudit, operator_pb.ExportAuditRequest()),
        )
    )
    if found := changed(choices, request):
        async for _ in _plain(method)(service, found, None):
            pass


async def _new_task(world: _World, choices: Choices) -> None:
    """A task's stream: its specification, then its first model in pieces."""
    spec = world.desk.store.task("task").task_spec()
    requests = [operator_pb.CreateTaskRequest(spec=spec.to_wire())]
    model = np.zeros(spec.model_bytes // 4, np.float32).tobytes()
    for start in range(0, len(model), 32):
        requests.append(operator_pb.CreateTaskRequest(model_data=model[start : start + 32]))
    sent = [found for request in requests if (found := changed(choices, request))]
    stream = _stream(sent)
    wanted = await services._first_spec(stream)
    received = await services._model_bytes(stream, wanted)
    assert len(received) == wanted.model_bytes


async def _stream(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


def _plain(method: Any) -> Any:  # noqa: ANN401
    """A service's method without the translation of its errors."""
    return method.__func__.__wrapped__


def _named(upload: Upload) -> dict[str, Any]:
    receipt = upload.admission.receipt
    return {
        "context": codec.context_id_to_wire(receipt.context),
        "client_key": receipt.client_key,
        "upload_digest": receipt.upload_digest,
    }


# Inputs that are kept count on these places: new ones go to the end.
_CALLS: tuple[Callable[[_World, Choices], Coroutine[Any, Any, None]], ...] = (
    *(announced, put, committed, _send, _withdraw, _ask_round, _ask_model, _ask_verdict),
    *(_operate, _export, _new_task),
)
_PLACE = {call: index for index, call in enumerate(_CALLS)}


def program(world: int, *calls: tuple[Callable[..., object], bytes]) -> bytes:
    return bytes([world]) + b"".join(bytes([_PLACE[call]]) + rest for call, rest in calls)


def _seeds() -> dict[str, bytes]:
    as_it_is = b"\0\0"  # which upload; nothing changed
    whole = [(announced, as_it_is), (put, b"\0\0\0\0"), (committed, as_it_is)]
    in_two = [
        *((announced, as_it_is), (put, b"\0\1\0\0"), (put, b"\0\0\0\0"), (committed, as_it_is)),
    ]
    three = [(_send, bytes([client])) for client in range(4)]
    return {
        "an upload": program(0, *whole),
        "an upload in two chunks": program(1, *in_two),
        "a full cohort": program(0, *three),
        "announced before the cohort was full": program(
            0, (announced, b"\3\0"), *three[:3], (put, b"\3\0\0\0"), (committed, b"\3\0")
        ),
        "another one of a client": program(0, (_send, b"\0"), (announced, b"\5\0")),
        "of another round": program(0, (announced, b"\6\0")),
        "sent twice": program(0, *whole, *whole),
        "a residue too large": program(0, whole[0], (put, b"\0\0\1\1\0\0\4\7\0\0")),
        "no chunks": program(1, (announced, as_it_is), (committed, as_it_is)),
        "withdrawn": program(0, *whole, (_withdraw, as_it_is), (announced, as_it_is)),
        "asked for": program(0, (_ask_round, b"\0"), (_ask_model, b"\0"), (_ask_verdict, as_it_is)),
        "operated": program(
            0, (_operate, as_it_is), (_operate, b"\1\0"), (_export, as_it_is), (_export, b"\1\0")
        ),
        "a task": program(0, (_new_task, bytes(8))),
    }


SERVER = Target(
    "server",
    "calls of clients and operators in any order: announced, sent, committed, withdrawn, asked",
    ("AggregationService", "Intake", "OperatorService", "residues.widen"),
    _one,
    _seeds,
    prepare=_worlds,
)
