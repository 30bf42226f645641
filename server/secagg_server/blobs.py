"""Files that outlive the process: upload chunks, models, what optimisers remember, and sums.

A blob appears whole or not at all: it is written aside, flushed to the disk, and renamed. Names are
made here from checked ids and digests, never from bytes that somebody sent.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from secagg.context import ContextId
from secagg.private_files import write

__all__ = ["BlobStore"]


class BlobStore:
    """Blobs below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def free_bytes(self) -> int:
        """Bytes that are left on the disk."""
        return shutil.disk_usage(self._root).free

    def put_chunk(
        self, context: ContextId, upload_digest: bytes, index: int, data: bytes | memoryview
    ) -> bool:
        """Store one checked chunk of an upload; whether it was not there before."""
        path = self._upload(context, upload_digest) / str(index)
        new = not path.exists()
        write(path, data)
        return new

    def chunk(self, context: ContextId, upload_digest: bytes, index: int) -> bytes:
        """One chunk of an upload; FileNotFoundError when it has not been stored."""
        return (self._upload(context, upload_digest) / str(index)).read_bytes()

    def missing_chunks(self, context: ContextId, upload_digest: bytes, count: int) -> list[int]:
        """Which of ``count`` chunks have not been stored."""
        folder = self._upload(context, upload_digest)
        return [index for index in range(count) if not (folder / str(index)).exists()]

    def drop_upload(self, context: ContextId, upload_digest: bytes) -> None:
        """Remove the chunks of one upload."""
        shutil.rmtree(self._upload(context, upload_digest), ignore_errors=True)

    def drop_round(self, context: ContextId) -> None:
        """Remove the chunks of every upload of a finished attempt."""
        shutil.rmtree(self._round(context), ignore_errors=True)

    def drop_uploads(self, task_id: str) -> None:
        """Remove the chunks of every upload of a task."""
        shutil.rmtree(self._root / "uploads" / task_id, ignore_errors=True)

    def put_model(self, task_id: str, version: int, data: bytes) -> None:
        """Store a model version."""
        write(self._root / "models" / task_id / f"{version}.f32", data)

    def model(self, task_id: str, version: int) -> bytes:
        """A model version's bytes."""
        return (self._root / "models" / task_id / f"{version}.f32").read_bytes()

    def model_piece(self, task_id: str, version: int, start: int, size: int) -> bytes:
        """Up to ``size`` bytes of a model version, from ``start``."""
        with (self._root / "models" / task_id / f"{version}.f32").open("rb") as file:
            file.seek(start)
            return file.read(size)

    def drop_model(self, task_id: str, version: int) -> None:
        """Remove a model version, and what the optimiser remembered with it."""
        (self._root / "models" / task_id / f"{version}.f32").unlink(missing_ok=True)
        self.drop_optimiser(task_id, version)

    def put_optimiser(self, task_id: str, version: int, data: bytes) -> None:
        """Store what the optimiser remembers with a model version."""
        write(self._root / "models" / task_id / f"{version}.f64", data)

    def optimiser(self, task_id: str, version: int) -> bytes:
        """What the optimiser remembers with a model version."""
        return (self._root / "models" / task_id / f"{version}.f64").read_bytes()

    def drop_optimiser(self, task_id: str, version: int) -> None:
        """Remove what the optimiser remembers with a model version."""
        (self._root / "models" / task_id / f"{version}.f64").unlink(missing_ok=True)

    def drop_sums(self, task_id: str, round_number: int) -> None:
        """Remove a round's sums."""
        (self._root / "sums" / task_id / f"{round_number}.i64").unlink(missing_ok=True)

    def put_sums(self, task_id: str, round_number: int, data: bytes) -> None:
        """Store a round's exact sums."""
        write(self._root / "sums" / task_id / f"{round_number}.i64", data)

    def sums(self, task_id: str, round_number: int) -> bytes:
        """A round's exact sums."""
        return (self._root / "sums" / task_id / f"{round_number}.i64").read_bytes()

    def _round(self, context: ContextId) -> Path:
        name = f"{context.round_number}-{context.attempt}"
        return self._root / "uploads" / context.task_id / name

    def _upload(self, context: ContextId, upload_digest: bytes) -> Path:
        return self._round(context) / upload_digest.hex()
