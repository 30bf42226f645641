"""What attackers can do: choose seeds and noise, add ciphertexts, read what they have keys of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secagg import ckks, onetime, ring
from secagg.context import RoundContext
from secagg.enrolment import Enrolment, Member
from secagg.packing import pack, unpack
from secagg.parameters import Plan
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey
from secagg.residues import ResidueSum, narrow, widen
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload
from secagg_client.session import ClientKit, ClientSession

__all__ = [
    "Integers",
    "PuppetSession",
    "Residues",
    "coefficients",
    "enrolment",
    "key_of",
    "name_of",
    "named",
    "read",
    "residues",
    "signer",
    "summed",
    "upload_under",
]

Integers = NDArray[np.int64]
Residues = NDArray[np.uint64]


def named(label: str, *fields: str | int) -> bytes:
    """32 bytes that are the same in every run: a seed, or a private key."""
    return hashlib.sha256(repr((label, *fields)).encode()).digest()


def signer(name: str) -> SigningKey:
    """The signing key of whoever has this name, the same in every run."""
    return SigningKey.from_bytes(named("signer", name))


def enrolment(keys: Mapping[str, Sequence[SigningKey]]) -> Enrolment:
    """An authority's list of these clients and their keys."""
    members = {name: Member(name, tuple(k.public for k in held)) for name, held in keys.items()}
    return Enrolment(1, members, (signer("key holder").public,))


def coefficients(plan: Plan, parts: Sequence[Integers]) -> Integers:
    """Packed integers, one array a segment, whether or not they are in range."""
    packed = [pack(layout, part) for layout, part in zip(plan.layouts, parts, strict=True)]
    return np.concatenate(packed)


def key_of(seeds: Iterable[bytes]) -> Residues:
    """The sum of the one-time keys of these seeds, in NTT form."""
    return ring.to_ntt(sum(onetime.secret(seed) for seed in seeds)[None])[0]  # type: ignore[index]


def upload_under(
    context: RoundContext,
    parts: Sequence[Integers],
    identity: SigningKey,
    seed: bytes,
    noise: Integers | None = None,
    commitment: bytes = NO_COMMITMENT,
) -> Upload:
    """A validly signed upload under a seed, and with a noise, of the attacker's own choosing."""
    plan = context.plan
    if noise is None:
        noise = onetime.errors(named("errors", seed.hex()), plan.blocks)
    plaintext = coefficients(plan, parts) + noise
    sealed_bytes = ckks.encrypt(plaintext, context.public_polynomials(), key_of([seed]))
    payload = narrow(sealed_bytes)
    name = hashlib.sha256(payload).digest()
    info = seal_info(context.id.digest, identity.public, name)
    sealed = seal(seed, context.round_key, info)
    receipt = Receipt.sign(identity, context.id, name, sealed, commitment)
    return Upload(Admission(receipt, sealed), payload)


def name_of(upload: Upload) -> bytes:
    """The digest under which manifests list an upload."""
    return upload.admission.receipt.upload_digest


def residues(upload: Upload) -> Residues:
    """An upload's ciphertexts."""
    return widen(upload.payload, len(upload.payload) // (7 * 4096))


def summed(uploads: Sequence[Upload]) -> Residues:
    """The sum of these ciphertexts, whoever sent them."""
    running = ResidueSum(len(residues(uploads[0])))
    for upload in uploads:
        running.add(residues(upload))
    return running.value()


def read(
    context: RoundContext, key: Residues, ciphertexts: Residues, clients: int = 1
) -> list[Integers]:
    """What these ciphertexts say to whoever has the key, one array a segment.

    Raises:
        ReleaseError: nothing, with this key.
    """
    opened = ckks.decrypt(ciphertexts, context.public_polynomials(), key)
    ranges = context.plan.block_ranges()
    return [unpack(layout, opened[blocks], clients) for _, layout, blocks in ranges]


class PuppetSession(ClientSession):
    """The real client, before a server that answers what the attacker wrote.

    Attributes:
        answers: what to answer, by the name of the rpc; an exception is raised.
        sent: every upload that this client let go, in order.
    """

    def __init__(
        self,
        credentials: ClientKit | SigningKey,
        answers: dict[str, Any] | None = None,
        outbox: Path | None = None,
    ) -> None:
        # Nobody listens there, and nobody is called.
        super().__init__(
            "127.0.0.1:9",
            "task",
            credentials,
            insecure=isinstance(credentials, SigningKey),
            outbox=outbox,
        )
        self.answers = answers or {}
        self.sent: list[Upload] = []

    def send(self, context: RoundContext, upload: Upload) -> None:
        """Keep what would have been uploaded; the answer may be an error."""
        self.sent.append(upload)
        if error := self.answers.get("Upload"):
            raise error

    def _call(self, method: Callable[..., Any], request: object) -> Any:  # noqa: ANN401
        return self.answers[type(request).__name__.removesuffix("Request")]
