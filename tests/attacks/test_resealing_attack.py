"""A server that surrounds its victim with uploads whose seeds it knows.

Whatever opens is then the victim's update and numbers of the server's own. It needs seals that the
key holder opens, and a quorum of clients, so there are two schemes to break: seals without receipts
(the server reseals in other clients' names), and receipts without an enrolment (the server invents
clients, as in any Sybil attack). Willow (eprint 2024/936) leaves both to its setting as well.

Ours signs the hash of the seal in the receipt, and counts only clients that the authority enrolled.
Two enrolled clients that conspire with the server still learn the third of a cohort of three: no
cryptography tells a conspirator from a client, a larger `min_clients` does.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    enrolment,
    key_of,
    name_of,
    named,
    read,
    signer,
    summed,
    upload_under,
)
from key_holders import durable_rounds

from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.enrolment import Enrolment, Member
from secagg.errors import (
    NotEnrolledError,
    QuorumError,
    ReceiptError,
    ReleaseError,
    RevokedError,
    SealError,
)
from secagg.keyholder import KeyHolder
from secagg.planner import plan_integers
from secagg.receipts import Receipt
from secagg.sealing import RoundKeyPair, seal, seal_info
from secagg.upload import Admission, Upload
from secagg_keyholder.rounds import Rounds

SIZE = 50
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
NAMES = ["victim", "bystander-1", "bystander-2", "bystander-3"]
NOTHING = [np.zeros(SIZE, np.int64)]
UPDATE = [np.random.default_rng(1).integers(-100, 100, SIZE, endpoint=True)]


def honest(context: RoundContext, name: str) -> Upload:
    return upload_under(context, UPDATE, signer(name), named("the client's own seed", name))


def invented(context: RoundContext, name: str) -> Upload:
    """An upload of zeros under a key and a seed of the server's own."""
    return upload_under(context, NOTHING, signer(name), named("the server's seed", name))


# --- broken ---------------------------------------------------------------------------------------


class SealsAlone:
    """Broken: a manifest is names with sealed seeds, and a seal shows nothing of its maker."""

    def __init__(self) -> None:
        self._pair = RoundKeyPair()
        self.context = RoundContext.create(
            PLAN,
            self._pair.public,
            task_id="task",
            round_number=1,
            attempt=1,
            model_digest=NO_MODEL,
        )

    def release(self, manifest: dict[str, bytes], residues: Residues) -> list[Integers]:
        assert len(manifest) >= 3
        seeds = [self._pair.open(sealed, b"") for sealed in manifest.values()]
        return read(self.context, key_of(seeds), residues, len(seeds))


def test_seals_without_receipts_single_out_a_victim() -> None:
    scheme = SealsAlone()
    victim = honest(scheme.context, "victim")
    public, own = scheme.context.round_key, named("the client's own seed", "victim")
    manifest, fakes = {"victim": seal(own, public, b"")}, []
    for name in NAMES[1:]:
        fakes.append(invented(scheme.context, name))
        manifest[name] = seal(named("the server's seed", name), public, b"")
    opened = scheme.release(manifest, summed([victim, *fakes]))
    assert np.array_equal(opened[0], UPDATE[0])


def test_receipts_without_an_enrolment_count_clients_that_the_server_invented() -> None:
    holder = KeyHolder(PLAN)  # the open enrolment: for plaintext on loopback
    uploads = [honest(holder.context, "victim")]
    uploads += [invented(holder.context, f"invented {i}") for i in range(PLAN.min_clients - 1)]
    manifest = tuple(upload.admission for upload in uploads)
    released = holder.release(Aggregate(manifest, summed(uploads)))
    assert np.array_equal(released.sums[0], UPDATE[0])


# --- ours -----------------------------------------------------------------------------------------


def roster() -> Enrolment:
    listed = enrolment({name: [signer(name)] for name in NAMES})
    gone = Member("revoked", (signer("revoked").public,), revoked=True)
    return replace(listed, members={**listed.members, "revoked": gone})


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return durable_rounds(tmp_path, roster=roster())


@pytest.fixture
def context(rounds: Rounds) -> RoundContext:
    return rounds.open(PLAN, "task", 1, 1, NO_MODEL)[0]


