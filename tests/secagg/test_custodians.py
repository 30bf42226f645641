"""Enough custodians open the passphrase; fewer, or the wrong ones, are told what is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shamir_mnemonic import Share, generate_mnemonics

from secagg.custodians import MAX_CUSTODIANS, check_custodians, combine, fresh_passphrase, split
from secagg.errors import ConfigurationError

PASSPHRASE = fresh_passphrase()
SHARES = split(PASSPHRASE, 3, 5)


def test_passphrases_are_32_fresh_bytes() -> None:
    assert len(bytes.fromhex(PASSPHRASE)) == 32
    assert len({fresh_passphrase() for _ in range(50)}) == 50


def test_any_three_of_five_open_it_in_any_order() -> None:
    for chosen in combinations(SHARES, 3):
        assert combine(chosen) == combine(chosen[::-1]) == PASSPHRASE


def test_more_than_enough_do_no_harm() -> None:
    assert combine(SHARES) == combine([*SHARES, *SHARES]) == PASSPHRASE


@settings(max_examples=20)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 16), st.data())
def test_every_secret_comes_back_from_every_scheme(
    secret: bytes, count: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(2, count))
    shares = split(secret.hex(), threshold, count)
    assert len(shares) == len(set(shares)) == count
    chosen = data.draw(st.permutations(shares))
    assert combine(chosen[:threshold]) == secret.hex()
    with pytest.raises(ConfigurationError, match="bring 1 more"):
        combine(chosen[: threshold - 1])


@pytest.mark.parametrize(
    ("shares", "missing"),
    [(SHARES[:2], 1), (SHARES[:1], 2), ([SHARES[0]] * 3, 2), ([], 2)],
    ids=["two", "one", "one three times", "none"],
)
def test_too_few_are_told_how_many_more(shares: list[str], missing: int) -> None:
    with pytest.raises(ConfigurationError, match=f"bring {missing} more"):
        combine(shares)


def test_shares_of_another_passphrase_are_noticed() -> None:
    others = split(fresh_passphrase(), 3, 5)
    again = split(PASSPHRASE, 3, 5)
    for foreign in (others[2], again[2]):
        with pytest.raises(ConfigurationError, match="different ones"):
            combine([*SHARES[:2], foreign])
        with pytest.raises(ConfigurationError, match="different ones"):
            combine([*SHARES, foreign])
        # Not "bring 1 more": a third share would not help.
        with pytest.raises(ConfigurationError, match="different ones"):
            combine([SHARES[0], foreign])


def test_a_forged_share_is_noticed() -> None:
    # It has the right identifier and checksum; only the secret's own digest gives it away.
    real = Share.from_mnemonic(SHARES[2])
    value = bytes([real.value[0] ^ 1]) + real.value[1:]
    forged = Share(
        real.identifier,
        real.extendable,
        real.iteration_exponent,
        real.group_index,
        real.group_threshold,
        real.group_count,
        real.index,
        real.member_threshold,
        value,
    ).mnemonic()
    with pytest.raises(ConfigurationError, match="different ones"):
        combine([*SHARES[:2], forged])


@given(st.integers(0, 32), st.sampled_from(["academic", "zero", "notaword", ""]))
def test_a_damaged_share_is_named_without_its_words(position: int, word: str) -> None:
    words = SHARES[1].split()
    if words[position] == word:
        return
    words[position] = word
    with pytest.raises(ConfigurationError, match="share 2 is damaged") as refusal:
        combine([SHARES[0], " ".join(words), SHARES[2]])
    _shows_none_of(refusal.value, [SHARES[0], SHARES[1], SHARES[2]])


@given(st.text(max_size=300))
def test_any_other_text_is_damaged(text: str) -> None:
    with pytest.raises(ConfigurationError, match="share 1 is damaged"):
        combine([text])


def _shows_none_of(error: Exception, shares: Sequence[str]) -> None:
    # The message itself uses some of the short words, but none of the long ones.
    long = {word for share in shares for word in share.split() if len(word) > 6}
    assert not long & set(str(error).split())
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    ("threshold", "count"), [(1, 1), (1, 3), (0, 3), (-1, 2), (4, 3), (2, 17), (17, 17), (2, 0)]
)
def test_numbers_that_cannot_be_are_refused(threshold: int, count: int) -> None:
    for check in (check_custodians, lambda *numbers: split(PASSPHRASE, *numbers)):
        with pytest.raises(ConfigurationError, match=rf"<= {MAX_CUSTODIANS}.*{threshold}.*{count}"):
            check(threshold, count)


@pytest.mark.parametrize(
    "passphrase", ["", "correct horse", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"]
)
def test_other_passphrases_are_not_split(passphrase: str) -> None:
    # It would come back in another form, and open nothing.
    with pytest.raises(ConfigurationError, match="64 lower-case hexadecimal digits") as refusal:
        split(passphrase, 2, 3)
    assert not passphrase or passphrase not in str(refusal.value)


def test_shares_of_a_secret_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="got bytes=16"):
        combine(generate_mnemonics(1, [(2, 2)], bytes(16))[0])


def test_shares_of_several_groups_are_refused() -> None:
    groups = generate_mnemonics(2, [(2, 2), (2, 2)], bytes(32))
    with pytest.raises(ConfigurationError, match="different ones"):
        combine(groups[0])


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shamir_mnemonic", None)
    for use in (lambda: split(PASSPHRASE, 2, 3), lambda: combine(SHARES)):
        with pytest.raises(ConfigurationError, match=r"secagg\[keyholder\]"):
            use()
