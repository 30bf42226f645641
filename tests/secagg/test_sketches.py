"""Sketches against a slow reference: multipliers by their definition, products by Python integers.

The reference reads the randomness in the documented order and builds every block's multiplier as a
polynomial of its own; the code under test never does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from secagg import ckks, onetime, ring
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.errors import ConfigurationError, MalformedError
from secagg.keyholder import KeyHolder
from secagg.norm_check import _digits
from secagg.packing import balanced_digits, pack
from secagg.parameters import (
    MODULUS,
    FloatSegment,
    IntegerSegment,
    Layout,
    NormCheck,
    Plan,
    TensorSpec,
)
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.residues import multiply
from secagg.sampling import Stream, coin_differences, uniform_polynomials
from secagg.sketch_shape import (
    Shape,
    direction_shape,
    noise_energy,
    norm_shapes,
    sketch_bytes,
    weight_shapes,
)
from secagg.sketches import Rows, Sketch, sketch

CHECK = NormCheck()
UPLOAD, KEY = b"u" * 32, b"k" * 32

UPDATE = FloatSegment("update", (TensorSpec("w", (6000,)),), 1.0, 8, "samples", 50)
VOTES = IntegerSegment("votes", 300, 5, 20.0)
PLANS = {
    "two segments": make_plan([UPDATE, VOTES], max_clients=5, norm_check=CHECK),
    "many blocks": plan_integers(
        20_000, max_clients=1000, max_abs=200, max_norm=20_000, norm_check=CHECK
    ),
    "two bytes dropped": plan_integers(
        9000, max_clients=3, max_abs=10**7, max_norm=1e8, norm_check=CHECK
    ),
    "an unchecked segment": make_plan(
        [IntegerSegment("counts", 5000, 10**6), VOTES], max_clients=5, norm_check=CHECK
    ),
    "odd rows": plan_integers(
        50, max_clients=3, max_abs=1, max_norm=1, norm_check=replace(CHECK, sketches=9)
    ),
}


def integers(plan: Plan, seed: int) -> list[NDArray[np.int64]]:
    drawn = np.random.default_rng(seed)
    return [
        drawn.integers(-lay.max_abs, lay.max_abs, lay.values, endpoint=True) for lay in plan.layouts
    ]


def packed(plan: Plan, parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([pack(lay, p) for lay, p in zip(plan.layouts, parts, strict=True)])


@dataclass
class Case:
    """An upload under a key that the test knows, and its sketch."""

    plan: Plan
    context: RoundContext
    plaintext: NDArray[np.int64]
    key: NDArray[np.int64]
    ciphertexts: NDArray[np.uint64]

    def sketch(self, upload: bytes = UPLOAD, key: bytes = KEY) -> Sketch:
        return sketch(self.context, upload, [self.ciphertexts], key)


@functools.cache
def case(name: str) -> Case:
    plan = PLANS[name]
    context = KeyHolder(plan).context
    plaintext = packed(plan, integers(plan, 1))
    key = onetime.secret(bytes(32))
    noisy = plaintext + onetime.errors(b"e" * 32, plan.blocks)
    public = context.public_polynomials()
    ciphertexts = ckks.encrypt(noisy, public, ring.to_ntt(key[None])[0])
    return Case(plan, context, plaintext, key, ciphertexts)


# --- the reference ------------------------------------------------------------------------------


@dataclass
class Reference:
    """What the documentation says of one segment's rows."""

    multipliers: NDArray[np.int64]  # (rows, blocks, 4096)
    blinds: NDArray[np.int64]  # (rows, 2, 4096)
    mixes: NDArray[np.int64]  # (rows, blocks, 2, 2): u and v of each blind
    positions: NDArray[np.int64]
    errors: NDArray[np.int64]


