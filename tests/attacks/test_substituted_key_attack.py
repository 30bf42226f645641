"""A server that puts a round key of its own in the place of the key holder's.

Every client then seals its seed to the server, which opens each upload alone: the man in the middle
of any key exchange that nobody authenticates. Broken: a client that takes the round key that it is
shown. Ours pins the key holder's identity and takes no round without its signature on the context.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attacker import Integers, PuppetSession, key_of, read, residues, signer

from secagg.context import NO_MODEL, RoundContext
from secagg.endorsement import Endorsement
from secagg.errors import SealError, UntrustedKeyError
from secagg.keyholder import KeyHolder
from secagg.planner import plan_integers
from secagg.provision import Federation
from secagg.quantize import dequantize_integers
from secagg.receipts import SigningKey
from secagg.sealing import RoundKeyPair, seal_info
from secagg.upload import Upload
from secagg.wire.codec import context_id_to_wire, plan_to_wire
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client import session as client_session
from secagg_client.session import ClientKit
from secagg_keyholder.vault import load_identity

SIZE = 50
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
PASSPHRASE = "1" * 64
UPDATE = np.random.default_rng(1).integers(-100, 100, SIZE, endpoint=True)


def context_for(pair: RoundKeyPair, round_number: int = 1, attempt: int = 1) -> RoundContext:
    return KeyHolder(PLAN, pair=pair, round_number=round_number, attempt=attempt).context


def announced(context: RoundContext, endorsement: Endorsement | None) -> pb.GetRoundResponse:
    answer = pb.GetRoundResponse(
        context=context_id_to_wire(context.id),
        plan=plan_to_wire(context.plan),
        round_key=context.round_key,
        rounds_total=1,
    )
    if endorsement is not None:
        answer.key_holder_identity = endorsement.identity
        answer.round_key_signature = endorsement.signature
    return answer


def read_by_server(context: RoundContext, pair: RoundKeyPair, upload: Upload) -> Integers:
    """What the server gets out of one upload when the round key is its own."""
    receipt = upload.admission.receipt
    info = seal_info(context.id.digest, receipt.client_key, receipt.upload_digest)
    seed = pair.open(upload.admission.sealed_seed, info)
    return read(context, key_of([seed]), residues(upload))[0]


def unsigned(released: Integers, context: RoundContext) -> Integers:
    """An integer segment without its public signs."""
    return dequantize_integers(PLAN.segments[0], released, rotation=context.rotation)  # type: ignore[arg-type]


# --- broken ---------------------------------------------------------------------------------------


def test_a_client_without_a_pin_is_read_alone() -> None:
    own = RoundKeyPair()
    context = context_for(own)
    # Our own client as it is on loopback without TLS: it has nothing to check a round key against.
    with PuppetSession(signer("victim"), {"GetRound": announced(context, None)}) as session:
        next(session.rounds()).contribute({"counts": UPDATE})
    (upload,) = session.sent
    opened = read_by_server(context, own, upload)
    assert np.array_equal(unsigned(opened, context), UPDATE)


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "federation"
    Federation.create(
        folder,
        server_hosts=["localhost", "127.0.0.1"],
        key_holder_hosts=["localhost"],
        clients=["victim"],
        passphrase=PASSPHRASE,
    )
    return folder


@pytest.fixture(scope="module")
def key_holder(federation: Path) -> SigningKey:
    return load_identity(federation / "keyholder" / "identity.key", PASSPHRASE)


@pytest.fixture
def kit(federation: Path) -> ClientKit:
    return ClientKit.load(federation / "clients" / "victim")


Forgery = Callable[[SigningKey, RoundContext], Endorsement]


def of_another_round(key_holder: SigningKey, _: RoundContext) -> Endorsement:
    """A genuine signature, for a genuine round key: not for this one."""
    return Endorsement.sign(key_holder, context_for(RoundKeyPair()).id)


FORGERIES: dict[str, Forgery] = {
    "nobody's": lambda key_holder, _: Endorsement(key_holder.public, bytes(64)),
    "none": lambda key_holder, _: Endorsement(key_holder.public, b""),
    "the server's own": lambda _, context: Endorsement.sign(signer("server"), context.id),
    "the server's, in the key holder's name": lambda key_holder, context: Endorsement(
        key_holder.public, Endorsement.sign(signer("server"), context.id).signature
    ),
    "the key holder's, on another round key": of_another_round,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_ours_refuses_before_anything_is_encrypted(
    forgery: str, kit: ClientKit, key_holder: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Upload:
        raise AssertionError("something was encrypted")

    monkeypatch.setattr(client_session, "encrypt_quantized", never)
    context = context_for(RoundKeyPair())
    answer = announced(context, FORGERIES[forgery](key_holder, context))
    with PuppetSession(kit, {"GetRound": answer}) as session:
        with pytest.raises(UntrustedKeyError):
            next(session.rounds())
        assert session.sent == []


def test_ours_takes_an_endorsement_for_its_own_round_and_attempt_only(
    kit: ClientKit, key_holder: SigningKey
) -> None:
    # The same round key throughout: a signature on it alone would pass.
    pair = RoundKeyPair()
    endorsement = Endorsement.sign(key_holder, context_for(pair).id)
    for other in (context_for(pair, round_number=2), context_for(pair, attempt=2)):
        answers = {"GetRound": announced(other, endorsement)}
        with PuppetSession(kit, answers) as session, pytest.raises(UntrustedKeyError):
            next(session.rounds())


def test_ours_contributes_where_the_pinned_key_holder_has_signed(
    kit: ClientKit, key_holder: SigningKey
) -> None:
    holder = KeyHolder(PLAN)
    answer = announced(holder.context, Endorsement.sign(key_holder, holder.context.id))
    assert holder.context.id.model_digest == NO_MODEL
    with PuppetSession(kit, {"GetRound": answer}) as session:
        next(session.rounds()).contribute({"counts": UPDATE})
    holder.admit(session.sent[0].admission)
    # The server has every byte of this upload, and a key of its own that opens none of it.
    with pytest.raises(SealError):
        read_by_server(holder.context, RoundKeyPair(), session.sent[0])
