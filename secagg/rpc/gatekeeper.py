"""Who may call what, and how much at once: asked before any message is looked at.

An interceptor in front of every service. In this order: the wire version, the caller's certificate,
its role, whether it has been revoked, whether there is room. The caller's identity is what its
certificate says; `caller` gives it to the handler. Health checks are open to every certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
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
    NoCertificateError,
    OverloadedError,
    SecaggError,
    VersionError,
    WrongRoleError,
)
from secagg.rpc.deadlines import deadline_s
from secagg.rpc.status import abort_with

__all__ = ["VERSION_KEY", "WIRE_VERSION", "Gatekeeper", "caller", "metadata"]

WIRE_VERSION = "1"
VERSION_KEY = "secagg-wire-version"
DEFAULT_IN_FLIGHT = 64

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
    """

    def __init__(
        self,
        allowed: Mapping[str, Collection[Role]],
        roster: Roster,
        *,
        encrypted: bool,
        in_flight: int = DEFAULT_IN_FLIGHT,
        hashed: Callable[[str], str] = lambda _: "-",
    ) -> None:
        self._allowed = allowed
        self._roster = roster
        self._encrypted = encrypted
        self._room = in_flight
        self._hashed = hashed

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - a handler of any message
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or service == _HEALTH:
            return handler
        sent = dict(handler_call_details.invocation_metadata or ())
        version = sent.get(VERSION_KEY)
        return self._guarded(
            handler, _Call(service, method, None if version is None else str(version))
        )

    def _guarded(self, handler: Any, call: _Call) -> Any:  # noqa: ANN401 - as above
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
            wrapped: Any = self._streaming(getattr(handler, kind), call)
        else:
            kind = "stream_unary" if handler.request_streaming else "unary_unary"
            wrapped = self._answering(getattr(handler, kind), call)
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _answering(self, inner: Callable[..., Awaitable[Any]], call: _Call) -> Callable[..., Any]:
        @functools.wraps(inner)
        async def wrapped(request: object, context: _Context) -> Any:  # noqa: ANN401
            try:
                with self._admitted(call, context):
                    async with asyncio.timeout(_limit_s(call, context)):
                        return await inner(request, context)
            except SecaggError as error:
                await abort_with(error, context)
            except TimeoutError:
                await _abort_late(context)

        return wrapped

    def _streaming(
        self, inner: Callable[..., AsyncIterator[Any]], call: _Call
    ) -> Callable[..., AsyncIterator[Any]]:
        @functools.wraps(inner)
        async def wrapped(request: object, context: _Context) -> AsyncIterator[Any]:
            try:
                with self._admitted(call, context):
                    async with asyncio.timeout(_limit_s(call, context)):
                        async for message in inner(request, context):
                            yield message
            except SecaggError as error:
                await abort_with(error, context)
            except TimeoutError:
                await _abort_late(context)

        return wrapped

    @contextlib.contextmanager
    def _admitted(self, call: _Call, context: _Context) -> Iterator[None]:
        """Let one call in for as long as it lasts, and leave one line about it in the log."""
        started, reason, who = time.perf_counter(), "", None
        try:
            _check_version(call.version)
            who = self._identified(call, context)
            if self._room < 1:
                raise OverloadedError(
                    "expected room for another call; this service has its hands full; try again "
                    "after the delay given"
                )
            self._room -= 1
            _CALLER.set(who)  # every call is an asyncio task, with a context of its own
            try:
                yield
            finally:
                self._room += 1
        except SecaggError as error:
            reason = error.reason
            raise
        except grpc.aio.AbortError:
            reason = "REFUSED"
            raise
        except (TimeoutError, asyncio.CancelledError, GeneratorExit):
            reason = "DEADLINE_OR_CANCELLED"
            raise
        finally:
            _LOG.debug(
                "call",
                method=call.method,
                ms=round((time.perf_counter() - started) * 1000, 1),
                reason=reason or "OK",
                caller=self._hashed(who.name) if who else "-",
            )

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
