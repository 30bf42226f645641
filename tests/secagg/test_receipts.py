"""A receipt covers its context, client, upload and sealed seed: all of it or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg.context import ContextId
from secagg.errors import ContextError, MalformedError, ReceiptError
from secagg.receipts import NO_COMMITMENT, Receipt, SigningKey

CONTEXT = ContextId("task", 3, 1, b"p" * 32, b"m" * 32, b"k" * 32)
SEED = b"sealed seed"
UPLOAD = b"u" * 32
KEY = SigningKey.from_bytes(bytes(range(32)))
RECEIPT = Receipt.sign(KEY, CONTEXT, UPLOAD, SEED)
COMMITTED = Receipt.sign(KEY, CONTEXT, UPLOAD, SEED, b"c" * 32)


def test_an_honest_receipt_is_accepted() -> None:
    RECEIPT.verify(CONTEXT, SEED)
    assert RECEIPT.client_key == KEY.public


def test_a_receipt_commits_to_the_challenge_that_it_was_made_for_or_to_none() -> None:
    COMMITTED.verify(CONTEXT, SEED)
    assert COMMITTED.challenge_commitment == b"c" * 32
    assert RECEIPT.challenge_commitment == NO_COMMITMENT == bytes(32)
    assert COMMITTED.signature != RECEIPT.signature


def test_signing_is_deterministic_so_that_a_retry_sends_the_same_bytes() -> None:
    assert Receipt.sign(KEY, CONTEXT, UPLOAD, SEED) == RECEIPT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task_id", "other"),
        ("round_number", 4),
        ("attempt", 2),
        ("plan_digest", b"P" * 32),
        ("model_digest", b"M" * 32),
        ("round_key_id", b"K" * 32),
    ],
)
def test_a_receipt_of_another_context_is_refused_and_the_field_named(
    field: str, value: object
) -> None:
    other = replace(CONTEXT, **{field: value})
    with pytest.raises(ContextError, match=f"{field} differ"):
        Receipt.sign(KEY, other, UPLOAD, SEED).verify(CONTEXT, SEED)
    # Relabelled: it claims this context, but its signature is about the other one.
    relabelled = replace(Receipt.sign(KEY, other, UPLOAD, SEED), context=CONTEXT)
    with pytest.raises(ReceiptError, match="signature"):
        relabelled.verify(CONTEXT, SEED)


@pytest.mark.parametrize(
    "changed",
    [
        replace(RECEIPT, client_key=SigningKey.generate().public),
        replace(RECEIPT, upload_digest=b"v" + UPLOAD[1:]),
        replace(RECEIPT, signature=bytes(64)),
        replace(RECEIPT, signature=RECEIPT.signature[32:] + RECEIPT.signature[:32]),
        replace(RECEIPT, signature=Receipt.sign(KEY, CONTEXT, UPLOAD, b"other").signature),
        replace(RECEIPT, client_key=b"\xff" * 32),
        replace(RECEIPT, challenge_commitment=b"c" * 32),
        replace(COMMITTED, challenge_commitment=NO_COMMITMENT),
        replace(COMMITTED, challenge_commitment=b"d" + b"c" * 31),
    ],
)
def test_every_altered_field_breaks_the_signature(changed: Receipt) -> None:
    with pytest.raises(ReceiptError, match="signature"):
        changed.verify(CONTEXT, SEED)


def test_every_flipped_bit_of_the_signature_is_noticed() -> None:
    for bit in range(512):
        damaged = bytearray(RECEIPT.signature)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(ReceiptError):
            replace(RECEIPT, signature=bytes(damaged)).verify(CONTEXT, SEED)


def test_the_signature_is_not_malleable() -> None:
    # S + L satisfies the same equation; RFC 8032 demands S < L.
    order = 2**252 + 27742317777372353535851937790883648493
    scalar = int.from_bytes(RECEIPT.signature[32:], "little") + order
    twin = RECEIPT.signature[:32] + scalar.to_bytes(32, "little")
    with pytest.raises(ReceiptError):
        replace(RECEIPT, signature=twin).verify(CONTEXT, SEED)


@pytest.mark.parametrize("seed", [b"", b"sealed see", b"sealed seed\0", b"Sealed seed"])
def test_another_sealed_seed_is_refused(seed: bytes) -> None:
    with pytest.raises(ReceiptError, match="sealed seed"):
        RECEIPT.verify(CONTEXT, seed)


def test_another_seed_under_a_matching_hash_needs_another_signature() -> None:
    resealed = Receipt.sign(SigningKey.generate(), CONTEXT, UPLOAD, b"other")
    forged = replace(RECEIPT, sealed_seed_sha256=resealed.sealed_seed_sha256)
    with pytest.raises(ReceiptError, match="signature"):
        forged.verify(CONTEXT, b"other")


@pytest.mark.parametrize(
    "field", ["client_key", "upload_digest", "challenge_commitment", "signature"]
)
@pytest.mark.parametrize("change", ["empty", "short", "long"])
def test_fields_of_another_size_are_refused(field: str, change: str) -> None:
    value = getattr(RECEIPT, field)
    wrong = {"empty": b"", "short": value[:-1], "long": value + b"\0"}[change]
    with pytest.raises(ReceiptError, match=f"expected {field} of {len(value)} bytes"):
        replace(RECEIPT, **{field: wrong}).verify(CONTEXT, SEED)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_signing_keys_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(MalformedError, match=f"bytes={size}"):
        SigningKey.from_bytes(bytes(size))


def test_a_signing_key_can_be_stored_and_read() -> None:
    again = SigningKey.from_bytes(KEY.to_bytes())
    assert again.public == KEY.public
    assert again.sign(b"x") == KEY.sign(b"x")


def test_neither_keys_nor_client_names_are_shown() -> None:
    assert repr(KEY) == str(KEY) == "SigningKey(OMITTED)"
    for value in (KEY.public, COMMITTED.signature, COMMITTED.challenge_commitment):
        assert repr(value) not in repr(COMMITTED)
        assert value.hex() not in repr(COMMITTED)
