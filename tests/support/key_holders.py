"""A key holder without a network, for the coordinator; tests make it fail where they like."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.enrolment import OpenEnrolment, Roster
from secagg.instruments import SILENT, Meter
from secagg.parameters import Plan
from secagg.private_files import write
from secagg.receipts import SigningKey
from secagg.sketches import Sketch
from secagg.upload import Admission
from secagg.verdicts import Verdict
from secagg.wire.codec import sums_from_bytes
from secagg_keyholder import vault
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Policy, Rounds
from secagg_keyholder.vault import RoundKeys
from secagg_server.key_holder import Opened, ReleasedSums

__all__ = ["LocalKeyHolder", "durable_rounds"]

PASSPHRASE = "0" * 64
AUDIT_KEY = bytes(32)
SALT = b"a salt for tests"


def durable_rounds(
    folder: Path,
    *,
    policy: Policy | None = None,
    roster: Roster | None = None,
    identity: SigningKey | None = None,
    meter: Meter = SILENT,
    compute: Callable[..., Any] = lambda work, *arguments: work(*arguments),
) -> Rounds:
    """The key holder's rounds over a ledger and keys in a folder, recovered as after a start."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = Rounds(
        Ledger(folder / "ledger.sqlite3", AUDIT_KEY, meter=meter),
        _round_keys(folder / "round-keys"),
        identity or SigningKey.generate(),
        roster or OpenEnrolment(),
        policy or Policy(),
        compute,
        meter=meter,
    )
    rounds.recover()
    return rounds


def _round_keys(folder: Path) -> RoundKeys:
    """Keys under the salt that all have here, so that the passphrase is stretched only once."""
    if not folder.exists():
        folder.mkdir(mode=0o700)
        write(folder / "salt", SALT)
    with mock.patch.object(vault, "Scrypt", _Remembered):
        return RoundKeys(folder, PASSPHRASE)


class _Remembered:
    """Scrypt that does the same work once."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401 - those of Scrypt
        self._settings = settings

    def derive(self, passphrase: bytes) -> bytes:
        return _stretched(passphrase, **self._settings)


@functools.cache
def _stretched(passphrase: bytes, **settings: Any) -> bytes:  # noqa: ANN401 - those of Scrypt
    return Scrypt(**settings).derive(passphrase)


class LocalKeyHolder:
    """The server's `KeyHolderStub` over the key holder's own `Rounds`.

    Args:
        measured: ``meter`` and ``compute`` of `durable_rounds`.

    Attributes:
        calls: names of the calls so far, in order.
        closed: contexts that were closed.
        contexts: contexts that were opened.
        manifests: upload digests of every sum that was to be opened.
        sketches: every sketch that was judged, repeated ones too.
        change: what it makes of its verdicts before it gives them, where it lies.
        rounds: what it does without a server between; another one after each restart.
    """

    def __init__(self, roster: Roster | None = None, **measured: Any) -> None:  # noqa: ANN401
        self._roster = roster
        self._measured = measured
        self.calls: list[str] = []
        self.contexts: list[RoundContext] = []
        self.closed: list[RoundContext] = []
        self.manifests: list[list[bytes]] = []
        self.sketches: list[Sketch] = []
        self.change: Callable[[list[Verdict]], list[Verdict]] = lambda given: given
        self._before: dict[str, list[BaseException]] = defaultdict(list)
        self._after: dict[str, list[BaseException]] = defaultdict(list)
        self.lose()

    def restart(self) -> None:
        """Forget what was in memory, as a restarted process does."""
        self.rounds = durable_rounds(
            self._state, roster=self._roster, identity=self.identity, **self._measured
        )

    def lose(self) -> None:
        """Lose everything, as after a fire."""
        self._state = Path(tempfile.mkdtemp(prefix="secagg-test-"))
        weakref.finalize(self, shutil.rmtree, self._state, ignore_errors=True)
        self.identity = SigningKey.generate()
        self.restart()

    def fail(self, call: str, error: BaseException, times: int = 1) -> None:
        """Let the next calls of this name fail without any effect."""
        self._before[call] += [error] * times

    def lose_answer(self, call: str, error: BaseException) -> None:
        """Let the next call of this name take effect, and fail all the same."""
        self._after[call].append(error)

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        if self._before[name]:
            raise self._before[name].pop(0)
        try:
            yield
        finally:
            if self._after[name]:
                raise self._after[name].pop(0)

    async def open_round(
        self, plan: Plan, *, task_id: str, round_number: int, attempt: int, model_digest: bytes
    ) -> tuple[RoundContext, Endorsement]:
        """See `KeyHolderStub`."""
        with self._call("open_round"):
            opened = self.rounds.open(plan, task_id, round_number, attempt, model_digest)
            self.contexts.append(opened[0])
        return opened

    async def judge(self, context: RoundContext, admissions: Sequence[Admission]) -> Opened:
        """See `KeyHolderStub`."""
        with self._call("judge"):
            reasons = self.rounds.judge(context.id, admissions)
        names = [admission.receipt.upload_digest for admission in admissions]
        return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}

    async def submit_sketch(self, context: RoundContext, sketch: Sketch) -> None:
        """See `KeyHolderStub`."""
        with self._call("submit_sketch"):
            self.rounds.submit_sketch(context.id, sketch)
            self.sketches.append(sketch)

    async def verdicts(self, context: RoundContext) -> list[Verdict]:
        """See `KeyHolderStub`."""
        with self._call("verdicts"):
            return self.change(self.rounds.verdicts(context.id))

    async def release(
        self, context: RoundContext, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> ReleasedSums:
        """See `KeyHolderStub`."""
        with self._call("release"):
            self.manifests.append(list(upload_digests))
            released = self.rounds.release(context.id, upload_digests, residues)
        sums = sums_from_bytes(released.sums, context.plan)
        return ReleasedSums(sums, released.contributors)

    async def check_sum(
        self, context: RoundContext, upload_digests: Sequence[bytes], low: NDArray[np.uint32]
    ) -> None:
        """See `KeyHolderStub`."""
        with self._call("check_sum"):
            self.rounds.check(context.id, upload_digests, low)

    async def audit(
        self, context: RoundContext, upload_digest: bytes, low: NDArray[np.uint32]
    ) -> str:
        """See `KeyHolderStub`."""
        with self._call("audit"):
            return self.rounds.audit(context.id, upload_digest, low)

    async def close_round(self, context: RoundContext) -> None:
        """See `KeyHolderStub`."""
        with self._call("close_round"):
            self.rounds.close(context.id)
            self.closed.append(context)
