"""The discrete Gaussian against its definition, exact arithmetic, and another implementation."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import opendp.prelude as dp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom, chi2

from secagg import discrete_gaussian as module
from secagg.discrete_gaussian import CUT_MASS, LARGEST_STD, TAIL, discrete_gaussian
from secagg.errors import InputError
from secagg.sampling import Stream

FALSE_ALARM = 1e-9  # of each statistical test, were its seed not fixed
DEVIATIONS = 6.5  # of a normal statistic: two-sided false alarm below 1e-10
KEY = bytes(range(32))
BATCH = 1 << 14
COUNT = 1_000_000
SCALES = (1, 2, 3, 17, 600, 10**5, 2**33, 2**53)

Sampler = Callable[[int, int], np.ndarray]


def ours(std: int, count: int) -> np.ndarray:
    return discrete_gaussian(Stream.derive("test", std), std, count)


# --- the law -----------------------------------------------------------------------------------


def edges(variance: float, count: int) -> np.ndarray:
    """Half-integers that cut the line into cells where ``count`` samples are expected to be many.

    Eight cells a standard deviation, or one an integer; tails are pooled where 100 are expected.
    """
    std = math.sqrt(variance)
    reach = next(x for x in np.arange(6, 0, -0.01) if count * ndtr(-x) > 100) * std
    width = max(1, round(std / 8))
    side = np.arange(width // 2 + 0.5, max(reach, 1.5), width)
    return np.concatenate([-side[::-1], side])


def masses(variance: float, cuts: np.ndarray) -> np.ndarray:
    """What N_Z(0, variance) gives to the cells between half-integers, and beyond them."""
    if variance > 1e6:
        # The midpoint rule: exact to 1 / (24 variance), which no test here can see.
        below = ndtr(cuts / math.sqrt(variance))
    else:
        reach = math.ceil(10 * math.sqrt(variance))
        at = np.arange(-reach, reach + 1)
        mass = np.exp(-(at.astype(float) ** 2) / (2 * variance))
        below = np.concatenate([[0], np.cumsum(mass / mass.sum())])[np.searchsorted(at, cuts)]
    return np.diff(below, prepend=0, append=1)


def counts(samples: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(cuts, samples), minlength=cuts.size + 1)


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> None:
    expected = probabilities * observed.sum()
    # Pearson's approximation holds where every expected count is well above 5.
    assert expected.min() > 20
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(FALSE_ALARM, observed.size - 1)


def fits(samples: np.ndarray, variance: float) -> None:
    cuts = edges(variance, samples.size)
    chi_square(counts(samples, cuts), masses(variance, cuts))


def agree(one: np.ndarray, other: np.ndarray, variance: float) -> None:
    """Two samples of one law, of different sizes (Pearson's test of homogeneity)."""
    cuts = edges(variance, min(one.size, other.size))
    a, b = counts(one, cuts), counts(other, cuts)
    ratio = math.sqrt(other.size / one.size)
    assert (a + b).min() > 20
    statistic = float(((a * ratio - b / ratio) ** 2 / (a + b)).sum())
    assert statistic < chi2.isf(FALSE_ALARM, a.size - 1)


def exact_variance(std: int) -> float:
    if std > 100:
        return float(std) ** 2
    at = np.arange(-TAIL * std, TAIL * std + 1, dtype=float)
    mass = np.exp(-(at**2) / (2 * std**2))
    return float((at**2 * mass).sum() / mass.sum())


def moments(samples: np.ndarray, std: int) -> None:
    variance, values = exact_variance(std), samples.astype(float)
    count = samples.size
    assert abs(values.mean()) < DEVIATIONS * math.sqrt(variance / count)
    squares = values**2
    # Both standard deviations are those of a normal; at std 1 the fourth moment is not larger.
    assert abs(squares.mean() - variance) < DEVIATIONS * variance * math.sqrt(2 / count)
    if std > 1:
        fourth = (squares**2).mean() / 3 / variance**2
        assert abs(fourth - 1) < DEVIATIONS * math.sqrt(96 / 9 / count)


def symmetric(samples: np.ndarray, std: int) -> None:
    up, down = samples[samples > 0], -samples[samples < 0]
    assert abs(up.size - down.size) < DEVIATIONS * math.sqrt(up.size + down.size)
    cuts = edges(std**2, samples.size // 2)
    cuts = cuts[cuts > 0]
    a, b = counts(up, cuts)[1:], counts(down, cuts)[1:]
    assert (a + b).min() > 20
    statistic = float(((a - b) ** 2 / (a + b)).sum())
    assert statistic < chi2.isf(FALSE_ALARM, a.size)


def tails(samples: np.ndarray, std: int) -> None:
    for reach in (3, 4, 4.5):
        cut = math.floor(reach * std) + 0.5
        beyond = int((np.abs(samples) > cut).sum())
        mass = 1 - masses(float(std) ** 2, np.array([-cut, cut]))[1]
        law = binom(samples.size, mass)
        assert law.cdf(beyond) > FALSE_ALARM / 2
        assert law.sf(beyond - 1) > FALSE_ALARM / 2


@pytest.mark.parametrize("std", SCALES)
def test_samples_follow_the_law(std: int) -> None:
    drawn = ours(std, COUNT)
    assert drawn.dtype == np.int64
    assert drawn.shape == (COUNT,)
    assert int(np.abs(drawn).max()) < TAIL * std
    fits(drawn, float(std) ** 2)
    moments(drawn, std)
    symmetric(drawn, std)
    tails(drawn, std)


@pytest.mark.parametrize("std", [600, 10**5, 2**33, 2**53])
def test_low_bits_are_uniform(std: int) -> None:
    # Poisson's summation: within exp(-2 pi**2 (std / 64)**2) of uniform.
    drawn = ours(std, COUNT)
    chi_square(np.bincount(drawn & 63, minlength=64), np.full(64, 1 / 64))


@pytest.mark.parametrize("std", [1, 3, 10**5])
def test_neighbours_are_independent(std: int) -> None:
    drawn = ours(std, COUNT)
    for lag in (1, 2, 64):
        one, other = drawn[lag:], drawn[:-lag]
        pairs = (one[::2].astype(float) * other[::2]).mean() / exact_variance(std)
        assert abs(pairs) < DEVIATIONS / math.sqrt(one.size // 2)
        sizes = (np.abs(one) > std).astype(int) * 2 + (np.abs(other) > std)
        table = np.bincount(sizes[::2], minlength=4).reshape(2, 2)
        expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
        assert ((table - expected) ** 2 / expected).sum() < chi2.isf(FALSE_ALARM, 1)


@pytest.mark.parametrize("shares", [2, 10, 100])
@pytest.mark.parametrize("std", [2, 17, 10**5, 2**33])
def test_the_sum_of_shares_is_the_discrete_gaussian_of_the_whole(std: int, shares: int) -> None:
    # Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), theorem 5: from std 2 on, as near as nothing.
    size = 3_000_000 // shares
    total = sum(discrete_gaussian(Stream.derive("share", i), std, size) for i in range(shares))
    fits(total, float(shares * std**2))
    assert math.isclose(
        float((total.astype(float) ** 2).mean()),
        shares * float(std) ** 2,
        rel_tol=DEVIATIONS * math.sqrt(2 / size),
    )


def test_at_std_1_the_sum_of_shares_is_near_the_whole_and_its_variance_smaller() -> None:
    total = sum(discrete_gaussian(Stream.derive("share", i), 1, 100_000) for i in range(10))
    assert 0.999 < exact_variance(1) < 1
    fits(total, 10.0)


def by_opendp(std: int, count: int) -> np.ndarray:
    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T="i64"))
    noise = dp.m.make_gaussian(domain, dp.l2_distance(T=float), float(std))
    return np.array(noise([0] * count), dtype=np.int64)


@pytest.mark.parametrize("std", [1, 2, 17, 10**5, 2**33])
def test_opendp_draws_from_the_same_law(std: int) -> None:
    # Its randomness is the system's: a false alarm in 10**9 runs.
    theirs = by_opendp(std, 15_000)
    agree(theirs, ours(std, COUNT), float(std) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("std", [3, 2**33])
def test_opendp_draws_from_the_same_law_a_million_times(std: int) -> None:
    theirs = by_opendp(std, COUNT)
    fits(theirs, float(std) ** 2)
    agree(theirs, discrete_gaussian(Stream(KEY), std, 10 * COUNT), float(std) ** 2)


# --- the tests can fail --------------------------------------------------------------------------


def plain(
    std: int,
    count: int,
    *,
    largest_k: int = 9,
    negative_zero: bool = False,
    negative: float = 0.5,
    accept: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Karney's algorithm in floating point with numpy's generator, and mistakes on demand."""
    random = np.random.default_rng(std)
    size = 2 * count if std > 1 else 3 * count
    mass = np.exp(-(np.arange(largest_k + 1.0) ** 2) / 2)
    k = random.choice(largest_k + 1, size, p=mass / mass.sum())
    j = random.integers(0, std, size)
    minus = random.random(size) < negative
    x = j / std
    rate = np.exp(-x * (2 * k + x) / 2) if accept is None else accept(k, x)
    kept = (random.random(size) < rate) & (negative_zero | ~((k == 0) & (j == 0) & minus))
    drawn = np.where(minus, -(k * std + j), k * std + j)[kept]
    assert drawn.size >= count
    return drawn[:count]


def checks(samples: np.ndarray, std: int) -> list[str]:
    """Which of the checks above refuse these samples."""
    refused = []
    for name, check in (
        ("fit", lambda: fits(samples, float(std) ** 2)),
        ("moments", lambda: moments(samples, std)),
        ("symmetry", lambda: symmetric(samples, std)),
        ("tails", lambda: tails(samples, std)),
    ):
        try:
            check()
        except AssertionError:
            refused.append(name)
    return refused


@pytest.mark.parametrize("std", [1, 3, 600])
def test_the_checks_pass_the_algorithm_written_plainly(std: int) -> None:
    assert checks(plain(std, COUNT), std) == []


def rounded(scale: float) -> Sampler:
    def draw(std: int, count: int) -> np.ndarray:
        random = np.random.default_rng(7)
        return np.rint(random.normal(0, scale * std, count)).astype(np.int64)

    return draw


WRONG: dict[str, tuple[int, Sampler, str]] = {
    "a rounded normal, 1 % wide": (600, rounded(1.01), "fit moments"),
    "a rounded normal, 1 % narrow": (10**5, rounded(0.99), "fit moments"),
    "a rounded normal at std 1": (1, rounded(1.0), "fit moments"),
    "50.5 % negative": (600, lambda s, n: plain(s, n, negative=0.505), "symmetry"),
    "always positive": (3, lambda s, n: plain(s, n, negative=0.0), "fit symmetry"),
    "zero twice": (1, lambda s, n: plain(s, n, negative_zero=True), "fit moments"),
    "zero twice at std 17": (17, lambda s, n: plain(s, n, negative_zero=True), "fit"),
    "no k of 3": (600, lambda s, n: plain(s, n, largest_k=2), "fit moments tails"),
    "no k of 4": (600, lambda s, n: plain(s, n, largest_k=3), "tails"),
    "no acceptance": (600, lambda s, n: plain(s, n, accept=lambda k, x: x * 0 + 1), "fit moments"),
    "k forgotten": (17, lambda s, n: plain(s, n, accept=lambda k, x: np.exp(-x * x / 2)), "fit"),
    "one too far": (17, lambda s, n: plain(s, n) + 1, "fit symmetry"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_checks_refuse_a_wrong_sampler(name: str) -> None:
    std, draw, expected = WRONG[name]
    assert set(expected.split()) <= set(checks(draw(std, COUNT), std))


# --- exactness -------------------------------------------------------------------------------


def exponential(t: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """exp(-t) for t in [0, 50] from below and above, by exp(t)'s series and what remains of it."""
    term = total = Fraction(1)
    for n in itertools.count(1):
        term *= t / n
        total += term
        # From here on each term is below half of the one before.
        if n > 2 * t and term * 2**bits < 1:
            return 1 / (total + term), 1 / total
    raise AssertionError


def cumulative(bits: int) -> list[tuple[Fraction, Fraction]]:
    mass = [exponential(Fraction(k * k, 2), bits) for k in range(TAIL)]
    low, high = (list(itertools.accumulate(side)) for side in zip(*mass, strict=True))
    return [(a / high[-1], b / low[-1]) for a, b in zip(low[:-1], high[:-1], strict=True)]


@pytest.mark.parametrize("bits", [16, 80, 144, 336])
def test_cuts_of_k_are_the_exact_cumulative_masses(bits: int) -> None:
    cells = module._k_cuts(bits)
    assert len(cells) == TAIL - 1
    for (low, high), (least, largest) in zip(cells, cumulative(bits + 100), strict=True):
        # The cell holds the cut, and is as narrow as it can be told apart from its neighbours.
        assert low <= math.floor(least * 2**bits)
        assert high >= math.floor(largest * 2**bits)
        assert high == low


def test_the_table_of_k_says_what_the_cuts_say_and_doubts_five_cells() -> None:
    cuts = [math.floor(low * 2**16) for low, _ in cumulative(100)]
    for cell, k in enumerate(module._K_TABLE.tolist()):
        assert k == (255 if cell in cuts else sum(cell > cut for cut in cuts))
    assert sum(module._K_TABLE == 255) == len(set(cuts)) == 5


@settings(deadline=None, max_examples=60)
@given(
    std=st.one_of(st.integers(1, 20), st.integers(1, LARGEST_STD)),
    k=st.integers(0, 9),
    at=st.floats(0, 1),
    bits=st.sampled_from([31, 95, 159, 351]),
)
def test_cuts_of_the_acceptance_are_the_exact_probability(
    std: int, k: int, at: float, bits: int
) -> None:
    j = min(int(at * std), std - 1)
    ((low, high),) = module._accept_cuts(std, k, j)(bits)
    x = Fraction(j, std)
    least, largest = exponential(x * (2 * k + x) / 2, bits + 100)
    assert low <= math.floor(least * 2**bits) <= math.floor(largest * 2**bits) <= high
    # An interval of two cells stands for a cut next to a border, such as exp(0) = 1.
    assert high - low <= (1 if j == 0 else 0) or bits == 31


class Bits(Stream):
    """A stream that gives chosen bytes, and counts those it was asked for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(KEY)
        self.data, self.at = data, 0

    def read(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at].ljust(count, b"\0")


def words_of(value: int, words: int) -> bytes:
    return b"".join(
        (value >> 64 * i & (1 << 64) - 1).to_bytes(8, "little") for i in reversed(range(words))
    )


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize(("std", "k", "j"), [(2, 0, 1), (2**53, 9, 2**53 - 1), (600, 2, 17)])
def test_a_uniform_next_to_the_cut_is_decided_by_as_many_bits_as_it_takes(
    std: int, k: int, j: int, off: int
) -> None:
    x = Fraction(j, std)
    bits = 31 + 5 * 64
    least, largest = exponential(x * (2 * k + x) / 2, bits + 100)
    floor = math.floor(least * 2**bits)
    assert floor == math.floor(largest * 2**bits)
    value = floor + off
    spare = Bits(words_of(value, 5))
    refused = module._place(value >> 320, 31, module._accept_cuts(std, k, j), spare)
    # The cut is inside the cell of its floor; the zeros that follow lie below it.
    assert refused == (off > 0)
    assert spare.at == (40 if off else 48)


def test_a_certain_acceptance_never_refuses() -> None:
    cuts = module._accept_cuts(7, 3, 0)
    for ones in (0, 1, 2, 3):
        spare = Bits(b"\xff" * 8 * ones)
        assert module._place((1 << 31) - 1, 31, cuts, spare) == 0
        assert spare.at == 8 * (ones + 1)


EXACT_SCALES = (1, 3, 600, 2**53)


@pytest.mark.parametrize("std", EXACT_SCALES)
def test_decimal_arithmetic_alone_gives_the_same_samples(
    std: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = ours(std, 3000)
    monkeypatch.setattr(module, "_SURELY", 2.0**40)
    monkeypatch.setattr(module, "_PERHAPS", -(2.0**40))
    monkeypatch.setattr(module, "_K_TABLE", np.full(1 << 16, 255, np.uint8))
    assert np.array_equal(ours(std, 3000), fast)


@pytest.mark.parametrize("std", EXACT_SCALES)
@pytest.mark.parametrize("name", ["libm", "above", "below", "noisy"])
def test_another_machines_exp_gives_the_same_samples(
    std: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, exp = ours(std, 300_000), np.exp
    noise = np.random.default_rng(3)

    def other(values: np.ndarray, out: np.ndarray) -> np.ndarray:
        if name == "libm":
            out[:] = [math.exp(value) for value in values.tolist()]
            return out
        exp(values, out=out)
        error = {"above": 1.0, "below": -1.0, "noisy": noise.uniform(-1, 1, out.size)}[name]
        out += error * 0.99 * 2.0**-33
        return out

    monkeypatch.setattr(np, "exp", other)
    assert np.array_equal(ours(std, 300_000), usual)


def test_an_exp_that_is_too_far_off_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, exp = ours(600, 300_000), np.exp
    monkeypatch.setattr(np, "exp", lambda values, out: np.multiply(exp(values), 1.001, out=out))
    assert not np.array_equal(ours(600, 300_000), usual)


def test_the_mass_that_is_cut_off_is_below_the_bound() -> None:
    for std in (1, 2, 3, 17, 100):
        at = [math.exp(-((TAIL + i / std) ** 2) / 2) for i in range(10 * std)]
        whole = math.fsum(math.exp(-((i / std) ** 2) / 2) for i in range(-12 * std, 12 * std + 1))
        assert CUT_MASS / 16 < 2 * math.fsum(at) / whole < CUT_MASS
    assert 2 * math.exp(-50) * 1.1 / math.sqrt(2 * math.pi) < CUT_MASS


# --- crafted streams ---------------------------------------------------------------------------


class Crafted(Stream):
    """Every candidate's 16 bits, word and coin as told; the pattern is repeated."""

    def __init__(self, *candidates: tuple[int, int, int], spare: bytes = KEY) -> None:
        super().__init__(KEY)
        self.spare = spare
        self.cells, self.words, self.coins = zip(*candidates, strict=True)

    def read(self, count: int) -> bytes:
        if count == 32:
            return self.spare
        assert count == 2 * BATCH
        return np.resize(np.array(self.cells, "<u2"), BATCH).tobytes()

    def uint64(self, count: int) -> np.ndarray:
        return np.resize(np.array(self.words, np.uint64), count)

    def uint32(self, count: int) -> np.ndarray:
        return np.resize(np.array(self.coins, np.uint32), count)


def test_words_beyond_the_last_multiple_of_std_are_refused() -> None:
    last = (1 << 64) - 1
    # 2**64 = 1 mod 3, and 6 mod 10.
    taken = [(0, word, 0) for word in (0, 1, 2, 3, last, last - 1, last - 3)]
    assert discrete_gaussian(Crafted(*taken), 3, 6).tolist() == [0, 1, 2, 0, 2, 0]
    for off in range(6):
        drawn = discrete_gaussian(Crafted((0, last - off, 0), (0, 5, 0)), 10, 8)
        assert drawn.tolist() == [5] * 8
    assert discrete_gaussian(Crafted((0, last - 6, 0)), 10, 2).tolist() == [9, 9]
    assert discrete_gaussian(Crafted((0, last, 0)), 2**53, 1).tolist() == [2**53 - 1]


def test_a_negative_zero_is_refused_and_a_positive_one_is_not() -> None:
    candidates = ((0, 0, 1), (0, 0, 0), (0, 7, 1), (0, 2, 1), (40_000, 0, 1))
    drawn = discrete_gaussian(Crafted(*candidates), 7, 6)
    assert drawn.tolist() == [0, -2, -7, 0, -2, -7]


def test_the_lowest_bit_of_the_coin_is_the_sign_and_nothing_else() -> None:
    # std 2, k = 0, j = 1: accepted below exp(-1/8).
    cut = math.floor(math.exp(-1 / 8) * 2**31)
    for sign, value in ((0, 1), (1, -1)):
        accepted = ((0, 1, (cut - 1) << 1 | sign), (0, 3, (cut - 9) << 1 | sign))
        refused = ((0, 1, (cut + 1) << 1 | sign), (0, 1, (cut + 9) << 1 | sign))
        drawn = discrete_gaussian(Crafted(*accepted, *refused, (40_000, 0, 0)), 2, 6)
        assert drawn.tolist() == [value, value, 2] * 2


def test_an_undecided_coin_accepts_as_often_as_the_rest_of_the_cut_says() -> None:
    share = math.exp(-1 / 8) * 2**31 % 1
    cut = math.floor(math.exp(-1 / 8) * 2**31)
    drawn = discrete_gaussian(Crafted((0, 1, cut << 1), (40_000, 0, 0)), 2, BATCH // 2)
    accepted = int((drawn == 1).sum())
    odds = share / (1 + share)
    deviation = math.sqrt(drawn.size * odds * (1 - odds))
    assert 0.1 < share < 0.9
    assert abs(accepted - drawn.size * odds) < DEVIATIONS * deviation


def test_doubts_of_one_batch_are_not_settled_as_in_another() -> None:
    # Every second candidate is in doubt; the others, which are 2, mark the places.
    cut = math.floor(math.exp(-1 / 8) * 2**31)
    drawn = discrete_gaussian(Crafted((40_000, 0, 0), (0, 1, cut << 1)), 2, 2 * BATCH)
    marks = np.flatnonzero(drawn == 2)
    settled = np.diff(marks) == 2
    one, other = settled[: BATCH // 2], settled[BATCH // 2 : BATCH]
    assert 0.1 < (one == other).mean() < 0.9
    tail = discrete_gaussian(Crafted((65_535, 0, 0)), 1, 2 * BATCH)
    assert 0.1 < (tail[:BATCH] == tail[BATCH:]).mean() < 0.9
    # Nor in one call as in another: what settles them is drawn from the stream.
    again = discrete_gaussian(Crafted((65_535, 0, 0), spare=bytes(32)), 1, BATCH)
    assert 0.1 < (tail[:BATCH] == again).mean() < 0.9


def test_the_far_tail_follows_the_law() -> None:
    # All candidates from the last cell of k's table, which is one sample in 10**5 otherwise.
    drawn = discrete_gaussian(Crafted((65_535, 0, 0)), 2**20, 3 * BATCH) >> 20
    mass = np.exp(-(np.arange(TAIL) ** 2.0) / 2)
    law = mass / mass.sum() * 2.0**16
    law[4] = 1 - law[5:].sum()
    chi_square(np.bincount(drawn, minlength=7)[4:7], law[4:7] / law[4:7].sum())
    assert drawn.min() == 4


# --- what fixes the samples ---------------------------------------------------------------------

DIGESTS = {
    1: "65efe3279f6bf3f26330fba739690e45",
    2: "21b81f517956aac3ca6e2830b0dcb783",
    3: "b16a1b609450c2ed0d9b00001326e5b7",
    17: "2fc869e0286761f3d74f561b9aedc987",
    600: "a0b05cd24c02217b1432f8b6c7e58e00",
    10**5: "654d011a16728f00fe739716b6450f8e",
    2**33: "c1e4656d70440137c2c5ef114085f999",
    2**53: "4124445312a7c9c293179561488bdc0a",
}


@pytest.mark.parametrize("std", SCALES)
def test_samples_are_what_they_have_always_been(std: int) -> None:
    drawn = discrete_gaussian(Stream(KEY), std, 100_000)
    assert hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()[:32] == DIGESTS[std]


def test_another_process_draws_the_same() -> None:
    program = (
        "import hashlib; from secagg.sampling import Stream;"
        "from secagg.discrete_gaussian import discrete_gaussian as draw;"
        "print(hashlib.sha256(draw(Stream(bytes(range(32))), 600, 100_000)).hexdigest()[:32])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert done.stdout.decode().strip() == DIGESTS[600]


@settings(deadline=None, max_examples=30)
@given(
    std=st.integers(1, LARGEST_STD),
    key=st.binary(min_size=32, max_size=32),
    size=st.integers(0, 40_000),
)
def test_a_shorter_call_gives_a_prefix(std: int, key: bytes, size: int) -> None:
    drawn = discrete_gaussian(Stream(key), std, size)
    assert drawn.shape == (size,)
    assert drawn.dtype == np.int64
    assert np.array_equal(drawn, discrete_gaussian(Stream(key), std, 40_000)[:size])
    if size:
        assert int(np.abs(drawn).max()) < TAIL * std


def test_keys_scales_and_calls_give_different_samples() -> None:
    stream = Stream(KEY)
    drawn = [
        discrete_gaussian(stream, 10**6, 100),
        discrete_gaussian(stream, 10**6, 100),
        discrete_gaussian(Stream(bytes(32)), 10**6, 100),
        discrete_gaussian(Stream(KEY), 10**6 + 1, 100),
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert (one != other).mean() > 0.9


def test_batches_do_not_repeat() -> None:
    drawn = discrete_gaussian(Stream(KEY), 2**53, 60_000)
    assert np.unique(drawn).size == drawn.size


def test_the_largest_std_is_one_that_float64_and_int64_can_hold() -> None:
    assert float(LARGEST_STD - 1) + 1 == LARGEST_STD == 2**53
    assert TAIL * LARGEST_STD < 2**63


def test_numpy_integers_are_integers() -> None:
    expected = discrete_gaussian(Stream(KEY), 2**40, 10)
    assert np.array_equal(discrete_gaussian(Stream(KEY), np.int64(2**40), np.int32(10)), expected)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "came"),
    [
        (0, "0"),
        (-1, "-1"),
        (LARGEST_STD + 1, str(LARGEST_STD + 1)),
        (1 << 70, str(1 << 70)),
        (1.0, "float"),
        (math.nan, "float"),
        (np.float64(3), "float64"),
        (True, "bool"),
        ("7", "str"),
        (None, "NoneType"),
        (np.array([3]), "ndarray"),
    ],
)
def test_a_bad_std_is_refused_and_nothing_is_drawn(std: object, came: str) -> None:
    stream = Stream(KEY)
    message = f"expected a standard deviation .* from 1 to {LARGEST_STD}; got {re.escape(came)}; "
    with pytest.raises(InputError, match=message):
        discrete_gaussian(stream, std, 5)
    assert stream.read(8) == Stream(KEY).read(8)


@pytest.mark.parametrize(
    ("count", "came"), [(-1, "-1"), (1 << 63, str(1 << 63)), (2.0, "float"), (False, "bool")]
)
def test_a_bad_count_is_refused_and_nothing_is_drawn(count: object, came: str) -> None:
    stream = Stream(KEY)
    with pytest.raises(InputError, match=f"expected a number of samples .*; got {came}; "):
        discrete_gaussian(stream, 5, count)
    assert stream.read(8) == Stream(KEY).read(8)


def test_no_samples_are_an_empty_array() -> None:
    drawn = discrete_gaussian(Stream(KEY), 1, 0)
    assert drawn.shape == (0,)
    assert drawn.dtype == np.int64
