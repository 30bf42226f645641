"""Small plans, clients and uploads. Client i contributes values that name it in any sum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from secagg import encryptor
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.enrolment import Enrolment, Member, Roster
from secagg.keyholder import KeyHolder
from secagg.parameters import (
    BLOCK_BYTES,
    MODULUS,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg.quantize import Quantized, quantize
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.residues import narrow
from secagg.sampling import Stream, uniform_polynomials
from secagg.sealing import SEALED_SEED_BYTES
from secagg.upload import Admission, Upload

__all__ = [
    "ABOVE_MODULUS",
    "ChangingRoster",
    "broken_seal",
    "chunk",
    "clear_sums",
    "contribution",
    "counts_plan",
    "encrypted",
    "enrolment",
    "identity",
    "long_plan",
    "mixed_plan",
    "name_of",
    "noise_upload",
    "off_grid",
    "out_of_range",
    "quantized",
    "replayed",
    "round_context",
    "samples",
]

TENSORS = (TensorSpec("a/weight", (3, 2)), TensorSpec("b", ()), TensorSpec("c", (4,)))
COUNTS = 24
COUNTS_NORM = 1000.0  # where it is checked

ABOVE_MODULUS = MODULUS.to_bytes(7, "little")
"""One residue that is exactly q, in its wire form."""


def mixed_plan(
    *, min_clients: int = 3, max_clients: int = 6, norm_check: NormCheck | None = None
) -> Plan:
    """A weighted model update and a vector of counts: 2 polynomials, 1 chunk."""
    segments = [
        FloatSegment("update", TENSORS, 2.0, 10, "samples", 100),
        IntegerSegment("counts", COUNTS, 1 << 20, None if norm_check is None else COUNTS_NORM),
    ]
    return make_plan(
        segments, min_clients=min_clients, max_clients=max_clients, norm_check=norm_check
    )


def counts_plan(*, min_clients: int = 3, max_clients: int = 6) -> Plan:
    """Counts alone: 1 polynomial, 1 chunk, no model."""
    segment = IntegerSegment("counts", COUNTS, 1 << 20)
    return make_plan([segment], min_clients=min_clients, max_clients=max_clients)


def long_plan(*, max_clients: int = 6) -> Plan:
    """Integers that fill 70 polynomials: chunks of 32, 32 and 6."""
    plan = make_plan([IntegerSegment("wide", 70 * 4096, 10**9)], max_clients=max_clients)
    assert (plan.blocks, plan.chunks) == (70, 3)
    return plan


def round_context(plan: Plan, **name: Any) -> RoundContext:  # noqa: ANN401 - names of a context
    """A context with a round key that nobody needs to open."""
    return KeyHolder(plan, **name).context


def identity(index: int) -> SigningKey:
    """Client i's key: the same in every run."""
    return SigningKey.from_bytes(hashlib.sha256(f"client {index}".encode()).digest())


def samples(index: int) -> int:
    """Samples behind client i's update."""
    return 10 + 7 * index


def contribution(plan: Plan, index: int) -> dict[str, Any]:
    """What client i contributes: counts of 2**i and i, floats of its own."""
    values: dict[str, Any] = {}
    for segment in plan.segments:
        if isinstance(segment, IntegerSegment):
            numbers = np.full(segment.size, 1 << index, dtype=np.int64)
            numbers[index % segment.size] = index
            values[segment.name] = numbers
        else:
            values[segment.name] = {
                tensor.name: np.full(tensor.shape, 0.01 * (index + 1) * (-1) ** place)
                for place, tensor in enumerate(segment.tensors)
            }
    return values


def rounding(context: RoundContext, index: int) -> Stream:
    """Client i's repeatable stochastic rounding in a round, whatever the attempt."""
    return Stream.derive("test rounding", context.id.task_id, context.id.round_number, index)


def quantized(context: RoundContext, index: int) -> list[Quantized]:
    """Client i's integers."""
    return quantize(
        context.plan,
        contribution(context.plan, index),
        samples=samples(index),
        rotation=context.rotation,
        randomness=rounding(context, index),
    )


def encrypted(context: RoundContext, index: int, commitment: bytes = NO_COMMITMENT) -> Upload:
    """Client i's upload; encrypting twice gives two different ones."""
    return encrypt_quantized(context, quantized(context, index), identity(index), commitment)


