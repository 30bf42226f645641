"""The noise audit names whoever is off the grid, never an honest client, and shows no values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from grids import PLANS, mixed, shifts
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from secagg import ckks, noise_audit, ring
from secagg.errors import ReleaseError
from secagg.noise_audit import HIGHEST, LOWEST, dithered, off_grid
from secagg.packing import pack, unpack
from secagg.parameters import MODULUS, Layout, Plan
from secagg.planner import plan_integers
from secagg.residues import ResidueSum
from secagg.sampling import CBD_BITS, Stream, centred_binomial, ternary, uniform_polynomials

Coefficients = NDArray[np.int64]
Low = NDArray[np.uint32]

NAMED = 29
"""The smallest error that no dither and no cover hide."""

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
any_plan = st.sampled_from(list(PLANS.values()))


def stream(*fields: bytes | str | int) -> Stream:
    return Stream.derive("test noise audit", *fields)


def packed(plan: Plan, choose: Callable[[Layout], NDArray[np.int64]]) -> Coefficients:
    return np.concatenate([pack(layout, choose(layout)) for layout in plan.layouts])


def constant(plan: Plan, sign: int) -> Coefficients:
    """Every value at its planned extreme."""
    return packed(plan, lambda layout: np.full(layout.values, sign * layout.max_abs))


def random_update(plan: Plan, seed: int) -> Coefficients:
    drawn = np.random.default_rng(seed)
    return packed(
        plan,
        lambda layout: drawn.integers(
            -layout.max_abs, layout.max_abs, layout.values, endpoint=True
        ),
    )


def errors(plan: Plan, seed: int) -> Coefficients:
    return centred_binomial(stream("errors", seed), plan.blocks * 4096).reshape(-1, 4096)


def centred(values: NDArray[np.integer]) -> Coefficients:
    """Modulo q, in (-q/2, q/2)."""
    half = MODULUS // 2
    return (values.astype(np.int64) + half) % MODULUS - half


def masks(plan: Plan, *seed: int) -> Coefficients:
    """What a_j s is to everybody but the client: uniform modulo q."""
    return centred(uniform_polynomials(stream("mask", *seed), plan.blocks))


def sent(plan: Plan, plaintext: Coefficients, mask: Coefficients, randomness: Stream) -> Low:
    return dithered(plan, ring.to_ntt(centred(plaintext - mask)), randomness)


def named(plan: Plan, plaintext: Coefficients, *seed: int) -> bool:
    mask = masks(plan, *seed)
    return off_grid(plan, sent(plan, plaintext, mask, stream("dither", *seed)), mask)


def beside_grid(plan: Plan, values: Coefficients) -> Coefficients:
    """What lies beside the grid."""
    half = 1 << (shifts(plan) - 1)
    return (values + half) % (2 * half) - half


def seen(
    plan: Plan, plaintext: Coefficients, mask: Coefficients, randomness: Stream
) -> Coefficients:
    """The noise that the key holder finds."""
    return beside_grid(plan, sent(plan, plaintext, mask, randomness) + mask % MODULUS)


# --- what makes it work ---------------------------------------------------------------------------


def test_the_modulus_is_one_on_every_grid_a_planner_can_make() -> None:
    for clients in (3, 4, 6, 10, 1000, 1_000_000):
        for size in (1, 4096, 1 << 20):
            layout = plan_integers(size, max_clients=clients, max_abs=1).layouts[0]
            assert 7 <= layout.shift <= 24
            assert MODULUS % (1 << layout.shift) == 1
            # The window of noise that passes leaves most of the grid to be named.
            assert 1 << layout.shift > 2 * NAMED


def test_the_window_is_the_largest_error_with_dither_wraps_and_cover() -> None:
    assert (LOWEST, HIGHEST) == (-CBD_BITS - 1 - 2, CBD_BITS + 2 + 2) == (-24, 25)


def always(value: int) -> Callable[[Stream, int], NDArray[np.uint64]]:
    return lambda _stream, blocks: np.full((blocks, 4096), value, np.uint64)


def without_cover(monkeypatch: pytest.MonkeyPatch, noise: int = 0) -> None:
    monkeypatch.setattr(noise_audit, "_cover", always(noise % 2**64))


@pytest.mark.parametrize(
    ("drawn", "coefficient", "taken"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (1, 1, 0),
        (2**55 - 1, 2**55, 1),
        (2**55, 2**55, 0),
        (MODULUS - 2, MODULUS - 1, 1),
        (MODULUS - 1, MODULUS - 1, 0),
    ],
)
def test_one_is_taken_with_probability_of_exactly_coefficient_over_q(
    drawn: int, coefficient: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of q equally likely draws, those below the coefficient take one.
    without_cover(monkeypatch)
    monkeypatch.setattr(noise_audit, "uniform_polynomials", always(drawn))
    plan = PLANS["smallest grid"]
    low = sent(plan, np.full((1, 4096), coefficient), np.zeros((1, 4096), np.int64), stream())
    assert set(np.unique(low)) == {(coefficient - taken) % (1 << plan.layouts[0].shift)}


anything = st.integers(-(MODULUS // 2), MODULUS // 2)


@settings(deadline=None, max_examples=200)
@given(plan=any_plan, plaintext=anything | st.integers(-30, 30), mask=anything)
def test_what_is_seen_is_noise_and_a_fair_rounding_of_mask_less_value(
    plan: Plan, plaintext: int, mask: int
) -> None:
    """Exact, on the real modulus: the whole law of what the key holder sees, cover aside."""
    x = Fraction(mask % MODULUS - plaintext, MODULUS)
    below, above = x.__floor__(), x.__ceil__()
    shape = (plan.blocks, 4096)
    full, masked = np.full(shape, plaintext), np.full(shape, mask)
    noise = beside_grid(plan, full)
    with pytest.MonkeyPatch.context() as patch:
        without_cover(patch)
        for drawn, rounded in ((0, below), (MODULUS - 1, above)):
            patch.setattr(noise_audit, "uniform_polynomials", always(drawn))
            told = seen(plan, full, masked, stream())
            assert not beside_grid(plan, told - noise - rounded).any()
    # And down is drawn as often as a fair rounding goes down.
    assert Fraction((plaintext - mask) % MODULUS, MODULUS) == above - x


def test_the_cover_is_four_fair_bits_less_two() -> None:
    # Nothing is taken from a coefficient of zero.
    plan = PLANS["a million clients"]
    plan = replace(plan, layouts=(replace(plan.layouts[0], values=4096 * 50),))
    low = dithered(plan, np.zeros((plan.blocks, 4096), np.uint64), stream("cover"))
    counts = np.bincount(beside_grid(plan, low.astype(np.int64)).reshape(-1) + 2)
    expected = np.array([1, 4, 6, 4, 1]) / 16 * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@every_plan
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_on_average_it_shows_mask_less_value_over_q_and_nothing_else(
    plan: Plan, sign: int, share: float
) -> None:
    """Means of errors that are known; deviation sqrt(1 + 1/4); false alarm 6e-5 a layout."""
    mask = centred(np.full((plan.blocks, 4096), int(share * MODULUS)))
    values, noise = constant(plan, sign), errors(plan, 1)
    told = seen(plan, values + noise, mask, stream("mean")) - noise
    expected = (mask % MODULUS - values) / MODULUS
    for _, _, part in plan.block_ranges():
        deviation = np.sqrt(1.25 / told[part].size)
        assert abs((told[part] - expected[part]).mean()) < 4 * deviation


# --- honest uploads are never named ---------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    plan=any_plan,
    values=st.sampled_from([-1, 0, 1, None]),
    error=st.sampled_from([-21, 21, None]),
    seed=st.integers(0, 2**32),
)
def test_honest_uploads_are_never_named(
    plan: Plan, values: int | None, error: int | None, seed: int
) -> None:
    update = random_update(plan, seed) if values is None else constant(plan, values)
    noise = errors(plan, seed) if error is None else np.full(update.shape, error)
    assert not named(plan, update + noise, seed)


@settings(deadline=None, max_examples=100)
@given(
    clients=st.integers(3, 1_000_000),
    magnitude=st.integers(1, 100),
    size=st.integers(1, 9000),
    seed=st.integers(0, 2**32),
)
def test_honest_uploads_of_any_plan_are_never_named(
    clients: int, magnitude: int, size: int, seed: int
) -> None:
    plan = plan_integers(size, max_clients=clients, max_abs=magnitude)
    signs = np.random.default_rng(seed).choice([-21, 21], (plan.blocks, 4096))
    assert not named(plan, random_update(plan, seed) + signs, seed)


def extremes(plan: Plan) -> Iterable[tuple[int, int]]:
    """Values and masks around every place where mask less value goes over a multiple of q."""
    layout = plan.layouts[0]
    largest = int(constant(plan, 1).max())
    top = (MODULUS // 2 >> layout.shift) - 1 << layout.shift
    for value in (-top, -largest, 0, largest, top):
        around = (0, value, value + MODULUS, value - MODULUS, MODULUS - 1)
        yield from ((value, mask + step) for mask in around for step in (-60, -1, 0, 1, 60))


@pytest.mark.parametrize("name", ["smallest grid", "a hundred clients", "a million clients"])
def test_wraps_neither_name_the_honest_nor_hide_anybody(name: str) -> None:
    """Every error beside every edge, each with a dither and a cover of its own."""
    plan = PLANS[name]
    plan = replace(plan, layouts=(replace(plan.layouts[0], values=1),))
    half = 1 << (plan.layouts[0].shift - 1)
    honest = np.arange(-CBD_BITS, CBD_BITS + 1)
    sizes = np.union1d(np.arange(NAMED, NAMED + 99), np.arange(half - 99, half + 1))
    bad = np.r_[sizes, -sizes]
    bad = bad[(np.abs(bad) >= NAMED) & (np.abs(bad) <= half)]
    for value, mask in extremes(plan):
        row = np.resize(value + honest, (1, 4096))
        masked = centred(np.full((1, 4096), mask))
        low = sent(plan, row, masked, stream(name, f"{value} {mask}"))
        assert not off_grid(plan, low, masked), (value, mask)
        told = seen(plan, np.resize(value + bad, (1, 4096)), masked, stream(f"{value} {mask}"))
        assert ((told < LOWEST) | (told > HIGHEST)).all(), (value, mask)


def masks_under(public: NDArray[np.uint64], key: NDArray[np.uint64]) -> Coefficients:
    return ckks.decrypt(np.zeros_like(public), public, key)


@pytest.mark.parametrize("opens", [1, 2])
def test_through_the_cipher_an_honest_upload_passes_under_its_own_key_only(opens: int) -> None:
    plan = mixed()
    public = uniform_polynomials(stream("public"), plan.blocks)
    sealed = ckks.encrypt(random_update(plan, 1) + errors(plan, 1), public, one_time_key(1))
    found = off_grid(plan, dithered(plan, sealed), masks_under(public, one_time_key(opens)))
    assert found == (opens != 1)


# --- whoever is off the grid always is ------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(data=st.data(), plan=any_plan, seed=st.integers(0, 2**32))
def test_one_coefficient_off_by_29_or_more_is_always_named(
    data: st.DataObject, plan: Plan, seed: int
) -> None:
    block, position = data.draw(st.integers(0, plan.blocks - 1)), data.draw(st.integers(0, 4095))
    half = 1 << (int(shifts(plan)[block, 0]) - 1)
    size = data.draw(st.integers(NAMED, half) | st.sampled_from([NAMED, half - 1, half]))
    sign = data.draw(st.sampled_from([-1, 1]))
    plaintext = random_update(plan, seed) + errors(plan, seed)
    # Anywhere on the grid, not only where honest values lie.
    most = (MODULUS // 2 >> int(shifts(plan)[block, 0])) - 1
    value = data.draw(st.just(0) | st.integers(-most, most))
    plaintext[block, position] = 2 * half * value + sign * size
    assert named(plan, plaintext, seed)


@pytest.mark.parametrize(
    ("sign", "mask", "drawn", "cover"), [(1, 0.1, 0, -2), (-1, 0.9, MODULUS - 1, 2)]
)
def test_28_can_slip_through_at_the_very_worst_and_29_cannot(
    sign: int, mask: float, drawn: int, cover: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A value of almost q / 2 on the far side of the mask, the dither's rarer answer, all covers.
    monkeypatch.setattr(noise_audit, "uniform_polynomials", always(drawn))
    without_cover(monkeypatch, cover)
    plan = PLANS["smallest grid"]
    masked = centred(np.full((1, 4096), int(mask * MODULUS)))
    value = sign * (int(0.49 * MODULUS) >> 7 << 7)
    passes = [
        not off_grid(
            plan, sent(plan, np.full((1, 4096), value + sign * e), masked, stream()), masked
        )
        for e in (NAMED - 1, NAMED)
    ]
    assert passes == [True, False]


@pytest.mark.parametrize("sign", [-1, 1])
def test_in_between_chance_decides(sign: int) -> None:
    plan = PLANS["smallest grid"]
    plaintext = np.zeros((1, 4096), np.int64)
    plaintext[0, 5] = sign * (CBD_BITS + 4)
    assert {named(plan, plaintext, seed) for seed in range(100)} == {False, True}


@every_plan
def test_random_residues_are_named(plan: Plan) -> None:
    noise = uniform_polynomials(stream("noise"), plan.blocks)
    assert off_grid(plan, dithered(plan, noise), masks(plan, 1))


@every_plan
@pytest.mark.parametrize("change", [1, 1 << 30, MODULUS - 1])
def test_one_changed_residue_is_named(plan: Plan, change: int) -> None:
    mask = masks(plan, 1)
    residues = ring.to_ntt(centred(random_update(plan, 1) - mask))
    residues[-1, 9] = (int(residues[-1, 9]) + change) % MODULUS
    assert off_grid(plan, dithered(plan, residues, stream(1)), mask)


# --- what it cannot name --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(plan=any_plan, steps=st.integers(-1000, 1000), seed=st.integers(0, 2**32))
def test_a_multiple_of_the_grid_is_another_value_and_invisible(
    plan: Plan, steps: int, seed: int
) -> None:
    shifted = random_update(plan, seed) + errors(plan, seed) + (steps << shifts(plan))
    assert not named(plan, shifted, seed)


def test_a_value_out_of_range_stops_the_sum_and_is_not_named() -> None:
    plan = PLANS["smallest grid"]
    (layout,) = plan.layouts
    assert layout.values < 4095
    beyond = random_update(plan, 1)
    beyond[0, 4095] = 1 << layout.shift  # a padding slot
    with pytest.raises(ReleaseError, match="planned range"):
        unpack(layout, beyond, 3)
    assert not named(plan, beyond, 1)


def test_errors_within_the_limit_that_all_push_one_way_are_not_named() -> None:
    plan = plan_integers(100, max_clients=100, max_abs=1)
    (layout,) = plan.layouts
    conspirators = layout.guard // CBD_BITS + 1
    assert conspirators == 14  # of 100
    pushing = np.full((1, 4096), CBD_BITS)
    assert not named(plan, pushing, 1)
    with pytest.raises(ReleaseError, match="beyond the guard"):
        unpack(layout, conspirators * pushing, 100)


# --- randomness -----------------------------------------------------------------------------------


def test_dither_and_cover_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = mixed(), []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes([len(asked)]) * count

    monkeypatch.setattr("secagg.sampling.os.urandom", urandom)
    residues = ring.to_ntt(random_update(plan, 1))
    first = dithered(plan, residues)
    assert asked == [32]
    assert np.array_equal(first, dithered(plan, residues, Stream(b"\1" * 32)))
    assert not np.array_equal(first, dithered(plan, residues))
    assert asked == [32, 32]


def test_no_two_blocks_share_a_dither_or_a_cover() -> None:
    plan = plan_integers(4096 * 70, max_clients=3, max_abs=1 << 40)
    assert plan.blocks == 70  # more than two chunks
    # Half of q: what is taken is a fair bit.
    half = np.full((70, 4096), MODULUS // 2)
    for low in (dithered(plan, np.zeros((70, 4096), np.uint64)), dithered(plan, ring.to_ntt(half))):
        assert np.unique(low, axis=0).shape == (70, 4096)
        told = beside_grid(plan, low.astype(np.int64) - low[0, 0]).astype(float)
        related = np.corrcoef(told) - np.eye(70)
        # Independent values: standard deviation 1 / 64; 7 of them, false alarm below 1e-8.
        assert np.abs(related).max() < 7 / 64


def test_a_seeded_stream_gives_the_same_low_bits_again_and_the_upload_stays_as_it_was() -> None:
    plan = mixed((7, 16, 24))
    residues = uniform_polynomials(stream("residues"), plan.blocks)
    kept = residues.copy()
    first = dithered(plan, residues, stream("seed"))
    assert np.array_equal(first, dithered(plan, residues, stream("seed")))
    assert np.array_equal(residues, kept)
    assert first.dtype == np.uint32
    assert (first >> shifts(plan).astype(np.uint32) == 0).all()
    for _, layout, part in plan.block_ranges():
        assert first[part].max() >> (layout.shift - 1) == 1


# --- the attack it answers ------------------------------------------------------------------------


def one_time_key(client: int) -> NDArray[np.uint64]:
    key: NDArray[np.uint64] = ring.to_ntt(ternary(stream("key", client))[None])[0]
    return key


@dataclass
class Textbook:
    """A round with a release guard and nothing else: keys, ciphertexts, their sum."""

    number: int
    attacker: int | None = None
    clients: int = 6

    def __post_init__(self) -> None:
        self.plan = plan_integers(5000, max_clients=self.clients, max_abs=1 << 30)
        self.public = uniform_polynomials(stream("public", self.number), self.plan.blocks)
        drawn = np.random.default_rng(self.number)
        (self.layout,) = self.plan.layouts
        most = self.layout.max_abs
        self.values = drawn.integers(-most, most, (self.clients, 5000), endpoint=True)
        self.ciphertexts = [self._upload(client) for client in range(self.clients)]

    def _secret(self, client: int) -> Coefficients:
        return ternary(stream("secret", self.number, client))[None]

    def _upload(self, client: int) -> NDArray[np.uint64]:
        plaintext = pack(self.layout, self.values[client]) + errors(self.plan, client)
        if client == self.attacker:
            plaintext[0, 1234] += 1 << (self.layout.shift - 1)
        key = ring.to_ntt(self._secret(client))[0]
        return ckks.encrypt(plaintext, self.public, key)

    def _opened(self, residues: NDArray[np.uint64], clients: Iterable[int]) -> Coefficients:
        key = np.sum([self._secret(client) for client in clients], axis=0)
        return ckks.decrypt(residues, self.public, ring.to_ntt(key)[0])

    def release(self, clients: list[int]) -> NDArray[np.int64]:
        total = ResidueSum(self.plan.blocks)
        for client in clients:
            total.add(self.ciphertexts[client])
        return unpack(self.layout, self._opened(total.value(), clients), len(clients))

    def audit(self) -> list[int]:
        """Who is off the grid: the server sends low bits, the key holder has the masks."""
        nothing = np.zeros_like(self.ciphertexts[0])
        return [
            client
            for client, sealed in enumerate(self.ciphertexts)
            if off_grid(self.plan, dithered(self.plan, sealed), self._opened(nothing, [client]))
        ]


def test_without_an_audit_half_a_step_stops_every_round_unnamed() -> None:
    refusals = set()
    for number in range(4):
        for attacker in (0, 3, 5):
            with pytest.raises(ReleaseError) as refused:
                Textbook(number, attacker).release(list(range(6)))
            refusals.add(str(refused.value))
    assert len(refusals) == 1  # the same words, whoever it was


@pytest.mark.parametrize("attacker", range(6))
def test_with_the_audit_it_is_named_and_the_rest_sums_exactly(attacker: int) -> None:
    attacked = Textbook(attacker, attacker)
    assert attacked.audit() == [attacker]
    rest = [client for client in range(6) if client != attacker]
    assert np.array_equal(attacked.release(rest), attacked.values[rest].sum(axis=0))


def test_an_audit_of_a_round_of_honest_clients_names_nobody() -> None:
    honest = Textbook(1)
    assert honest.audit() == []
    assert np.array_equal(honest.release(list(range(6))), honest.values.sum(axis=0))


@pytest.mark.parametrize(
    ("clients", "values", "rarely"),
    [(3, 100, 1e-3), (3, 1 << 20, 5e-3), (4, 1 << 20, 5e-4), (10, 1 << 20, 1e-6)],
)
def test_one_upload_that_is_not_named_hardly_ever_stops_a_round(
    clients: int, values: int, rarely: float
) -> None:
    # The largest error that can pass, in every coefficient, beside the others' honest ones.
    (layout,) = plan_integers(values, max_clients=clients, max_abs=127).layouts
    bits = 2 * CBD_BITS * (clients - 1)
    beyond = stats.binom(bits, 0.5).sf(bits // 2 + layout.guard - (NAMED - 1))
    assert layout.blocks * 4096 * beyond < rarely
