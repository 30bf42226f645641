"""Key holders that put sketches together: with one another, with clients, with the sum.

Broken, one by one: multipliers that all clients share, which show the cosine of two updates, give
way to any client that tells them, and come out of the sum; multipliers that a client knows before
it uploads, which do not see what it made for them; masks that are exact, from which division gets
the multipliers.

Ours has multipliers of their own for each upload, out of a challenge and the upload itself, and
masks with an error: nothing divides.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from attacker import Integers, Residues, named, signer
from sketch_views import (
    Floats,
    divided,
    encrypted,
    fixed_context,
    multiplied,
    multipliers,
    opened,
    public,
    shown,
    turned,
)

from secagg.challenges import challenge_key
from secagg.context import RoundContext
from secagg.norm_check import passes
from secagg.onetime import secret
from secagg.parameters import MODULUS, RING_DEGREE, NormCheck
from secagg.planner import plan_integers, plan_tensors
from secagg.residues import narrow
from secagg.sketch_shape import Shape, norm_shapes
from secagg.sketches import Rows, sketch

CHECK = NormCheck()
# One block, one digit in use.
PLAN = plan_tensors(RING_DEGREE, max_clients=8, clip=1.0, norm_check=CHECK)
(LAYOUT,) = PLAN.layouts
CONTEXT = fixed_context(PLAN)
SHARED = named("shared challenge"), named("shared name")
EVERYTHING = Shape(1, RING_DEGREE, 1)
EXACT = Shape(CHECK.sketches, 16, 0)
SHORT = 4  # no coefficient of a multiplier is larger


def seed_of(name: str) -> bytes:
    return named("seed", name)


def asked(context: RoundContext, name: str, ciphertexts: Residues) -> tuple[bytes, bytes]:
    """The challenge and the digest from which ours expands a client's multipliers."""
    key = challenge_key(named("secret"), context.id.digest, signer(name).public)
    return key, hashlib.sha256(narrow(ciphertexts)).digest()


def update(number: int) -> Integers:
    drawn = np.random.default_rng(number).normal(0, 25, RING_DEGREE)
    return np.rint(drawn).astype(np.int64)


# --- two clients ----------------------------------------------------------------------------------


def correlation(*, shared: bool) -> float:
    """Of what two sketches show at the same place, of updates with a cosine of 0.9."""
    both = {"a": update(1), "b": np.rint(0.9 * update(1) + 0.436 * update(2)).astype(np.int64)}
    seen: list[Integers] = []
    for name, values in both.items():
        ciphertexts = encrypted(CONTEXT, [values], seed_of(name))
        asks = SHARED if shared else asked(CONTEXT, name, ciphertexts)
        (rows,) = shown(CONTEXT, ciphertexts, *asks)
        seen.append(opened(LAYOUT, rows, seed_of(name))[:, 0].reshape(-1))
    return float(np.corrcoef(*seen)[0, 1])


def test_shared_multipliers_show_the_cosine_of_two_updates() -> None:
    assert correlation(shared=True) == pytest.approx(0.9, abs=0.1)


def test_ours_shows_none() -> None:
    # Of 256 values; false alarm 1e-7.
    assert abs(correlation(shared=False)) < 5.3 / 16


# --- a client that tells its multipliers ----------------------------------------------------------

COUNTS = plan_integers(1000, max_clients=8, max_abs=5, max_norm=20, norm_check=CHECK)
ITEMS = 10


def counts() -> Integers:
    drawn = np.random.default_rng(3)
    values = np.zeros(1000, dtype=np.int64)
    values[drawn.choice(1000, ITEMS, replace=False)] = drawn.integers(1, 5, ITEMS, endpoint=True)
    return values


def equations(drawn: Integers, positions: Integers) -> Floats:
    """What a value shows of one block: (values shown, 4096), by the multipliers (rows, 4096)."""
    rows = []
    for row, places in zip(drawn, positions, strict=True):
        extended = np.concatenate([row, -row])
        for place in places.astype(np.int64):
            rows.append(extended[(place - np.arange(RING_DEGREE)) % (2 * RING_DEGREE)])
    return np.array(rows, dtype=np.float64)


