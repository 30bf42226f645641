"""One client's contribution to one round: a receipt, a sealed seed, and ciphertext bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import MalformedError, ReceiptError
from secagg.receipts import NO_COMMITMENT, Receipt
from secagg.residues import widen

__all__ = ["Admission", "Upload"]


@dataclass(frozen=True, slots=True)
class Admission:
    """What the key holder needs of an upload: its receipt and the seed sealed to the round key."""

    receipt: Receipt
    sealed_seed: bytes = field(repr=False)

    def verify(self, context: RoundContext) -> None:
        """Check everything that can be checked without a key.

        Raises:
            ContextError, ReceiptError: see `Receipt.verify`.
            ReceiptError: it commits to no challenge, and the plan has a norm check; or the other
                way round.
        """
        self.receipt.verify(context.id, self.sealed_seed)
        committed = self.receipt.challenge_commitment != NO_COMMITMENT
        if committed != (context.plan.norm_check is not None):
            raise ReceiptError(
                "expected a receipt with a challenge commitment exactly where the plan has a norm "
                "check; encrypt with the commitment that came with the round"
            )


@dataclass(frozen=True, slots=True)
class Upload:
    """An encrypted contribution.

    Attributes:
        admission: receipt and sealed seed.
        payload: ciphertext: 7-byte residues, ``plan.payload_bytes`` of them in all.
    """

    admission: Admission
    payload: bytes | memoryview = field(repr=False)

    def validate(self, context: RoundContext) -> NDArray[np.uint64]:
        """Check an untrusted upload from cheap to dear and return its residues.

        Returns:
            uint64 of shape (plan.blocks, 4096), below q.

        Raises:
            MalformedError: wrong size, wrong digest, or a residue of q or more.
            ContextError, ReceiptError: see `Receipt.verify`.
        """
        expected = context.plan.payload_bytes
        if len(self.payload) != expected:
            raise MalformedError(
                f"expected an upload of {context.plan.blocks} ciphertexts ({expected} bytes); got "
                f"bytes={len(self.payload)}; encrypt with the round's plan"
            )
        self.admission.verify(context)
        if hashlib.sha256(self.payload).digest() != self.admission.receipt.upload_digest:
            raise MalformedError("expected the bytes that the receipt signs; their SHA-256 differs")
        return widen(self.payload, context.plan.blocks)
