"""A network that carries bytes between the real stubs and the real handlers, and does them harm.

What generated stubs need of a channel, and generated registrations of a server, in simulated time.
Errors travel as gRPC's: a status, and metadata that trail it.
"""

# ruff: noqa: ANN401 - messages of any kind, and gRPC's own

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from secagg.rpc.gatekeeper import Gatekeeper
from secagg.rpc.status import from_rpc_error
from simulation.faults import Fault
from simulation.loop import Owner, begin, waits

__all__ = [
    "AsyncChannel",
    "BlockingChannel",
    "Call",
    "Caller",
    "Listener",
    "Network",
    "Observer",
    "RpcFailure",
]

Codes = grpc.StatusCode
_Metadata = tuple[tuple[str, Any], ...]


class RpcFailure(grpc.RpcError):
    """A failed call as gRPC reports it."""

    def __init__(self, code: Codes, details: str = "", trailing: _Metadata = ()) -> None:
        super().__init__(f"{code}: {details}")
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> Codes:
        """The status code."""
        return self._code

    def details(self) -> str:
        """Its text."""
        return self._details

    def trailing_metadata(self) -> _Metadata:
        """What came with it."""
        return self._trailing


def _unavailable(why: str) -> RpcFailure:
    return RpcFailure(Codes.UNAVAILABLE, why)


@dataclass(frozen=True)
class Caller:
    """Who calls: its name, and the certificate it shows."""

    name: str
    certificate: bytes = field(repr=False)


@dataclass(frozen=True)
class Call:
    """One call as it travels.

    Attributes:
        method: full name, ``/service/Method``.
        requests: its messages' bytes; one where it is not a stream.
        timeout: seconds that the caller waits.
        waits: for a connection, until then.
    """

    method: str
    caller: Caller
    metadata: _Metadata
    requests: tuple[bytes, ...] = field(repr=False)
    timeout: float
    waits: bool = False

    @property
    def name(self) -> str:
        """The method's short name."""
        return self.method.rpartition("/")[2]


class _Context:
    """What handlers and gatekeeper use of a `grpc.aio.ServicerContext`."""

    def __init__(self, caller: Caller, timeout: float) -> None:
        self._caller = caller
        self._until = asyncio.get_running_loop().time() + timeout
        self._trailing: _Metadata = ()
        self.failure: RpcFailure | None = None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {"x509_pem_cert": [self._caller.certificate]}

    def time_remaining(self) -> float:
        return self._until - asyncio.get_running_loop().time()

    def trailing_metadata(self) -> _Metadata:
        return self._trailing

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self._trailing = tuple(trailing_metadata)
        self.failure = RpcFailure(code, details, self._trailing)
        raise grpc.aio.AbortError


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: _Metadata


