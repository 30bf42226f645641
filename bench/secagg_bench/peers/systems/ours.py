"""This library: a plan, one round key a round, and the bytes that travel.

A client quantises, encrypts, seals and signs; the server parses, checks receipt, SHA-256 and range,
and adds; the key holder admits each upload, opens the sum, and the mean is read from it. With the
norm check, a sketch of each upload goes to the key holder, which judges it before it opens.

Left out: transport, the store, enrolment (anybody's key will do), the key holder's endorsement of
the round and its journal, and its look at the low bits of the sum before it has the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from secagg.aggregator import Aggregator
    from secagg.challenger import Challenger
    from secagg.keyholder import KeyHolder
    from secagg.residues import ResidueSum
    from secagg_bench.peers.worker import Clock


class System:
    """Clients keep their signing keys; a round has a key of its own.

    Args:
        bits: of a quantised value.
        max_clients: that the plan is for; ``clients`` when omitted.
        norm_check: whether each upload is judged before the sum is opened.
        privacy: who adds noise, a mode of `secagg.parameters.Privacy`, with a multiplier of 1; no
            noise when omitted. That of any half of the clients is enough.
    """

    DISTRIBUTIONS: ClassVar = ("secagg", "tenseal", "cryptography")

    _holder: KeyHolder
    _challenger: Challenger
    _server: Aggregator
    _unauthenticated: ResidueSum

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        clients: int,
        clock: Clock,
        *,
        bits: int = 8,
        max_clients: int | None = None,
        norm_check: bool = False,
        privacy: str = "",
    ) -> None:
        from secagg.parameters import MIN_COHORT, NormCheck, Privacy
        from secagg.planner import plan_tensors
        from secagg.receipts import SigningKey

        self._checked, self._clock, self._number = norm_check, clock, 0
        self._plan = plan_tensors(
            shapes,
            max_clients=max_clients or clients,
            min_clients=max(MIN_COHORT, clients // 2),
            clip=1.0,
            bits=bits,
            norm_check=NormCheck() if norm_check else None,
            # No budget is kept here: that is the work of the key holder's service.
            privacy=Privacy(privacy, noise_multiplier=1.0, epsilon=8.0, delta=1e-5)
            if privacy
            else None,
        )
        self._identities = [SigningKey.generate() for _ in range(clients)]

    def round(self) -> None:
        """A new round key; the server's commitments, if it is to make sketches."""
        from secagg.aggregator import Aggregator
        from secagg.challenger import Challenger
        from secagg.keyholder import KeyHolder
        from secagg.receipts import NO_COMMITMENT
        from secagg.residues import ResidueSum

        self._number += 1
        self._holder = KeyHolder(self._plan, round_number=self._number)
        context = self._holder.context
        self._challenger, self._server = Challenger(context), Aggregator(context)
        self._unauthenticated = ResidueSum(self._plan.blocks)
        self._sketches: list[bytes] = []
        self._commitments = [
            self._challenger.commitment(each.public) if self._checked else NO_COMMITMENT
            for each in self._identities
        ]

    def client(self, number: int, update: Mapping[str, NDArray[np.float32]]) -> list[bytes]:
        """One message."""
        from secagg.encryptor import Encryptor
        from secagg.wire.codec import upload_to_bytes

        identity, commitment = self._identities[number], self._commitments[number]
        encryptor = Encryptor(self._holder.context, identity, commitment=commitment)
        return [upload_to_bytes(encryptor.encrypt(update))]

    def add(self, number: int, messages: list[bytes]) -> None:
        """Beside it, the part of it that others do too: no receipt, no SHA-256, no sketch."""
        from secagg.residues import widen
        from secagg.wire.codec import upload_from_bytes

        with self._clock.part("parse"):
            upload = upload_from_bytes(messages[0], self._plan)
        if self._checked:
            with self._clock.part("sketch"):
                residues = widen(upload.payload, self._plan.blocks)  # from where it is stored
                sketch = self._challenger.sketch_validated(upload.admission.receipt, [residues])
                self._sketches.append(sketch.to_bytes())
        self._server.add(upload)
        with self._clock.beside("unauthenticated"):
            parsed = upload_from_bytes(messages[0], self._plan)
            self._unauthenticated.add(widen(parsed.payload, self._plan.blocks))

    def hand_over(self) -> list[bytes]:
        """Admissions, sketches, and the sum's residues."""
        from secagg.residues import narrow
        from secagg.wire.codec import admission_to_wire

        total = self._server.aggregate()
        admissions = [admission_to_wire(each).SerializeToString() for each in total.manifest]
        return [*admissions, *self._sketches, narrow(total.residues)]

    def open(self, messages: list[bytes]) -> dict[str, NDArray[Any]]:
        """The mean, float64."""
        from secagg.residues import widen

        uploads = self._server.contributors
        with self._clock.part("admit"):
            names = [self._admitted(each) for each in messages[:uploads]]
        if self._checked:
            with self._clock.part("judge"):
                self._judge(names, messages[uploads:-1])
        with self._clock.part("release"):
            residues = widen(messages[-1], self._plan.sum_blocks)
            release = self._holder.release_admitted(names, residues)
        return release.mean()

    def _admitted(self, message: bytes) -> bytes:
        from secagg.wire.codec import admission_from_wire, parse
        from secagg.wire.v1 import round_pb2

        admission = admission_from_wire(parse(round_pb2.Admission, message))
        self._holder.admit(admission)
        return admission.receipt.upload_digest

    def _judge(self, names: Sequence[bytes], sketches: Sequence[bytes]) -> None:
        from secagg.sketches import Sketch

        for name, sketch in zip(names, sketches, strict=True):
            self._holder.submit_sketch(Sketch.from_bytes(self._plan, name, sketch))
        if not all(each.accepted for each in self._holder.verdicts()):
            raise RuntimeError("expected honest updates to pass the norm check; one was refused")