def pursued(matrix: Floats, seen: Floats) -> Integers:
    """The few entries that explain what is seen best: orthogonal matching pursuit."""
    chosen: list[int] = []
    left, found = seen, np.zeros(0)
    for _ in range(ITEMS):
        chosen.append(int(np.argmax(np.abs(matrix.T @ left))))
        found = np.linalg.lstsq(matrix[:, chosen], seen, rcond=None)[0]
        left = seen - matrix[:, chosen] @ found
    values = np.zeros(matrix.shape[1], dtype=np.int64)
    values[chosen] = np.rint(found)
    return values


def solved(*, shared: bool) -> Integers:
    """The victim's counts, as read with the multipliers of a client that is with the key holder."""
    context, (layout,) = fixed_context(COUNTS), COUNTS.layouts
    ciphertexts = encrypted(context, [counts()], seed_of("victim"))
    asks = SHARED if shared else asked(context, "victim", ciphertexts)
    (rows,) = shown(context, ciphertexts, *asks)
    own = encrypted(context, [counts() * 0], seed_of("colluder"))
    known = SHARED if shared else asked(context, "colluder", own)
    drawn = multipliers(COUNTS, *known)[:, 0]
    seen = opened(layout, rows, seed_of("victim"))[:, 0].reshape(-1)
    return pursued(equations(drawn, rows.positions.astype(np.int64))[:, :1000], seen.astype(float))


def test_with_shared_multipliers_a_colluding_client_lets_sparse_counts_be_solved_for() -> None:
    assert np.array_equal(solved(shared=True), counts())


def test_a_colluding_client_of_ours_knows_nothing_of_others_multipliers() -> None:
    read = solved(shared=False)
    # Of 10 items among 1000, a guess has 0.1 on average; five or more by chance: 2e-8.
    assert np.count_nonzero((read != 0) & (counts() != 0)) < 5


# --- a client that knows its multipliers before it uploads ----------------------------------------


def unseen(asks: tuple[bytes, bytes], positions: Integers) -> Integers:
    """An update of ten times the bound that no row with these multipliers sees."""
    rows = equations(multipliers(PLAN, *asks)[:, 0], positions)
    wanted = np.random.default_rng(4).normal(size=RING_DEGREE)
    kernel = wanted - rows.T @ np.linalg.solve(rows @ rows.T, rows @ wanted)
    return np.rint(kernel * 10 * LAYOUT.norm / np.linalg.norm(kernel)).astype(np.int64)


def test_known_multipliers_do_not_see_what_was_made_for_them() -> None:
    nothing = encrypted(CONTEXT, [update(1) * 0], seed_of("victim"))
    seed = seed_of("poisoner")
    (rows,) = shown(CONTEXT, nothing, *SHARED)
    poison = unseen(SHARED, rows.positions.astype(np.int64))
    assert np.linalg.norm(poison) > 9.9 * LAYOUT.norm
    ciphertexts = encrypted(CONTEXT, [poison], seed)
    key, name = SHARED
    assert passes(PLAN, secret(seed), sketch(CONTEXT, name, [ciphertexts], key))
    # Even with the challenge known, the multipliers depend on what is uploaded.
    name = hashlib.sha256(narrow(ciphertexts)).digest()
    assert not passes(PLAN, secret(seed), sketch(CONTEXT, name, [ciphertexts], key))
    # And so they do where only the upload is known.
    key, _ = asked(CONTEXT, "poisoner", ciphertexts)
    assert not passes(PLAN, secret(seed), sketch(CONTEXT, SHARED[1], [ciphertexts], key))


# --- masks ----------------------------------------------------------------------------------------


def masks(rows: Rows) -> Integers:
    return (rows.masks << np.uint64(8 * rows.shape.dropped)).astype(np.int64)


def short(polynomials: Integers) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    out: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = np.abs(polynomials).max(axis=-1) <= SHORT
    return out


def test_an_exact_mask_of_one_block_is_the_multiplier() -> None:
    ciphertexts = encrypted(CONTEXT, [update(1)], seed_of("victim"))
    asks = asked(CONTEXT, "victim", ciphertexts)
    (rows,) = shown(CONTEXT, ciphertexts, *asks, EXACT)
    read = divided(masks(rows), public(CONTEXT)[0])
    assert np.array_equal(read, multipliers(PLAN, *asks, EXACT)[:, 0])
    # From then on any guess about the update is right or wrong, up to the upload's own errors.
    seen = opened(LAYOUT, rows, seed_of("victim"))[:, 0]
    right, wrong = (
        np.take_along_axis(multiplied(read, update(n)), rows.positions.astype(np.int64), 1)
        for n in (1, 2)
    )
    assert np.abs(seen - right).max() < 8
    assert np.abs(seen - wrong).max() > LAYOUT.norm


