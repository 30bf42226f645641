"""TenSEAL's `CKKSVector` under one public key, in two ways to use it.

``common``: N = 8192, moduli of 60, 40 and 40 bits, scale 2**40, a vector for every 4096 values of
the model. ``fedml_he``: N = 8192, moduli of 60, 40, 40 and 60 bits, scale 2**52, a vector for each
tensor, which TenSEAL splits by itself. These are the parameters of the context that FedML has in
its repository (commit 03e11dfee69a, ``python/fedml/core/fhe``), and the steps of its code there, of
the system in Jin et al. 2023, "FedML-HE: An Efficient Homomorphic-Encryption-Based
Privacy-Preserving Federated Learning System". The calls are ours; FedML divides by the number of
clients before it encrypts, here that comes last.

Whoever has the secret key could open each upload as well as the sum, and nothing says who sent
what: neither is part of what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ._flat import flatten, shaped

if TYPE_CHECKING:
    from secagg_bench.peers.worker import Clock

_DEGREE = 8192
_SLOTS = _DEGREE // 2
_CONTEXTS = {"common": ([60, 40, 40], 40), "fedml_he": ([60, 40, 40, 60], 52)}
"""Bits of the moduli, and of the scale."""


class System:
    """Keys are made once and stay for all rounds.

    Args:
        use: ``"common"`` or ``"fedml_he"``.
    """

    DISTRIBUTIONS: ClassVar = ("tenseal",)

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        use: str = "common",
    ) -> None:
        import tenseal

        moduli, scale = _CONTEXTS[use]
        self._whole_tensors = use == "fedml_he"
        self._tenseal: Any = tenseal
        self._secret = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, _DEGREE, coeff_mod_bit_sizes=moduli, n_threads=1
        )
        self._secret.global_scale = 2.0**scale
        self._public = self._secret.copy()
        self._public.make_context_public()
        self._shapes, self._clock = shapes, clock
        self._sum: list[Any] = []
        self._added = 0

    def round(self) -> None:
        """Forget the sum."""
        self._sum, self._added = [], 0

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """A message for each vector."""
        if self._whole_tensors:
            vectors = [each.reshape(-1) for each in update.values()]
        else:
            values = flatten(update)
            vectors = np.split(values, range(_SLOTS, values.size, _SLOTS))
        return [self._tenseal.ckks_vector(self._public, each).serialize() for each in vectors]

    def add(self, number: int, messages: list[bytes]) -> None:
        """Parsing includes what SEAL checks of a ciphertext; there is nothing else to check."""
        with self._clock.part("parse"):
            vectors = [self._tenseal.ckks_vector_from(self._public, each) for each in messages]
        if self._added:
            for total, vector in zip(self._sum, vectors, strict=True):
                total += vector
        else:
            self._sum = vectors
        self._added += 1

    def hand_over(self) -> list[bytes]:
        """A message for each vector of the sum."""
        return [each.serialize() for each in self._sum]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float64."""
        with self._clock.part("parse"):
            vectors = [self._tenseal.ckks_vector_from(self._secret, each) for each in messages]
        total = np.concatenate([np.asarray(each.decrypt()) for each in vectors])
        return shaped(total / self._added, self._shapes)
