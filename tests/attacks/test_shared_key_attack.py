"""Why keys are used once: an exact sum under a shared key gives the key away.

A textbook scheme, built here from the library's own ring: every client encrypts under the public
key of one long-term secret s, and exact integer sums are published. One malicious client adds
K * 2**s to the *second* half of an encryption of zero, which then decrypts to K * s(X): on the
grid, every digit in range, with an honest norm. The published sum is K * s(X) plus what the
others sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from round_support import raw_upload

from secagg import ckks, encryptor, onetime, ring
from secagg.aggregator import Aggregate, Aggregator
from secagg.errors import ReleaseError
from secagg.keyholder import KeyHolder
from secagg.packing import pack, unpack
from secagg.parameters import MODULUS, RING_DEGREE, Layout
from secagg.planner import plan_integers, plan_tensors
from secagg.receipts import SigningKey
from secagg.residues import ResidueSum, widen
from secagg.sampling import Stream, centred_binomial, ternary, uniform_polynomials

Residues = NDArray[np.uint64]
Integers = NDArray[np.int64]

CLIENTS, OTHERS, BOOST = 10, 3, 36


def boost_is_within_an_honest_norm() -> bool:
    """K * s(X) is no larger than an update that uses its whole clip norm, in quantisation steps."""
    segment = plan_tensors(RING_DEGREE, max_clients=CLIENTS, clip=1.0).segments[0]
    steps = 1.0 / segment.step  # type: ignore[union-attr]
    return BOOST * math.sqrt(RING_DEGREE * 2 / 3) * 1.05 <= steps and segment.max_abs >= BOOST


@dataclass
class SharedKey:
    """The textbook scheme: one key for everybody, for ever."""

    stream: Stream

    def __post_init__(self) -> None:
        self.secret = ternary(self.stream)
        self.key = ring.to_ntt(self.secret[None])[0]
        self.second = uniform_polynomials(self.stream, 1)
        self.first = ckks.encrypt(self._error(), self.second, self.key)  # b = e - a s
        # Noise e v + e0 + e1 s of ten clients: standard deviation below 3.24 * 90 * sqrt(10).
        self.layout = Layout(RING_DEGREE, 127, 1270, 5082, 1, 15, (1 << 14) - 1)

    def _error(self) -> Integers:
        return centred_binomial(self.stream, RING_DEGREE)[None]

    def encrypt(self, values: Integers) -> tuple[Residues, Residues]:
        """(b v + e0 + m, a v + e1)."""
        mask = ring.to_ntt(-ternary(self.stream)[None])[0]
        first = ckks.encrypt(pack(self.layout, values) + self._error(), self.first, mask)
        return first, ckks.encrypt(self._error(), self.second, mask)

    def open(self, first: Residues, second: Residues, key: Residues) -> Integers:
        return unpack(
            self.layout,
            ckks.decrypt(first, second, key),
            self.layout.sum_abs // self.layout.max_abs,
        )

    def publish(self, uploads: list[tuple[Residues, Residues]]) -> Integers:
        """The exact sum of a round: what a careful operator would release."""
        halves = ResidueSum(1), ResidueSum(1)
        for upload in uploads:
            for half, part in zip(halves, upload, strict=True):
                half.add(part)
        return self.open(halves[0].value(), halves[1].value(), self.key)

    def malicious(self) -> tuple[Residues, Residues]:
        """Enc(0) + (0, K 2**s): uses nothing but the public key."""
        first, second = self.encrypt(np.zeros(RING_DEGREE, np.int64))
        step = np.uint64(BOOST << self.layout.shift)
        return first, (second + step) % np.uint64(MODULUS)


def guess(published: list[Integers]) -> Integers:
    return np.clip(np.rint(np.sum(published, axis=0) / (BOOST * len(published))), -1, 1).astype(
        np.int64
    )


def test_an_exact_sum_under_a_shared_key_gives_the_key_away() -> None:
    assert boost_is_within_an_honest_norm()
    scheme = SharedKey(Stream(b"shared key".ljust(32)))
    drawn = np.random.default_rng(1)

    def honest() -> tuple[Residues, Residues]:
        return scheme.encrypt(drawn.integers(-OTHERS, OTHERS, RING_DEGREE, endpoint=True))

    victims_update = drawn.integers(-127, 127, RING_DEGREE, endpoint=True)
    stored = scheme.encrypt(victims_update)  # a single upload of some earlier round
    rounds = [
        scheme.publish([*(honest() for _ in range(CLIENTS - 1)), scheme.malicious()])
        for _ in range(2)
    ]
    # The nine others sum to a standard deviation of 6 against half a boost of 18: 3 of them in one
    # round, 4.2 in two. So some 8 coefficients of 4096 are wrong at first, 0.1 then; seeds fixed.
    wrong = np.count_nonzero(guess(rounds[:1]) != scheme.secret)
    assert wrong < 20
    recovered = guess(rounds)
    assert np.array_equal(recovered, scheme.secret)
    opened = scheme.open(*stored, ring.to_ntt(recovered[None])[0])
    assert np.array_equal(opened, victims_update)


def test_the_trick_looks_honest_to_every_check_on_the_sum() -> None:
    scheme = SharedKey(Stream(b"alone".ljust(32)))
    opened = scheme.publish([scheme.malicious()])
    assert np.array_equal(opened, BOOST * scheme.secret)
    assert np.abs(opened).max() <= scheme.layout.max_abs


# --- the same against one-time keys ---------------------------------------------------------------

PLAN = plan_integers(RING_DEGREE, max_clients=CLIENTS, max_abs=127)


def test_one_time_keys_leave_the_trick_nothing_but_the_attackers_own_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # There is no second half to add to: a_j is fixed by the round. The most a client can multiply
    # by K * 2**s is a secret it knows, its own.
    holder = KeyHolder(PLAN)
    drawn = np.random.default_rng(2)
    victims = [drawn.integers(-OTHERS, OTHERS, RING_DEGREE, endpoint=True) for _ in range(9)]
    seeds: list[bytes] = []
    genuine = onetime.fresh_seed

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    monkeypatch.setattr(encryptor, "fresh_seed", spy)
    uploads = [raw_upload(holder.context, [values]) for values in victims]
    boosted = bytes(7) + b"attacker's chosen seed..."
    own = onetime.secret(boosted.ljust(32))
    monkeypatch.setattr(encryptor, "fresh_seed", lambda *_: boosted.ljust(32))
    attack = raw_upload(holder.context, [BOOST * own], SigningKey.generate())
    server = Aggregator(holder.context)
    for upload in [*uploads, attack]:
        server.add(upload)
    published = holder.release(server.aggregate()).sums[0]

    assert np.array_equal(published - BOOST * own, np.sum(victims, axis=0))
    # The estimate that recovered the shared key finds the attacker's own key, and no victim's: an
    # independent key agrees in a third of its coefficients, 30 = one standard deviation.
    recovered = guess([published])
    assert np.count_nonzero(recovered != own) < 20
    public = holder.context.public_polynomials()
    layout = PLAN.layouts[0]
    for seed, upload in zip(seeds[::2], uploads, strict=True):  # every other one is of errors
        agreeing = np.count_nonzero(recovered == onetime.secret(seed))
        assert abs(agreeing - RING_DEGREE / 3) < 8 * 31
        opened = ckks.decrypt(widen(upload.payload, 1), public, ring.to_ntt(recovered[None])[0])
        with pytest.raises(ReleaseError):
            unpack(layout, opened, layout.sum_abs // layout.max_abs)


def test_a_stored_upload_does_not_open_in_any_later_round() -> None:
    # Another round has another public string and other keys: yesterday's upload adds up to noise.
    first = KeyHolder(PLAN)
    stored = raw_upload(first.context, [np.ones(RING_DEGREE, np.int64)])
    later = KeyHolder(PLAN, round_number=2)
    uploads = [raw_upload(later.context, [np.ones(RING_DEGREE, np.int64)]) for _ in range(3)]
    total = ResidueSum(1)
    for upload in [*uploads, stored]:
        total.add(widen(upload.payload, 1))
    manifest = tuple(upload.admission for upload in uploads)
    with pytest.raises(ReleaseError):
        later.release(Aggregate(manifest, total.value()))


def test_adding_a_constant_to_the_upload_changes_ones_own_value_alone() -> None:
    # The server-side form of the trick, 2**s added to every evaluation, is the constant
    # polynomial 2**s: it counts one more in coefficient 0 and multiplies no key.
    holder = KeyHolder(PLAN)
    values = np.arange(RING_DEGREE) % 50
    uploads = [raw_upload(holder.context, [values]) for _ in range(3)]
    total = ResidueSum(1)
    for upload in uploads:
        total.add(widen(upload.payload, 1))
    total.add(np.full((1, RING_DEGREE), 1 << PLAN.layouts[0].shift, np.uint64))
    manifest = tuple(upload.admission for upload in uploads)
    released = holder.release(Aggregate(manifest, total.value())).sums[0]
    assert released[0] == 3 * values[0] + 1
    assert np.array_equal(released[1:], 3 * values[1:])
