"""The stream against RFC 8439, the distributions against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from secagg import sampling
from secagg.parameters import MODULUS
from secagg.sampling import (
    Stream,
    centred_binomial,
    coin_differences,
    signs,
    ternary,
    uniform_polynomials,
)

FALSE_ALARM = 1e-9  # of each goodness-of-fit test, were its seed not fixed
KEY = bytes(range(32))


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> None:
    expected = probabilities * observed.sum()
    # Pearson's approximation holds where every expected count is well above 5.
    assert expected.min() > 20
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(FALSE_ALARM, observed.size - 1)


# --- the stream ---------------------------------------------------------------------------------


def test_the_stream_is_chacha20_of_rfc_8439() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: key 0, nonce 0, blocks 0 and 1.
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert Stream(bytes(32)).read(128) == expected


def test_the_key_matters_in_every_byte() -> None:
    # RFC 8439, appendix A.1, test vector 3 has the last key byte 1 and counter 1.
    assert Stream(bytes(31) + b"\1").read(128)[64:96] == bytes.fromhex(
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    )
    assert len({Stream(bytes(i) + b"\1" + bytes(31 - i)).read(32) for i in range(32)}) == 32


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 300), max_size=10))
def test_a_stream_is_the_same_however_it_is_read(cuts: list[int]) -> None:
    stream, whole = Stream(KEY), Stream(KEY).read(sum(cuts))
    assert b"".join(stream.read(cut) for cut in cuts) == whole


def test_words_are_little_endian() -> None:
    data = Stream(KEY).read(32)
    assert Stream(KEY).uint64(4).tolist() == [
        int.from_bytes(data[i : i + 8], "little") for i in range(0, 32, 8)
    ]
    assert Stream(KEY).uint32(8).tolist() == [
        int.from_bytes(data[i : i + 4], "little") for i in range(0, 32, 4)
    ]


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_keys_of_another_size_are_refused_without_being_shown(size: int) -> None:
    with pytest.raises(ValueError, match="32-byte key") as error:
        Stream(b"\xa5" * size)
    assert "a5" not in str(error.value)


def test_streams_do_not_show_their_key() -> None:
    for stream in (Stream(KEY), Stream.derive("label", KEY), Stream.from_os()):
        assert repr(stream) == str(stream) == "Stream(OMITTED)"
        assert KEY not in vars(stream).values()


def test_derived_streams_differ_by_label_and_by_field_boundary() -> None:
    derived = [
        Stream.derive("a", b"bc"),
        Stream.derive("ab", b"c"),
        Stream.derive("a", b"b", b"c"),
        Stream.derive("a", "bc"),
        Stream.derive("a", b"bc", b""),
        Stream.derive("a", 0x6362),
    ]
    assert len({stream.read(16) for stream in derived}) == len(derived)
    assert Stream.derive("a", b"bc").read(16) == Stream.derive("a", b"bc").read(16)


def test_streams_of_the_system_are_fresh() -> None:
    assert Stream.from_os().read(32) != Stream.from_os().read(32)


# --- distributions --------------------------------------------------------------------------------


def test_errors_are_centred_binomial() -> None:
    count = 1_000_000
    drawn = centred_binomial(Stream(KEY), count)
    assert drawn.dtype == np.int64
    assert np.abs(drawn).max() <= 21
    # Difference of two Binomial(21, 1/2) = Binomial(42, 1/2) - 21. Tails beyond 12 are pooled.
    exact = np.array([math.comb(42, 21 + k) / 2**42 for k in range(-21, 22)])
    counts = np.bincount(drawn + 21, minlength=43)
    middle = slice(21 - 12, 21 + 13)
    pooled = np.array([counts[: middle.start].sum(), *counts[middle], counts[middle.stop :].sum()])
    tail = exact[: middle.start].sum()
    chi_square(pooled, np.array([tail, *exact[middle], tail]))
    # Variance 10.5; the sample variance of a sub-Gaussian has standard deviation below
    # sqrt(2 / count) * 10.5: 6.5 of them, false alarm below 1e-10.
    assert abs(drawn.var() - 10.5) < 6.5 * 10.5 * math.sqrt(2 / count)
    assert pytest.approx(math.sqrt(10.5)) == sampling.ERROR_STD


def test_errors_use_each_of_42_bits_once() -> None:
    class Fixed(Stream):
        def uint64(self, count: int) -> np.ndarray:
            return np.array([1 << bit for bit in range(64)], dtype=np.uint64)[:count]

    assert centred_binomial(Fixed(KEY), 64).tolist() == [1] * 21 + [-1] * 21 + [0] * 22


def test_secrets_are_uniform_ternary() -> None:
    stream = Stream(KEY)
    drawn = np.stack([ternary(stream) for _ in range(100)])
    assert drawn.shape == (100, 4096)
    assert drawn.dtype == np.int64
    chi_square(np.bincount(drawn.reshape(-1) + 1, minlength=3), np.full(3, 1 / 3))
    # Trits come five to a byte: neighbours must be independent too.
    pairs = (drawn[:, :-1] + 1) * 3 + drawn[:, 1:] + 1
    chi_square(np.bincount(pairs[:, ::2].reshape(-1), minlength=9), np.full(9, 1 / 9))
    chi_square(np.bincount(pairs[:, 1::2].reshape(-1), minlength=9), np.full(9, 1 / 9))


def test_every_coefficient_of_a_secret_takes_every_value() -> None:
    stream = Stream(KEY)
    drawn = np.stack([ternary(stream) for _ in range(100)])
    for value in (-1, 0, 1):
        # (2/3)**100 * 4096 * 3: below 1e-13.
        assert (drawn == value).any(axis=0).all()


def test_bytes_of_243_and_more_are_rejected() -> None:
    class Fixed(Stream):
        def read(self, count: int) -> bytes:
            return bytes([255, 243, 0, 242, 1] * count)[:count]

    with pytest.raises(RuntimeError, match="too few trits"):
        ternary(Fixed(KEY))

    class Enough(Stream):
        def read(self, count: int) -> bytes:
            return bytes([243] + [0, 242, 1, 3] * count)[:count]

    drawn = ternary(Enough(KEY))
    assert drawn[:20].tolist() == [-1] * 5 + [1] * 5 + [0] + [-1] * 4 + [-1, 0] + [-1] * 3


def test_signs_are_fair_and_one_bit_each() -> None:
    drawn = signs(Stream(KEY), 400_000)
    assert drawn.dtype == np.int8
    assert set(np.unique(drawn)) == {-1, 1}
    octets = np.packbits(drawn > 0, bitorder="little")
    chi_square(np.bincount(octets, minlength=256), np.full(256, 1 / 256))
    assert octets.tobytes() == Stream(KEY).read(50_000)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 4097])
def test_a_shorter_run_of_signs_is_a_prefix(count: int) -> None:
    drawn = signs(Stream(KEY), count)
    assert drawn.shape == (count,)
    assert np.array_equal(drawn, signs(Stream(KEY), 5000)[:count])


def test_coin_differences_are_those_of_two_fair_coins() -> None:
    drawn = coin_differences(Stream(KEY), (100, 4096))
    assert drawn.shape == (100, 4096)
    assert drawn.dtype == np.int64
    chi_square(np.bincount(drawn.reshape(-1) + 1, minlength=3), np.array([0.25, 0.5, 0.25]))
    # Neighbours, and the same place of neighbouring rows, are independent.
    law = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).reshape(-1)
    for one, other in ((drawn[:, ::2], drawn[:, 1::2]), (drawn[::2], drawn[1::2])):
        pairs = (one + 1) * 3 + other + 1
        chi_square(np.bincount(pairs.reshape(-1), minlength=9), law)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 4097])
def test_coin_differences_are_one_half_of_the_bits_less_the_other(count: int) -> None:
    data = Stream(KEY).read((2 * count + 7) // 8)
    bits = [octet >> place & 1 for octet in data for place in range(8)]
    expected = [bits[i] - bits[count + i] for i in range(count)]
    stream = Stream(KEY)
    assert coin_differences(stream, (count,)).tolist() == expected
    # It takes whole bytes, and not one too many.
    whole = Stream(KEY).read(len(data) + 4)
    assert stream.read(4) == whole[len(data) :]


def test_public_coefficients_are_uniform_below_q() -> None:
    drawn = uniform_polynomials(Stream(KEY), 100)
    assert drawn.shape == (100, 4096)
    assert int(drawn.max()) < MODULUS
    flat = drawn.reshape(-1)
    for bins in (
        flat >> np.uint64(48),  # the high byte, short of its full range by 2**-32 only
        flat & np.uint64(0xFF),
        flat >> np.uint64(24) & np.uint64(0xFF),
        (flat[::2] ^ flat[1::2]) >> np.uint64(48),
    ):
        chi_square(np.bincount(bins.astype(np.int64), minlength=256), np.full(256, 1 / 256))


def test_public_polynomials_are_the_stream_in_seven_byte_words() -> None:
    drawn = uniform_polynomials(Stream(KEY), 3)
    data = Stream(KEY).read(3 * 4104 * 7)
    for block, index in ((0, 0), (0, 4095), (1, 0), (2, 4095)):
        at = (block * 4104 + index) * 7
        assert int(drawn[block, index]) == int.from_bytes(data[at : at + 7], "little")


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_expansion_does_not_depend_on_its_chunks(parts: list[int]) -> None:
    whole = uniform_polynomials(Stream(KEY), sum(parts))
    stream = Stream(KEY)
    pieces = [uniform_polynomials(stream, blocks) for blocks in parts]
    assert np.array_equal(np.concatenate(pieces), whole)


class Crafted(Stream):
    """Counts up in 7-byte words, with q or more in chosen places."""

    def __init__(self, bad: dict[int, int]) -> None:
        super().__init__(KEY)
        self._bad = bad

    def read(self, count: int) -> bytes:
        words = (self._bad.get(i, i) for i in range(count // 7))
        return b"".join(word.to_bytes(7, "little") for word in words)


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 56) - 1])
def test_words_of_q_and_more_are_rejected_within_their_block(value: int) -> None:
    bad = dict.fromkeys((0, 5, 4095, 4096, 4104 + 4103), value)
    drawn = uniform_polynomials(Crafted(bad), 3)
    first = [i for i in range(4104) if i not in bad][:4096]
    assert drawn[0].tolist() == first
    # The other blocks start where they always start.
    assert drawn[1].tolist() == list(range(4104, 4104 + 4096))
    assert drawn[2].tolist() == list(range(8208, 8208 + 4096))


def test_q_minus_one_is_accepted_and_eight_rejections_are_the_most() -> None:
    drawn = uniform_polynomials(Crafted({0: MODULUS - 1} | dict.fromkeys(range(1, 9), MODULUS)), 1)
    assert int(drawn[0, 0]) == MODULUS - 1
    assert int(drawn[0, 1]) == 9
    with pytest.raises(RuntimeError, match="too few residues"):
        uniform_polynomials(Crafted(dict.fromkeys(range(9), MODULUS)), 1)


def test_both_paths_of_the_rejection_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit that rejects one word in 1000 makes the slow path run on real streams.
    limit = (1 << 56) - (1 << 56) // 1000
    monkeypatch.setattr(sampling, "MODULUS", limit)
    drawn = uniform_polynomials(Stream(KEY), 4)
    data = Stream(KEY).read(4 * 4104 * 7)
    words = [int.from_bytes(data[i : i + 7], "little") for i in range(0, len(data), 7)]
    for block in range(4):
        kept = [word for word in words[block * 4104 :][:4104] if word < limit]
        assert len(kept) < 4104
        assert drawn[block].tolist() == kept[:4096]