class Listener:
    """What a program listens with: its services behind its gatekeeper, for as long as it runs."""

    def __init__(self, process: Owner, gatekeeper: Gatekeeper) -> None:
        self.process = process
        self.handlers: dict[str, Any] = {}
        self._gatekeeper = gatekeeper

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """What generated code calls; the next method says it all."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """What generated code calls."""
        self.handlers |= {f"/{service}/{name}": each for name, each in handlers.items()}

    async def answer(self, call: Call) -> tuple[list[Any], list[bytes]]:
        """The requests as they were understood, and the answers' bytes.

        Raises:
            RpcFailure: as the caller will see it.
        """
        details = _Details(call.method, call.metadata)
        handler = await self._gatekeeper.intercept_service(self._found, details)  # type: ignore[arg-type]
        try:
            requests = [handler.request_deserializer(each) for each in call.requests]
        except DecodeError:
            raise RpcFailure(Codes.INTERNAL, "Exception deserializing request!") from None
        context: Any = _Context(call.caller, call.timeout)
        try:
            answers = await _handled(handler, requests, context)
        except grpc.aio.AbortError:
            raise context.failure from None
        except Exception as error:
            raise RpcFailure(Codes.UNKNOWN, f"Unexpected {type(error).__name__}") from error
        return requests, [handler.response_serializer(each) for each in answers]

    async def _found(self, details: Any) -> Any:
        return self.handlers[details.method]


async def _handled(handler: Any, requests: list[Any], context: Any) -> list[Any]:
    asked = _each(requests) if handler.request_streaming else requests[0]
    if handler.response_streaming:
        kind = handler.stream_stream if handler.request_streaming else handler.unary_stream
        return [message async for message in kind(asked, context)]
    kind = handler.stream_unary if handler.request_streaming else handler.unary_unary
    return [await kind(asked, context)]


async def _each(messages: list[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


class Observer(Protocol):
    """Sees every call at its callee."""

    def arrived(self, call: Call) -> None:
        """Its handler begins; what that does may last, whatever becomes of the answer."""

    def answered(
        self,
        call: Call,
        requests: list[Any],
        answers: list[bytes],
        failure: RpcFailure | None,
        changed: bool,
    ) -> None:
        """It was answered, or refused, and the answer has yet to travel.

        Args:
            requests: as the handler understood them.
            changed: whether the network had changed them.
        """

    def harmed(self, call: Call) -> None:
        """It is about to meet a fault."""

    def tampered(self, call: Call) -> None:
        """Its answer is changed."""


class Network:
    """Everybody's connections.

    Args:
        faults: what happens to which call.
        delay: seconds that something takes, by a label.
        observer: told of every call.

    Attributes:
        listeners: who answers a service; a service that nobody answers is down.
        messages: requests and answers so far, by method, delivered or lost; without those calls
            that are told "not yet", which are cheap and many.
        injected: faults so far, by kind.
    """

    def __init__(
        self,
        faults: Iterable[Fault],
        delay: Callable[[str], float],
        observer: Observer,
    ) -> None:
        self._faults: dict[tuple[str, int], Fault] = {}
        for fault in faults:
            self._faults.setdefault((fault.method, fault.nth), fault)
        self._delay, self._observer = delay, observer
        self._seen: Counter[str] = Counter()
        self._sent: list[tuple[Call, bool]] = []
        self._under_way = Owner()
        self.listeners: dict[str, Listener] = {}
        self.messages: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.calm = False

    async def carry(self, call: Call) -> list[bytes]:
        """The answers' bytes.

        Raises:
            RpcFailure: what the other side said, or what became of the connection.
        """
        self._seen[call.name] += 1
        fault = self._faults.get((call.name, self._seen[call.name]))
        if fault is None or self.calm:
            return await self._within(call, self._delivered(call))
        self.injected[fault.what] += 1
        return await self._within(call, self._harmed(call, fault))

    async def _within(self, call: Call, work: Any) -> list[bytes]:
        try:
            async with asyncio.timeout(call.timeout):
                answers: list[bytes] = await work
                return answers
        except TimeoutError:
            self._count(call, "answer")
            raise RpcFailure(Codes.DEADLINE_EXCEEDED, "Deadline Exceeded") from None

    async def _harmed(self, call: Call, fault: Fault) -> list[bytes]:
        what, number = fault.what, fault.number
        self._observer.harmed(call)
        if what == "lose request":
            self._count(call, "request")
            raise _unavailable("connection reset")
        if what == "time out":
            await asyncio.sleep(call.timeout + 1)
        if what == "deliver late":
            self._later(call, False, 0.2 + number / 4)
            raise _unavailable("connection reset")
        if what == "deliver twice":
            self._later(call, False, number / 100)
        if what == "replay" and self._sent:
            self._later(*self._sent[-1 - number % len(self._sent)], 0.0)
        changed = what == "change request"
        if changed:
            call = _changed_call(call, number)
        answers = await self._delivered(call, changed=changed)
        if what == "lose answer":
            raise _unavailable("connection reset")
        # Nothing but TLS protects the answer to a release: there, a change ends the connection.
        if what == "change answer":
            if call.name == "Release":
                raise _unavailable("decryption failed or bad record mac")
            self._observer.tampered(call)
            answers = _changed(answers, number)
        return answers

    def _count(self, call: Call, what: str) -> None:
        self.messages[f"{call.name} {what}"] += 1

    def _later(self, call: Call, changed: bool, seconds: float) -> None:
        async def deliver() -> None:
            await asyncio.sleep(seconds)
            # Nobody waits for it.
            with contextlib.suppress(RpcFailure):
                await self._delivered(call, changed=changed)

        begin(deliver(), self._under_way)

    async def _delivered(self, call: Call, *, changed: bool = False) -> list[bytes]:
        self._sent.append((call, changed))
        self._sent = self._sent[-200:]
        await asyncio.sleep(self._delay(f"to {call.name}"))
        service = call.method.split("/")[1]
        while (listener := self.listeners.get(service)) is None:
            if not call.waits:
                self._count(call, "request")
                raise _unavailable("connection refused")
            await asyncio.sleep(0.5)
        self._observer.arrived(call)
        failure, requests, answers = None, [], []
        try:
            requests, answers = await self._served(listener, call)
        except RpcFailure as error:
            failure = error
        not_yet = failure is not None and from_rpc_error(failure).reason == "NOT_READY"
        if not not_yet:
            self._count(call, "request")
            self._count(call, "answer")
        self._observer.answered(call, requests, answers, failure, changed)
        await asyncio.sleep(self._delay(f"from {call.name}"))
        if failure is not None:
            raise failure
        return answers

    async def _served(self, listener: Listener, call: Call) -> tuple[list[Any], list[bytes]]:
        """Answered by a task of that process; it ends with the process, or with its caller."""
        serving = begin(listener.answer(call), listener.process)
        try:
            await asyncio.wait([serving])
        except asyncio.CancelledError:
            serving.cancel()
            raise
        if serving.cancelled() or (
            serving.exception() is not None and not isinstance(serving.exception(), RpcFailure)
        ):
            raise _unavailable("connection reset by peer")
        return serving.result()


def _changed_call(call: Call, number: int) -> Call:
    changed = tuple(_changed(list(call.requests), number))
    return Call(call.method, call.caller, call.metadata, changed, call.timeout, call.waits)


def _changed(messages: list[bytes], number: int) -> list[bytes]:
    """A flipped bit, a cut, or something more, in one of the messages."""
    choice = random.Random(number)
    which = choice.randrange(len(messages)) if messages else 0
    if not messages:
        return messages
    data = bytearray(messages[which])
    how = number % 3
    if how == 0 and data:
        # Fields that decide are at the start; what follows are thousands of residues.
        place = choice.randrange(min(len(data), 400 if choice.random() < 0.7 else len(data)))
        data[place] ^= 1 << choice.randrange(8)
    elif how == 1:
        del data[choice.randrange(len(data) + 1) :]
    else:
        data += choice.randbytes(choice.randrange(1, 20))
    return [*messages[:which], bytes(data), *messages[which + 1 :]]


class _Channel:
    """What stubs are made from."""

    def __init__(self, network: Network, caller: Caller) -> None:
        self._network, self._caller = network, caller

    def _call(self, method: str, requests: Iterable[bytes], options: dict[str, Any]) -> Call:
        metadata = tuple(options.get("metadata") or ())
        timeout, waiting = options.get("timeout") or 3600.0, bool(options.get("wait_for_ready"))
        return Call(method, self._caller, metadata, tuple(requests), timeout, waiting)


def _understood(answers: list[bytes], read: Callable[[bytes], Any]) -> list[Any]:
    try:
        return [read(each) for each in answers]
    except DecodeError:
        raise RpcFailure(Codes.INTERNAL, "Exception deserializing response!") from None


class BlockingChannel(_Channel):
    """A `grpc.Channel`, for simulated threads."""

    def close(self) -> None:
        """As gRPC's."""

    def _multicallable(
        self, method: str, write: Callable[[Any], bytes], read: Callable[[bytes], Any], **_: object
    ) -> Callable[..., Any]:
        def ask(request: Any, **options: Any) -> Any:
            call = self._call(method, [write(request)], options)
            return _understood(waits(self._network.carry(call)), read)[0]

        return ask

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: object,
    ) -> Callable[..., Any]:
        """See gRPC."""
        return self._multicallable(method, request_serializer, response_deserializer)


class AsyncChannel(_Channel):
    """A `grpc.aio.Channel`."""

    async def close(self, grace: float | None = None) -> None:
        """As gRPC's."""

    def _maker(self, *, many_requests: bool, many_answers: bool) -> Callable[..., Any]:
        def make(
            method: str,
            request_serializer: Callable[[Any], bytes],
            response_deserializer: Callable[[bytes], Any],
            **_: object,
        ) -> Callable[..., Any]:
            async def answers(request: Any, options: dict[str, Any]) -> list[Any]:
                sent = [each async for each in request] if many_requests else [request]
                call = self._call(method, [request_serializer(each) for each in sent], options)
                return _understood(await self._network.carry(call), response_deserializer)

            async def one(request: Any, **options: Any) -> Any:
                return (await answers(request, options))[0]

            async def many(request: Any, **options: Any) -> AsyncIterator[Any]:
                for answer in await answers(request, options):
                    yield answer

            return many if many_answers else one

        return make

    def __getattr__(self, name: str) -> Any:
        asked, _, answered = name.partition("_")
        return self._maker(many_requests=asked == "stream", many_answers=answered == "stream")
