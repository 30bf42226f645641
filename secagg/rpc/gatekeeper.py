"""Who may call what, and how much at once: asked before any message is read.

An interceptor in front of every service. In this order: the wire version, the caller's certificate,
its role, whether it has been revoked, whether there is room for it. The caller's identity is what
its certificate says; `caller` gives it to the handler. Health checks are open to every certificate.

What is refused leaves its message in the connection, where flow control holds the rest of it back;
and a message that is let in has to arrive within the call's deadline. So memory is that of the
calls that are let in, however many ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog

from secagg.certificates import Identity, Role, identity_of
from secagg.enrolment import Roster
from secagg.errors import (
    MalformedError,
    NoCertificateError,
    OverloadedError,
    SecaggError,
    VersionError,
    WrongRoleError,
)
from secagg.instruments import SILENT, Meter
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.metrics import (
    CALL_LIMIT,
    CALLS,
    CALLS_IN_FLIGHT,
    DEADLINE_OR_CANCELLED,
    REFUSED_CALLS,
)
from secagg.rpc.status import abort_with, reason_sent
from secagg.rpc.turns import Turns

__all__ = ["VERSION_KEY", "WIRE_VERSION", "Gatekeeper", "caller", "metadata"]

WIRE_VERSION = "1"
VERSION_KEY = "secagg-wire-version"
DEFAULT_IN_FLIGHT = 64
AT_ONCE = 16
"""Calls of one message that have it in memory at a time; more threads than work on them."""
CLIENT_IN_FLIGHT = 4
"""Calls of one client at once, of which an honest one makes one: nobody has the room of others."""

_HEALTH = "grpc.health.v1.Health"
_CALLER: ContextVar[Identity | None] = ContextVar("caller", default=None)
_LOG = structlog.get_logger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]


def metadata() -> tuple[tuple[str, str], ...]:
    """What every call must carry."""
    return ((VERSION_KEY, WIRE_VERSION),)


def caller() -> Identity | None:
    """Who makes the current call; None where the listener speaks plaintext."""
    return _CALLER.get()


@dataclass(frozen=True, slots=True)
class _Call:
    service: str
    method: str
    version: str | None


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Lets calls through, or refuses them.

    Args:
        allowed: roles that may call, by full service name.
        roster: who is enrolled and who is revoked.
        encrypted: whether the listener speaks TLS; without it nobody can be told apart.
        in_flight: calls that may be worked on at once; more are told to come again.
        hashed: a name's keyed hash for the log.
        meter: counts and times calls.
    """

    def __init__(
        self,
        allowed: Mapping[str, Collection[Role]],
        roster: Roster,
        *,
        encrypted: bool,
        in_flight: int = DEFAULT_IN_FLIGHT,
        hashed: Callable[[str], str] = lambda _: "-",
        meter: Meter = SILENT,
    ) -> None:
        self._allowed = allowed
        self._roster = roster
        self._encrypted = encrypted
        self._room = in_flight
        self._turns = Turns(AT_ONCE)
        self._of_client: Counter[str] = Counter()
        self._hashed = hashed
        self._meter = meter
        meter.set(CALL_LIMIT, in_flight)
        meter.watch(CALLS_IN_FLIGHT, lambda: in_flight - self._room)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a handler of any message
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None:
            return handler
        if service == _HEALTH:
            return handler if handler.response_streaming else _timely(handler, method)
        sent = dict(handler_call_details.invocation_metadata or ())
        version = sent.get(VERSION_KEY)
        return self._guarded(
            handler, _Call(service, method, None if version is None else str(version))
        )

    def _guarded(self, handler: Any, call: _Call) -> Any:  # noqa: ANN401 - as above
        asks = "stream" if handler.request_streaming else "unary"
        answers = "stream" if handler.response_streaming else "unary"
        inner = getattr(handler, f"{asks}_{answers}")
        wrap = self._streaming if handler.response_streaming else self._answering
        if not handler.request_streaming:
            inner = (_of_one if handler.response_streaming else self._in_turn)(inner)
        # As a stream, even where it is of one message: gRPC reads that of any other call before it
        # asks anybody. On the wire both are the same.
        make: Any = getattr(grpc, f"stream_{answers}_rpc_method_handler")
        return make(wrap(inner, call), handler.request_deserializer, handler.response_serializer)

    def _in_turn(self, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """A method of one message, as one of a stream."""

        @functools.wraps(inner)
        async def wrapped(requests: AsyncIterator[Any], context: _Context) -> Any:  # noqa: ANN401
            return await self._turns.take(
                lambda: _the_one(requests), lambda request: inner(request, context)
            )

        return wrapped

    def _answering(self, inner: Callable[..., Awaitable[Any]], call: _Call) -> Callable[..., Any]:
        @functools.wraps(inner)
        async def wrapped(requests: AsyncIterator[Any], context: _Context) -> Any:  # noqa: ANN401
            try:
                with self._admitted(call, context):
                    async with asyncio.timeout(_limit_s(call, context)):
                        return await inner(requests, context)
            except SecaggError as error:
                await abort_with(error, context)
            except TimeoutError:
                await _abort_late(context)

        return wrapped

    def _streaming(
        self, inner: Callable[..., AsyncIterator[Any]], call: _Call
    ) -> Callable[..., AsyncIterator[Any]]:
        @functools.wraps(inner)
        async def wrapped(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
            try:
                with self._admitted(call, context):
                    async with asyncio.timeout(_limit_s(call, context)):
                        async for message in inner(requests, context):
                            yield message
            except SecaggError as error:
                await abort_with(error, context)
            except TimeoutError:
                await _abort_late(context)

        return wrapped

    @contextlib.contextmanager
    def _admitted(self, call: _Call, context: _Context) -> Iterator[None]:
        """Let one call in for as long as it lasts; count it, and leave one line in the log."""
        started, reason, who = time.perf_counter(), "", None
        try:
            _check_version(call.version)
            who = self._identified(call, context)
            with self._in_flight(who):
                _CALLER.set(who)  # every call is an asyncio task, with a context of its own
                yield
        except SecaggError as error:
            reason = error.reason
            raise
        except grpc.aio.AbortError:
            reason = reason_sent(context)
            raise
        except (TimeoutError, asyncio.CancelledError, GeneratorExit):
            reason = DEADLINE_OR_CANCELLED
            raise
        finally:
            seconds = time.perf_counter() - started
            self._meter.record(CALLS, seconds, rpc_method=call.method)
            if reason:
                self._meter.add(REFUSED_CALLS, reason=reason)
            _LOG.debug(
                "call",
                method=call.method,
                ms=round(seconds * 1000, 1),
                reason=reason or "OK",
                caller=self._hashed(who.name) if who else "-",
            )

    @contextlib.contextmanager
    def _in_flight(self, who: Identity | None) -> Iterator[None]:
        """A call's place, if there is one left for its caller."""
        if self._room < 1:
            raise OverloadedError(
                "expected room for another call; this service has its hands full; try again after "
                "the delay given"
            )
        client = who.name if who is not None and who.role is Role.CLIENT else None
        if client is not None and self._of_client[client] >= CLIENT_IN_FLIGHT:
            raise OverloadedError(
                f"expected at most {CLIENT_IN_FLIGHT} calls of one client at once; got another; "
                "try again after the delay given"
            )
        self._room -= 1
        if client is not None:
            self._of_client[client] += 1
        try:
            yield
        finally:
            self._room += 1
            if client is not None:
                self._of_client[client] -= 1
                if not self._of_client[client]:
                    del self._of_client[client]

    def _identified(self, call: _Call, context: _Context) -> Identity | None:
        if not self._encrypted:
            return None
        shown = b"".join(context.auth_context().get("x509_pem_cert", ()))
        if not shown:
            raise NoCertificateError("expected a client certificate; none was shown; use a kit")
        identity = _identity(shown)
        if identity.role not in self._allowed.get(call.service, ()):
            raise WrongRoleError(
                f"expected a caller whose role may use {call.service}; the certificate is a "
                f"{identity.role.value}'s; use the kit made for this program"
            )
        self._roster.check_certificate(identity.serial_number)
        if identity.role is Role.CLIENT:
            self._roster.require(identity.name)
        return identity


_identity = functools.lru_cache(maxsize=4096)(identity_of)


async def _the_one(requests: AsyncIterator[Any]) -> Any:  # noqa: ANN401 - a message of any kind
    """The message of a call that has one.

    Read to its end: a stream that is left in its middle keeps the message until the garbage is
    collected.
    """
    request = None
    async for each in requests:
        if request is not None:
            raise MalformedError("expected one message; got more")
        request = each
    if request is None:
        raise MalformedError("expected one message; got none")
    return request


def _of_one(inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """A method of one message and a stream of answers, as one of two streams."""

    @functools.wraps(inner)
    async def wrapped(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
        async for message in inner(await _the_one(requests), context):
            yield message

    return wrapped


def _timely(handler: Any, method: str) -> Any:  # noqa: ANN401 - of any message
    """A call that everybody may make, but not leave lying: its message too has to come in time."""

    @functools.wraps(handler.unary_unary)
    async def wrapped(requests: AsyncIterator[Any], context: _Context) -> Any:  # noqa: ANN401
        try:
            async with asyncio.timeout(deadline_s(method)):
                return await handler.unary_unary(await _the_one(requests), context)
        except SecaggError as error:
            await abort_with(error, context)
        except TimeoutError:
            await _abort_late(context)

    return grpc.stream_unary_rpc_method_handler(
        wrapped, handler.request_deserializer, handler.response_serializer
    )


def _check_version(version: str | None) -> None:
    if version != WIRE_VERSION:
        raise VersionError(
            f"expected wire version {WIRE_VERSION}; got {(version or 'none')[:20]!r}; upgrade the "
            "older side: both must speak the same version"
        )


def _limit_s(call: _Call, context: _Context) -> float:
    limit, remaining = deadline_s(call.method), context.time_remaining()
    return limit if remaining is None else min(limit, remaining)


async def _abort_late(context: _Context) -> None:
    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call took longer than it may")
