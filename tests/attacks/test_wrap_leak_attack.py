"""A key holder that reads values off the wraps of a noise audit.

To see an upload's noise, one has to get rid of its value; modulo q, whatever hides the value wraps
now and then, and a wrap takes one from the noise (see `noise_audit`). Each tells on which side of
something that the key holder knows the value lies. Errors blur that, and over a million values
blurred hints add up for whoever holds two candidates for *all* of them and asks which it was.

Broken, one by one: a full ciphertext under a random mask, where a wrap is as likely as the value is
large; errors that come from the sealed seed, which blur nothing; a dither without a cover, where
whoever can open the sum knows what the errors add up to, and so what the dithers do.

Ours shows dithered and covered low bits. What it is worth is the *square* of the share of q by
which the candidates differ, and the last tests compute how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    coefficients,
    key_of,
    named,
    residues,
    signer,
    upload_under,
)
from numpy.typing import NDArray

from secagg import ckks, noise_audit, onetime, ring
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.keyholder import KeyHolder
from secagg.noise_audit import dithered, off_grid
from secagg.parameters import MODULUS, RING_DEGREE, Plan
from secagg.planner import plan_integers
from secagg.quantize import Quantized
from secagg.sampling import CBD_BITS, Stream, uniform_polynomials
from secagg.sealing import RoundKeyPair
from secagg.upload import Upload

Floats = NDArray[np.float64]

# Three clients, and values that fill their coefficients: the most that an audit can show.
LARGEST = 1 << 45
PLAN = plan_integers(RING_DEGREE, max_clients=3, max_abs=LARGEST)
GRID = 1 << PLAN.layouts[0].shift
LOW, HIGH = (coefficients(PLAN, [np.full(RING_DEGREE, sign * LARGEST)]) for sign in (-1, 1))
APART = 2 * LARGEST * GRID / MODULUS
UPLOADS = 20


def values(number: int) -> Integers:
    return np.random.default_rng(number).integers(-LARGEST, LARGEST, RING_DEGREE, endpoint=True)


def fixed_context() -> RoundContext:
    """A round whose every byte is the same in every run."""
    private = b"".join(named("round key", part) for part in range(3))
    return KeyHolder(PLAN, pair=RoundKeyPair.from_bytes(private)).context


CONTEXT = fixed_context()


class Sent(NamedTuple):
    """An upload, and the seed that the key holder opens."""

    upload: Upload
    seed: bytes

    def opened(self, ciphertexts: Residues) -> Integers:
        """What the key holder gets out of ciphertexts under this client's key; centred."""
        return ckks.decrypt(ciphertexts, CONTEXT.public_polynomials(), key_of([self.seed]))

    def mask(self) -> Integers:
        """a_j s: the key holder needs no ciphertext for that."""
        return self.opened(np.zeros((PLAN.blocks, RING_DEGREE), np.uint64))


def ours(message: Integers, number: int) -> Sent:
    """Our own client's upload: repeatable, with the seed that it seals."""
    seeds: list[bytes] = []
    genuine = onetime.fresh_seed
    drawn = (named("generator", number, index) for index in range(2))

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secagg.encryptor.fresh_seed", spy)
        patch.setattr("secagg.onetime.os.urandom", lambda count: next(drawn)[:count])
        upload = encrypt_quantized(CONTEXT, [Quantized(message)], signer("client"))
    sealed, errors = seeds
    assert sealed != errors
    return Sent(upload, sealed)


def noise_of(sent: Sent, number: int) -> Integers:
    """What an audit of ours shows."""
    low = dithered(PLAN, residues(sent.upload), Stream.derive("dither", number))
    assert not off_grid(PLAN, low, sent.mask())
    return beside_grid(low + sent.mask() % MODULUS)


