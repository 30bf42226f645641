"""Whoever asks for too much at once: what a call, a client, a connection may take, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import resource
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohort
import grpc
import grpc.aio
import pytest
from clocks import ManualClock
from federations import AGGREGATION, gatekeeper, kit, shared
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from servers import DEADLINE_S, Server, breathe, running, scenario, task
from serving import LoopThread, loop_thread, serving, soon

from secagg.certificates import Kit
from secagg.enrolment import EnrolmentFile, OpenEnrolment
from secagg.errors import (
    RETRY_S,
    ClosedError,
    DuplicateError,
    MalformedError,
    NotReadyError,
    OverloadedError,
    SecaggError,
)
from secagg.rpc import channels, footprint
from secagg.rpc import turns as rpc_turns
from secagg.rpc.deadlines import DEADLINES_S
from secagg.rpc.gatekeeper import CLIENT_IN_FLIGHT, Gatekeeper, metadata
from secagg.rpc.lifecycle import add_health
from secagg.rpc.status import from_rpc_error, retry_delay_s, to_status, translated
from secagg.rpc.turns import Turns as CallTurns
from secagg.upload import Upload
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc as aggregation
from secagg_server.rounds import LONGEST_TURN_S, TURNS_PER_S, OpenRounds, Turns
from secagg_server.services import AggregationService

TIMEOUT_S = 20.0
CHUNK = f"/{AGGREGATION}/PutChunk"


class Faces(aggregation.AggregationServiceServicer):
    """Takes chunks; a caller that asks for a round waits until the test lets it go."""

    def __init__(self) -> None:
        self.inside = 0
        self.go = threading.Event()

    @translated
    async def GetRound(self, request: pb.GetRoundRequest, context: object) -> pb.GetRoundResponse:
        self.inside += 1
        try:
            await soon(self.go.is_set)
        finally:
            self.inside -= 1
        return pb.GetRoundResponse(model_version=7)

    @translated
    async def PutChunk(self, request: pb.PutChunkRequest, context: object) -> pb.PutChunkResponse:
        return pb.PutChunkResponse()


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def faces() -> Iterator[Faces]:
    made = Faces()
    yield made
    made.go.set()


@contextlib.contextmanager
def opened(
    thread: LoopThread, faces: Faces, keeper: Gatekeeper | None = None, own: Kit | None = None
) -> Iterator[str]:
    """A listener with these faces, in plaintext for everybody by default."""
    keeper = keeper or gatekeeper(OpenEnrolment(), encrypted=False)

    def add(server: grpc.aio.Server) -> None:
        aggregation.add_AggregationServiceServicer_to_server(faces, server)
        add_health(server)

    with serving(thread, add, own, [keeper]) as address:
        yield address


class Trickle:
    """Messages that do not come for as long as the test holds them back."""

    def __init__(self, *first: bytes) -> None:
        self._first = list(first)
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        yield from self._first
        self._ended.wait(TIMEOUT_S)

    def end(self) -> None:
        self._ended.set()


def left_lying(channel: grpc.Channel, method: str, **how: Any) -> grpc.RpcError:  # noqa: ANN401
    """How a call ends whose message never comes."""
    messages = Trickle()
    call = channel.stream_unary(method)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(messages), **{"timeout": TIMEOUT_S, "metadata": metadata()} | how)
        return caught.value
    finally:
        messages.end()


# --- calls ---------------------------------------------------------------------------------------


def test_a_call_that_finds_no_room_is_told_so_before_it_has_sent_anything(
    thread: LoopThread, faces: Faces
) -> None:
    keeper = gatekeeper(OpenEnrolment(), encrypted=False, in_flight=0)
    with opened(thread, faces, keeper) as address, channels.channel(address, None) as channel:
        error = left_lying(channel, CHUNK)
    assert type(from_rpc_error(error)) is OverloadedError
    assert (retry_delay_s(error) or 0) > 0


@pytest.mark.parametrize(("name", "sent"), [("admin", metadata()), ("alice", ())])
def test_who_may_not_call_is_told_so_before_it_has_sent_anything(
    name: str, sent: tuple[tuple[str, str], ...], thread: LoopThread, faces: Faces
) -> None:
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    with (
        opened(thread, faces, gatekeeper(roster), own) as address,
        channels.channel(address, kit(shared(), name)) as channel,
    ):
        error = left_lying(channel, CHUNK, metadata=sent)
    assert error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION)


@pytest.mark.parametrize(
    ("method", "sent"), [(CHUNK, metadata()), ("/grpc.health.v1.Health/Check", ())]
)
def test_a_message_that_does_not_come_ends_with_the_calls_own_deadline(
    method: str,
    sent: tuple[tuple[str, str], ...],
    thread: LoopThread,
    faces: Faces,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PutChunk", "Check"):
        monkeypatch.setitem(DEADLINES_S, name, 0.05)
    keeper = gatekeeper(OpenEnrolment(), encrypted=False, in_flight=1)
    with opened(thread, faces, keeper) as address, channels.channel(address, None) as channel:
        # The caller sets no deadline of its own.
        error = left_lying(channel, method, timeout=None, metadata=sent)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        monkeypatch.undo()
        stub = aggregation.AggregationServiceStub(channel)
        stub.PutChunk(pb.PutChunkRequest(), timeout=TIMEOUT_S, metadata=metadata())


@pytest.mark.parametrize("messages", [0, 2, 50])
def test_a_call_of_one_message_comes_with_one(
    messages: int, thread: LoopThread, faces: Faces
) -> None:
    sent = iter([b""] * messages)
    with (
        opened(thread, faces) as address,
        channels.channel(address, None) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.stream_unary(CHUNK)(sent, timeout=TIMEOUT_S, metadata=metadata())
    assert type(from_rpc_error(caught.value)) is MalformedError


def test_a_client_has_room_for_a_few_calls_and_takes_none_from_others(
    thread: LoopThread, faces: Faces
) -> None:
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    request = pb.GetRoundRequest()
    with (
        opened(thread, faces, gatekeeper(roster), own) as address,
        channels.channel(address, kit(shared(), "alice")) as hers,
        channels.channel(address, kit(shared(), "bob")) as his,
    ):
        alice, bob = (aggregation.AggregationServiceStub(each) for each in (hers, his))
        how: dict[str, Any] = {"timeout": TIMEOUT_S, "metadata": metadata()}
        calls = [alice.GetRound.future(request, **how) for _ in range(CLIENT_IN_FLIGHT)]
        thread.run(soon(lambda: faces.inside == CLIENT_IN_FLIGHT))
        with pytest.raises(grpc.RpcError) as caught:
            alice.GetRound(request, **how)
        assert type(from_rpc_error(caught.value)) is OverloadedError
        assert (retry_delay_s(caught.value) or 0) > 0
        calls.append(bob.GetRound.future(request, **how))
        thread.run(soon(lambda: faces.inside == CLIENT_IN_FLIGHT + 1))
        faces.go.set()
        assert [call.result().model_version for call in calls] == [7] * len(calls)
        assert alice.GetRound(request, **how).model_version == 7


def test_a_client_that_leaves_amid_its_calls_has_its_room_back(
    thread: LoopThread, faces: Faces
) -> None:
    own = kit(shared(), "server")
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    with opened(thread, faces, gatekeeper(roster), own) as address:
        for _ in range(3):
            with channels.channel(address, kit(shared(), "alice")) as channel:
                stub = aggregation.AggregationServiceStub(channel)
                how: dict[str, Any] = {"timeout": TIMEOUT_S, "metadata": metadata()}
                request = pb.GetRoundRequest()
                calls = [stub.GetRound.future(request, **how) for _ in range(CLIENT_IN_FLIGHT)]
                thread.run(soon(lambda: faces.inside == CLIENT_IN_FLIGHT))
            assert len(calls) == CLIENT_IN_FLIGHT  # gRPC cancels what nobody holds
            thread.run(soon(lambda: faces.inside == 0))


def test_messages_are_read_and_worked_on_a_few_at_a_time() -> None:
    async def run() -> None:
        turns, go = CallTurns(2), asyncio.Event()
        read: list[int] = []

        async def call(number: int) -> int:
            async def message() -> int:
                read.append(number)
                return number

            async def work(found: int) -> int:
                await go.wait()
                return found

            return await turns.take(message, work)

        calls = [asyncio.create_task(call(number)) for number in range(5)]
        await breathe()
        assert read == [0, 1]
        go.set()
        assert await asyncio.gather(*calls) == list(range(5))
        assert read == list(range(5))

    asyncio.run(run())


def test_who_is_slow_to_send_lets_the_next_go_first_and_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc_turns, "PATIENCE_S", 0.0)

    async def run() -> None:
        turns, sent = CallTurns(1), asyncio.Event()
        inside, most = 0, 0

        async def work(found: str) -> str:
            nonlocal inside, most
            inside, most = inside + 1, max(most, inside + 1)
            await breathe()
            inside -= 1
            return found

        async def late() -> str:
            await sent.wait()
            return "late"

        async def prompt() -> str:
            return "prompt"

        slow = asyncio.create_task(turns.take(late, work))
        assert await turns.take(prompt, work) == "prompt"
        sent.set()
        assert await slow == "late"
        # Its turn was given back once: there is still but one.
        monkeypatch.setattr(rpc_turns, "PATIENCE_S", 60.0)
        most = 0
        await asyncio.gather(*(turns.take(prompt, work) for _ in range(4)))
        assert most == 1

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_turn_ends_with_its_call_however_that_ends(cancelled: bool) -> None:
    async def run() -> None:
        turns = CallTurns(1)

        async def broken() -> str:
            if cancelled:
                await asyncio.Event().wait()
            raise ConnectionResetError

        async def work(found: str) -> str:
            return found

        async def prompt() -> str:
            return "prompt"

        call = asyncio.create_task(turns.take(broken, work))
        await breathe()
        call.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else ConnectionResetError):
            await call
        assert await turns.take(prompt, work) == "prompt"

    asyncio.run(run())


# --- connections ---------------------------------------------------------------------------------


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), TIMEOUT_S)


def ends(connection: socket.socket) -> bool:
    """Whether the other side cuts the connection."""
    connection.settimeout(TIMEOUT_S)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def healthy(address: str) -> bool:
    with channels.channel(address, None) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_listener_has_room_for_so_many_connections_and_for_others_after_them(
    thread: LoopThread, faces: Faces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "most_connections", lambda: 2)
    with opened(thread, faces) as address:
        with dial(address) as first, dial(address) as second:
            with dial(address) as third:
                assert ends(third)
            for each in (first, second):
                each.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        assert each.recv(4096)  # those that were there first still are
        assert healthy(address)


def test_a_third_of_the_open_files_is_for_the_connections_of_a_listener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for soft, wanted in [
        (1024, 341),
        (20_000, 6666),
        (1 << 20, footprint.MAX_CONNECTIONS),
        (resource.RLIM_INFINITY, footprint.MAX_CONNECTIONS),
        (1, 1),
    ]:
        monkeypatch.setattr(resource, "getrlimit", lambda _kind, soft=soft: (soft, soft))
        assert footprint.most_connections() == wanted


SETTLES_IN = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
from secagg.rpc.footprint import settle_in
settle_in()
settle_in()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_a_program_takes_the_files_that_it_may_have() -> None:
    code = SETTLES_IN.format(hard=512)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["512", "512"]


def test_large_buffers_go_back_to_the_system() -> None:
    """Of many threads, each of which also keeps something small of what it has done."""
    code = """
