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
from secagg.receipts import NO_COMMITMENT, SigningKey
from secagg.release import Release
from secagg.sketch_shape import sketch_bytes
from secagg.upload import Admission, Upload

__all__ = ["Contribution", "Costs", "encrypted_round"]

Contribution = Mapping[str, npt.NDArray[Any]]
"""One client's arrays, by segment name."""

_STEPS = ("compute", "encrypt", "add", "sketch", "judge", "open")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of the processor and bytes.

    Attributes:
        upload_bytes: of one client's upload.
        sketch_bytes: from server to key holder, for each upload; 0 without a norm check.
        seconds: by step, one entry a client: ``compute`` and ``encrypt`` of the client, ``add`` and
            ``sketch`` of the server, ``judge`` of the key holder; and its ``open``, once.
    """

    upload_bytes: int
    sketch_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in _STEPS})

    def summary(self) -> dict[str, float | int]:
        """Medians over the clients; steps that there were none of are left out."""
        found = {f"{step}_s": median(times) for step, times in self.seconds.items() if times}
        sizes = {"upload_bytes": self.upload_bytes, "sketch_bytes": self.sketch_bytes}
        return sizes | {"clients": len(self.seconds["encrypt"])} | found

    def timed(self, step: str, action: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401
        """Do something, and remember how long it took."""
        started = time.process_time()
        done = action(*arguments)
        self.seconds[step].append(time.process_time() - started)
        return done


def encrypted_round(
    plan: Plan,
    clients: Iterable[Callable[[], Contribution]],
    progress: Callable[[int], None] = lambda _done: None,
) -> tuple[Release, Costs]:
    """Encrypt, check, add and open what the clients compute.

    Args:
        clients: each computes one client's contribution.
        progress: told how many clients have encrypted theirs.

    Raises:
        NormError: the norm check has refused somebody.
        SecaggError: see the roles.
    """
    holder = KeyHolder(plan)
    challenger = Challenger(holder.context) if plan.norm_check else None
    costs = Costs(plan.payload_bytes, sketch_bytes(plan, direction=False) if plan.norm_check else 0)
    with tempfile.TemporaryDirectory() as folder:
        waiting: list[tuple[Path, Admission]] = []
        for number, compute in enumerate(clients, start=1):
            upload = _contribute(holder, challenger, compute, costs)
            file = Path(folder) / str(number)
            file.write_bytes(upload.payload)
            waiting.append((file, upload.admission))
            progress(number)
        if plan.norm_check and not all(verdict.accepted for verdict in holder.verdicts()):
            raise NormError("expected contributions within the plan's norm; one was refused")
        server = Aggregator(holder.context)
        for file, admission in waiting:
            costs.timed("add", server.add, Upload(admission, file.read_bytes()))
    release = costs.timed("open", holder.release, server.aggregate())
    return release, costs


def _contribute(
    holder: KeyHolder,
    challenger: Challenger | None,
    compute: Callable[[], Contribution],
    costs: Costs,
) -> Upload:
    """One client's upload; where there is a norm check, it has been looked at."""
    identity = SigningKey.generate()
    commitment = challenger.commitment(identity.public) if challenger else NO_COMMITMENT
    client = Encryptor(holder.context, identity, commitment=commitment)
    upload = costs.timed("encrypt", client.encrypt_segments, costs.timed("compute", compute))
    if challenger:
        holder.admit(upload.admission)
        costs.timed("judge", holder.submit_sketch, costs.timed("sketch", challenger.sketch, upload))
    return upload
