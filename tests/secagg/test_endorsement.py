"""The key holder's signature on a round: only its own, only on this very round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.context import ContextId, RoundContext
from secagg.endorsement import IDENTITY_BYTES, Endorsement, read_pins
from secagg.errors import MalformedError, UntrustedKeyError
from secagg.parameters import IntegerSegment
from secagg.planner import make_plan
from secagg.receipts import Receipt, SigningKey
from secagg.sealing import RoundKeyPair

KEY_HOLDER, OTHER = SigningKey.generate(), SigningKey.generate()
PLAN = make_plan([IntegerSegment("counts", 5, 100)], max_clients=5)


def context(**changes: object) -> ContextId:
    made = RoundContext.create(
        PLAN,
        RoundKeyPair().public,
        task_id="task",
        round_number=2,
        attempt=1,
        model_digest=bytes(32),
    )
    return replace(made.id, **changes)  # type: ignore[arg-type]


def test_a_round_is_accepted_from_the_key_holder_that_is_pinned() -> None:
    this = context()
    endorsement = Endorsement.sign(KEY_HOLDER, this)
    endorsement.verify(this, {KEY_HOLDER.public})
    endorsement.verify(this, [OTHER.public, KEY_HOLDER.public])
    assert endorsement.identity == KEY_HOLDER.public
    assert endorsement == Endorsement.sign(KEY_HOLDER, this)


CHANGES: dict[str, Callable[[ContextId], ContextId]] = {
    "task": lambda this: replace(this, task_id="another"),
    "task, one letter": lambda this: replace(this, task_id="Task"),
    "round": lambda this: replace(this, round_number=3),
    "earlier round": lambda this: replace(this, round_number=1),
    "attempt": lambda this: replace(this, attempt=2),
    "round and attempt exchanged": lambda this: replace(this, round_number=1, attempt=2),
    "plan": lambda this: replace(this, plan_digest=bytes([1]) * 32),
    "model": lambda this: replace(this, model_digest=bytes([1]) * 32),
    "round key": lambda this: replace(this, round_key_id=bytes([1]) * 32),
    "plan and model exchanged": lambda this: replace(
        this, plan_digest=this.model_digest, model_digest=this.plan_digest
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_endorsement_of_another_round_is_worth_nothing(change: str) -> None:
    this = context()
    other = CHANGES[change](this)
    assert other != this
    for signed, offered in ((this, other), (other, this)):
        with pytest.raises(UntrustedKeyError, match="its own in its place; contribute nothing"):
            Endorsement.sign(KEY_HOLDER, signed).verify(offered, {KEY_HOLDER.public})


def test_another_key_is_not_taken_for_the_key_holders() -> None:
    this = context()
    with pytest.raises(UntrustedKeyError, match="key holder that is pinned here; got another"):
        Endorsement.sign(OTHER, this).verify(this, {KEY_HOLDER.public})
    with pytest.raises(UntrustedKeyError, match="key holder that is pinned here; got another"):
        Endorsement.sign(KEY_HOLDER, this).verify(this, set())


def test_another_key_under_the_key_holders_name_is_not_taken_either() -> None:
    this = context()
    lie = Endorsement(KEY_HOLDER.public, OTHER.sign(b"anything"))
    with pytest.raises(UntrustedKeyError, match="the pinned key holder's signature"):
        lie.verify(this, {KEY_HOLDER.public})
    swapped = replace(Endorsement.sign(OTHER, this), identity=KEY_HOLDER.public)
    with pytest.raises(UntrustedKeyError, match="the pinned key holder's signature"):
        swapped.verify(this, {KEY_HOLDER.public, OTHER.public})


def test_a_signature_made_for_something_else_is_none_here() -> None:
    """A client's receipt, and the bare digest, are signed under words of their own."""
    this = context()
    receipt = Receipt.sign(KEY_HOLDER, this, bytes(32), b"seed")
    for signature in (receipt.signature, KEY_HOLDER.sign(this.digest)):
        with pytest.raises(UntrustedKeyError):
            Endorsement(KEY_HOLDER.public, signature).verify(this, {KEY_HOLDER.public})


@given(st.integers(0, 63), st.integers(0, 7))
def test_one_flipped_bit_of_the_signature_spoils_it(place: int, bit: int) -> None:
    this = context()
    good = Endorsement.sign(KEY_HOLDER, this)
    damaged = bytearray(good.signature)
    damaged[place] ^= 1 << bit
    with pytest.raises(UntrustedKeyError):
        replace(good, signature=bytes(damaged)).verify(this, {KEY_HOLDER.public})


@given(st.binary(max_size=80))
def test_bytes_that_are_no_signature_are_refused_as_such(signature: bytes) -> None:
    with pytest.raises(UntrustedKeyError):
        Endorsement(KEY_HOLDER.public, signature).verify(context(), {KEY_HOLDER.public})


@given(st.binary(max_size=40))
def test_a_pin_that_is_no_key_endorses_nothing(pin: bytes) -> None:
    this = context()
    signature = Endorsement.sign(KEY_HOLDER, this).signature
    with pytest.raises(UntrustedKeyError):
        Endorsement(pin, signature).verify(this, {pin})


def test_the_signature_is_not_shown() -> None:
    endorsement = Endorsement.sign(KEY_HOLDER, context())
    assert "signature" not in repr(endorsement)


# --- pins ----------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4))
def test_pins_are_one_key_a_line(keys: list[bytes]) -> None:
    assert read_pins("".join(f"{key.hex()}\n" for key in keys)) == frozenset(keys)


def test_white_space_and_capitals_do_not_matter() -> None:
    key = bytes(range(32))
    assert read_pins(f"\r\n  {key.hex().upper()} \r\n") == {key}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "00" * 31,
        "00" * 33,
        "0" * 63,
        "zz" * 32,
        f"{'00' * 32}\n{'00' * 31}",
        f"{'00' * 32} # the new one",
        "00" * 64,
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_anything_else_in_the_file_is_refused_as_a_whole(text: str) -> None:
    with pytest.raises(MalformedError, match=rf"{IDENTITY_BYTES} bytes in hexadecimal"):
        read_pins(text)
