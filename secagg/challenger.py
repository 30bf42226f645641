"""The server's side of the norm check: what is asked about each upload of one attempt."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from secagg.challenges import challenge_key, commitment
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.errors import ReceiptError
from secagg.receipts import Receipt
from secagg.sketches import Sketch, sketch
from secagg.upload import Upload

__all__ = ["Challenger"]


class Challenger:
    """Commits to its challenges, and sketches uploads by them.

    Args:
        context: the attempt.
        secret: 32 bytes that outlive a restart, so that the same is asked again; fresh ones when
            omitted.
        direction: what updates are compared with, where the plan has a direction check.
    """

    def __init__(
        self,
        context: RoundContext,
        secret: bytes | None = None,
        direction: Direction | None = None,
    ) -> None:
        self._context = context
        self._secret = secret or os.urandom(32)
        self._direction = direction

    def commitment(self, client_key: bytes) -> bytes:
        """For a client's receipt: what its upload will be asked is fixed from here on."""
        return commitment(self.key(client_key))

    def key(self, client_key: bytes) -> bytes:
        """The challenge key itself. For the client alone, once its verdict has been given."""
        return challenge_key(self._secret, self._context.id.digest, client_key)

    def sketch(self, upload: Upload) -> Sketch:
        """What the key holder is shown of an upload.

        Raises:
            MalformedError, ContextError, ReceiptError: see `Upload.validate`.
            ReceiptError: the receipt holds another commitment.
        """
        residues = upload.validate(self._context)
        return self.sketch_validated(upload.admission.receipt, [residues])

    def sketch_validated(self, receipt: Receipt, chunks: Iterable[NDArray[np.uint64]]) -> Sketch:
        """The same of residues that have been validated, in chunks of blocks in order.

        Raises:
            ReceiptError: the receipt holds another commitment.
            MalformedError: not exactly the plan's blocks.
        """
        self.require_committed(receipt)
        key = self.key(receipt.client_key)
        return sketch(self._context, receipt.upload_digest, chunks, key, self._direction)

    def require_committed(self, receipt: Receipt) -> None:
        """Refuse a receipt that commits to another challenge.

        Raises:
            ReceiptError: it does.
        """
        if receipt.challenge_commitment != self.commitment(receipt.client_key):
            raise ReceiptError(
                "expected the challenge commitment that came with the round; the receipt has "
                "another; fetch the round and encrypt anew"
            )

    def __repr__(self) -> str:
        return "Challenger(OMITTED)"