def test_a_mask_of_ours_divides_to_nothing_short() -> None:
    ciphertexts = encrypted(CONTEXT, [update(1)], seed_of("victim"))
    (rows,) = shown(CONTEXT, ciphertexts, *asked(CONTEXT, "victim", ciphertexts))
    assert rows.shape.dropped >= 1
    read = divided(masks(rows), public(CONTEXT)[0])
    assert np.abs(read).max(axis=1).min() > MODULUS // 2 - MODULUS // 100


TWO = plan_tensors(6 * RING_DEGREE, max_clients=8, clip=1.0, norm_check=CHECK)


def found(shape: Shape, asks: tuple[bytes, bytes]) -> tuple[set[int], set[int]]:
    """Rows whose two blocks are under one multiplier, up to a power of X**2048: found, and true."""
    context = fixed_context(TWO)
    nothing = encrypted(context, [np.zeros(TWO.layouts[0].values, np.int64)], seed_of("victim"))
    (rows,) = shown(context, nothing, *asks, shape)
    drawn, (first, second) = multipliers(TWO, *asks, shape), public(context)
    guessed, true = set[int](), set[int]()
    for _ in range(4):
        second = turned(second)
        # (r, X**2048k r): the mask is r (a_1 + X**2048k a_2).
        quotient = divided(masks(rows), (first + second) % MODULUS)
        guessed |= {int(row) for row in np.flatnonzero(short(quotient))}
        drawn[:, 0] = turned(drawn[:, 0])
        true |= {int(r) for r in np.flatnonzero((drawn[:, 0] == drawn[:, 1]).all(axis=1))}
    return guessed, true


def test_exact_masks_of_few_blocks_give_way_to_guessed_mixes() -> None:
    guessed, true = found(EXACT, SHARED)
    assert true
    assert guessed == true


def test_guessed_mixes_do_not_help_against_ours() -> None:
    guessed, true = found(norm_shapes(TWO)[0], SHARED)
    assert true
    assert not guessed


# --- with the sum ---------------------------------------------------------------------------------

CLIENTS = ("victim", "alice", "bob", "carol")


def deconvolved(products: Integers, factor: Integers) -> Floats:
    """What a polynomial was multiplied by, over the reals: small errors stay small."""
    turns = np.exp(-1j * np.pi * np.arange(RING_DEGREE) / RING_DEGREE)
    quotient = np.fft.fft(products * turns) / np.fft.fft(factor * turns)
    out: Floats = (np.fft.ifft(quotient) / turns).real
    return out


def total() -> Integers:
    """The sum of the updates, which the key holder opens."""
    added: Integers = np.sum([update(number) for number in range(len(CLIENTS))], axis=0)
    return added


def read_with_the_sum(*, shared: bool) -> Floats:
    """The victim's update, as read off all coefficients of a row with the multiplier of a sum.

    The key holder has the sum of the updates, and the sum of what all coefficients show.
    """
    rows = {}
    for number, name in enumerate(CLIENTS):
        ciphertexts = encrypted(CONTEXT, [update(number)], seed_of(name))
        asks = SHARED if shared else asked(CONTEXT, name, ciphertexts)
        (seen,) = shown(CONTEXT, ciphertexts, *asks, EVERYTHING)
        rows[name] = opened(LAYOUT, seen, seed_of(name))[0, 0]
    multiplier = np.rint(deconvolved(np.sum(list(rows.values()), axis=0), total()))
    return deconvolved(rows["victim"], multiplier.astype(np.int64))


def likeness(read: Floats) -> float:
    return float(np.corrcoef(read, update(0))[0, 1])


def test_shared_multipliers_come_out_of_the_sum_and_open_every_update() -> None:
    assert likeness(read_with_the_sum(shared=True)) > 0.9


def test_multipliers_of_their_own_do_not_come_out_of_the_sum() -> None:
    """Even if all coefficients were shown; ours shows 16 of 4096.

    What is read is not unlike the update, because the sum, which it is made of, is not: it is to
    be less like it than that.
    """
    assert likeness(total().astype(float)) == pytest.approx(0.5, abs=0.1)
    assert abs(likeness(read_with_the_sum(shared=False))) < 0.3
