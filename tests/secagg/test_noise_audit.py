"""The noise audit names whoever is off the grid, never an honest client, and shows no values."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from secagg import ckks, noise_audit, ring
from secagg.errors import InputError, MalformedError, ReleaseError
from secagg.noise_audit import (
    HIGHEST,
    LOWEST,
    dithered,
    low_from_bytes,
    low_to_bytes,
    off_grid,
)
from secagg.packing import pack, unpack
from secagg.parameters import (
    MODULUS,
    FloatSegment,
    IntegerSegment,
    Layout,
    Plan,
    Segment,
    TensorSpec,
)
from secagg.planner import make_plan, plan_integers
from secagg.residues import ResidueSum
from secagg.sampling import CBD_BITS, Stream, centred_binomial, ternary, uniform_polynomials

Coefficients = NDArray[np.int64]
Low = NDArray[np.uint32]

NAMED = 29
"""The smallest error that no dither and no cover hide."""


def mixed(shifts: tuple[int, ...] = ()) -> Plan:
    """Three segments; with shifts, on grids of their own, which no planner makes today."""
    segments: list[Segment] = [
        FloatSegment("update", (TensorSpec("w", (9000,)),), 1.0, 8),
        IntegerSegment("counts", 10, 1 << 20),
        IntegerSegment("wide", 5000, 10**9),
    ]
    plan = make_plan(segments, max_clients=6)
    layouts = zip(plan.layouts, shifts or [lay.shift for lay in plan.layouts], strict=True)
    return replace(plan, layouts=tuple(replace(lay, shift=shift) for lay, shift in layouts))


PLANS = {
    "smallest grid": plan_integers(100, max_clients=3, max_abs=1),
    "a hundred clients": plan_integers(20_000, max_clients=100, max_abs=127),
    "a million clients": plan_integers(4096, max_clients=1_000_000, max_abs=100),
    "segments": mixed(),
    "a grid a segment": mixed((7, 16, 24)),
}
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


def shifts(plan: Plan) -> Coefficients:
    """The shift of each coefficient's grid, int64 (blocks, 1)."""
    counts = [layout.blocks for layout in plan.layouts]
    return np.repeat([layout.shift for layout in plan.layouts], counts)[:, None]


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


def seen(plan: Plan, plaintext: Coefficients, mask: Coefficients, randomness: Stream) -> Coefficients:
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


def centred(value: int) -> int:
    half = MODULUS // 2
    return (value + half) % MODULUS - half


