"""The rounds a key holder knows: which may be opened, which are open, which were released.

One round of a task is open at a time, and a released round is never opened again: the same inputs
must not be summed twice over different cohorts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secagg.context import ContextId
from secagg.errors import ClosedError, ConfigurationError, DuplicateError, UploadError
from secagg.keyholder import KeyHolder
from secagg.parameters import Plan
from secagg.release import Release
from secagg.upload import Admission

__all__ = ["Rounds"]


class Rounds:
    """Rounds by task; call from one thread at a time."""

    def __init__(self, min_clients: int) -> None:
        self._min_clients = min_clients
        self._current: dict[str, KeyHolder] = {}
        self._released: dict[str, int] = {}  # highest released round

    def open(
        self, plan: Plan, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> KeyHolder:
        """A round key for one attempt; the same request gets the same key.

        Raises:
            ConfigurationError: the plan's cohort is below this key holder's floor.
            ClosedError: the round, or a later attempt, has been opened or released.
            DuplicateError: this attempt was opened with another plan or model.
        """
        if plan.min_clients < self._min_clients:
            raise ConfigurationError(
                f"expected a plan of at least min_clients={self._min_clients}, this key holder's "
                f"floor; got min_clients={plan.min_clients}"
            )
        current = self._current.get(task_id)
        wanted = (round_number, attempt)
        known = (current.context.id.round_number, current.context.id.attempt) if current else (0, 0)
        if wanted < known or (round_number <= self._released.get(task_id, 0) and wanted != known):
            raise ClosedError(
                "expected a later round or attempt; this one is over; one release a round; a task "
                "that starts afresh needs an id that this key holder has not seen"
            )
        if current is not None and wanted == known:
            return _same(current, plan, model_digest)
        fresh = KeyHolder(
            plan,
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            model_digest=model_digest,
        )
        if current is not None:
            current.close()
        self._current[task_id] = fresh
        return fresh

    def judge(self, context: ContextId, admissions: Sequence[Admission]) -> list[str]:
        """The reason of refusal for each upload; empty where it is accepted.

        Raises:
            ClosedError, ContextError: not the open round.
        """
        holder = self._require(context)
        return [_judged(holder, admission) for admission in admissions]

    def plan(self, context: ContextId) -> Plan:
        """What the open round computes on.

        Raises:
            ClosedError, ContextError: not the open round.
        """
        return self._require(context).context.plan

    def release(
        self, context: ContextId, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> Release:
        """Open a sum; again with the same manifest and sum: the same answer.

        Raises:
            SecaggError: see `KeyHolder.release_admitted`.
        """
        holder = self._require(context)
        release = holder.release_admitted(upload_digests, residues)
        self._released[context.task_id] = context.round_number
        return release

    def close(self, context: ContextId) -> None:
        """Erase the secrets of an attempt, if it is still the current one."""
        holder = self._current.get(context.task_id)
        if holder is not None and holder.context.id == context:
            holder.close()

    def _require(self, context: ContextId) -> KeyHolder:
        holder = self._current.get(context.task_id)
        if holder is None:
            raise ClosedError("expected an open round; this key holder has none for the task")
        holder.context.id.require(context)
        return holder


def _same(holder: KeyHolder, plan: Plan, model_digest: bytes) -> KeyHolder:
    if (holder.context.plan.digest, holder.context.id.model_digest) != (plan.digest, model_digest):
        raise DuplicateError("expected the plan and model that this attempt was opened with")
    return holder


def _judged(holder: KeyHolder, admission: Admission) -> str:
    try:
        holder.admit(admission)
    except UploadError as error:
        return error.reason
    return ""