def by_hand(octet: int) -> NDArray[np.int64]:
    """The mix of one byte, by cases."""
    signs = [1 - 2 * (octet >> bit & 1) for bit in range(4, 8)]
    mix = np.zeros((2, 2), dtype=np.int64)
    kind = octet & 3
    if kind < 2:
        first, second = octet >> 2 & 1, octet >> 3 & 1
        mix[0, first] = signs[first]
        mix[1, second] = signs[2 + second]
    else:
        mix[kind - 2] = signs[2 * (kind - 2) : 2 * (kind - 2) + 2]
    return mix


def turned(polynomials: NDArray[np.int64]) -> NDArray[np.int64]:
    """Times X**2048 modulo X**4096 + 1."""
    return np.concatenate([-polynomials[..., 2048:], polynomials[..., :2048]], axis=-1)


def reference(shape: Shape, blocks: int, stream: Stream) -> Reference:
    octets = np.frombuffer(stream.read(shape.rows * blocks), dtype=np.uint8)
    mixes = np.array([by_hand(int(octet)) for octet in octets])
    mixes = mixes.reshape(shape.rows, blocks, 2, 2)
    blinds = coin_differences(stream, (shape.rows, 2, 4096))
    for row in range(shape.rows):
        for index, parity in enumerate((1, 0)):
            if int(blinds[row, index].sum()) % 2 != parity:
                blinds[row, index, 0] = 1 if blinds[row, index, 0] == 0 else 0
    width = 4096 // shape.values
    drawn = stream.uint32(shape.rows * shape.values).astype(np.int64) % width
    positions = drawn.reshape(shape.rows, -1) + width * np.arange(shape.values)
    masks = stream.uint32(shape.rows * 4096).astype(np.int64).reshape(shape.rows, -1)
    multipliers = np.einsum("ijl,ilk->ijk", mixes[..., 0], blinds) + np.einsum(
        "ijl,ilk->ijk", mixes[..., 1], turned(blinds)
    )
    return Reference(multipliers, blinds, mixes, positions, masks % 256**shape.dropped)


def references(plan: Plan, upload: bytes = UPLOAD, key: bytes = KEY) -> Iterator[Reference]:
    for shape in norm_shapes(plan):
        stream = Stream.derive("sketch", key, upload, shape.segment)
        yield reference(shape, plan.layouts[shape.segment].blocks, stream)


def checked(plan: Plan) -> list[tuple[Layout, slice]]:
    """Layout and blocks of each segment with a norm."""
    return [(layout, blocks) for _, layout, blocks in plan.block_ranges() if layout.norm]


def coefficients_at(
    multiplier: NDArray[np.int64], polynomial: NDArray[np.int64], positions: NDArray[np.int64]
) -> list[int]:
    """Coefficients of a negacyclic product, in Python integers."""
    turns = np.concatenate([polynomial, -polynomial])
    used = np.flatnonzero(multiplier)
    out = []
    for position in positions:
        terms = turns[(position - used) % 8192]
        out.append(sum(map(int.__mul__, multiplier[used].tolist(), terms.tolist())))
    return out


def inner_products(truth: Reference, plaintext: NDArray[np.int64]) -> NDArray[np.object_]:
    """sum_j (r_ij m_j)[k] of every shown value: Python integers."""
    out = np.zeros(truth.positions.shape, dtype=object)
    for row, positions in enumerate(truth.positions):
        for block, polynomial in enumerate(plaintext):
            out[row] += coefficients_at(truth.multipliers[row, block], polynomial, positions)
    return out


def transformed_sum(truth: Reference, polynomials: NDArray[np.uint64]) -> NDArray[np.object_]:
    """sum_j r_ij a_j in coefficients, residues as Python integers; products by Python."""
    rows = []
    for multipliers in truth.multipliers:
        below = ring.to_ntt(multipliers).astype(object) * polynomials.astype(object)
        total = np.array([int(each) % MODULUS for each in below.sum(axis=0)], dtype=np.uint64)
        rows.append(ring.from_ntt(total[None])[0])
    return np.array(rows).astype(object) % MODULUS


