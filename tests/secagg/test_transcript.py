"""Hashing of structured values: every list of fields has an encoding of its own."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.transcript import Field, digest, encode

FIELDS = st.lists(
    st.one_of(st.binary(max_size=9), st.text(max_size=5), st.integers(0, (1 << 64) - 1)), max_size=4
)


@given(FIELDS, FIELDS)
def test_different_fields_have_different_encodings(first: list[Field], second: list[Field]) -> None:
    same = [(type(one), one) for one in first] == [(type(one), one) for one in second]
    assert (encode("label", *first) == encode("label", *second)) == same


@given(st.text(max_size=9), FIELDS)
def test_a_digest_is_the_hash_of_the_encoding(label: str, fields: list[Field]) -> None:
    assert digest(label, *fields) == hashlib.sha256(encode(label, *fields)).digest()


@given(st.binary(max_size=64))
def test_a_view_stands_for_its_bytes(data: bytes) -> None:
    assert encode("label", memoryview(data), "rest") == encode("label", data, "rest")
    assert digest("label", memoryview(bytearray(data))) == digest("label", data)


def test_a_field_cannot_be_mistaken_for_one_of_another_kind_or_for_two() -> None:
    kinds: list[list[Field]] = [
        [b"12345678"],
        ["12345678"],
        [0x3837363534333231],
        [b"1234", b"5678"],
    ]
    assert all(encode("label", *one) != encode("label", *other) for one, other in pairwise(kinds))


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_integers_of_more_than_eight_bytes_are_refused(number: int) -> None:
    with pytest.raises(OverflowError):
        encode("label", number)
