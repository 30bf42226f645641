"""A key holder without a network, for the coordinator; tests make it fail where they like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import SecaggError
from secagg.parameters import Plan
from secagg.upload import Admission
from secagg_keyholder.rounds import Rounds
from secagg_server.key_holder import Opened, ReleasedSums

__all__ = ["LocalKeyHolder"]


class LocalKeyHolder:
    """The server's `KeyHolderStub` over the key holder's own `Rounds`.

    Attributes:
        calls: names of the calls so far, in order.
        closed: contexts that were closed.
        contexts: contexts that were opened.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.contexts: list[RoundContext] = []
        self.closed: list[RoundContext] = []
        self.manifests: list[list[bytes]] = []
        self._rounds = Rounds(3)
        self._before: dict[str, list[SecaggError]] = defaultdict(list)
        self._after: dict[str, list[SecaggError]] = defaultdict(list)

    def restart(self) -> None:
        """Forget everything, as a restarted process does."""
        self._rounds = Rounds(3)

    def fail(self, call: str, error: SecaggError, times: int = 1) -> None:
        """Let the next calls of this name fail without any effect."""
        self._before[call] += [error] * times

    def lose_answer(self, call: str, error: SecaggError) -> None:
        """Let the next call of this name take effect, and fail all the same."""
        self._after[call].append(error)

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        if self._before[call]:
            raise self._before[call].pop(0)

    def _leave(self, call: str) -> None:
        if self._after[call]:
            raise self._after[call].pop(0)

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> RoundContext:
        """See `KeyHolderStub`."""
        self._enter("open_round")
        context = self._rounds.open(plan, task_id, round_number, attempt, model_digest).context
        self.contexts.append(context)
        self._leave("open_round")
        return context

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        """See `KeyHolderStub`."""
        self._enter("judge")
        reasons = self._rounds.judge(context.id, admissions)
        self._leave("judge")
        names = [admission.receipt.upload_digest for admission in admissions]
        return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """See `KeyHolderStub`."""
        self._enter("release")
        self.manifests.append(list(upload_digests))
        released = self._rounds.release(context.id, upload_digests, residues)
        self._leave("release")
        return ReleasedSums(released.sums, released.contributors)

    async def close_round(self, context: RoundContext) -> None:
        """See `KeyHolderStub`."""
        self._enter("close_round")
        self._rounds.close(context.id)
        self.closed.append(context)
