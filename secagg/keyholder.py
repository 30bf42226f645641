"""The key holder's role: open the sum over a signed list of clients, once, and nothing else.

Neither the key of a sum nor its noise ever leaves this module: a release is exact integers
(publishing a CKKS decryption as floats hands out the key: Li and Micciancio, eprint 2020/1533).
The secrets are erased as soon as the round is released or abandoned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secagg import ckks
from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.errors import ClosedError, DuplicateError, QuorumError, ReleaseError, SealError
from secagg.onetime import secret
from secagg.packing import unpack
from secagg.parameters import MODULUS, RING_DEGREE, Plan
from secagg.release import Release
from secagg.sealing import RoundKeyPair, seal_info
from secagg.transcript import digest
from secagg.upload import Admission

__all__ = ["MAX_REFUSALS", "KeyHolder"]

MAX_REFUSALS = 2
"""Sums that may fail to open before a round is closed for good."""


class KeyHolder:
    """Holds the secrets of one attempt at one round.

    Args:
        plan: what is summed.
        task_id, round_number, attempt, model_digest: see `ContextId`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        task_id: str = "task",
        round_number: int = 1,
        attempt: int = 1,
        model_digest: bytes = NO_MODEL,
    ) -> None:
        self._pair: RoundKeyPair | None = RoundKeyPair()
        self._seeds: dict[bytes, bytes] = {}  # by upload digest
        self._taken: set[bytes] = set()  # the same seeds
        self._uploads: dict[bytes, bytes] = {}  # upload digest by client key
        self._released: tuple[bytes, Release] | None = None
        self._refusals = 0
        self.context = RoundContext.create(
            plan,
            self._pair.public,
            task_id=task_id,
            round_number=round_number,
            attempt=attempt,
            model_digest=model_digest,
        )

    def admit(self, admission: Admission) -> None:
        """Check a receipt and open its seed; admitting the same upload again changes nothing.

        Raises:
            ContextError, ReceiptError: see `Receipt.verify`.
            SealError: the seed does not open, or is somebody else's.
            DuplicateError: another upload of this client, or this upload of another client, has
                been admitted.
            ClosedError: the round is over.
        """
        admission.verify(self.context)
        receipt = admission.receipt
        known = self._uploads.get(receipt.client_key)
        if known == receipt.upload_digest:
            return
        if known is not None or receipt.upload_digest in self._seeds:
            raise DuplicateError(
                "expected one upload a client and round, and each upload once; the first one stands"
            )
        self._seeds[receipt.upload_digest] = self._open(admission)
        self._uploads[receipt.client_key] = receipt.upload_digest

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

    def release(self, aggregate: Aggregate) -> Release:
        """Admit the uploads of an aggregate and open its sum.

        Raises:
            see :meth:`admit` and :meth:`release_admitted`.
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
            residues: uint64 of shape (plan.blocks, 4096): the sum of the ciphertexts.

        Raises:
            QuorumError: fewer distinct clients than the plan's minimum.
            ClosedError: more than its maximum, or another manifest has been released.
            SealError: an upload was not admitted.
            DuplicateError: an upload is named twice.
            ReleaseError: the residues are not the sum of these uploads; the second time, the round
                is closed.
        """
        name = digest("manifest", *sorted(upload_digests), residues.tobytes())
        if self._released is not None:
            if self._released[0] != name:
                raise ClosedError("expected the manifest already released; one release a round")
            return self._released[1]
        self._check_cohort(upload_digests)
        sums = self._guarded([self._seeds[upload] for upload in upload_digests], residues)
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
        if count < plan.min_clients:
            raise QuorumError(
                f"expected at least min_clients={plan.min_clients} distinct clients; got {count}; "
                "the sum stays closed"
            )
        if count > plan.max_clients:
            raise ClosedError(f"expected at most max_clients={plan.max_clients}; got {count}")

    def _guarded(
        self, seeds: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], ...]:
        """Open a sum; too many refusals end the round, so that they never become an oracle."""
        try:
            return self._open_sum(seeds, residues)
        except ReleaseError:
            self._refusals += 1
            if self._refusals >= MAX_REFUSALS:
                self.close()
            raise

    def _open_sum(
        self, seeds: Sequence[bytes], residues: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], ...]:
        plan = self.context.plan
        expected = (plan.blocks, RING_DEGREE)
        if residues.shape != expected or residues.dtype != np.uint64 or residues.max() >= MODULUS:
            raise ReleaseError(
                f"expected {plan.blocks} summed polynomials of residues below q; got "
                f"shape={residues.shape}, dtype={residues.dtype}"
            )
        key = np.zeros((1, RING_DEGREE), dtype=np.int64)
        for seed in seeds:
            key += secret(seed)
        noisy = ckks.decrypt(residues, self.context.public_polynomials(), ckks.to_ntt(key)[0])
        return tuple(
            unpack(layout, noisy[blocks], len(seeds)) for _, layout, blocks in plan.block_ranges()
        )

    def close(self) -> None:
        """Forget the round key and every seed; what was released can still be read again."""
        self._pair = None
        self._seeds.clear()
        self._taken.clear()
        self._uploads.clear()

    def __repr__(self) -> str:
        return f"KeyHolder({self.context.id.task_id!r}, round {self.context.id.round_number})"
