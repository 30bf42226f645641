"""Errors across the wire: one translator at each edge.

The sender turns a `SecaggError` into a status code with ``google.rpc.ErrorInfo`` (reason, domain)
and, where trying again helps, ``google.rpc.RetryInfo``. The receiver gets the same class back.
Anything that is not a `SecaggError` crosses as INTERNAL without its text.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
import structlog
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from secagg.errors import (
    NotReadyError,
    OverloadedError,
    SecaggError,
    UnavailableError,
    by_reason,
)
from secagg.logs import where

__all__ = [
    "DOMAIN",
    "abort_with",
    "from_rpc_error",
    "reason_sent",
    "retry_delay_s",
    "to_status",
    "translated",
]

DOMAIN = "secagg"
MAX_TEXT = 2000  # the text travels twice, in headers of at most 16 KiB
# Where bytes are not what TLS made of them, gRPC ends calls as UNKNOWN. Our services
# never do: what is unexpected there is INTERNAL.
_UNREACHABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,
)
_DETAILS_KEY = "grpc-status-details-bin"  # gRPC's own
_LOG = structlog.get_logger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])


def to_status(error: SecaggError) -> status_pb2.Status:
    """The rich status that carries this error."""
    message = str(error)[:MAX_TEXT]
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if isinstance(error, NotReadyError | OverloadedError):
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_rpc_error(error: grpc.RpcError) -> SecaggError:
    """The error that the other side raised, or the nearest one for a failed connection."""
    status = _status(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if _unpacked(detail, info) and info.domain == DOMAIN:
            return by_reason(info.reason)(status.message)
    call = cast(grpc.Call, error)
    if call.code() in _UNREACHABLE:
        return UnavailableError(f"expected an answer; the other side is unreachable: {call.code()}")
    return SecaggError(f"the other side failed: {call.code()}: {call.details()}")


def _status(error: grpc.RpcError) -> status_pb2.Status:
    """The rich status of a failed call; empty where the peer sent none, or garbage."""
    try:
        found = rpc_status.from_call(cast(grpc.Call, error))
    except (ValueError, DecodeError):
        found = None
    return found or status_pb2.Status()


def retry_delay_s(error: grpc.RpcError) -> float | None:
    """Seconds after which the other side asks to be tried again; None when it does not ask."""
    info = error_details_pb2.RetryInfo()
    for detail in _status(error).details:
        if _unpacked(detail, info):
            return info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return None


def _unpacked(detail: any_pb2.Any, message: Message) -> bool:
    """Whether a detail is of this message's kind, which then holds it; garbage is of no kind."""
    try:
        return bool(detail.Unpack(message))
    except DecodeError:
        return False


def translated(handler: _F) -> _F:
    """Wrap a servicer method so that its errors cross the wire as described above."""
    wrap = _wrap_stream if inspect.isasyncgenfunction(handler) else _wrap_unary
    return cast(_F, wrap(handler))


def _wrap_unary(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapped(
        self: object, request: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:  # noqa: ANN401 - any response message
        try:
            return await handler(self, request, context)
        except Exception as error:  # every error must cross the edge translated
            await _abort(handler.__name__, error, context)

    return wrapped


def _wrap_stream(handler: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    @functools.wraps(handler)
    async def wrapped(
        self: object, request: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        try:
            async for message in handler(self, request, context):
                yield message
        except Exception as error:  # every error must cross the edge translated
            await _abort(handler.__name__, error, context)

    return wrapped


async def abort_with(error: SecaggError, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End a call with the status that carries this error."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def reason_sent(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Why a call was ended that `translated` or `abort_with` ended: the reason it was given.

    ``INTERNAL`` for one that was ended without: the caller has not been told either.
    """
    sent: Any = context.trailing_metadata()
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    status.ParseFromString(dict(sent or ()).get(_DETAILS_KEY, b""))
    for detail in status.details:
        if detail.Unpack(info):
            return str(info.reason)
    return SecaggError.reason


async def _abort(
    method: str, error: Exception, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, TimeoutError):
        raise error  # the gatekeeper's
    if isinstance(error, SecaggError):
        await abort_with(error, context)
    # The text of an unexpected error may hold anything, so neither the peer nor the log gets it.
    _LOG.error("unexpected_error", method=method, error=type(error).__name__, at=where(error))
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