def test_the_reference_multiplies_as_a_convolution_does() -> None:
    drawn = np.random.default_rng(1)
    one, other = drawn.integers(-4, 5, 4096), drawn.integers(-(1 << 40), 1 << 40, 4096)
    whole = np.convolve(one, other)
    folded = whole[:4096].copy()
    folded[:4095] -= whole[4096:]
    assert coefficients_at(one, other, np.arange(0, 4096, 97)) == folded[::97].tolist()


# --- rows against the reference -----------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_a_sketch_opens_to_inner_products_digit_by_digit(name: str) -> None:
    it = case(name)
    made = it.sketch()
    for rows, truth, (layout, blocks) in zip(
        made.norms, references(it.plan), checked(it.plan), strict=True
    ):
        assert np.array_equal(rows.positions, truth.positions)
        exact = inner_products(truth, it.plaintext[blocks])
        found = _digits(layout, rows, it.key)
        wanted = balanced_digits(layout, (exact >> layout.shift).astype(np.int64))
        # Noise moves the lowest digit alone, by less than 8 standard deviations and a half; where
        # that digit was half a base already, into the next one.
        reach = 8 * math.sqrt(noise_energy(layout, rows.shape)) + 0.5
        assert reach < layout.base / 8
        powers = layout.base ** np.arange(layout.digits)
        moved = np.einsum("ijk,j->ik", found - wanted, powers)
        assert np.abs(moved).max() <= reach
        carried = np.abs(wanted[:, 0]) > layout.base / 2 - reach
        kept = np.where(carried[:, None], wanted, found)
        assert np.array_equal(kept[:, 1:], wanted[:, 1:])


def test_the_plans_of_this_file_drop_one_byte_and_two_and_have_several_blocks_and_digits() -> None:
    shapes = [shape for plan in PLANS.values() for shape in norm_shapes(plan)]
    layouts = [layout for plan in PLANS.values() for layout in plan.layouts]
    assert {shape.dropped for shape in shapes} == {1, 2}
    assert max(layout.blocks for layout in layouts) > 2
    assert max(layout.digits for layout in layouts) > 2


@pytest.mark.parametrize("name", PLANS)
def test_values_are_those_of_the_ciphertexts_exactly(name: str) -> None:
    it = case(name)
    for rows, truth, (_, blocks) in zip(
        it.sketch().norms, references(it.plan), checked(it.plan), strict=True
    ):
        whole = transformed_sum(truth, it.ciphertexts[blocks])
        exact = np.take_along_axis(whole, truth.positions, axis=1)
        assert np.array_equal(rows.values.astype(object), exact)


