"""Challenges: one a client and attempt, fixed by its commitment, and shown by nothing else."""

from __future__ import annotations

import hashlib

import cohort
import numpy as np
import pytest

from secagg.challenger import Challenger
from secagg.challenges import CHALLENGE_KEY_BYTES, challenge_key, commitment
from secagg.context import RoundContext
from secagg.encryptor import Encryptor
from secagg.errors import ConfigurationError, ContextError, MalformedError, ReceiptError
from secagg.keyholder import KeyHolder
from secagg.parameters import NormCheck, Plan
from secagg.planner import plan_integers
from secagg.receipts import NO_COMMITMENT
from secagg.sketches import sketch
from secagg.upload import Upload

PLAN = plan_integers(50, max_clients=5, max_abs=20, max_norm=100, norm_check=NormCheck(sketches=8))
SECRET = b"s" * 32


def uploaded(
    context: RoundContext, challenger: Challenger, index: int = 0, plan: Plan = PLAN
) -> Upload:
    bound = challenger.commitment(cohort.identity(index).public)
    values = np.arange(plan.layouts[0].values) % 7
    return Encryptor(context, cohort.identity(index), commitment=bound).encrypt(values)


def test_keys_differ_by_secret_context_and_client() -> None:
    keys = {
        challenge_key(secret, context, client)
        for secret in (b"s" * 32, b"t" * 32)
        for context in (b"c" * 32, b"d" * 32)
        for client in (b"k" * 32, b"l" * 32)
    }
    assert len(keys) == 8
    assert all(len(key) == CHALLENGE_KEY_BYTES == 32 for key in keys)
    assert challenge_key(b"s" * 32, b"c" * 32, b"k" * 32) in keys


def test_a_commitment_is_a_hash_that_is_used_for_nothing_else() -> None:
    key = challenge_key(SECRET, b"c" * 32, b"k" * 32)
    assert len(commitment(key)) == 32
    assert commitment(key) == commitment(key)
    assert commitment(key) not in (key, hashlib.sha256(key).digest(), NO_COMMITMENT)
    flipped = bytes([key[0] ^ 1]) + key[1:]
    assert commitment(flipped) != commitment(key)


def test_the_format_is_stable() -> None:
    # A change of these values is a change of protocol.
    key = challenge_key(bytes(32), bytes(32), bytes(32))
    assert (key.hex(), commitment(key).hex()) == (
        "e5ff2b674b1e3eddc3618cd0a8feef53f5eb2238ad8b6020310372e2dfbcc3ac",
        "ff9c09231827e47a2ca34a6cd204a1b4360a6d3954d68a4386db5cd5cb2a74a0",
    )


def test_a_challenger_commits_to_the_key_it_gives_later_and_repeats_itself() -> None:
    context = KeyHolder(PLAN).context
    client = cohort.identity(1).public
    first, again = Challenger(context, SECRET), Challenger(context, SECRET)
    assert first.key(client) == challenge_key(SECRET, context.id.digest, client)
    assert first.commitment(client) == commitment(first.key(client)) == again.commitment(client)
    assert first.key(cohort.identity(2).public) != first.key(client)
    other_attempt = Challenger(KeyHolder(PLAN).context, SECRET)
    assert other_attempt.key(client) != first.key(client)
    assert Challenger(context).key(client) != Challenger(context).key(client)


def test_a_challenger_sketches_by_its_key_and_the_uploads_digest() -> None:
    context = KeyHolder(PLAN).context
    challenger = Challenger(context, SECRET)
    upload = uploaded(context, challenger)
    receipt = upload.admission.receipt
    residues = upload.validate(context)
    expected = sketch(
        context, receipt.upload_digest, [residues], challenger.key(receipt.client_key)
    )
    assert challenger.sketch(upload).digest == expected.digest
    assert challenger.sketch_validated(receipt, [residues]).digest == expected.digest
    assert Challenger(context, SECRET).sketch(upload).digest == expected.digest


def test_a_receipt_with_another_commitment_is_refused() -> None:
    context = KeyHolder(PLAN).context
    mine, other = Challenger(context, SECRET), Challenger(context, b"o" * 32)
    upload = uploaded(context, other)
    receipt = upload.admission.receipt
    other.require_committed(receipt)
    for refused in (
        lambda: mine.require_committed(receipt),
        lambda: mine.sketch(upload),
        lambda: mine.sketch_validated(receipt, [upload.validate(context)]),
    ):
        with pytest.raises(ReceiptError, match="challenge commitment"):
            refused()


def test_an_upload_that_is_not_valid_is_not_sketched() -> None:
    context = KeyHolder(PLAN).context
    challenger = Challenger(context, SECRET)
    upload = uploaded(context, challenger)
    shorter = Upload(upload.admission, upload.payload[:-1])
    changed = Upload(upload.admission, bytes(len(upload.payload)))
    for bad in (shorter, changed):
        with pytest.raises(MalformedError):
            challenger.sketch(bad)
    with pytest.raises(ContextError):
        Challenger(KeyHolder(PLAN).context, SECRET).sketch(upload)


def test_without_a_norm_check_nothing_is_sketched() -> None:
    plan = plan_integers(50, max_clients=5, max_abs=20)
    context = KeyHolder(plan).context
    challenger = Challenger(context, SECRET)
    with pytest.raises(ContextError, match="commitment"):
        uploaded(context, challenger, plan=plan)
    key = challenger.key(bytes(32))
    with pytest.raises(ConfigurationError):
        sketch(context, bytes(32), [np.zeros((1, 4096), dtype=np.uint64)], key)


def test_a_challenger_does_not_show_its_secret() -> None:
    challenger = Challenger(KeyHolder(PLAN).context, SECRET)
    assert repr(challenger) == str(challenger) == "Challenger(OMITTED)"
