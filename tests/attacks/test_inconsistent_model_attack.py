"""A server that shows different clients different models, or plans, for one round.

Secure aggregation hides who sent what, not what the sum is made of: models made so that everybody
but the victim computes an update of zero leave the victim's alone in an honest sum (Pasquini,
Francati and Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
2022). Broken: public polynomials that depend on the round's number only.

Ours hashes model and plan into the context: it is endorsed for one model and plan, clients compare
the model they download with it, seals and receipts are bound to it, and so are the polynomials:
ciphertexts made for different contexts do not add up to anything that opens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    PuppetSession,
    Residues,
    key_of,
    name_of,
    named,
    read,
    signer,
    summed,
    upload_under,
)
from key_holders import durable_rounds
from numpy.typing import NDArray

from secagg.context import NO_MODEL, ContextId, RoundContext
from secagg.errors import (
    ClosedError,
    ContextError,
    DuplicateError,
    ReleaseError,
    SealError,
    SecaggError,
)
from secagg.keyholder import KeyHolder
from secagg.parameters import Plan
from secagg.planner import plan_tensors
from secagg.receipts import Receipt
from secagg.sealing import RoundKeyPair, seal, seal_info
from secagg.upload import Admission, Upload
from secagg.wire.codec import (
    context_id_to_wire,
    model_digest,
    model_to_bytes,
    piece_count,
    plan_to_wire,
    tensors_to_wire,
)
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_keyholder.rounds import Rounds

Model = NDArray[np.float32]

SIZE = 64
PLAN = plan_tensors({"w": (SIZE,)}, max_clients=6, clip=1.0)
OTHER_PLAN = plan_tensors({"w": (SIZE,)}, max_clients=6, clip=2.0)
CLIENTS = ["victim", "alice", "bob", "carol"]
LIVE, DEAD = np.ones(SIZE, np.float32), np.full(SIZE, -1, np.float32)


def trained(model: Model, name: str) -> Integers:
    """A layer behind a ReLU: where its input is negative, there is no gradient and no update."""
    drawn = np.random.default_rng(list(name.encode())).integers(-100, 100, SIZE, endpoint=True)
    return np.where(model > 0, drawn, 0)


def shown(name: str) -> Model:
    """The live model for the victim, a dead one for everybody else."""
    return LIVE if name == "victim" else DEAD


def digest_of(model: Model) -> bytes:
    return model_digest(model_to_bytes(model))


def seed(name: str) -> bytes:
    return named("seed", name)


# --- broken ---------------------------------------------------------------------------------------


class RoundNumberOnly:
    """Broken: what binds the ciphertexts of a round together does not depend on the model."""

    def __init__(self) -> None:
        self.context = KeyHolder(PLAN, round_number=1, model_digest=NO_MODEL).context

    def upload(self, name: str) -> Upload:
        update = trained(shown(name), name)
        return upload_under(self.context, [update], signer(name), seed(name))

    def release(self, clients: list[str], sum_: Residues) -> Integers:
        assert len(clients) >= PLAN.min_clients
        return read(self.context, key_of([seed(name) for name in clients]), sum_, len(clients))[0]


def test_models_that_silence_everybody_else_leave_the_victim_alone_in_the_sum() -> None:
    scheme = RoundNumberOnly()
    opened = scheme.release(CLIENTS, summed([scheme.upload(name) for name in CLIENTS]))
    assert np.array_equal(opened, trained(LIVE, "victim"))
    assert np.count_nonzero(opened) > SIZE / 2


# --- ours -----------------------------------------------------------------------------------------

PAIR = RoundKeyPair()


def context_of(plan: Plan, model: Model) -> RoundContext:
    return KeyHolder(plan, pair=PAIR, model_digest=digest_of(model)).context


SHOWN: dict[str, Callable[[str], RoundContext]] = {
    "models": lambda name: context_of(PLAN, shown(name)),
    "plans": lambda name: context_of(PLAN if name == "victim" else OTHER_PLAN, LIVE),
}


def holder() -> KeyHolder:
    """The key holder's round is that of the victim; the server picks which."""
    return KeyHolder(PLAN, pair=PAIR, model_digest=digest_of(LIVE))