@pytest.mark.parametrize("name", PLANS)
def test_masks_are_off_by_their_error_and_their_cut_alone(name: str) -> None:
    it = case(name)
    public = it.context.public_polynomials()
    for rows, truth, (_, blocks) in zip(
        it.sketch().norms, references(it.plan), checked(it.plan), strict=True
    ):
        cut = 256**rows.shape.dropped
        assert 0 <= truth.errors.min() <= truth.errors.max() < cut
        exact = transformed_sum(truth, public[blocks])
        assert np.array_equal(rows.masks.astype(object), (exact + truth.errors) % MODULUS // cut)
        # What the key holder computes with is off by less than 256**dropped, up or down, and by
        # nothing on average: D / sqrt(6) a mask, 8 standard deviations of the mean.
        off = (rows.masks.astype(object) * cut - exact + MODULUS // 2) % MODULUS - MODULUS // 2
        off = off.astype(np.float64)
        assert np.abs(off).max() < cut
        assert abs(off.mean()) < 8 * cut / math.sqrt(6 * off.size)
        assert off.var() == pytest.approx(cut**2 / 6, rel=0.05)


def test_every_mask_has_an_error_of_its_own() -> None:
    errors = next(truth.errors for truth in references(PLANS["two bytes dropped"]))
    assert errors.shape == (16, 4096)
    expected = errors.size / 256
    for octets in (errors & 255, errors >> 8):
        counts = np.bincount(octets.reshape(-1), minlength=256)
        assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-9, 255)
    assert len({row.tobytes() for row in errors}) == 16


# --- multipliers --------------------------------------------------------------------------------


def drawn_references(count: int, blocks: int) -> Iterator[Reference]:
    shape = Shape(16, 16, 1)
    for number in range(count):
        yield reference(shape, blocks, Stream.derive("test", number))


@pytest.mark.parametrize("name", PLANS)
def test_positions_are_one_in_each_equal_stretch(name: str) -> None:
    for rows in case(name).sketch().norms:
        width = 4096 // rows.shape.values
        stretches = rows.positions // width
        assert np.array_equal(
            stretches, np.broadcast_to(np.arange(rows.shape.values), stretches.shape)
        )
        assert len({row.tobytes() for row in rows.positions}) == rows.shape.rows


def test_blinds_are_odd_and_even_at_one() -> None:
    from secagg.sketches import _NormLook

    for number in range(20):
        look = _NormLook(Shape(16, 16, 1), slice(0, 2), Stream.derive("test", number))
        values = look._blinds.reshape(16, 2, 4096).sum(axis=2) % 2
        assert (values == [1, 0]).all()
        assert set(np.unique(look._blinds)) == {-1, 0, 1}


def test_blinds_are_ternary_and_two_places_of_four_are_taken() -> None:
    counts = np.zeros(3)
    kinds = np.zeros(3)
    for truth in drawn_references(40, 8):
        counts += np.bincount(truth.blinds.reshape(-1) + 1, minlength=3)
        taken = np.abs(truth.mixes).sum(axis=3).reshape(-1, 2)
        assert (taken.sum(axis=1) == 2).all()
        kinds += np.bincount(taken[:, 0], minlength=3)
    for observed, share in ((counts, [0.25, 0.5, 0.25]), (kinds, [0.25, 0.5, 0.25])):
        expected = observed.sum() * np.array(share)
        assert ((observed - expected) ** 2 / expected).sum() < chi2.isf(1e-9, 2)


def test_multipliers_are_odd_at_one_for_half_of_the_blocks_independently() -> None:
    parities = np.concatenate(
        [truth.multipliers.sum(axis=2) % 2 for truth in drawn_references(150, 3)]
    )
    patterns = parities @ [1, 2, 4]
    observed = np.bincount(patterns, minlength=8)
    expected = len(patterns) / 8
    assert ((observed - expected) ** 2 / expected).sum() < chi2.isf(1e-9, 7)


def test_coefficients_of_multipliers_have_variance_one_and_no_covariance() -> None:
    draws = np.concatenate([truth.multipliers for truth in drawn_references(20, 2)])
    count = draws.size
    # Fourth moments of at most 4: 8 standard deviations of the mean.
    reach = 8 * math.sqrt(4 / count)
    assert abs(draws.mean()) < reach
    assert abs((draws**2).mean() - 1) < 0.02  # blinds of 4096 places: |p|^2 strays by 1.6 %
    for lag in (1, 2, 17, 2047, 2048, 2049):
        assert abs((draws[..., lag:] * draws[..., :-lag]).mean()) < 0.02
    assert abs((draws[:, 0] * draws[:, 1]).mean()) < 0.02


# --- what a sketch depends on -------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.integers(0, 5), max_size=4))
def test_a_sketch_is_the_same_however_the_upload_is_cut(cuts: list[int]) -> None:
    it = case("many blocks")
    places = np.cumsum(cuts)
    chunks = np.split(it.ciphertexts, places[places < it.plan.blocks])
    made = sketch(it.context, UPLOAD, iter(chunks), KEY)
    assert made.digest == it.sketch().digest


def test_a_long_upload_is_the_same_in_one_piece_and_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_integers(
        140 * 4096, max_clients=1000, max_abs=10**8, max_norm=10**9, norm_check=CHECK
    )
    context = KeyHolder(plan).context
    assert plan.blocks == 140  # more than are in floating point at a time
    uniform = uniform_polynomials(Stream(KEY), plan.blocks)
    whole = sketch(context, UPLOAD, [uniform], KEY)
    chunks = sketch(context, UPLOAD, np.split(uniform, [32, 64, 96, 128]), KEY)
    assert chunks.digest == whole.digest
    (truth,) = references(plan)
    exact = transformed_sum(truth, uniform)
    shown = np.take_along_axis(exact, truth.positions, axis=1)
    assert np.array_equal(whole.norms[0].values.astype(object), shown)


def test_another_upload_or_key_has_another_sketch_altogether() -> None:
    it = case("two segments")
    first = it.sketch()
    assert it.sketch().digest == first.digest
    for other in (it.sketch(upload=b"v" * 32), it.sketch(key=b"K" * 32)):
        assert other.digest != first.digest
        for mine, yours in zip(first.norms, other.norms, strict=True):
            assert (mine.masks == yours.masks).mean() < 0.01
            assert (mine.values == yours.values).mean() < 0.01
            assert (mine.positions == yours.positions).mean() < 0.1


def test_segments_have_multipliers_of_their_own() -> None:
    first, second = (truth.blinds for truth in references(PLANS["two segments"]))
    assert not np.array_equal(first, second)
    twins = make_plan(
        [IntegerSegment("a", 50, 3, 9.0), IntegerSegment("b", 50, 3, 9.0)],
        max_clients=3,
        norm_check=CHECK,
    )
    context = KeyHolder(twins).context
    same = np.repeat(uniform_polynomials(Stream(KEY), 1), 2, axis=0)
    one, other = sketch(context, UPLOAD, [same], KEY).norms
    assert not (one.values == other.values).any()


@pytest.mark.parametrize(
    "shape", [(0, 4096), (1, 4096), (3, 4096), (2, 4095), (2, 2048), (2, 8192)]
)
def test_another_number_of_blocks_is_refused(shape: tuple[int, int]) -> None:
    it = case("two segments")
    assert it.plan.blocks == 2
    with pytest.raises(MalformedError, match="exactly 2 blocks"):
        sketch(it.context, UPLOAD, [np.zeros(shape, dtype=np.uint64)], KEY)


def test_chunks_too_many_or_too_few_are_refused() -> None:
    it = case("two segments")
    block = it.ciphertexts[:1]
    for chunks in ([], [block], [block, block, block], [it.ciphertexts, block]):
        with pytest.raises(MalformedError, match="exactly 2 blocks"):
            sketch(it.context, UPLOAD, chunks, KEY)


def test_without_a_norm_check_there_is_no_sketch() -> None:
    plan = plan_integers(10, max_clients=3, max_abs=1)
    context = KeyHolder(plan).context
    with pytest.raises(ConfigurationError, match="norm check"):
        sketch(context, UPLOAD, [np.zeros((1, 4096), dtype=np.uint64)], KEY)
    with pytest.raises(ConfigurationError, match="norm check"):
        Sketch.from_bytes(plan, UPLOAD, b"")


# --- bytes --------------------------------------------------------------------------------------


SHAPES = st.builds(Shape, st.integers(1, 9), st.sampled_from([1, 2, 16, 64]), st.integers(1, 2))


def random_rows(shape: Shape, seed: int) -> Rows:
    drawn = np.random.default_rng(seed)
    shown = (shape.rows, shape.values)
    largest = (MODULUS - 1) >> (8 * shape.dropped)
    return Rows(
        shape,
        drawn.integers(0, 4096, shown).astype(np.uint16),
        drawn.integers(0, MODULUS, shown, dtype=np.uint64),
        drawn.integers(0, largest, (shape.rows, 4096), dtype=np.uint64, endpoint=True),
    )


def same_rows(one: Rows, other: Rows) -> bool:
    return (
        one.shape == other.shape
        and one.positions.dtype == other.positions.dtype == np.uint16
        and one.values.dtype == other.values.dtype == one.masks.dtype == np.uint64
        and np.array_equal(one.positions, other.positions)
        and np.array_equal(one.values, other.values)
        and np.array_equal(one.masks, other.masks)
    )


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 2**32))
def test_rows_come_back_from_their_bytes(shape: Shape, seed: int) -> None:
    rows = random_rows(shape, seed)
    data = rows.to_bytes()
    assert len(data) == shape.bytes
    assert same_rows(Rows.from_bytes(data, shape), rows)