def clear_sums(context: RoundContext, indexes: Iterable[int]) -> list[NDArray[np.int64]]:
    """What the sum over these clients must be, exactly, computed without any cipher."""
    per_client = [[part.summand for part in quantized(context, index)] for index in indexes]
    return [sum(parts[1:], start=parts[0]) for parts in zip(*per_client, strict=True)]


def noise_upload(context: RoundContext, index: int, nonce: int = 0) -> Upload:
    """A validly signed upload of random residues under a seal that opens nothing; cheap."""
    stream = Stream.derive("noise upload", index, nonce)
    payload = narrow(uniform_polynomials(stream, context.plan.blocks))
    sealed = stream.read(SEALED_SEED_BYTES)
    digest = hashlib.sha256(payload).digest()
    return Upload(
        Admission(Receipt.sign(identity(index), context.id, digest, sealed), sealed), payload
    )


def off_grid(context: RoundContext, index: int) -> Upload:
    """Client i's upload with half a step on coefficient i, correctly signed and sealed.

    One coefficient each: two halves at the same place are a whole step, which is on the grid.
    """
    return _shifted(context, index, 1 << (context.plan.layouts[0].shift - 1))


def out_of_range(context: RoundContext, index: int) -> Upload:
    """Client i's upload with one value that no cohort can reach; on the grid, signed and sealed."""
    layout = context.plan.layouts[0]
    # In the top digit, which nothing reduces, and above what the largest cohort sums up to.
    value = (context.plan.max_clients + 1) * layout.max_abs * layout.base ** (layout.digits - 1)
    return _shifted(context, index, value << layout.shift)


def _shifted(context: RoundContext, index: int, offset: int) -> Upload:
    def errors(seed: bytes, blocks: int) -> NDArray[np.int64]:
        drawn = encryptor_errors(seed, blocks)
        drawn[0, index] += offset
        return drawn

    encryptor_errors = encryptor.errors
    with mock.patch.object(encryptor, "errors", errors):
        return encrypted(context, index)


def replayed(context: RoundContext, index: int, upload: Upload) -> Upload:
    """The bytes and seal of an upload under client i's receipt for a round."""
    name, sealed = upload.admission.receipt.upload_digest, upload.admission.sealed_seed
    receipt = Receipt.sign(identity(index), context.id, name, sealed)
    return replace(upload, admission=Admission(receipt, sealed))


def broken_seal(context: RoundContext, index: int) -> Upload:
    """Client i's upload with a sealed seed that does not open, under a valid receipt."""
    upload = encrypted(context, index)
    receipt, sealed = upload.admission.receipt, bytearray(upload.admission.sealed_seed)
    sealed[-1] ^= 1
    signed = Receipt.sign(identity(index), context.id, receipt.upload_digest, bytes(sealed))
    return replace(upload, admission=Admission(signed, bytes(sealed)))


def chunk(upload: Upload, index: int) -> bytes:
    """Chunk ``index`` of an upload."""
    size = 32 * BLOCK_BYTES
    return upload.payload[index * size : (index + 1) * size]


def name_of(index: int) -> str:
    """Client i's name where it is enrolled."""
    return f"client-{index}"


def enrolment(
    indexes: Iterable[int],
    *,
    revoked: Iterable[int] = (),
    second_keys: dict[int, int] | None = None,
) -> Enrolment:
    """A list of these clients.

    Args:
        second_keys: whose key one of them has beside its own, as while keys are rotated.
    """
    gone, second = set(revoked), second_keys or {}
    members = {}
    for index in indexes:
        keys = [identity(i).public for i in (index, second.get(index)) if i is not None]
        members[name_of(index)] = Member(name_of(index), tuple(keys), index in gone)
    return Enrolment(1, members, (bytes(32),))


class ChangingRoster:
    """An enrolment that tests replace while it is in use; implements `Roster`."""

    def __init__(self, enrolment: Roster) -> None:
        self.enrolment = enrolment

    def client_of(self, signing_key: bytes) -> str:
        """See `Roster`."""
        return self.enrolment.client_of(signing_key)

    def require(self, name: str) -> Member:
        """See `Roster`."""
        return self.enrolment.require(name)

    def check_certificate(self, serial_number: int) -> None:
        """See `Roster`."""
        self.enrolment.check_certificate(serial_number)

    def active(self) -> list[str]:
        """See `Roster`."""
        return self.enrolment.active()
