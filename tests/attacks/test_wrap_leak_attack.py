"""A key holder that reads values off the wraps of a noise audit.

An audited upload comes to the key holder under a mask. Modulo q, a masked value wraps now and then,
and a wrap takes one from the noise (see `noise_audit`). Whoever knows the errors thus sees every
wrap, and with it on which side of the opened grid value the client's own value lies: nothing about
most coefficients, a bound on the value of about one in 4 n for n clients.

Broken: errors that come from the sealed seed, which the key holder has. In ours they have a seed
that never leaves the client, and the same reading is guessing.

What remains is a hint: noise of 21, say, is likelier without a wrap than with one. On a coefficient
it is worth next to nothing. Over a whole upload hints add up for whoever holds two candidates for
*all* of its values and asks which one it was; by how much, the last tests compute. It is most
where the cohort is small and the values fill their coefficients, and the planner decides on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, sqrt
from typing import NamedTuple

import numpy as np
import pytest
from attacker import Integers, coefficients, key_of, named, residues, signer, upload_under
from numpy.typing import NDArray

from secagg import ckks, onetime
from secagg.context import RoundContext
from secagg.encryptor import encrypt_quantized
from secagg.keyholder import KeyHolder
from secagg.noise_audit import masked, off_grid
from secagg.parameters import MODULUS, RING_DEGREE, Plan
from secagg.planner import plan_integers
from secagg.quantize import Quantized
from secagg.sampling import CBD_BITS, Stream
from secagg.sealing import RoundKeyPair
from secagg.upload import Upload

# Three clients, and values that fill their coefficients: as many wraps as there can be.
LARGEST = 1 << 45
PLAN = plan_integers(RING_DEGREE, max_clients=3, max_abs=LARGEST)
UPLOADS = 20


class Audited(NamedTuple):
    """What the key holder has in its hands after an audit: the seed, and what it opened."""

    seed: bytes
    grid: Integers
    noise: Integers


def values(number: int, plan: Plan = PLAN) -> Integers:
    drawn = np.random.default_rng(number)
    (layout,) = plan.layouts
    return drawn.integers(-layout.max_abs, layout.max_abs, layout.values, endpoint=True)


def steps(plan: Plan, message: Integers) -> Integers:
    """The values' place on the grid, one for each coefficient."""
    packed: Integers = coefficients(plan, [message]) >> plan.layouts[0].shift
    return packed


def audited(context: RoundContext, upload: Upload, seed: bytes, number: int) -> Audited:
    hidden = masked(context.plan, residues(upload), Stream.derive("mask", number))
    opened = ckks.decrypt(hidden, context.public_polynomials(), key_of([seed]))
    assert not off_grid(context.plan, opened)
    shift = context.plan.layouts[0].shift
    grid = (opened + (1 << (shift - 1))) >> shift
    return Audited(seed, grid, opened - (grid << shift))


def fixed_context() -> RoundContext:
    """A round whose every byte is the same in every run."""
    private = b"".join(named("round key", part) for part in range(3))
    return KeyHolder(PLAN, pair=RoundKeyPair.from_bytes(private)).context


@dataclass
class Claims:
    """Where the key holder says that a value lies beyond the opened one, and whether it does."""

    made: NDArray[np.bool_]
    true: NDArray[np.bool_]


def read_off(seen: Audited, message: Integers, plan: Plan = PLAN) -> Claims:
    """The distinguisher: expand the errors from the seed, and call what is missing a wrap."""
    wrapped = seen.noise - onetime.errors(seen.seed, plan.blocks) == -1
    value = steps(plan, message)
    beyond = np.where(seen.grid >= 0, value > seen.grid, value <= seen.grid)
    return Claims(wrapped != (seen.grid < 0), beyond)


# --- broken ---------------------------------------------------------------------------------------


def test_errors_from_the_sealed_seed_show_the_key_holder_where_values_lie() -> None:
    context = fixed_context()
    told = 0
    for number in range(4):
        message, seed = values(number), named("sealed seed", number)
        upload = upload_under(
            context, [message], signer("c"), seed, onetime.errors(seed, PLAN.blocks)
        )
        claims = read_off(audited(context, upload, seed, number), message)
        # Every claim is true, and none is missed: no statistics are needed.
        assert np.array_equal(claims.made, claims.true)
        told += np.count_nonzero(claims.made)
    # |value| / K on average, K masks: some 3 % of the coefficients of an upload.
    expected = 4 * RING_DEGREE * LARGEST / 2 / ((MODULUS - 1) >> PLAN.layouts[0].shift)
    assert abs(told - expected) < 4 * sqrt(expected)


# --- ours -----------------------------------------------------------------------------------------


