"""A client's private files, readable by their owner only.

What a device remembers is kept for each round: another attempt at a round starts from what was
remembered before it, and gives the same contribution.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secagg.archive import npz_of, read_npz
from secagg.errors import InputError
from secagg.private_files import write
from secagg.receipts import SigningKey
from secagg_client.config import identity_in

__all__ = ["StateDir"]

_KEPT_STATES = 2
_NAMELESS = re.compile(r"(?:vectors|left-over)-(?P<round>\d+)\.npz")

_Tensors = Mapping[str, npt.NDArray[np.float32]]


class StateDir:
    """A folder of one client; what is remembered in it is for one task.

    What a version before 0.2 remembered has no task's name on it. It counts for the first task that
    goes on from it, and is removed when that has something newer.

    Args:
        root: the folder; made when there is something to keep.
        task_id: the task.
    """

    def __init__(self, root: Path, task_id: str) -> None:
        self._root = root
        self._task_id = task_id

    def identity(self) -> SigningKey:
        """The client's signing key, made at the first call."""
        return identity_in(self._root)

    def save(self, round_number: int, state: bytes, left_over: _Tensors | None = None) -> None:
        """Keep what is remembered after a round, and what was after the round before.

        Args:
            state: of a learner, such as its users' vectors.
            left_over: what compression has left out of the contribution; None for nothing.
        """
        # The vectors last: they are what makes the round one that is remembered.
        if left_over is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **left_over)  # type: ignore[arg-type]  # names come from the plan
            write(self._left_over(round_number), buffer.getvalue())
        write(self._vectors(round_number), state)
        kept = self._own_rounds()
        for old in kept[:-_KEPT_STATES]:
            self._left_over(old).unlink(missing_ok=True)
            self._vectors(old).unlink()
        if len(kept) >= _KEPT_STATES:
            for path in self._root.glob("*.npz"):
                if _NAMELESS.fullmatch(path.name):
                    path.unlink()

    def before(self, round_number: int) -> tuple[bytes | None, _Tensors]:
        """What a round starts from: a learner's state, None before the first one; and left-overs.

        Raises:
            InputError: the file of left-overs is damaged.
        """
        earlier = [number for number in self._rounds() if number < round_number]
        if not earlier:
            return None, {}
        vectors, left_over = self._files(earlier[-1])
        return vectors.read_bytes(), read_npz(left_over) if left_over.exists() else {}

    def latest_vectors(self) -> bytes | None:
        """The newest state of a learner; None before the first round."""
        rounds = self._own_rounds() or self._rounds()
        return self._files(rounds[-1])[0].read_bytes() if rounds else None

    def user_vector(self, user: int) -> npt.NDArray[np.float32] | None:
        """The newest vector of a user that was trained here, ``(d,)``; None where there is none.

        Raises:
            InputError: what is remembered is damaged, or is no users' vectors.
        """
        state = self.latest_vectors()
        if not state:
            return None
        saved = npz_of(state, str(self._root))
        try:
            users, vectors = saved["users"], saved["vectors"]
            found: npt.NDArray[np.float32] = vectors[np.flatnonzero(users == user)]
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"expected users and their vectors in {self._root}; got other arrays; restore a "
                "copy, or remove the file to train anew"
            ) from None
        return found[0] if len(found) else None

    def note_cost(self, line: str) -> None:
        """Append a line to the client's own record of costs."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._root / "costs.jsonl"
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _vectors(self, round_number: int) -> Path:
        return self._root / f"vectors-{self._task_id}.{round_number}.npz"

    def _left_over(self, round_number: int) -> Path:
        return self._root / f"left-over-{self._task_id}.{round_number}.npz"

    def _files(self, round_number: int) -> tuple[Path, Path]:
        """What is remembered of a round: its own files, or those without a task's name."""
        own = self._vectors(round_number), self._left_over(round_number)
        if own[0].exists():
            return own
        return (
            self._root / f"vectors-{round_number}.npz",
            self._root / f"left-over-{round_number}.npz",
        )

    def _rounds(self) -> list[int]:
        nameless = [path.name for path in self._root.glob("vectors-*.npz")]
        found = [match for match in map(_NAMELESS.fullmatch, nameless) if match]
        return sorted({*self._own_rounds(), *(int(match["round"]) for match in found)})

    def _own_rounds(self) -> list[int]:
        prefix = f"vectors-{self._task_id}."
        names = [path.name for path in self._root.glob("vectors-*.npz")]
        # Not by a pattern: a task's name may look like one.
        ends = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return sorted(int(end[:-4]) for end in ends if end[:-4].isdecimal())
