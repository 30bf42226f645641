"""What nobody does without who adds up ciphertexts like these; not a system: it protects nothing.

* A client samples its errors, expands the public polynomials and transforms its message; quantising
  it, the product with the key, and everything about bytes are left out. SEAL's transform stands for
  any: there may be faster ones.
* The server adds words that lie in its memory, in one pass.
* Who opens the sum expands the public polynomials and transforms back.
* An upload is as long as the entropy of what was quantised, and room for the sum of as many clients
  as the plan has: no code is shorter that can be added without being opened.

The updates are summed up beside it, so that there is a mean to answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ._flat import flatten, shaped

if TYPE_CHECKING:
    from secagg.parameters import Plan
    from secagg.ring import Residues
    from secagg_bench.peers.worker import Clock


class System:
    """Polynomials of the plan that `ours` makes of the same options."""

    DISTRIBUTIONS: ClassVar = ("secagg", "tenseal", "cryptography")

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        bits: int = 8,
        max_clients: int | None = None,
    ) -> None:
        from secagg.planner import plan_tensors
        from secagg.sampling import Stream, uniform_polynomials

        self._shapes, self._clock = shapes, clock
        self._plan: Plan = plan_tensors(
            shapes, max_clients=max_clients or clients, clip=1.0, bits=bits
        )
        self._polynomials: Residues = uniform_polynomials(Stream(bytes(32)), self._plan.blocks)
        self._total = self._polynomials.copy()

    def round(self) -> None:
        """Forget the sum of the updates."""
        self._updates: dict[int, NDArray[np.float64]] = {}
        self._added: list[int] = []

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """Bytes that mean nothing, as many as there must be."""
        from secagg.onetime import errors

        with self._clock.beside("preparation"):
            self._updates[number] = flatten(update).astype(np.float64)
            size = self._least_bytes(update)
        self._expand()
        errors(bytes(32), self._plan.blocks)
        self._transform(back=False)
        return [bytes(size)]

    def _least_bytes(self, update: Mapping[str, NDArray[np.float32]]) -> int:
        from secagg.quantize import quantize
        from secagg.sampling import Stream

        (part,) = quantize(
            self._plan,
            {self._plan.segments[0].name: update},
            samples=1,
            rotation=bytes(32),
            randomness=Stream(bytes(32)),
        )
        counts = np.unique(part.values, return_counts=True)[1] / part.values.size
        entropy = -float(counts @ np.log2(counts))
        values = sum(each.size for each in update.values())
        bits = values * (entropy + math.log2(self._plan.max_clients))
        return math.ceil(bits / 8)

    def _expand(self) -> None:
        from secagg.sampling import Stream, uniform_polynomials

        uniform_polynomials(Stream(bytes(32)), self._plan.blocks)

    def _transform(self, *, back: bool) -> None:
        from secagg import ring

        for ciphertext in self._loaded(ntt=back):
            if back:
                ring.EVALUATOR.transform_from_ntt_inplace(ciphertext)
            else:
                ring.EVALUATOR.transform_to_ntt_inplace(ciphertext)

    def _loaded(self, *, ntt: bool) -> Iterator[Any]:
        """SEAL's copies of the polynomials; what it takes to make them does not count."""
        from secagg import ring

        for batch in ring.batches(self._plan.blocks):
            with self._clock.beside("preparation"):
                part = self._polynomials[batch]
                ciphertext = ring.load(part if ntt else part.view(np.int64), ntt=ntt)
            yield ciphertext

    def add(self, number: int, messages: list[bytes]) -> None:
        """One pass over the memory that the sum and the upload take."""
        np.add(self._total, self._polynomials, out=self._total)
        self._added.append(number)

    def hand_over(self) -> list[bytes]:
        """The words of the sum."""
        return [self._total.tobytes()]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, from the updates themselves."""
        self._expand()
        self._transform(back=True)
        with self._clock.beside("preparation"):
            mean = sum(self._updates[each] for each in self._added) / len(self._added)
            return shaped(np.asarray(mean), self._shapes)