import sys, threading
from pathlib import Path
def rss():
    fields = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0])
from secagg.rpc.footprint import settle_in
settle_in()
kept, before = [], rss()
def work():
    for _ in range(20):
        large = [bytes(900_000 + n) for n in range(8)]
        kept.append(bytes(700))
threads = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
print(rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5_000  # kB; 43 MB were in use at a time


class Parsed:
    """A message."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def test_a_message_is_forgotten_once_it_is_answered(thread: LoopThread, faces: Faces) -> None:
    """Not once the garbage is collected: large ones, which are few, would lie there for long."""
    parsed: list[weakref.ref[Parsed]] = []

    async def put(request: Parsed, context: object) -> bytes:
        parsed.append(weakref.ref(request))
        return b""

    handler = grpc.unary_unary_rpc_method_handler(put, Parsed, bytes)

    def add(server: grpc.aio.Server) -> None:
        handlers = grpc.method_handlers_generic_handler(AGGREGATION, {"PutChunk": handler})
        server.add_generic_rpc_handlers((handlers,))

    keeper = gatekeeper(OpenEnrolment(), encrypted=False)
    gc.disable()
    try:
        with (
            serving(thread, add, None, [keeper]) as address,
            channels.channel(address, None) as channel,
        ):
            for _ in range(5):
                channel.unary_unary(CHUNK)(b"data", timeout=TIMEOUT_S, metadata=metadata())
            thread.run(soon(lambda: not any(each() for each in parsed)))
    finally:
        gc.enable()
    assert len(parsed) == 5


# --- those who wait ------------------------------------------------------------------------------


def test_a_few_who_wait_for_a_round_come_back_soon_and_a_thousand_one_after_the_other() -> None:
    clock = ManualClock()
    turns = Turns(clock)
    assert [turns.next_s() for _ in range(3)] == pytest.approx([RETRY_S, 0.205, 0.21])
    clock.advance(60.0)
    found = [turns.next_s() for _ in range(1000)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == pytest.approx((RETRY_S, LONGEST_TURN_S))
    assert all(b - a <= 1 / TURNS_PER_S + 1e-9 for a, b in itertools.pairwise(found))


def test_a_crowd_is_told_when_to_come_back() -> None:
    rounds = OpenRounds(ManualClock())
    told = []
    for _ in range(400):
        with pytest.raises(NotReadyError) as caught:
            rounds.newest("task", (0, 0), None)
        told.append(caught.value.retry_s)
    assert told[0] < told[-1] <= LONGEST_TURN_S
    sent = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(sent) for detail in to_status(caught.value).details)
    assert sent.retry_delay.ToTimedelta().total_seconds() == pytest.approx(told[-1])


# --- uploads -------------------------------------------------------------------------------------


def refused(work: Callable[[], object]) -> type[SecaggError]:
    with pytest.raises(SecaggError) as caught:
        work()
    return type(caught.value)


def on_disk(server: Server) -> int:
    return sum(path.stat().st_size for path in server.upload_files())


@scenario
async def test_a_client_leaves_no_more_than_one_upload_of_a_round_on_the_disk(
    folder: Path,
) -> None:
    plan = cohort.long_plan()
    async with running(folder) as server:
        server.create(task(plan, rounds=1, target_clients=4))
        context = (await server.collecting()).context
        uploads = [cohort.noise_upload(context, 0, nonce) for nonce in range(5)]

        def put(upload: Upload, index: int) -> None:
            receipt = upload.admission.receipt
            named = (context.id, receipt.client_key, receipt.upload_digest)
            server.intake.put_chunk(*named, index, cohort.chunk(upload, index % plan.chunks))

        first, *others = uploads
        server.intake.open(first.admission)
        for other in others:
            assert refused(lambda: server.intake.open(other.admission)) is DuplicateError  # noqa: B023
            assert refused(lambda: put(other, 0)) is ClosedError  # noqa: B023
        assert refused(lambda: put(first, plan.chunks)) is MalformedError
        for _ in range(3):
            for index in range(plan.chunks):
                put(first, index)
        assert on_disk(server) == plan.payload_bytes
        # Never completed: it goes with its round.
        server.clock.advance(DEADLINE_S)
        await server.ended()
        await server.tidied()
        assert refused(lambda: put(first, 0)) is ClosedError
        assert on_disk(server) == 0


@scenario
async def test_what_is_announced_again_and_again_is_on_record_once(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task())
        context = (await server.collecting()).context
        admission = cohort.noise_upload(context, 0).admission
        server.intake.open(admission)
        entries = len(list(server.store.audit()))
        for _ in range(50):
            server.intake.open(admission)
        assert len(list(server.store.audit())) == entries


@scenario
async def test_nothing_of_a_task_that_has_ended_stays_in_memory(folder: Path) -> None:
    async with running(folder) as server:
        server.create(task(rounds=1))
        context = (await server.collecting()).context
        server.send_all(context, range(3))
        server.clock.advance(DEADLINE_S)
        await server.ended()
        await server.task_ended()
        await soon(lambda: not server.coordinator._running)
        assert server.coordinator._contexts == {}
        assert server.rounds._open == {}


@scenario
async def test_digests_of_models_are_kept_for_a_few_versions_only(folder: Path) -> None:
    async with running(folder) as server:
        faces: Any = AggregationService(
            server.store, server.blobs, server.rounds, server.intake, server.verdicts
        )
        for version in range(300):
            server.blobs.put_model("task", version, b"1234")
            faces._model_digest("task", version)
        assert faces._model_digest.cache_info().currsize <= 256
