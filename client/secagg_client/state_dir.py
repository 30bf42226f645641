"""A client's private files, readable by their owner only.

What a device remembers is kept for each round: another attempt at a round starts from what was
remembered before it, and gives the same contribution.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from secagg.archive import read_npz
from secagg.private_files import write
from secagg.receipts import SigningKey
from secagg_client.config import identity_in

__all__ = ["StateDir"]

_KEPT_STATES = 2

_Tensors = Mapping[str, npt.NDArray[np.float32]]


class StateDir:
    """A folder of one client for one task."""

    def __init__(self, root: Path) -> None:
        self._root = root

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
        for old in self._rounds()[:-_KEPT_STATES]:
            self._left_over(old).unlink(missing_ok=True)
            self._vectors(old).unlink()

    def before(self, round_number: int) -> tuple[bytes | None, _Tensors]:
        """What a round starts from: a learner's state, None before the first one; and left-overs.

        Raises:
            InputError: the file of left-overs is damaged.
        """
        earlier = [number for number in self._rounds() if number < round_number]
        if not earlier:
            return None, {}
        file = self._left_over(earlier[-1])
        return self._vectors(earlier[-1]).read_bytes(), read_npz(file) if file.exists() else {}

    def latest_vectors(self) -> bytes | None:
        """The newest state of a learner; None before the first round."""
        rounds = self._rounds()
        return self._vectors(rounds[-1]).read_bytes() if rounds else None

    def user_vector(self, user: int) -> npt.NDArray[np.float32] | None:
        """The newest vector of a user that was trained here, ``(d,)``; None where there is none."""
        state = self.latest_vectors()
        if not state:
            return None
        with np.load(io.BytesIO(state), allow_pickle=False) as saved:
            vectors: npt.NDArray[np.float32] = saved["vectors"][saved["users"] == user]
        return vectors[0] if len(vectors) else None

    def note_cost(self, line: str) -> None:
        """Append a line to the client's own record of costs."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._root / "costs.jsonl"
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _vectors(self, round_number: int) -> Path:
        return self._root / f"vectors-{round_number}.npz"

    def _left_over(self, round_number: int) -> Path:
        return self._root / f"left-over-{round_number}.npz"

    def _rounds(self) -> list[int]:
        names = (path.stem.removeprefix("vectors-") for path in self._root.glob("vectors-*.npz"))
        return sorted(int(name) for name in names)