def test_the_bytes_of_rows_are_positions_values_and_masks_little_endian() -> None:
    rows = random_rows(Shape(2, 3, 2), 5)
    parts = [(rows.positions, 2), (rows.values, 7), (rows.masks, 5)]
    expected = b"".join(
        int(number).to_bytes(size, "little") for part, size in parts for number in part.reshape(-1)
    )
    assert rows.to_bytes() == expected


@pytest.mark.parametrize("name", PLANS)
def test_a_sketch_comes_back_from_its_bytes(name: str) -> None:
    it = case(name)
    made = it.sketch()
    data = made.to_bytes()
    assert len(data) == sketch_bytes(it.plan, direction=False)
    for carrier in (data, bytearray(data)):
        back = Sketch.from_bytes(it.plan, UPLOAD, carrier)
        assert all(map(same_rows, back.norms, made.norms))
        assert (back.direction, back.digest, back.upload_digest) == (None, made.digest, UPLOAD)


@pytest.mark.parametrize("dropped", [1, 2])
def test_numbers_out_of_range_are_refused(dropped: int) -> None:
    shape = Shape(2, 4, dropped)
    largest = (MODULUS - 1) >> (8 * dropped)
    good = random_rows(shape, 3)
    Rows.from_bytes(good.to_bytes(), shape)
    for change in ("positions", "values", "masks"):
        most, least = {
            "positions": (4095, 4096),
            "values": (MODULUS - 1, MODULUS),
            "masks": (largest, largest + 1),
        }[change]
        for place in (0, -1):
            changed = getattr(good, change).copy()
            changed.reshape(-1)[place] = most
            Rows.from_bytes(replace(good, **{change: changed}).to_bytes(), shape)
            changed.reshape(-1)[place] = least
            if change == "masks" and least >= 1 << (8 * shape.mask_bytes):
                continue
            with pytest.raises(MalformedError, match="below"):
                Rows.from_bytes(replace(good, **{change: changed}).to_bytes(), shape)


