"""Verdicts: every part of what a key holder says is under its signature."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secagg.context import ContextId
from secagg.errors import ContextError, UntrustedKeyError
from secagg.receipts import Receipt, SigningKey
from secagg.verdicts import Verdict

CONTEXT = ContextId("task", 3, 1, b"p" * 32, b"m" * 32, b"k" * 32)
CLIENT = SigningKey.from_bytes(bytes(range(32)))
HOLDER = SigningKey.from_bytes(bytes(range(1, 33)))
RECEIPT = Receipt.sign(CLIENT, CONTEXT, b"u" * 32, b"sealed", b"c" * 32)
VERDICT = Verdict.sign(HOLDER, RECEIPT, b"d" * 32, accepted=True)
PINNED = [bytes(32), HOLDER.public]


def test_a_signed_verdict_is_believed() -> None:
    VERDICT.verify(CONTEXT, PINNED)
    refused = Verdict.sign(HOLDER, RECEIPT, b"d" * 32, accepted=False)
    refused.verify(CONTEXT, PINNED)
    assert (VERDICT.accepted, refused.accepted) == (True, False)
    assert VERDICT.identity == HOLDER.public


def test_signing_again_gives_the_same_bytes() -> None:
    assert Verdict.sign(HOLDER, RECEIPT, b"d" * 32, accepted=True) == VERDICT


@pytest.mark.parametrize(
    "changed",
    [
        replace(VERDICT, accepted=False),
        replace(VERDICT, sketch_digest=b"e" * 32),
        replace(VERDICT, receipt=replace(RECEIPT, upload_digest=b"v" * 32)),
        replace(VERDICT, receipt=replace(RECEIPT, client_key=HOLDER.public)),
        replace(VERDICT, receipt=replace(RECEIPT, challenge_commitment=b"x" * 32)),
        replace(VERDICT, signature=bytes(64)),
        replace(VERDICT, signature=VERDICT.signature[:-1]),
        replace(VERDICT, signature=b""),
        replace(VERDICT, signature=CLIENT.sign(b"something")),
    ],
    ids=lambda verdict: "",
)
def test_every_altered_part_breaks_the_signature(changed: Verdict) -> None:
    with pytest.raises(UntrustedKeyError, match="pinned"):
        changed.verify(CONTEXT, PINNED)


@pytest.mark.parametrize("pinned", [[], [CLIENT.public], [bytes(32)]])
def test_a_key_holder_that_is_not_pinned_is_not_believed(pinned: list[bytes]) -> None:
    with pytest.raises(UntrustedKeyError):
        VERDICT.verify(CONTEXT, pinned)


def test_somebody_elses_signature_under_a_pinned_name_is_not_believed() -> None:
    forged = replace(
        Verdict.sign(CLIENT, RECEIPT, b"d" * 32, accepted=True), identity=HOLDER.public
    )
    with pytest.raises(UntrustedKeyError):
        forged.verify(CONTEXT, PINNED)


def test_a_pin_that_is_no_key_is_an_untrusted_key_and_nothing_worse() -> None:
    broken = replace(VERDICT, identity=b"short")
    with pytest.raises(UntrustedKeyError):
        broken.verify(CONTEXT, [b"short"])


@pytest.mark.parametrize("other", [replace(CONTEXT, round_number=4), replace(CONTEXT, attempt=2)])
def test_a_verdict_of_another_attempt_is_refused(other: ContextId) -> None:
    with pytest.raises(ContextError, match="differ"):
        VERDICT.verify(other, PINNED)
    # Relabelled, it claims this attempt, but was signed for the other.
    elsewhere = Verdict.sign(HOLDER, replace(RECEIPT, context=other), b"d" * 32, accepted=True)
    relabelled = replace(elsewhere, receipt=RECEIPT)
    with pytest.raises(UntrustedKeyError):
        relabelled.verify(CONTEXT, PINNED)


def test_a_receipts_signature_is_no_verdict_and_a_verdict_is_no_receipt() -> None:
    crossed = replace(VERDICT, identity=CLIENT.public, signature=RECEIPT.signature)
    with pytest.raises(UntrustedKeyError):
        crossed.verify(CONTEXT, [CLIENT.public])


def test_a_verdict_shows_neither_keys_nor_signatures() -> None:
    text = repr(VERDICT)
    for value in (HOLDER.public, VERDICT.signature, CLIENT.public, RECEIPT.challenge_commitment):
        assert repr(value) not in text
