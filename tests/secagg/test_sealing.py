"""Sealed seeds open with the same key for the same purpose, and in no other way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.errors import MalformedError, SealError
from secagg.sealing import (
    ROUND_KEY_BYTES,
    ROUND_PRIVATE_BYTES,
    SEALED_SEED_BYTES,
    SEED_BYTES,
    RoundKeyPair,
    seal,
    seal_info,
)

SEED = bytes(range(100, 132))
INFO = seal_info(b"c" * 32, b"k" * 32, b"u" * 32)


@pytest.fixture(scope="module")
def pair() -> RoundKeyPair:
    return RoundKeyPair()


@pytest.fixture(scope="module")
def sealed(pair: RoundKeyPair) -> bytes:
    return seal(SEED, pair.public, INFO)


def test_a_seal_opens_with_its_key_and_info(pair: RoundKeyPair, sealed: bytes) -> None:
    assert pair.open(sealed, INFO) == SEED
    assert len(sealed) == SEALED_SEED_BYTES
    assert len(pair.public) == ROUND_KEY_BYTES
    assert len(SEED) == SEED_BYTES


def test_seals_of_the_same_seed_differ_and_hide_it(pair: RoundKeyPair, sealed: bytes) -> None:
    again = seal(SEED, pair.public, INFO)
    assert again != sealed
    assert SEED not in again
    # Not even one half of the encapsulation repeats.
    assert again[:1088] != sealed[:1088]
    assert again[1088:1120] != sealed[1088:1120]


def test_another_key_does_not_open_it(sealed: bytes) -> None:
    with pytest.raises(SealError):
        RoundKeyPair().open(sealed, INFO)


@pytest.mark.parametrize("part", ["mlkem", "x25519"])
def test_both_halves_of_the_hybrid_are_needed(pair: RoundKeyPair, part: str) -> None:
    other = RoundKeyPair().public
    mixed = (
        other[:1184] + pair.public[1184:] if part == "mlkem" else pair.public[:1184] + other[1184:]
    )
    with pytest.raises(SealError):
        pair.open(seal(SEED, mixed, INFO), INFO)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        INFO + b"\0",
        INFO[:-1],
        seal_info(b"C" * 32, b"k" * 32, b"u" * 32),
        seal_info(b"c" * 32, b"K" * 32, b"u" * 32),
        seal_info(b"c" * 32, b"k" * 32, b"U" * 32),
        seal_info(b"c" * 31, b"ck" + b"k" * 31, b"u" * 32),
    ],
)
def test_another_purpose_does_not_open_it(pair: RoundKeyPair, sealed: bytes, info: bytes) -> None:
    with pytest.raises(SealError):
        pair.open(sealed, info)


def test_no_two_purposes_share_an_encoding() -> None:
    fields = [(b"ab", b"c", b""), (b"a", b"bc", b""), (b"", b"ab", b"c"), (b"abc", b"", b"")]
    assert len({seal_info(*parts) for parts in fields}) == len(fields)


def test_every_flipped_bit_is_noticed(pair: RoundKeyPair, sealed: bytes) -> None:
    for bit in range(8 * SEALED_SEED_BYTES):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(SealError):
            pair.open(bytes(damaged), INFO)


def test_every_truncation_and_extension_is_refused(pair: RoundKeyPair, sealed: bytes) -> None:
    for size in range(SEALED_SEED_BYTES):
        with pytest.raises(SealError, match=f"bytes={size}"):
            pair.open(sealed[:size], INFO)
    for longer in (sealed + b"\0", sealed * 2):
        with pytest.raises(SealError):
            pair.open(longer, INFO)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_seeds_of_another_size_are_refused(pair: RoundKeyPair, size: int) -> None:
    with pytest.raises(SealError, match="sealed seed of"):
        pair.open(seal(bytes(size), pair.public, INFO), INFO)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        bytes(32),
        bytes(ROUND_KEY_BYTES - 1),
        bytes(ROUND_KEY_BYTES + 1),
        bytes(ROUND_KEY_BYTES),
        b"\xff" * ROUND_KEY_BYTES,
    ],
)
def test_what_is_no_round_key_is_refused(key: bytes) -> None:
    with pytest.raises(MalformedError, match="round key"):
        seal(SEED, key, INFO)


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_points_of_small_order_are_refused(pair: RoundKeyPair, point: bytes) -> None:
    # They would make the X25519 half of the secret known to everybody.
    with pytest.raises(MalformedError):
        seal(SEED, pair.public[:1184] + point, INFO)


def test_round_keys_are_fresh_and_hidden(pair: RoundKeyPair) -> None:
    assert RoundKeyPair().public != pair.public
    assert repr(pair) == str(pair) == "RoundKeyPair(OMITTED)"


def test_errors_do_not_show_the_seed_nor_the_seal(pair: RoundKeyPair, sealed: bytes) -> None:
    for data, info in ((sealed[:-1], INFO), (sealed, b"")):
        with pytest.raises(SealError) as error:
            pair.open(data, info)
        text = repr(error.value) + repr(error.value.__cause__)
        for secret in (SEED, sealed[:16], sealed[-16:]):
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text


def test_a_stored_key_is_the_same_key(pair: RoundKeyPair, sealed: bytes) -> None:
    data = pair.to_bytes()
    again = RoundKeyPair.from_bytes(data)
    assert len(data) == ROUND_PRIVATE_BYTES
    assert (again.public, again.to_bytes()) == (pair.public, data)
    assert again.open(sealed, INFO) == SEED
    assert pair.open(seal(SEED, again.public, INFO), INFO) == SEED


@pytest.mark.parametrize("at", [0, 63, 64, 70], ids=["mlkem", "rejection", "x25519", "inside"])
def test_another_stored_key_does_not_open_it(pair: RoundKeyPair, sealed: bytes, at: int) -> None:
    data = bytearray(pair.to_bytes())
    data[at] ^= 0x10
    other = RoundKeyPair.from_bytes(bytes(data))
    if at != 63:  # the last bytes of the seed only serve to reject silently
        assert other.public != pair.public
        with pytest.raises(SealError):
            other.open(sealed, INFO)
    else:
        assert other.public == pair.public


@given(data=st.binary(max_size=2 * ROUND_PRIVATE_BYTES))
def test_private_bytes_of_another_size_are_refused(data: bytes) -> None:
    if len(data) == ROUND_PRIVATE_BYTES:
        assert RoundKeyPair.from_bytes(data).to_bytes() == data
        return
    with pytest.raises(MalformedError, match=f"{ROUND_PRIVATE_BYTES} bytes") as error:
        RoundKeyPair.from_bytes(data)
    if len(data) > 3:
        assert data.hex() not in str(error.value)


def test_a_stored_key_stays_hidden_in_its_repr(pair: RoundKeyPair) -> None:
    again = RoundKeyPair.from_bytes(pair.to_bytes())
    assert repr(again) == str(again) == "RoundKeyPair(OMITTED)"