def test_every_other_size_is_refused() -> None:
    it = case("odd rows")
    data = it.sketch().to_bytes()
    for size in (0, 1, len(data) - 1, len(data) + 1, 2 * len(data)):
        with pytest.raises(MalformedError, match=f"bytes={size};"):
            Sketch.from_bytes(it.plan, UPLOAD, (data * 2)[:size])


# --- with a direction ---------------------------------------------------------------------------


def directed(size: int = 9000) -> tuple[RoundContext, Direction, NDArray[np.uint64]]:
    plan = plan_tensors(size, max_clients=8, clip=1.0, norm_check=replace(CHECK, min_cosine=0.0))
    context = KeyHolder(plan).context
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    vector = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    known = Direction.of(segment, vector, context.rotation)
    assert known is not None
    return context, known, uniform_polynomials(Stream(KEY), plan.blocks)


def test_a_direction_comes_back_from_the_bytes_whose_size_tells_of_it() -> None:
    context, known, upload = directed()
    plan = context.plan
    with_it = sketch(context, UPLOAD, [upload], KEY, known)
    without = sketch(context, UPLOAD, [upload], KEY)
    assert without.direction is None
    assert with_it.direction is not None
    # The norms are the same: the direction has a stream of its own.
    assert all(map(same_rows, with_it.norms, without.norms))
    for made, direction in ((with_it, True), (without, False)):
        data = made.to_bytes()
        assert len(data) == sketch_bytes(plan, direction=direction)
        back = Sketch.from_bytes(plan, UPLOAD, data)
        assert back.digest == made.digest
        assert (back.direction is not None) == direction
    with pytest.raises(MalformedError):
        Sketch.from_bytes(plan, UPLOAD, with_it.to_bytes()[:-1])


