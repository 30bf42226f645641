"""What the server computes on uploads that lie on its disk: sums, sketches, low bits.

One chunk of one upload is in memory at a time, whatever the number of clients. The heavy parts run
wherever ``compute`` runs them, such as in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.instruments import SILENT, Meter
from secagg.noise_audit import dithered
from secagg.parameters import Plan
from secagg.receipts import Receipt
from secagg.residues import ResidueSum, folded, widen
from secagg.rpc.metrics import OPERATIONS
from secagg.sampling import Stream
from secagg.sketches import Sketch
from secagg.transcript import digest
from secagg_server.blobs import BlobStore

__all__ = ["Ciphertexts", "here"]


def here(work: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - any result
    """Run a calculation where it is asked for."""
    return work(*arguments)


class Ciphertexts:
    """Uploads of any round, by the SHA-256 of their bytes.

    Args:
        compute: runs calculations that hold the interpreter's lock; called from threads.
        secret: 32 bytes that outlive a restart, so that a second audit has the dither of the first.
        meter: times sums; what ``compute`` runs is timed there.
    """

    def __init__(
        self,
        blobs: BlobStore,
        compute: Callable[..., Any],
        secret: bytes,
        meter: Meter = SILENT,
    ) -> None:
        self._blobs = blobs
        self._compute = compute
        self._secret = secret
        self._meter = meter

    def total(self, context: RoundContext, names: Sequence[bytes]) -> NDArray[np.uint64]:
        """The sum of these uploads, their noise added to what it hides.

        Returns:
            uint64 of shape (plan.sum_blocks, 4096), below q.
        """
        with self._meter.timed(OPERATIONS, operation="add"):
            parts = []
            for index in range(context.plan.chunks):
                running = ResidueSum(context.plan.chunk_blocks(index))
                for name in names:
                    running.add(self._residues(context, name, index))
                parts.append(running.value())
            return folded(np.concatenate(parts), context.plan.sum_blocks)

    def low_bits(
        self, context: RoundContext, residues: NDArray[np.uint64], *names: bytes
    ) -> NDArray[np.uint32]:
        """Low bits of what these uploads add up to; the same ones whenever they are needed."""
        key = digest("dither", self._secret, context.id.digest, *sorted(names))
        low: NDArray[np.uint32] = self._compute(_low_bits, context.plan, residues, key)
        return low

    def low_bits_of(self, context: RoundContext, name: bytes) -> NDArray[np.uint32]:
        """Low bits of one upload, for its audit."""
        chunks = range(context.plan.chunks)
        residues = np.concatenate([self._residues(context, name, index) for index in chunks])
        return self.low_bits(context, residues, name)

    def sketch(self, challenger: Challenger, plan: Plan, receipt: Receipt) -> Sketch:
        """What the key holder is shown of an upload.

        Raises:
            ReceiptError: its receipt holds another commitment.
        """
        sketch: Sketch = self._compute(_sketch, challenger, self._blobs, plan, receipt)
        return sketch

    def _residues(self, context: RoundContext, name: bytes, index: int) -> NDArray[np.uint64]:
        return widen(self._blobs.chunk(context.id, name, index), context.plan.chunk_blocks(index))


# Module level: they may run in another process. By their names they are timed.


def _low_bits(plan: Plan, residues: NDArray[np.uint64], key: bytes) -> NDArray[np.uint32]:
    return dithered(plan, residues, Stream(key))


def _sketch(challenger: Challenger, blobs: BlobStore, plan: Plan, receipt: Receipt) -> Sketch:
    chunks = (
        widen(blobs.chunk(receipt.context, receipt.upload_digest, index), plan.chunk_blocks(index))
        for index in range(plan.chunks)
    )
    return challenger.sketch_validated(receipt, chunks)
