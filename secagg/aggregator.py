"""The server's role: check uploads and add ciphertexts it cannot read.

Validate everything, then commit once: a refused upload leaves no trace in the sum. Memory is that
of one model, whatever the number of clients. No key ever comes near this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import ClosedError, DuplicateError, QuorumError
from secagg.residues import ResidueSum, folded
from secagg.upload import Admission, Upload

__all__ = ["Aggregate", "Aggregator"]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A sum of ciphertexts and the manifest of exactly the uploads in it.

    Attributes:
        manifest: receipt and sealed seed of each upload.
        residues: uint64 of shape (plan.sum_blocks, 4096), below q.
    """

    manifest: tuple[Admission, ...] = field(repr=False)
    residues: NDArray[np.uint64] = field(repr=False)


class Aggregator:
    """Adds the uploads of one round."""

    def __init__(self, context: RoundContext) -> None:
        self._context = context
        self._sum = ResidueSum(context.plan.blocks)
        self._accepted: dict[bytes, Admission] = {}

    @property
    def contributors(self) -> int:
        """Distinct clients in the sum."""
        return len(self._accepted)

    def add(self, upload: Upload) -> bool:
        """Add one upload.

        Returns:
            False when this very upload is in the sum already: a retry changes nothing.

        Raises:
            MalformedError, ContextError, ReceiptError: see `Upload.validate`.
            DuplicateError: the client has contributed something else.
            ClosedError: the cohort is full.
        """
        residues = upload.validate(self._context)
        receipt = upload.admission.receipt
        known = self._accepted.get(receipt.client_key)
        if known is not None:
            if known.receipt.upload_digest == receipt.upload_digest:
                return False
            raise DuplicateError(
                "expected one upload a client and round; this client sent a different one before; "
                "the first one stands"
            )
        if len(self._accepted) >= self._context.plan.max_clients:
            raise ClosedError(
                f"expected at most max_clients={self._context.plan.max_clients} uploads, beyond "
                "which the sum could wrap; join the next round"
            )
        self._sum.add(residues)
        self._accepted[receipt.client_key] = upload.admission
        return True

    def aggregate(self) -> Aggregate:
        """The sum so far, with its manifest.

        Raises:
            QuorumError: fewer clients than the plan's minimum.
        """
        wanted = self._context.plan.min_clients
        if self.contributors < wanted:
            raise QuorumError(
                f"expected at least min_clients={wanted} uploads; got {self.contributors}; wait "
                "for more or abort the round"
            )
        total = folded(self._sum.value(), self._context.plan.sum_blocks)
        return Aggregate(tuple(self._accepted.values()), total)
