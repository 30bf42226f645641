"""What this client has encrypted, on its own disk before the first byte of it leaves.

One round, one upload, ever: after a crash the same bytes are sent again. Encrypting anew would give
two different sums over the same data to whoever can have both opened.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from secagg.context import ContextId
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    MalformedError,
    ReceiptError,
)
from secagg.private_files import write
from secagg.upload import Upload
from secagg.wire.codec import admission_from_wire, admission_to_wire, parse
from secagg.wire.v1 import round_pb2

__all__ = ["Outbox"]

_LENGTH_BYTES = 4


class Outbox:
    """The newest upload of one task.

    Args:
        folder: private to this client.
        task_id: the task.
    """

    def __init__(self, folder: Path, task_id: str) -> None:
        self._folder = folder
        self._prefix = f"upload-{task_id}"

    def save(self, upload: Upload) -> None:
        """Keep an upload, and drop those of earlier rounds.

        Raises:
            ConfigurationError: the folder cannot be written; the upload must not be sent.
        """
        context = upload.admission.receipt.context
        admission = admission_to_wire(upload.admission).SerializeToString()
        data = len(admission).to_bytes(_LENGTH_BYTES, "little") + admission + upload.payload
        file = self._file((context.round_number, context.attempt))
        try:
            write(file, data)
        except OSError as error:
            raise ConfigurationError(
                f"expected a writable folder for uploads; {self._folder}: {error.strerror}; "
                "nothing was sent"
            ) from None
        for other in self._rounds():
            if self._file(other) != file:
                self._file(other).unlink()

    def newest(self) -> tuple[int, int]:
        """Round and attempt of the newest upload; zeros when there is none."""
        return max(self._rounds(), default=(0, 0))

    def load(self, context: ContextId) -> Upload | None:
        """What was encrypted for a round, if anything was.

        Raises:
            ClosedError: something was, and cannot be sent again; this client sits the round out.
        """
        file = self._file((context.round_number, context.attempt))
        if not file.exists():
            return None
        try:
            data = file.read_bytes()
            end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
            admission = admission_from_wire(parse(round_pb2.Admission, data[_LENGTH_BYTES:end]))
            upload = Upload(admission, data[end:])
            admission.receipt.verify(context, admission.sealed_seed)
        except (OSError, MalformedError, ContextError, ReceiptError):
            raise _sits_out() from None
        if hashlib.sha256(upload.payload).digest() != admission.receipt.upload_digest:
            raise _sits_out()
        return upload

    def _file(self, number: tuple[int, int]) -> Path:
        return self._folder / f"{self._prefix}.{number[0]}.{number[1]}"

    def _rounds(self) -> list[tuple[int, int]]:
        name = re.compile(re.escape(self._prefix) + r"\.([0-9]+)\.([0-9]+)")
        found = [name.fullmatch(path.name) for path in self._folder.glob(f"{self._prefix}.*")]
        return [(int(match[1]), int(match[2])) for match in found if match]


def _sits_out() -> ClosedError:
    return ClosedError(
        "expected the upload that was encrypted for this round; the file is damaged or for another "
        "context; this client sits the round out rather than encrypt a second time"
    )
