"""The key holder's role: open the sum over a signed list of clients, once, and nothing else.

Neither the key of a sum nor its noise ever leaves this module: a release is exact integers
(publishing a CKKS decryption as floats hands out the key: Li and Micciancio, eprint 2020/1533), or
what the plan has `publication` make of them.
The secrets are erased as soon as the round is released or abandoned.

Where the plan has a norm check, an upload is summed only if its sketch has passed (`norm_check`).
Verdicts are given all at once, when every admitted upload has its sketch: nobody can fit a question
to the answer to another.

When a sum does not open, somebody was off the grid. The noise audit (`noise_audit`) names them,
once a round, and the sum over the others is opened; a second refusal closes the round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from secagg import ckks, ring
from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.enrolment import OpenEnrolment, Roster
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    NormError,
    QuorumError,
    ReleaseError,
    SealError,
)
from secagg.noise_audit import off_grid, opens
from secagg.norm_check import passes
from secagg.onetime import secret
from secagg.packing import unpack
from secagg.parameters import MODULUS, RING_DEGREE, Plan
from secagg.publication import published
from secagg.receipts import Receipt, SigningKey
from secagg.release import Release
from secagg.sampling import Stream
from secagg.sealing import RoundKeyPair, seal_info
from secagg.sketches import Sketch
from secagg.transcript import digest
from secagg.upload import Admission
from secagg.verdicts import Verdict

__all__ = ["MAX_REFUSALS", "Finding", "KeyHolder"]

MAX_REFUSALS = 2
"""Sums that may fail to open before a round is closed for good."""

_T = TypeVar("_T")


def _here(work: Callable[..., _T], *arguments: object) -> _T:
    return work(*arguments)


@dataclass(frozen=True, slots=True)
class Finding:
    """What the norm check found of one upload.

    Attributes:
        sketch_digest: SHA-256 of the sketch it was judged by.
        passed: whether it may be summed.
    """

    sketch_digest: bytes
    passed: bool


class KeyHolder:
    """Holds the secrets of one attempt at one round.

    Args:
        plan: what is summed.
        task_id, round_number, attempt, model_digest: see `ContextId`.
        pair: the round key; a new one when omitted.
        roster: who may take part; anybody with a key when omitted.
        identity: signs verdicts; a new one when omitted.
        compute: runs the heavy calculations, such as in another process; here when omitted.
        noise_key: 32 bytes that the privacy noise of mode ``"release"`` is drawn from; fresh ones
            when omitted. Given, it makes a run repeatable, and is for tests only: whoever knows it
            takes the noise off again.

    Attributes:
        context: what uploads must be made for.
        refusals: different sums that did not open.
        identity_key: the public key that verdicts can be checked with, 32 bytes.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        task_id: str = "task",
        round_number: int = 1,
        attempt: int = 1,
        model_digest: bytes = NO_MODEL,
        pair: RoundKeyPair | None = None,
        roster: Roster | None = None,
        identity: SigningKey | None = None,
        compute: Callable[..., _T] = _here,
        noise_key: bytes | None = None,
    ) -> None:
        self._noise_key = noise_key
        self._pair: RoundKeyPair | None = pair or RoundKeyPair()
        self._roster = roster or OpenEnrolment()
        self._compute: Callable[..., object] = compute
        self._seeds: dict[bytes, bytes] = {}  # by upload digest
        self._taken: set[bytes] = set()  # the same seeds
        self._uploads: dict[str, bytes] = {}  # upload digest by client
        self._identity = identity or SigningKey.generate()
        self._receipts: dict[bytes, Receipt] = {}  # by upload digest
        self._findings: dict[bytes, Finding] = {}  # by upload digest
        self._judged = False
        self._audited: dict[bytes, bool] = {}  # off the grid or not, by upload digest
        self._released: tuple[bytes, Release] | None = None
        self._refused: set[bytes] = set()  # names of manifests with their sums
        self.refusals = 0
        self.context = RoundContext.create(
            plan,
            self._pair.public,
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            model_digest=model_digest,
        )

    def resume(
        self,
        refusals: int,
        audited: dict[bytes, bool],
        findings: dict[bytes, Finding] | None = None,
        *,
        judged: bool = False,
    ) -> None:
        """Continue where another process ended, once everybody it admitted is admitted again.

        Args:
            refusals: sums that it refused.
            audited: what its audit found, by upload digest.
            findings: what its norm check found, by upload digest.
            judged: whether it has given its verdicts.
        """
        self.refusals, self._audited = refusals, dict(audited)
        self._findings, self._judged = dict(findings or {}), judged

    @property
    def identity_key(self) -> bytes:
        """See the class."""
        return self._identity.public

    def admit(self, admission: Admission) -> str:
        """Check a receipt and open its seed; admitting the same upload again changes nothing.

        Returns:
            The client's name: one client may have several keys, and still counts once.

        Raises:
            ContextError, ReceiptError: see `Receipt.verify`.
            NotEnrolledError, RevokedError: signed by nobody who may take part.
            SealError: the seed does not open, or is somebody else's.
            DuplicateError: another upload of this client, or this upload of another client, has
                been admitted.
            ClosedError: the round is over, or its verdicts have been given.
        """
        admission.verify(self.context)
        receipt = admission.receipt
        client = self._roster.client_of(receipt.client_key)
        known = self._uploads.get(client)
        if known == receipt.upload_digest:
            return client
        if known is not None or receipt.upload_digest in self._seeds:
            raise DuplicateError(
                "expected one upload a client and round, and each upload once; the first one stands"
            )
        if self._judged:
            raise ClosedError("expected uploads before the verdicts; they have been given")
        self._seeds[receipt.upload_digest] = self._open(admission)
        self._uploads[client] = receipt.upload_digest
        self._receipts[receipt.upload_digest] = receipt
        return client

    def _open(self, admission: Admission) -> bytes:
        if self._pair is None:
            raise ClosedError("expected an open round; this one is released or abandoned")
        receipt = admission.receipt
        info = seal_info(self.context.id.digest, receipt.client_key, receipt.upload_digest)
        seed = self._pair.open(admission.sealed_seed, info)
        if seed in self._taken:
            raise SealError("expected a seed of its own for each client; this one is taken")
        self._taken.add(seed)
        return seed

    def submit_sketch(self, sketch: Sketch) -> Finding:
        """Look at an admitted upload's sketch; the same one again changes nothing.

        Returns:
            What was found. Not for the server to know before :meth:`verdicts`.

        Raises:
            ConfigurationError: the plan has no norm check.
            ClosedError: the round is over.
            SealError: the upload was not admitted.
            DuplicateError: another sketch of this upload was judged; the first one stands.
        """
        plan, name = self.context.plan, sketch.upload_digest
        if plan.norm_check is None:
            raise ConfigurationError("expected a plan with a norm check; this one has none")
        if self._pair is None:
            raise ClosedError("expected an open round; this one is released or abandoned")
        if name not in self._seeds:
            raise SealError("expected a sketch of an admitted upload; this one was not")
        known, sketch_digest = self._findings.get(name), sketch.digest
        if known is None:
            passed = self._compute(_judge_sketch, plan, self._seeds[name], sketch)
            known = self._findings[name] = Finding(sketch_digest, bool(passed))
        if known.sketch_digest != sketch_digest:
            raise DuplicateError(
                "expected the sketch that was judged before; one sketch an upload, and the first "
                "one stands"
            )
        return known

    def verdicts(self) -> list[Verdict]:
        """All verdicts of the round, signed; from then on no other upload is admitted.

        Raises:
            ConfigurationError: the plan has no norm check.
            ClosedError: the round is over, nothing has been admitted, or an admitted upload has no
                sketch yet.
        """
        if self.context.plan.norm_check is None:
            raise ConfigurationError("expected a plan with a norm check; this one has none")
        if self._pair is None:
            raise ClosedError("expected an open round; this one is released or abandoned")
        if not self._seeds or not self._findings.keys() >= self._seeds.keys():
            raise ClosedError("expected a sketch of every admitted upload; one is missing; send it")
        self._judged = True
        return [self._verdict(name, self._findings[name]) for name in self._seeds]

    def _verdict(self, name: bytes, found: Finding) -> Verdict:
        receipt = self._receipts[name]
        return Verdict.sign(self._identity, receipt, found.sketch_digest, accepted=found.passed)

    def release(self, aggregate: Aggregate) -> Release:
        """Admit the uploads of an aggregate and open its sum.

        Raises:
            SecaggError: see :meth:`admit` and :meth:`release_admitted`.
        """
        if self._released is None:
            for admission in aggregate.manifest:
                self.admit(admission)
        digests = [admission.receipt.upload_digest for admission in aggregate.manifest]
        return self.release_admitted(digests, aggregate.residues)

    def release_admitted(
        self, upload_digests: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> Release:
        """Open the sum over exactly the named uploads, all admitted before.

        The first release of a round is final: the same manifest and sum get the same answer again,
        any other one is refused.

        Args:
            upload_digests: the manifest: SHA-256 of each upload in the sum.
            residues: uint64 of shape (plan.sum_blocks, 4096): the sum of the ciphertexts, each
                segment's with its noise's (`residues.folded`).

        Raises:
            QuorumError: fewer distinct clients than the plan's minimum.
            ClosedError: more than its maximum, or another manifest has been released.
            SealError: an upload was not admitted.
            NormError: the norm check has not accepted an upload.
            DuplicateError: an upload is named twice.
            ReleaseError: the residues are not the sum of these uploads; the second time, the round
                is closed.
        """
        name = digest("manifest", *sorted(upload_digests), _bytes_of(residues))
        if self._released is not None:
            if self._released[0] != name:
                raise ClosedError("expected the manifest already released; one release a round")
            return self._released[1]
        self._check_cohort(upload_digests)
        if not _is_sum(self.context.plan, residues):
            raise ReleaseError(
                f"expected {self.context.plan.sum_blocks} summed polynomials of residues below q; "
                f"got shape={residues.shape}, dtype={residues.dtype}"
            )
        seeds = [self._seeds[each] for each in upload_digests]
        sums = self._guarded(name, _open_sum, self.context, seeds, residues, self._noise_key)
        release = Release(self.context.plan, self.context.rotation, len(upload_digests), sums)
        self._released = (name, release)
        self.close()
        return release

    def _check_cohort(self, upload_digests: Sequence[bytes]) -> None:
        plan, count = self.context.plan, len(upload_digests)
        if self._pair is None:
            raise ClosedError("expected an open round; this one is abandoned")
        if len(set(upload_digests)) != count:
            raise DuplicateError("expected each upload once in a manifest; one is repeated")
        if not self._seeds.keys() >= set(upload_digests):
            raise SealError("expected a manifest of admitted uploads; one of them was not")
        if plan.norm_check is not None and not (
            self._judged and all(self._findings[upload].passed for upload in upload_digests)
        ):
            raise NormError("expected a manifest of uploads whose norm was accepted; one was not")
        if self._audited and any(self._audited.get(upload, True) for upload in upload_digests):
            raise SealError("expected a manifest of uploads that passed the audit; one did not")
        if count < plan.min_clients:
            raise QuorumError(
                f"expected at least min_clients={plan.min_clients} distinct clients; got {count}; "
                "the sum stays closed"
            )
        if count > plan.max_clients:
            raise ClosedError(f"expected at most max_clients={plan.max_clients}; got {count}")

    def check(self, upload_digests: Sequence[bytes], low: NDArray[np.uint32]) -> None:
        """Look at a sum's noise alone, before the sum itself is handed over.

        A server that sends no sum before this has passed never sends two sums of one round, whose
        difference could be one client's upload.

        Args:
            upload_digests: the manifest, as for :meth:`release_admitted`.
            low: uint32 (plan.sum_blocks, 4096): the sum's low bits, see `noise_audit.dithered`.

        Raises:
            QuorumError, ClosedError, SealError, NormError, DuplicateError: see
                :meth:`release_admitted`.
            ReleaseError: the sum would not open; counts as a refusal.
            InputError: another shape or type.
        """
        if self._released is not None:
            return
        self._check_cohort(upload_digests)
        name = digest("manifest check", *sorted(upload_digests), _bytes_of(low))
        seeds = [self._seeds[each] for each in upload_digests]
        self._guarded(name, _check_sum, self.context, seeds, low)

    def _guarded(self, name: bytes, work: Callable[..., _T], *arguments: object) -> _T:
        """Open or check a sum; too many refusals end the round, lest they become an oracle.

        Asking again about the same sum, because the answer was lost perhaps, tells nothing new.
        """
        try:
            if name in self._refused:
                raise ReleaseError("expected another sum; this one was refused before; audit it")
            return self._compute(work, *arguments)  # type: ignore[return-value]
        except ReleaseError:
            if name not in self._refused:
                self._refused.add(name)
                self.refusals += 1
            if self.refusals >= MAX_REFUSALS:
                self.close()
            raise

    def audit(self, upload_digest: bytes, low: NDArray[np.uint32]) -> bool:
        """Whether an admitted upload is off the grid, once a sum has been refused.

        From the first audited upload on, only manifests of uploads that passed are opened. The same
        upload gets the same answer again, whatever is sent with it.

        Args:
            low: uint32 (plan.blocks, 4096), see `noise_audit.dithered`.

        Raises:
            ClosedError: no sum was refused, or the round is over.
            SealError: the upload was not admitted.
            InputError: another shape or type.
        """
        if self._pair is None or not self.refusals:
            raise ClosedError("expected an open round whose sum was refused; this one was not")
        if upload_digest not in self._seeds:
            raise SealError("expected an admitted upload; this one was not")
        if upload_digest not in self._audited:
            seed = self._seeds[upload_digest]
            found = self._compute(_audit_upload, self.context, seed, low)
            self._audited[upload_digest] = bool(found)
        return self._audited[upload_digest]

    def close(self) -> None:
        """Forget the round key and every seed; what was released can still be read again."""
        self._pair = None
        self._seeds.clear()
        self._taken.clear()
        self._uploads.clear()
        self._receipts.clear()
        self._findings.clear()
        self._audited.clear()

    def __repr__(self) -> str:
        return f"KeyHolder({self.context.id.task_id!r}, round {self.context.id.round_number})"


# Module level, and free of the round key: they may run in another process. By their names they
# are timed.


def _bytes_of(numbers: NDArray[np.uint64] | NDArray[np.uint32]) -> memoryview:
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data


def _is_sum(plan: Plan, residues: NDArray[np.uint64]) -> bool:
    expected = (plan.sum_blocks, RING_DEGREE)
    return bool(
        residues.shape == expected and residues.dtype == np.uint64 and residues.max() < MODULUS
    )


def _judge_sketch(plan: Plan, seed: bytes, sketch: Sketch) -> bool:
    return passes(plan, secret(seed), sketch)


def _open_sum(
    context: RoundContext,
    seeds: Sequence[bytes],
    residues: NDArray[np.uint64],
    noise_key: bytes | None,
) -> tuple[NDArray[np.int64], ...]:
    noisy = ckks.decrypt(residues, context.summed_polynomials(), _summed_key(seeds))
    sums = tuple(
        unpack(layout, noisy[blocks], len(seeds))
        for _, layout, blocks in context.plan.block_ranges()
    )
    randomness = Stream(noise_key) if noise_key else Stream.from_os()
    return published(context.plan, context.rotation, sums, randomness)


def _check_sum(context: RoundContext, seeds: Sequence[bytes], low: NDArray[np.uint32]) -> None:
    if not opens(context.plan, low, _masks(context.summed_polynomials(), seeds)):
        raise ReleaseError(
            "expected a sum whose noise is within the guard; it is not: an upload is missing, "
            "repeated, foreign or damaged; audit the uploads"
        )


def _audit_upload(context: RoundContext, seed: bytes, low: NDArray[np.uint32]) -> bool:
    return off_grid(context.plan, low, _masks(context.public_polynomials(), [seed]))


def _masks(public: NDArray[np.uint64], seeds: Sequence[bytes]) -> NDArray[np.int64]:
    """What hides a sum of uploads: a_j times the sum of their keys, in coefficients."""
    return ckks.decrypt(np.zeros_like(public), public, _summed_key(seeds))


def _summed_key(seeds: Sequence[bytes]) -> NDArray[np.uint64]:
    key = np.zeros((1, RING_DEGREE), dtype=np.int64)
    for seed in seeds:
        key += secret(seed)
    transformed: NDArray[np.uint64] = ring.to_ntt(key)[0]
    return transformed