def test_a_direction_is_ignored_where_the_plan_does_not_ask_for_it() -> None:
    it = case("many blocks")
    signs = np.ones(it.plan.layouts[0].values, dtype=np.int8)
    made = sketch(it.context, UPLOAD, [it.ciphertexts], KEY, Direction(signs))
    assert made.digest == it.sketch().digest


def test_a_directions_rows_sum_coordinates_of_one_digit_with_its_signs() -> None:
    """On a plaintext without a key: a row is a signed sum over a part of the coordinates."""
    context, known, _ = directed()
    plan, layout = context.plan, context.plan.layouts[0]
    shape = direction_shape(plan)
    assert shape is not None
    for digit in range(layout.digits):
        # A coordinate counts one with the direction's sign: agreeing everywhere, a row shows how
        # many it looks at. Rows of other digits see it with signs that are nothing to it.
        values = np.zeros(layout.blocks * layout.digits * 4096, dtype=np.int64)
        values.reshape(layout.blocks, layout.digits, 4096)[:, digit] = known.of_digit(layout, digit)
        upload = ring.to_ntt(pack(layout, values[: layout.values]))
        rows = sketch(context, UPLOAD, [upload], KEY, known).direction
        assert rows is not None
        found = _digits(layout, rows, np.zeros(4096, dtype=np.int64))[:, :, 0]
        mine = np.arange(shape.rows) % shape.digits == digit
        # Binomial with this mean; 8 standard deviations.
        reach = 8 * math.sqrt(shape.sampled)
        assert (np.abs(found[mine, digit] - shape.sampled) < reach).all()
        assert not np.delete(found, digit, axis=1).any()


def test_a_weights_rows_measure_the_weight() -> None:
    """A plaintext of nothing but a weight: each row sums up as many coordinates as it looks at."""
    plan = make_plan([VOTES, UPDATE], max_clients=5, norm_check=CHECK)
    (shape,), context = weight_shapes(plan), KeyHolder(plan).context
    assert shape.segment == 1
    layout = plan.layouts[1]
    flat = Direction.of_weight(UPDATE, context.rotation).signs.astype(np.int64)
    plaintext = packed(plan, [np.zeros(300, dtype=np.int64), 5 * flat])
    made = sketch(context, UPLOAD, [ring.to_ntt(plaintext)], KEY)
    (rows,) = made.weights
    found = _digits(layout, rows, np.zeros(4096, dtype=np.int64))[:, :, 0]
    mine = found[np.arange(shape.rows), np.arange(shape.rows) % shape.digits]
    assert (np.abs(mine - 5 * shape.sampled) <= 5 * 8 * math.sqrt(shape.sampled)).all()
    data = made.to_bytes()
    assert len(data) == sketch_bytes(plan, direction=False)
    assert Sketch.from_bytes(plan, UPLOAD, data).digest == made.digest
    assert same_rows(Sketch.from_bytes(plan, UPLOAD, data).weights[0], rows)


def test_a_sketch_shows_nothing_of_its_numbers() -> None:
    context, known, upload = directed()
    made = sketch(context, UPLOAD, [upload], KEY, known)
    rows = made.norms[0]
    for text in (repr(made), repr(rows), repr(made.direction)):
        assert str(int(rows.values[0, 0])) not in text
        assert "array" not in text


def test_multiplying_by_hand_agrees_with_the_rings_own_multiplication() -> None:
    # The reference's transforms, against `residues.multiply`, which the code under test uses.
    (truth,) = references(PLANS["odd rows"])
    upload = uniform_polynomials(Stream(KEY), 1)
    fast = multiply(ring.to_ntt(truth.multipliers[:, 0]), upload)
    assert np.array_equal(
        ring.from_ntt(fast).astype(object) % MODULUS, transformed_sum(truth, upload)
    )
