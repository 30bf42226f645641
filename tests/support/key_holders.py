"""A key holder without a network, for the coordinator; tests make it fail where they like."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import OpenEnrolment, Roster
from secagg.errors import SecaggError
from secagg.parameters import Plan
from secagg.receipts import SigningKey
from secagg.upload import Admission
from secagg.wire.codec import sums_from_bytes
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Policy, Rounds
from secagg_keyholder.vault import RoundKeys
from secagg_server.key_holder import Opened, ReleasedSums

__all__ = ["LocalKeyHolder", "durable_rounds"]

PASSPHRASE = "0" * 64
AUDIT_KEY = bytes(32)


def durable_rounds(
    folder: Path,
    *,
    policy: Policy | None = None,
    roster: Roster | None = None,
    identity: SigningKey | None = None,
) -> Rounds:
    """The key holder's rounds over a ledger and keys in a folder, recovered as after a start."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = Rounds(
        Ledger(folder / "ledger.sqlite3", AUDIT_KEY),
        RoundKeys(folder / "round-keys", PASSPHRASE),
        identity or SigningKey.generate(),
        roster or OpenEnrolment(),
        policy or Policy(),
    )
    rounds.recover()
    return rounds


class LocalKeyHolder:
    """The server's `KeyHolderStub` over the key holder's own `Rounds`.

    Attributes:
        calls: names of the calls so far, in order.
        closed: contexts that were closed.
        contexts: contexts that were opened.
    """

    def __init__(self, roster: Roster | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="secagg-test-")
        self._roster = roster
        self.calls: list[str] = []
        self.contexts: list[RoundContext] = []
        self.closed: list[RoundContext] = []
        self.manifests: list[list[bytes]] = []
        self._rounds = self._durable()
        self._before: dict[str, list[SecaggError]] = defaultdict(list)
        self._after: dict[str, list[SecaggError]] = defaultdict(list)

    def _durable(self) -> Rounds:
        return durable_rounds(Path(self._folder.name) / "state", roster=self._roster)

    def restart(self) -> None:
        """Forget what was in memory, as a restarted process does."""
        self._rounds = self._durable()

    def lose(self) -> None:
        """Lose everything, as after a fire."""
        self._folder = tempfile.TemporaryDirectory(prefix="secagg-test-")
        self._rounds = self._durable()

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
    ) -> tuple[RoundContext, Endorsement]:
        """See `KeyHolderStub`."""
        self._enter("open_round")
        opened = self._rounds.open(plan, task_id, round_number, attempt, model_digest)
        self.contexts.append(opened[0])
        self._leave("open_round")
        return opened

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
        sums = sums_from_bytes(released.sums, context.plan)
        return ReleasedSums(sums, released.contributors)

    async def audit(
        self, context: RoundContext, upload_digest: bytes, masked: NDArray[np.uint64]
    ) -> str:
        """See `KeyHolderStub`."""
        self._enter("audit")
        reason = self._rounds.audit(context.id, upload_digest, masked)
        self._leave("audit")
        return reason

    async def close_round(self, context: RoundContext) -> None:
        """See `KeyHolderStub`."""
        self._enter("close_round")
        self._rounds.close(context.id)
        self.closed.append(context)
