"""One encrypted round in one process, client after client, with what it costs each party.

All roles are the library's own. Uploads wait on the disk, as a server's do, so that memory is that
of one upload and one sum, however many clients there are. Times are of the processor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy.typing as npt

from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.encryptor import Encryptor
from secagg.errors import NormError
from secagg.keyholder import KeyHolder
from secagg.parameters import Plan
from secagg.receipts import SigningKey
from secagg.release import Release
from secagg.upload import Admission, Upload

__all__ = ["Costs", "encrypted_round"]

Contribution = Mapping[str, npt.NDArray[Any]]

_T = TypeVar("_T")


@dataclass(slots=True)
class Costs:
    """Seconds of each step, one entry a client, and bytes of one client.

    ``sketch`` and ``judge`` are empty without a norm check; ``open`` is the sum's, once.
    """

    upload_bytes: int
    prepare: list[float] = field(default_factory=list)
    encrypt: list[float] = field(default_factory=list)
    add: list[float] = field(default_factory=list)
    sketch: list[float] = field(default_factory=list)
    judge: list[float] = field(default_factory=list)
    open: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | int]:
        """Medians, in seconds; the upload's bytes as they are."""
        steps = ("prepare", "encrypt", "add", "sketch", "judge", "open")
        found = {f"{step}_s": median(times) for step in steps if (times := getattr(self, step))}
        return {"upload_bytes": self.upload_bytes, "clients": len(self.encrypt)} | found


def encrypted_round(
    plan: Plan,
    clients: Iterable[Callable[[], Contribution]],
    progress: Callable[[int], None] = lambda _done: None,
) -> tuple[Release, Costs]:
    """Encrypt, check, add and open what the clients compute.

    Args:
        clients: each computes one client's contribution, by segment name.
        progress: told how many clients are done.

    Raises:
        NormError: the norm check has refused somebody.
        SecaggError: see the roles.
    """
    holder = KeyHolder(plan)
    costs = Costs(plan.payload_bytes)
    with tempfile.TemporaryDirectory() as folder:
        waiting = []
        for number, client in enumerate(clients, start=1):
            upload = _contribute(holder, client, costs)
            waiting.append(_stored(Path(folder) / str(number), upload))
            progress(number)
        server = Aggregator(holder.context)
        for file, admission in waiting:
            added = Upload(admission, file.read_bytes())
            _timed(costs.add, server.add, added)
    release = _timed(costs.open, holder.release, server.aggregate())
    return release, costs


class _Asked:
    """A client with a key, and what the server will ask of its upload."""

    def __init__(self, holder: KeyHolder) -> None:
        self.identity = SigningKey.generate()
        self.challenger = Challenger(holder.context)


def _timed(into: list[float], action: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401
    started = time.process_time()
    done = action(*arguments)
    into.append(time.process_time() - started)
    return done