def edges(plan: Plan) -> Iterable[tuple[int, int]]:
    """Grid values and masks around every place where a sum of the two can wrap."""
    layout = plan.layouts[0]
    masks = (MODULUS - 1) >> layout.shift
    largest = int(constant(plan, 1).max()) >> layout.shift
    ends = (0, 1, largest, masks // 2 - 1, masks // 2)
    for value in {sign * end for sign in (-1, 1) for end in ends}:
        around = (0, masks // 2, masks, masks // 2 - value, masks - value, -value)
        near = {mask + step for mask in around for step in range(-2, 3)}
        yield from ((value, mask) for mask in near if 0 <= mask < masks)


@pytest.mark.parametrize("name", ["smallest grid", "a hundred clients", "a million clients"])
def test_wraps_neither_name_the_honest_nor_hide_anybody(name: str) -> None:
    plan = PLANS[name]
    shift = plan.layouts[0].shift
    half = 1 << (shift - 1)
    sizes = {*range(24), *range(half - 24, half + 1)}
    for value, mask in edges(plan):
        for error in {sign * size for sign in (-1, 1) for size in sizes}:
            plaintext = (value << shift) + error
            if abs(plaintext) > MODULUS // 2 or abs(error) == LIMIT:
                continue
            opened = np.zeros((plan.blocks, 4096), np.int64)
            opened[-1, 77] = centred(plaintext + (mask << shift))
            assert off_grid(plan, opened) == (abs(error) > LIMIT), (value, mask, error)


def test_an_honest_upload_through_the_cipher_is_not_named() -> None:
    plan = mixed()
    public, key = uniform_polynomials(stream("public"), plan.blocks), one_time_key(1)
    sealed = ckks.encrypt(random_update(plan, 1) + errors(plan, 1), public, key)
    opened = ckks.decrypt(masked(plan, sealed), public, key)
    assert not off_grid(plan, opened)


def test_an_upload_opened_under_another_key_is_named() -> None:
    plan = mixed()
    public = uniform_polynomials(stream("public"), plan.blocks)
    sealed = ckks.encrypt(random_update(plan, 1) + errors(plan, 1), public, one_time_key(1))
    assert off_grid(plan, ckks.decrypt(masked(plan, sealed), public, one_time_key(2)))


# --- whoever is off the grid always is ------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(data=st.data(), plan=any_plan, seed=st.integers(0, 2**32))
def test_one_coefficient_off_by_more_than_the_limit_is_always_named(
    data: st.DataObject, plan: Plan, seed: int
) -> None:
    block, position = data.draw(st.integers(0, plan.blocks - 1)), data.draw(st.integers(0, 4095))
    half = 1 << (int(shifts(plan)[block, 0]) - 1)
    size = data.draw(st.integers(LIMIT + 1, half) | st.sampled_from([LIMIT + 1, half - 1, half]))
    sign = data.draw(st.sampled_from([-1, 1]))
    plaintext = random_update(plan, seed) + errors(plan, seed)
    # Anywhere on the grid, not only where honest values lie.
    most = (MODULUS // 2 >> int(shifts(plan)[block, 0])) - 1
    value = data.draw(st.just(0) | st.integers(-most, most))
    plaintext[block, position] = 2 * half * value + sign * size
    assert named(plan, plaintext, seed)


@every_plan
@pytest.mark.parametrize("sign", [-1, 1])
def test_no_mask_hides_an_error_beyond_the_limit(plan: Plan, sign: int) -> None:
    plaintext = random_update(plan, 1)
    plaintext[-1, 4095] += sign * (LIMIT + 1)
    assert all(named(plan, plaintext, seed) for seed in range(50))


@pytest.mark.parametrize("sign", [-1, 1])
def test_at_the_limit_itself_the_mask_decides(sign: int) -> None:
    plan = PLANS["smallest grid"]
    plaintext = np.zeros((1, 4096), np.int64)
    plaintext[0, 5] = sign * LIMIT
    assert {named(plan, plaintext, seed) for seed in range(50)} == {False, True}


@every_plan
def test_random_residues_are_named(plan: Plan) -> None:
    noise = uniform_polynomials(stream("noise"), plan.blocks)
    assert off_grid(plan, ring.from_ntt(masked(plan, noise, stream("mask"))))


@every_plan
@pytest.mark.parametrize("change", [1, 1 << 30, MODULUS - 1])
def test_one_changed_residue_is_named(plan: Plan, change: int) -> None:
    residues = ring.to_ntt(random_update(plan, 1))
    residues[-1, 9] = (int(residues[-1, 9]) + change) % MODULUS
    assert off_grid(plan, ring.from_ntt(masked(plan, residues, stream(1))))


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


# --- what it reveals ------------------------------------------------------------------------------


@every_plan
def test_the_opened_grid_value_is_the_update_shifted_by_the_mask(plan: Plan) -> None:
    # For every fixed update, mask -> grid value is a translation of Z_K, K masks: a bijection. So a
    # uniform mask gives a uniform grid value, whatever the update.
    update = random_update(plan, 1)
    masks = (MODULUS - 1) >> shifts(plan)
    alone, _ = split(plan, audited(plan, np.zeros_like(update), stream(1)))
    together, _ = split(plan, audited(plan, update + errors(plan, 1), stream(1)))
    assert np.array_equal((together - alone) % masks, (update >> shifts(plan)) % masks)


def grid_values(plan: Plan, update: Coefficients, name: str, copies: int) -> Coefficients:
    opened = [audited(plan, update, stream(name, copy)) for copy in range(copies)]
    return np.concatenate([split(plan, part)[0] for part in opened]).reshape(-1)


@every_plan
def test_grid_values_are_uniform(plan: Plan) -> None:
    plan = replace(plan, segments=plan.segments[:1], layouts=plan.layouts[:1])
    masks = (MODULUS - 1) >> plan.layouts[0].shift
    values = grid_values(plan, constant(plan, 1), "uniform", 20) % masks
    for classes in (values * 64 // masks, values % 64, values % 63):
        counts = np.bincount(classes, minlength=classes.max() + 1)
        assert stats.chisquare(counts).pvalue > 1e-4


@every_plan
def test_opposite_updates_cannot_be_told_apart(plan: Plan) -> None:
    low, high = constant(plan, -1), constant(plan, 1)
    assert not np.array_equal(low, high)
    for row in range(0, plan.blocks, 3):
        part = _one_block(plan, row)
        one = grid_values(part, low[row : row + 1], "low", 10)
        other = grid_values(part, high[row : row + 1], "high", 10)
        assert stats.ks_2samp(one, other).pvalue > 1e-4


def _one_block(plan: Plan, row: int) -> Plan:
    (block,) = (
        (segment, replace(layout, values=1))
        for segment, layout, blocks in plan.block_ranges()
        if blocks.start <= row < blocks.stop
    )
    return replace(plan, segments=block[:1], layouts=block[1:])


def test_that_comparison_would_see_a_mask_of_half_the_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = noise_audit._multiples
    monkeypatch.setattr(
        noise_audit, "_multiples", lambda s, shift, n: genuine(s, shift, n) >> shift + 1 << shift
    )
    plan = plan_integers(4096, max_clients=3, max_abs=1 << 45)
    one = grid_values(plan, constant(plan, -1), "low", 10)
    other = grid_values(plan, constant(plan, 1), "high", 10)
    assert stats.ks_2samp(one, other).pvalue < 1e-4


@every_plan
@pytest.mark.parametrize("update", [-1, 1, None])
def test_a_wrap_tells_only_whether_the_value_lies_beyond_the_grid_value(
    plan: Plan, update: int | None
) -> None:
    """Whoever knows the errors, as the key holder does, sees the wraps: this much, and no more."""
    values = random_update(plan, 1) if update is None else constant(plan, update)
    grid, noise = split(plan, audited(plan, values, stream(3)))
    values >>= shifts(plan)
    told = (noise == -1) != (grid < 0)
    between = np.where(values > 0, (grid >= 0) & (grid < values), (grid < 0) & (grid >= values))
    assert np.array_equal(told, between)


@pytest.mark.parametrize("name", PLANS.keys() - {"a grid a segment"})
def test_a_value_is_told_less_often_than_once_in_four_times_the_cohort(name: str) -> None:
    # A wrap tells with probability |value| / K, and a planner leaves room for 4 R above the digits.
    plan = PLANS[name]
    for _, layout, blocks in plan.block_ranges():
        largest = int(constant(plan, 1)[blocks].max()) >> layout.shift
        assert 4 * plan.max_clients * largest < (MODULUS - 1) >> layout.shift


# --- randomness -----------------------------------------------------------------------------------


def test_the_mask_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = mixed(), []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes([len(asked)]) * count

    monkeypatch.setattr("secagg.sampling.os.urandom", urandom)
    residues = ring.to_ntt(random_update(plan, 1))
    first = masked(plan, residues)
    assert asked == [32]
    assert np.array_equal(first, masked(plan, residues, Stream(b"\1" * 32)))
    assert not np.array_equal(first, masked(plan, residues))
    assert asked == [32, 32]


def test_no_two_coefficients_share_a_mask() -> None:
    plan = plan_integers(4096 * 70, max_clients=3, max_abs=1 << 40)
    assert plan.blocks == 70  # more than two chunks
    nothing = np.zeros((70, 4096), dtype=np.uint64)
    grid, _ = split(plan, ring.from_ntt(masked(plan, nothing)))
    # 2**18 draws out of 2**49: a repetition has probability below 2**-13, a repeated chunk one.
    assert np.unique(grid).size > grid.size - 3
    again, _ = split(plan, ring.from_ntt(masked(plan, nothing)))
    assert np.intersect1d(grid, again).size < 3


def test_a_seeded_stream_gives_the_same_mask_again() -> None:
    plan = mixed()
    residues = ring.to_ntt(random_update(plan, 1))
    kept = residues.copy()
    first = masked(plan, residues, stream("seed"))
    assert np.array_equal(first, masked(plan, residues, stream("seed")))
    assert first.dtype == np.uint64
    assert int(first.max()) < MODULUS
    assert np.array_equal(residues, kept)


# --- arguments ------------------------------------------------------------------------------------

SHAPES = [(0, 4096), (1, 4096), (4, 4096), (3, 4095), (3 * 4096,), (1, 3, 4096), (4096, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    plan = plan_integers(3 * 4096, max_clients=3, max_abs=1 << 40)
    assert plan.blocks == 3
    with pytest.raises(InputError, match="shape"):
        masked(plan, np.zeros(shape, np.uint64))
    with pytest.raises(InputError, match="shape"):
        off_grid(plan, np.zeros(shape, np.int64))


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float64, ">u8", bool, object])
def test_other_types_of_residues_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match="uint64"):
        masked(PLANS["smallest grid"], np.zeros((1, 4096), dtype))


@pytest.mark.parametrize("dtype", [np.uint64, np.int32, np.float64, ">i8", bool, object])
def test_other_types_of_coefficients_are_refused(dtype: str) -> None:
    with pytest.raises(InputError, match="int64"):
        off_grid(PLANS["smallest grid"], np.zeros((1, 4096), dtype))


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 64) - 1])
def test_residues_of_q_or_more_are_refused(value: int) -> None:
    residues = np.zeros((1, 4096), np.uint64)
    residues[0, 4095] = value
    with pytest.raises(InputError, match="below q"):
        masked(PLANS["smallest grid"], residues)