@pytest.mark.parametrize("differing", SHOWN)
def test_ours_admits_only_what_was_made_for_its_own_model_and_plan(differing: str) -> None:
    keys = holder()
    uploads = [mixed(differing, name) for name in CLIENTS]
    keys.admit(uploads[0].admission)
    for name, upload in zip(CLIENTS[1:], uploads[1:], strict=True):
        with pytest.raises(ContextError, match=f"{differing[:-1]}_digest"):
            keys.admit(upload.admission)
        # Even a client that is told to sign for the other context cannot move its seal there.
        sealed = upload.admission.sealed_seed
        moved = Receipt.sign(signer(name), keys.context.id, name_of(upload), sealed)
        with pytest.raises(SealError):
            keys.admit(Admission(moved, sealed))


def mixed(differing: str, name: str) -> Upload:
    context = SHOWN[differing](name)
    update = trained(shown(name), name)
    return upload_under(context, [update], signer(name), seed(name))


@pytest.mark.parametrize("differing", SHOWN)
def test_ours_does_not_open_the_mixed_sum_even_with_every_seed_admitted(differing: str) -> None:
    # Grant the server what it cannot do: seals and receipts of all clients for one context.
    keys = holder()
    uploads = [mixed(differing, name) for name in CLIENTS]
    for name, upload in zip(CLIENTS, uploads, strict=True):
        info = seal_info(keys.context.id.digest, signer(name).public, name_of(upload))
        sealed = seal(seed(name), keys.context.round_key, info)
        receipt = Receipt.sign(signer(name), keys.context.id, name_of(upload), sealed)
        keys.admit(Admission(receipt, sealed))
    names = [name_of(upload) for upload in uploads]
    with pytest.raises(ReleaseError):
        keys.release_admitted(names, summed(uploads))
    # The victim's own ciphertext under all the names gains nothing either.
    with pytest.raises(ReleaseError):
        keys.release_admitted(names, summed(uploads[:1]))


def test_the_mixed_sum_fails_because_of_the_contexts_and_nothing_else() -> None:
    keys = holder()
    uploads = [
        upload_under(keys.context, [trained(shown(name), name)], signer(name), seed(name))
        for name in CLIENTS
    ]
    for upload in uploads:
        keys.admit(upload.admission)
    # One context for all means one model for all: whoever checks its model has not been fooled.
    released = keys.release_admitted([name_of(u) for u in uploads], summed(uploads))
    assert np.array_equal(released.sums[0], trained(LIVE, "victim"))


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return durable_rounds(tmp_path, identity=signer("key holder"))


@pytest.mark.parametrize(
    ("plan", "model"), [(PLAN, DEAD), (OTHER_PLAN, LIVE)], ids=["model", "plan"]
)
def test_ours_endorses_one_model_and_plan_for_an_attempt(
    rounds: Rounds, plan: Plan, model: Model
) -> None:
    genuine, endorsement = rounds.open(PLAN, "task", 1, 1, digest_of(LIVE))
    with pytest.raises(DuplicateError):
        rounds.open(plan, "task", 1, 1, digest_of(model))
    relabelled = KeyHolder(plan, model_digest=digest_of(model)).context.id
    forged: ContextId = replace(relabelled, round_key_id=genuine.id.round_key_id)
    with pytest.raises(SecaggError, match="pinned key holder's signature"):
        endorsement.verify(forged, {signer("key holder").public})
    # Another attempt for the others ends the first one: the two never count together.
    other, _ = rounds.open(plan, "task", 1, 2, digest_of(model))
    stale = upload_under(genuine, [trained(LIVE, "victim")], signer("victim"), seed("victim"))
    assert rounds.judge(other.id, [stale.admission]) == [ContextError.reason]
    with pytest.raises((ClosedError, ContextError)):
        rounds.judge(genuine.id, [stale.admission])


@pytest.mark.parametrize("lie", ["about the digest as well", "about the model alone"])
def test_a_client_of_ours_compares_its_model_with_the_context(lie: str) -> None:
    genuine = KeyHolder(PLAN, model_digest=digest_of(LIVE)).context
    data = model_to_bytes(DEAD)
    answers = {
        "GetRound": pb.GetRoundResponse(
            context=context_id_to_wire(genuine.id),
            plan=plan_to_wire(PLAN),
            round_key=genuine.round_key,
            model_version=0,
            rounds_total=1,
        ),
        "GetModel": pb.GetModelResponse(
            version=0,
            model_digest=digest_of(DEAD if lie.endswith("well") else LIVE),
            tensors=tensors_to_wire(PLAN.segments[0].tensors),  # type: ignore[union-attr]
            total_bytes=len(data),
            chunk_count=piece_count(len(data)),
            data=data,
        ),
    }
    with PuppetSession(signer("alice"), answers) as session:
        with pytest.raises(ContextError, match="model that the round names"):
            next(session.rounds())
        assert session.sent == []