def test_ours_admits_nobody_whom_the_authority_has_not_enrolled(
    rounds: Rounds, context: RoundContext
) -> None:
    uploads = [honest(context, "victim"), *(invented(context, f"invented {i}") for i in range(4))]
    uploads.append(invented(context, "revoked"))
    verdicts = rounds.judge(context.id, [upload.admission for upload in uploads])
    assert verdicts == ["", *[NotEnrolledError.reason] * 4, RevokedError.reason]
    # Neither the victim alone, nor with those that were refused.
    with pytest.raises(QuorumError):
        rounds.release(context.id, [name_of(uploads[0])], summed(uploads[:1]))
    with pytest.raises(SealError):
        rounds.release(context.id, [name_of(upload) for upload in uploads], summed(uploads))


def test_ours_counts_neither_a_client_nor_a_receipt_twice_to_reach_the_quorum(
    rounds: Rounds, context: RoundContext
) -> None:
    victim, other = honest(context, "victim"), honest(context, "bystander-1")
    assert rounds.judge(context.id, [victim.admission, other.admission] * 2) == [""] * 4
    with pytest.raises(QuorumError):
        rounds.release(context.id, [name_of(victim), name_of(other)], summed([victim, other]))


FORGERIES = ["another seal", "another seal and its hash", "the server's signature"]


def forged(context: RoundContext, name: str, how: str) -> Admission:
    """The server's upload in the name of an enrolled client."""
    upload = invented(context, name)
    bystander = honest(context, name).admission.receipt
    receipt = replace(bystander, upload_digest=name_of(upload))
    if how != "another seal":
        sealed_sha256 = hashlib.sha256(upload.admission.sealed_seed).digest()
        receipt = replace(receipt, sealed_seed_sha256=sealed_sha256)
    if how == "the server's signature":
        own = Receipt.sign(
            signer("server"), context.id, name_of(upload), upload.admission.sealed_seed
        )
        receipt = replace(receipt, signature=own.signature)
    return Admission(receipt, upload.admission.sealed_seed)


@pytest.mark.parametrize("how", FORGERIES)
def test_ours_opens_no_seal_that_the_client_has_not_signed(
    rounds: Rounds, context: RoundContext, how: str
) -> None:
    victim = honest(context, "victim")
    fakes = [forged(context, name, how) for name in NAMES[1:]]
    verdicts = rounds.judge(context.id, [victim.admission, *fakes])
    assert verdicts == ["", *[ReceiptError.reason] * 3]
    names = [name_of(victim), *(fake.receipt.upload_digest for fake in fakes)]
    with pytest.raises(SealError):
        rounds.release(context.id, names, summed([victim]))


def test_ours_opens_no_seed_of_the_servers_beside_a_clients_own_receipt(
    rounds: Rounds, context: RoundContext
) -> None:
    """Receipts and names are honest; seeds and summands of all but the victim are the server's."""
    victim, *others = (honest(context, name) for name in NAMES)
    swapped = [
        Admission(
            other.admission.receipt,
            seal(
                named("the server's seed", name),
                context.round_key,
                seal_info(context.id.digest, signer(name).public, name_of(other)),
            ),
        )
        for name, other in zip(NAMES[1:], others, strict=True)
    ]
    verdicts = rounds.judge(context.id, [victim.admission, *swapped])
    assert verdicts == ["", *[ReceiptError.reason] * 3]
    names = [name_of(upload) for upload in (victim, *others)]
    with pytest.raises(SealError):
        rounds.release(
            context.id, names, summed([victim, *(invented(context, name) for name in NAMES[1:])])
        )


def test_ours_does_not_let_the_victims_receipt_stand_beside_other_ciphertexts(
    rounds: Rounds, context: RoundContext
) -> None:
    # The manifest is honest, and admitted; the sum is the victim's upload alone, or with zeros.
    uploads = [honest(context, name) for name in NAMES]
    assert rounds.judge(context.id, [upload.admission for upload in uploads]) == [""] * 4
    zeros = [invented(context, name) for name in NAMES[1:]]
    for summands in (uploads[:1], [uploads[0], *zeros]):
        with pytest.raises(ReleaseError):
            rounds.release(context.id, [name_of(upload) for upload in uploads], summed(summands))