def ours(
    monkeypatch: pytest.MonkeyPatch, context: RoundContext, message: Integers, number: int
) -> Audited:
    """Our own client's upload, audited: repeatable, with what the key holder sees."""
    seeds: list[bytes] = []
    genuine = onetime.fresh_seed
    drawn = (named("generator", number, index) for index in range(2))

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    with monkeypatch.context() as patch:
        patch.setattr("secagg.encryptor.fresh_seed", spy)
        patch.setattr("secagg.onetime.os.urandom", lambda count: next(drawn)[:count])
        upload = encrypt_quantized(context, [Quantized(message)], signer("client"))
    sealed, errors = seeds
    assert sealed != errors
    return audited(context, upload, sealed, number)


def test_the_same_reading_of_ours_is_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are right no more often than silence is wrong; false alarm 6e-5."""
    context = fixed_context()
    made, true = [], []
    for number in range(UPLOADS):
        message = values(number)
        claims = read_off(ours(monkeypatch, context, message, number), message)
        made.append(claims.made)
        true.append(claims.true)
    claimed, beyond = np.concatenate(made).reshape(-1), np.concatenate(true).reshape(-1)
    # Where the value lies beyond and the reading says so, it is by chance: compare the two rates.
    hits, misses = beyond[claimed], beyond[~claimed]
    rate = beyond.mean()
    deviation = sqrt(rate * (1 - rate) * (1 / hits.size + 1 / misses.size))
    assert min(hits.size, misses.size) > 20_000
    assert abs(hits.mean() - misses.mean()) < 4 * deviation
    # And most of what it claims is false, where none was in the broken scheme.
    assert hits.mean() < 0.1


def test_the_errors_of_ours_have_nothing_to_do_with_the_sealed_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Correlation of noise and the errors that the sealed seed would give; false alarm 6e-5."""
    context = fixed_context()
    noise, guess = [], []
    for number in range(UPLOADS):
        seen = ours(monkeypatch, context, values(number), number)
        noise.append(seen.noise.reshape(-1))
        guess.append(onetime.errors(seen.seed, PLAN.blocks).reshape(-1))
    correlation = np.corrcoef(np.concatenate(noise), np.concatenate(guess))[0, 1]
    assert abs(correlation) < 4 / sqrt(UPLOADS * RING_DEGREE)


# --- what remains ---------------------------------------------------------------------------------

_WAYS = [comb(2 * CBD_BITS, k) / 4**CBD_BITS for k in range(2 * CBD_BITS + 1)]
# The log-likelihood that one wrap is worth on average: of CBD(21) against itself moved by one.
HINT = sum(p * np.log(p / q) for p, q in zip(_WAYS[1:], _WAYS[:-1], strict=True))


def log_likelihood(seen: Audited, candidate: Integers) -> float:
    """Of what was opened, were this the plaintext: the best use of all hints together."""
    errors = seen.noise + (seen.grid < candidate)  # a wrap, which this candidate would explain
    inside = np.abs(errors) <= CBD_BITS
    weights = np.log(np.array(_WAYS))[np.clip(errors, -CBD_BITS, CBD_BITS) + CBD_BITS]
    return float(np.where(inside, weights, -1000.0).sum())


def worth(plan: Plan, one: Integers, other: Integers) -> float:
    """Nats by which an audit tells two candidates for a whole upload apart, on average."""
    masks = (MODULUS - 1) >> plan.layouts[0].shift
    apart = np.abs(steps(plan, one) - steps(plan, other)).astype(np.float64)
    return float(HINT * apart.sum() / masks)


def test_hints_are_worth_what_theory_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all candidates these two are the farthest apart. Each trial has a deviation of about 8."""
    assert abs(HINT - 1 / CBD_BITS) < 1e-3  # 1 / (2 variance), as of a Gaussian
    context = fixed_context()
    low, high = (np.full(RING_DEGREE, sign * LARGEST) for sign in (-1, 1))
    gained = []
    for number in range(UPLOADS):
        seen = ours(monkeypatch, context, high, number)
        gained.append(
            log_likelihood(seen, steps(PLAN, high)) - log_likelihood(seen, steps(PLAN, low))
        )
    expected = worth(PLAN, low, high)
    assert abs(np.mean(gained) - expected) < 4 * sqrt(2 * expected / UPLOADS)
    # One coefficient of 4096 is worth a hundredth of a bit, a whole upload of such values is told.
    assert expected / RING_DEGREE < 0.01 < 10 < expected


@pytest.mark.parametrize(
    ("clients", "bits", "low", "high"),
    [(3, 8, 10, 30), (8, 8, 500, 1000), (20, 8, 1, 5), (100, 8, 0, 0.02), (1000, 8, 0, 0.2)],
)
def test_what_a_whole_model_is_worth_depends_on_how_full_its_coefficients_are(
    clients: int, bits: int, low: float, high: float
) -> None:
    """A million values, all at one extreme or all at the other: the bound on any two candidates.

    Eight clients of eight bits fill a coefficient almost to the brim, and an audit tells; a hundred
    leave so much room that it does not. One digit fewer a coefficient is worth a factor of B.
    """
    largest, size = (1 << (bits - 1)) - 1, 1 << 20
    plan = plan_integers(size, max_clients=clients, max_abs=largest)
    assert low <= worth(plan, np.full(size, -largest), np.full(size, largest)) < high