def beside_grid(amounts: Integers) -> Integers:
    return (amounts + GRID // 2) % GRID - GRID // 2


# --- what candidates predict ----------------------------------------------------------------------

ERROR = np.array([comb(2 * CBD_BITS, k) for k in range(2 * CBD_BITS + 1)]) / 4.0**CBD_BITS
COVER = np.array([1, 4, 6, 4, 1]) / 16
NO_COVER = np.array([0, 0, 1, 0, 0])
SPREAD = np.arange(-3, 5)  # a rounding, which is -1 to 2, and a cover


def moves(mask: Floats, value: Floats, cover: Floats = COVER) -> Floats:
    """Probability of each of SPREAD, by which an audit moves the noise; mask and value over q."""
    down, up = np.floor(mask - value), mask - value - np.floor(mask - value)
    law = np.zeros((*down.shape, SPREAD.size))
    for move, chance in zip(range(-2, 3), cover, strict=True):
        for at, share in ((down + move, 1 - up), (down + move + 1, up)):
            law += (at[..., None] == SPREAD) * (chance * share)[..., None]
    return law


def together(one: Floats, other: Floats) -> Floats:
    """The law of a sum, by the last axis."""
    size = one.shape[-1]
    law = np.zeros((*one.shape[:-1], size + other.shape[-1] - 1))
    for index in range(other.shape[-1]):
        law[..., index : index + size] += one * other[..., index : index + 1]
    return law


def nats(one: Floats, other: Floats) -> float:
    """How well one observation tells two laws apart, over all masks, on average.

    Four times the Bhattacharyya distance. Where both laws are close this is the Kullback-Leibler
    divergence, which however is infinite once there is an outcome that only one of them allows.
    """
    return float(-4 * np.log(np.sqrt(one * other).sum(axis=-1)).mean())


# A reading that takes nothing for impossible: rare certainties do not drown what is measured.
DOUBT = 1e-4


def ratio(one: Floats, other: Floats) -> Floats:
    """What each outcome says for one law against another, in nats."""
    doubted: Floats = np.log(one + DOUBT) - np.log(other + DOUBT)
    return doubted


class Gain(NamedTuple):
    """What a reading gets out of every coefficient together, and what it should get."""

    got: float
    mean: float
    variance: float


def gain(true: Floats, false: Floats, seen: Integers, lowest: int) -> Gain:
    says = ratio(true, false)
    got = np.take_along_axis(says, (seen - lowest)[..., None], axis=-1)
    return Gain(float(got.sum()), float((true * says).sum()), float((true * says**2).sum()))


def as_predicted(gains: Sequence[Gain]) -> bool:
    """False alarm 6e-5."""
    off = sum(each.got - each.mean for each in gains)
    return abs(off) < 4 * sqrt(sum(each.variance for each in gains))


MASKS = (np.arange(400) + 0.5) / 400


def worth_alone(apart: float, cover: Floats = COVER) -> float:
    """Of one coefficient's noise: two candidates that differ by this share of q."""
    one, other = (moves(MASKS, np.full(400, s * apart / 2), cover) for s in (1, -1))
    error = np.broadcast_to(ERROR, (400, ERROR.size))
    return nats(together(one, error), together(other, error))


def worth_of_moves(apart: float, cover: Floats = COVER) -> float:
    """Of one coefficient's moves of two clients together: who of them sent which candidate?"""
    one, other = (moves(MASKS, np.full(400, s * apart / 2), cover) for s in (1, -1))
    first, second = (np.broadcast_to(a[:, None], (400, 400, 8)) for a in (one, other))
    return nats(
        together(first, second.transpose(1, 0, 2)), together(second, first.transpose(1, 0, 2))
    )


# --- broken: full ciphertexts under a mask --------------------------------------------------------

CHOICES = (MODULUS - 1) // GRID
# The nats that one wrap is worth on average: of CBD(21) against itself moved by one.
WRAP = sum(p * np.log(p / q) for p, q in zip(ERROR[1:], ERROR[:-1], strict=True))


def unmasked(sent: Sent, number: int) -> tuple[Integers, Integers]:
    """Grid value and noise that the key holder opens, where a whole ciphertext moves, masked."""
    drawn = uniform_polynomials(Stream.derive("mask", number), PLAN.blocks).astype(np.int64)
    hidden = (residues(sent.upload) + ring.to_ntt(drawn % CHOICES * GRID)) % np.uint64(MODULUS)
    opened = sent.opened(hidden)
    noise = beside_grid(opened)
    return (opened - noise) // GRID, noise


def test_under_a_mask_errors_from_the_sealed_seed_show_where_values_lie() -> None:
    told = 0
    for number in range(4):
        message, seed = values(number), named("sealed seed", number)
        errors = onetime.errors(seed, PLAN.blocks)
        sent = Sent(upload_under(CONTEXT, [message], signer("c"), seed, errors), seed)
        grid, noise = unmasked(sent, number)
        claimed = (noise - errors == -1) != (grid < 0)
        beyond = np.where(grid >= 0, message > grid, message <= grid)
        # Every claim is true, and none is missed: no statistics are needed.
        assert np.array_equal(claimed, beyond)
        told += np.count_nonzero(claimed)
    expected = 4 * RING_DEGREE * APART / 4  # |value| over q on average
    assert abs(told - expected) < 4 * sqrt(expected)


def test_under_a_mask_errors_of_their_own_still_tell_candidates_apart() -> None:
    assert abs(WRAP - 1 / CBD_BITS) < 1e-3
    gains = []
    for number in range(UPLOADS):
        grid, noise = unmasked(ours(np.full(RING_DEGREE, LARGEST), number), number)
        # A wrap is for the candidate that lies beyond the opened value, and against the other.
        wrapped = np.concatenate([ERROR, [0]]), np.concatenate([[0], ERROR])
        laws = [np.where((grid < s * LARGEST)[..., None], *wrapped) for s in (1, -1)]
        gains.append(gain(laws[0], laws[1], noise, -CBD_BITS - 1))
    assert as_predicted(gains)
    worth = WRAP * RING_DEGREE * APART
    assert 20 < worth < 30
    assert np.mean([each.mean for each in gains]) == pytest.approx(worth, rel=0.2)


# --- ours -----------------------------------------------------------------------------------------


def test_ours_is_worth_the_square_of_it() -> None:
    """The best reading there is, for the two candidates that are the farthest apart."""
    gains = []
    for number in range(2 * UPLOADS):
        sent = ours(np.full(RING_DEGREE, LARGEST), number)
        noise, mask = noise_of(sent, number), sent.mask() % MODULUS / MODULUS
        error = np.broadcast_to(ERROR, (*noise.shape, ERROR.size))
        high, low = (together(moves(mask, m / MODULUS), error) for m in (HIGH, LOW))
        gains.append(gain(high, low, noise, -24))
    assert as_predicted(gains)
    worth = RING_DEGREE * worth_alone(APART)
    assert np.mean([each.mean for each in gains]) == pytest.approx(worth, rel=0.1)
    assert 2 < worth < 3 < WRAP * RING_DEGREE * APART / 8
    # A Gaussian of the variances of error, cover and, on average, dither.
    assert abs(worth_alone(APART) / APART**2 - 1 / (2 * (10.5 + 1 + 1 / 6))) < 1e-3


def test_the_errors_of_ours_have_nothing_to_do_with_the_sealed_seed() -> None:
    """Correlation of noise and the errors that the sealed seed would give; false alarm 6e-5."""
    noise, guess = [], []
    for number in range(UPLOADS):
        sent = ours(values(number), number)
        noise.append(noise_of(sent, number).reshape(-1))
        guess.append(onetime.errors(sent.seed, PLAN.blocks).reshape(-1))
    correlation = np.corrcoef(np.concatenate(noise), np.concatenate(guess))[0, 1]
    assert abs(correlation) < 4 / sqrt(UPLOADS * RING_DEGREE)


# --- a key holder that can open the sum -----------------------------------------------------------


def gain_from_moves(number: int, cover: Floats) -> Gain:
    """Two honest clients; those with the key holder are gone from the sum. Who sent which?

    It opens the sum, knows what the two errors add up to, and subtracts that from what it sees.
    """
    pair = [ours(np.full(RING_DEGREE, s * LARGEST), 2 * number + (s > 0)) for s in (1, -1)]
    seen = sum(noise_of(sent, 2 * number + index) for index, sent in enumerate(pair))
    errors = sum(beside_grid(sent.opened(residues(sent.upload))) for sent in pair)
    one, other = (sent.mask() % MODULUS / MODULUS for sent in pair)
    high, low = (m / MODULUS for m in (HIGH, LOW))
    true = together(moves(one, high, cover), moves(other, low, cover))
    false = together(moves(one, low, cover), moves(other, high, cover))
    return gain(true, false, seen - errors, -6)


def test_without_a_cover_the_sum_of_the_dithers_tells_who_sent_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        noise_audit, "_cover", lambda _stream, blocks: np.zeros((blocks, RING_DEGREE), np.uint64)
    )
    assert as_predicted([gain_from_moves(number, NO_COVER) for number in range(UPLOADS // 4)])
    # Far more than the noise itself gives away, and than the masks did.
    worth = RING_DEGREE * worth_of_moves(APART, NO_COVER)
    assert worth > 3 * WRAP * RING_DEGREE * APART
    assert worth > 15 * 2 * RING_DEGREE * worth_alone(APART, NO_COVER)


def test_with_the_cover_it_tells_less_than_the_noise_does() -> None:
    assert as_predicted([gain_from_moves(number, COVER) for number in range(UPLOADS)])
    assert worth_of_moves(APART) < worth_alone(APART)


# --- what remains ---------------------------------------------------------------------------------


def shares(plan: Plan, apart: Integers) -> Floats:
    """By what share of q each coefficient of two candidates differs."""
    return np.abs(coefficients(plan, [apart])) / MODULUS


def worth(shares: Floats, *, opens: bool) -> float:
    """Nats of a whole upload; of two, with the sum opened and everybody else on its side."""
    typical = float(np.sqrt((shares**2).mean()))
    each = worth_alone(typical)
    each = 2 * each + worth_of_moves(typical) if opens else each
    return float(each / typical**2 * (shares**2).sum())


@pytest.mark.parametrize(
    ("clients", "bits", "before", "extremes", "realistic", "at_most"),
    [
        (3, 8, 20, 0.029, 9e-4, 0.1),
        (8, 8, 760, 42, 1.3, 128),
        (20, 8, 3.1, 5e-4, 2e-5, 0.002),
        (100, 8, 0.005, 8e-10, 3e-11, 1e-8),
        (1000, 8, 0.09, 3e-7, 1e-8, 1e-6),
    ],
)
def test_what_a_whole_model_is_worth_depends_on_how_full_its_coefficients_are(
    clients: int, bits: int, before: float, extremes: float, realistic: float, at_most: float
) -> None:
    """A million values of which the key holder has two candidates.

    Eight clients of eight bits fill a coefficient almost to the brim: there one audit may tell
    which of two extremes it was, but hardly which of two updates at the full norm. `at_most` is for
    two extremes at two clients, the key holder being with all others.
    """
    largest, size = (1 << (bits - 1)) - 1, 1 << 20
    plan = plan_integers(size, max_clients=clients, max_abs=largest)
    farthest = shares(plan, np.full(size, 2 * largest))
    drawn = np.random.default_rng(clients).normal(0, largest / 4, (2, size))
    one, other = np.clip(np.rint(drawn), -largest, largest).astype(np.int64)
    close_to = {"rel": 0.2}
    assert WRAP * farthest.sum() == pytest.approx(before, **close_to)
    assert worth(farthest, opens=False) == pytest.approx(extremes, **close_to)
    assert worth(shares(plan, one - other), opens=False) == pytest.approx(realistic, **close_to)
    assert worth(farthest, opens=True) < 1.05 * at_most
