"""A connection to the key holder that breaks again and again costs time, and no round."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import cohort
import grpc
import grpc.aio
import numpy as np
import pytest

from secagg.errors import SecaggError, UnavailableError
from secagg.wire.codec import sums_to_bytes
from secagg.wire.v1 import key_holder_service_pb2 as pb
from secagg_server import key_holder
from secagg_server.key_holder import KEY_HOLDER_ATTEMPTS, KeyHolderClient

BREAKS = 4 * KEY_HOLDER_ATTEMPTS
CONTEXT = cohort.round_context(cohort.counts_plan())
SUMS = tuple(cohort.clear_sums(CONTEXT, range(3)))
NAMES = [bytes([index]) * 32 for index in range(3)]


class Line:
    """Calls that fail so many times, each after part of its answer, and then succeed."""

    def __init__(self, code: grpc.StatusCode, times: int) -> None:
        self._code, self._left = code, times
        self.calls = 0
        self.heard: list[int] = []

    def _broken(self) -> grpc.RpcError | None:
        self.calls += 1
        self._left -= 1
        if self._left < 0:
            return None
        nothing = grpc.aio.Metadata()
        return grpc.aio.AioRpcError(self._code, nothing, nothing, "the line broke")

    async def Release(self, requests: AsyncIterator[Any], **_: object) -> AsyncIterator[Any]:
        self.heard.append(len([request async for request in requests]))
        error, data = self._broken(), sums_to_bytes(SUMS)
        yield pb.ReleaseResponse(data=data[:8], contributors=3)
        if error is not None:
            raise error
        yield pb.ReleaseResponse(data=data[8:], contributors=3)

    async def SubmitSketch(self, requests: AsyncIterator[Any], **_: object) -> object:
        self.heard.append(len([request async for request in requests]))
        if error := self._broken():
            raise error
        return pb.SubmitSketchResponse()

    async def CloseRound(self, _request: object, **_: object) -> object:
        if error := self._broken():
            raise error
        return pb.CloseRoundResponse()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_holder, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(key_holder, "why_unreachable", lambda *_: None)


def over(line: Line) -> KeyHolderClient:
    client = KeyHolderClient.__new__(KeyHolderClient)
    client._address, client._kit = "127.0.0.1:1", None

    async def stub() -> Any:  # noqa: ANN401
        return line

    client._stub = stub  # type: ignore[method-assign]
    return client


def release(line: Line) -> Any:  # noqa: ANN401
    residues = np.zeros((CONTEXT.plan.sum_blocks, 4096), np.uint64)
    return asyncio.run(over(line).release(CONTEXT, NAMES, residues))


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN])
def test_a_release_whose_line_breaks_is_asked_for_again_as_a_whole(code: grpc.StatusCode) -> None:
    line = Line(code, BREAKS)
    found = release(line)
    assert line.calls == BREAKS + 1
    assert line.heard == [2] * line.calls, "the manifest and the sum, each time"
    assert found.contributors == 3
    for one, other in zip(found.sums, SUMS, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_sent_in_pieces_is_sent_again_from_the_first() -> None:
    line = Line(grpc.StatusCode.UNAVAILABLE, BREAKS)
    sketch = SimpleNamespace(upload_digest=NAMES[0], to_bytes=lambda: bytes(100))
    asyncio.run(over(line).submit_sketch(CONTEXT, cast(Any, sketch)))
    assert line.heard == [2] * (BREAKS + 1)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, UnavailableError),
        (grpc.StatusCode.INTERNAL, SecaggError),
    ],
)
def test_an_answer_and_a_deadline_are_final(code: grpc.StatusCode, kind: type[SecaggError]) -> None:
    line = Line(code, 1)
    with pytest.raises(kind) as caught:
        release(line)
    assert type(caught.value) is kind
    assert line.calls == 1


def test_a_line_that_breaks_for_ever_is_given_up_at_the_calls_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_holder, "deadline_s", lambda _name: 0.5)
    monkeypatch.setattr(key_holder, "_FIRST_PAUSE_S", 0.001)
    line = Line(grpc.StatusCode.UNAVAILABLE, 1_000_000)
    with pytest.raises(UnavailableError):
        release(line)
    assert line.calls > 1


def test_a_round_is_closed_by_one_call_or_none() -> None:
    line = Line(grpc.StatusCode.UNAVAILABLE, 1)
    with pytest.raises(UnavailableError):
        asyncio.run(over(line).close_round(CONTEXT))
    assert line.calls == 1
