"""What this client has encrypted, on its own disk before the first byte of it leaves.

One round, one upload, ever: after a crash the same bytes are sent again. Encrypting anew would give
two different sums over the same data to whoever can have both opened.

An upload is kept with the round that it was made for, until the next one: its verdict can be
checked after a restart too. A verdict that proves a forgery is kept as evidence, with its upload,
until somebody takes it away.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secagg.context import ContextId, RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    ForgedSketchError,
    MalformedError,
    PlanError,
)
from secagg.private_files import write
from secagg.transcript import DIGEST_BYTES
from secagg.upload import Upload
from secagg.wire.codec import (
    admission_from_wire,
    admission_to_wire,
    context_id_to_wire,
    parse,
    plan_to_wire,
    round_context_from_wire,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import round_pb2

__all__ = ["Kept", "Outbox"]

_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True)
class Kept:
    """An upload, and what it takes to check its verdict.

    Attributes:
        context: the attempt that it was encrypted for.
        key_holder: identity that endorsed the attempt, 32 bytes; empty if none did.
        upload: the very bytes that are sent.
    """

    context: RoundContext
    key_holder: bytes = field(repr=False)
    upload: Upload

    @property
    def number(self) -> tuple[int, int]:
        """Round and attempt."""
        return self.context.id.round_number, self.context.id.attempt

    def to_bytes(self) -> bytes:
        """SHA-256 of all that follows; round and admission, each after its length; ciphertext."""
        offer = pb.GetRoundResponse(
            context=context_id_to_wire(self.context.id),
            plan=plan_to_wire(self.context.plan),
            round_key=self.context.round_key,
            key_holder_identity=self.key_holder,
        )
        parts = (offer, admission_to_wire(self.upload.admission))
        header = b"".join(_framed(part.SerializeToString()) for part in parts)
        sha256 = hashlib.sha256(header)
        sha256.update(self.upload.payload)
        return b"".join((sha256.digest(), header, self.upload.payload))

    @classmethod
    def from_bytes(cls, data: bytes) -> Kept:
        """The inverse of :meth:`to_bytes`.

        Raises:
            MalformedError, ContextError, PlanError: the bytes are damaged, or something else.
        """
        if hashlib.sha256(memoryview(data)[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
            raise MalformedError("expected an upload as it was kept; its SHA-256 differs")
        first, start = _unframed(data, DIGEST_BYTES)
        second, start = _unframed(data, start)
        offer = parse(pb.GetRoundResponse, first)
        admission = admission_from_wire(parse(round_pb2.Admission, second))
        context = round_context_from_wire(offer.context, offer.plan, offer.round_key)
        return cls(context, offer.key_holder_identity, Upload(admission, data[start:]))


class Outbox:
    """The newest upload of one task, and evidence.

    Args:
        folder: private to this client.
        task_id: the task.
    """

    def __init__(self, folder: Path, task_id: str) -> None:
        self._folder = folder
        self._task_id = task_id

    def save(self, kept: Kept) -> None:
        """Keep an upload, and drop those of earlier rounds that are no evidence.

        Raises:
            ConfigurationError: the folder cannot be written; the upload must not be sent.
        """
        try:
            write(self._file(kept.number), kept.to_bytes())
        except OSError as error:
            raise ConfigurationError(
                f"expected a writable folder for uploads; {self._folder}: {error.strerror}; "
                "nothing was sent"
            ) from None
        for other in self._rounds():
            if other != kept.number and not self._evidence(other).exists():
                self._file(other).unlink()

    def newest(self) -> tuple[int, int]:
        """Round and attempt of the newest upload; zeros when there is none."""
        return max(self._rounds(), default=(0, 0))

    def latest(self) -> Kept | None:
        """The newest upload, if there is one.

        Raises:
            ClosedError: there is, and it is damaged.
        """
        number = self.newest()
        return self._read(number) if number != (0, 0) else None

    def load(self, context: ContextId) -> Kept | None:
        """What was encrypted for a round, if anything was.

        Raises:
            ClosedError: something was, and cannot be sent again; this client sits the round out.
        """
        number = (context.round_number, context.attempt)
        if not self._file(number).exists():
            return None
        kept = self._read(number)
        if kept.context.id != context:
            raise _sits_out()
        return kept

    def keep_evidence(self, number: tuple[int, int], verdict: bytes) -> str:
        """Keep what a server answered about the upload of a round, next to that upload.

        Returns:
            Where it is, or why it could not be written, in words.
        """
        file = self._evidence(number)
        try:
            write(file, verdict)
        except OSError as error:
            return f"the evidence could not be kept: {error.strerror}"
        return f"the evidence is {file}, with the upload next to it"

    def require_no_evidence(self) -> None:
        """Refuse to go on with a server that has been caught.

        Raises:
            ForgedSketchError: it has; says by which evidence.
        """
        if found := self.evidence():
            raise ForgedSketchError(
                "expected a server that has not been caught asking something else about an update; "
                f"{found[0]} is evidence that it was; report it, and move it away to take part "
                "again"
            )

    def evidence(self) -> Sequence[Path]:
        """Evidence against this task's server, in the order of the rounds."""
        return [self._evidence(number) for number in self._numbers("evidence", r"\.pb")]

    def _read(self, number: tuple[int, int]) -> Kept:
        try:
            return Kept.from_bytes(self._file(number).read_bytes())
        except (OSError, MalformedError, ContextError, PlanError):
            raise _sits_out() from None

    def _file(self, number: tuple[int, int]) -> Path:
        return self._folder / f"upload-{self._task_id}.{number[0]}.{number[1]}"

    def _evidence(self, number: tuple[int, int]) -> Path:
        return self._folder / f"evidence-{self._task_id}.{number[0]}.{number[1]}.pb"

    def _rounds(self) -> list[tuple[int, int]]:
        return self._numbers("upload", "")

    def _numbers(self, kind: str, suffix: str) -> list[tuple[int, int]]:
        prefix = f"{kind}-{self._task_id}"
        name = re.compile(rf"{re.escape(prefix)}\.([0-9]+)\.([0-9]+){suffix}")
        found = [name.fullmatch(path.name) for path in self._folder.glob(f"{prefix}.*")]
        return sorted((int(match[1]), int(match[2])) for match in found if match)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(_LENGTH_BYTES, "little") + part


def _unframed(data: bytes, start: int) -> tuple[bytes, int]:
    """A part and where the next one begins."""
    begin = start + _LENGTH_BYTES
    end = begin + int.from_bytes(data[start:begin], "little")
    return data[begin:end], end


def _sits_out() -> ClosedError:
    return ClosedError(
        "expected the upload that was encrypted for this round; the file is damaged or for another "
        "context; this client sits the round out rather than encrypt a second time"
    )