def test_refusals_show_no_values() -> None:
    with pytest.raises(InputError) as refused:
        off_grid(PLANS["smallest grid"], np.full((2, 4096), 987_654_321))
    assert "987" not in str(refused.value)


def test_memory_is_that_of_a_few_chunks_beyond_the_result() -> None:
    plan = plan_integers(4096 * 400, max_clients=3, max_abs=1 << 40)
    residues = np.zeros((plan.blocks, 4096), np.uint64)
    chunk = 32 * 4096 * 8
    assert residues.nbytes > 12 * chunk
    opened = residues.view(np.int64)
    assert peak(lambda: masked(plan, residues)) < residues.nbytes + 7 * chunk
    assert peak(lambda: off_grid(plan, opened)) < 4 * chunk


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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
        """Who is off the grid: the server masks, the key holder opens."""
        return [
            client
            for client, sealed in enumerate(self.ciphertexts)
            if off_grid(self.plan, self._opened(masked(self.plan, sealed), [client]))
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


def test_one_upload_at_the_limit_hardly_ever_stops_the_smallest_round() -> None:
    # Its worst coefficients beside the errors of two honest clients, together of variance 21.
    (layout,) = PLANS["smallest grid"].layouts
    room = (layout.guard - LIMIT) / math.sqrt(CBD_BITS)
    assert 2 * 4096 * stats.norm.sf(room) < 1e-4
