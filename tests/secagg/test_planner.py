"""The planner's inequalities, derived here once more in exact arithmetic, and its refusals."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secagg.errors import PlanError
from secagg.packing import pack, unpack
from secagg.parameters import (
    BLOCK_BYTES,
    CHUNK_BLOCKS,
    MAX_COHORT,
    MAX_SEGMENTS,
    MAX_VALUES,
    MODULUS,
    FloatSegment,
    IntegerSegment,
    Layout,
    NormCheck,
    Plan,
    Privacy,
    TensorSpec,
    check_ring,
)
from secagg.planner import (
    PRIVATE_MARGIN,
    explain,
    make_plan,
    noise_headroom,
    plan_integers,
    plan_tensors,
)

COHORTS = st.integers(3, MAX_COHORT)


def coefficients(plan: Plan) -> int:
    return sum(layout.blocks * 4096 for layout in plan.layouts)


def layout_is_exact(layout: Layout, plan: Plan) -> None:
    n, big_r, base, digits = plan.max_clients, layout.sum_abs, layout.base, layout.digits
    grid = 1 << layout.shift
    assert big_r == n * layout.max_abs
    assert base >= 4 * big_r + 2
    assert grid > 2 * layout.guard
    # The top digit: R, its mirror image and a margin as wide again, without wrapping.
    assert grid * base ** (digits - 1) * (4 * big_r + 2) <= MODULUS
    span = grid * big_r * Fraction(base**digits - 1, base - 1) + Fraction(grid, 2)
    assert span < Fraction(MODULUS, 2)


def guard_is_safe(layout: Layout, plan: Plan) -> None:
    # P(one of M coefficients leaves G) <= 2 M exp(-G^2 / (2 * 10.5 n)), unless G is the hard limit.
    # Compared in bits: log2(2 M) - G^2 / (21 n ln 2) <= -40.
    n = plan.max_clients
    if layout.guard < 21 * n:
        bits = 1 + math.log2(coefficients(plan)) - layout.guard**2 / (21 * n * math.log(2))
        assert bits <= -40
    assert layout.guard <= 21 * n


@settings(deadline=None, max_examples=200)
@given(clients=COHORTS, bits=st.integers(2, 16), parameters=st.integers(1, 1 << 24))
def test_float_plans_keep_every_inequality(clients: int, bits: int, parameters: int) -> None:
    plan = plan_tensors(parameters, max_clients=clients, clip=1.0, bits=bits)
    (layout,) = plan.layouts
    assert layout.max_abs == 2 ** (bits - 1) - 1
    assert layout.values >= parameters
    layout_is_exact(layout, plan)
    guard_is_safe(layout, plan)


@settings(deadline=None, max_examples=200)
@given(clients=COHORTS, size=st.integers(1, 1 << 24), magnitude=st.integers(1, 1 << 52))
def test_integer_plans_keep_every_inequality_or_are_refused(
    clients: int, size: int, magnitude: int
) -> None:
    try:
        plan = plan_integers(size, max_clients=clients, max_abs=magnitude)
    except PlanError:
        assume(False)
    layout_is_exact(plan.layouts[0], plan)
    guard_is_safe(plan.layouts[0], plan)


@settings(deadline=None, max_examples=100)
@given(clients=COHORTS, bits=st.integers(2, 16))
def test_no_further_digit_would_have_fitted(clients: int, bits: int) -> None:
    layout = plan_tensors(5000, max_clients=clients, clip=1.0, bits=bits).layouts[0]
    grid, more = 1 << layout.shift, layout.digits + 1
    top = grid * layout.base ** (more - 1) * (4 * layout.sum_abs + 2) <= MODULUS
    span = grid * layout.sum_abs * Fraction(layout.base**more - 1, layout.base - 1)
    assert not (top and span + Fraction(grid, 2) < Fraction(MODULUS, 2))


@settings(deadline=None, max_examples=60)
@given(
    clients=COHORTS,
    magnitude=st.integers(1, 1 << 40),
    signs=st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=12),
)
def test_the_whole_cohort_at_the_extreme_fits_in_every_digit(
    clients: int, magnitude: int, signs: list[int]
) -> None:
    try:
        plan = plan_integers(4096 * 12, max_clients=clients, max_abs=magnitude)
    except PlanError:
        assume(False)
    layout = plan.layouts[0]
    pattern = np.array([signs[d % len(signs)] for d in range(12)], dtype=np.int64)
    one = np.repeat(pattern, 4096) * magnitude
    single = pack(layout, one)
    total = [int(value) * clients for value in single[:, 0]]
    assert max(abs(value) for value in total) + layout.guard < MODULUS // 2
    for noise in (layout.guard, -layout.guard):
        assert np.array_equal(
            unpack(layout, single * clients + noise, layout.sum_abs // layout.max_abs),
            one * clients,
        )


def test_a_thousand_clients_and_a_million_bytes_take_two_digits() -> None:
    plan = plan_tensors(1_000_000, max_clients=1000, clip=1.0, bits=8)
    assert plan.layouts[0].digits == 2
    assert plan.payload_bytes / 1_000_000 <= 3.6


def test_the_guard_covers_all_segments_together() -> None:
    small = IntegerSegment("small", 10, 1)
    large = IntegerSegment("large", 1 << 24, 1)
    alone = make_plan([small], max_clients=100_000).layouts[0].guard
    together = make_plan([small, large], max_clients=100_000).layouts
    assert together[0].guard == together[1].guard > alone


NOISES = [
    (None, None),
    (NormCheck(PRIVATE_MARGIN, 8), None),
    (None, Privacy("release", 1.0, 100.0, 1e-5)),
    (NormCheck(PRIVATE_MARGIN, 8), Privacy("distributed", 1.0, 100.0, 1e-5)),
]


@pytest.mark.parametrize(("check", "privacy"), NOISES)
@given(most=st.integers(3, 3000))
@settings(max_examples=30, deadline=None)
def test_the_noise_headroom_is_what_a_smaller_plan_would_not_have_guarded_against(
    check: NormCheck | None, privacy: Privacy | None, most: int
) -> None:
    def plan(clients: int) -> Plan:
        return plan_tensors(
            100, max_clients=clients, clip=1.0, bits=4, norm_check=check, privacy=privacy
        )

    full = plan(most)
    assert noise_headroom(full, most) == 0
    rooms = [noise_headroom(full, clients) for clients in range(3, most + 1, max(1, most // 7))]
    assert rooms == sorted(rooms, reverse=True)
    assert min(rooms) >= 0
    smaller = max(3, most // 2)
    assert 2 ** noise_headroom(full, smaller) == pytest.approx(
        full.layouts[0].guard / plan(smaller).layouts[0].guard
    )


@pytest.mark.parametrize("clients", [3, 8, 1000, MAX_COHORT])
def test_the_suggestion_of_a_refusal_works_and_is_the_largest(clients: int) -> None:
    with pytest.raises(PlanError) as refusal:
        plan_integers(10_000, max_clients=clients, max_abs=1 << 55)
    found = re.search(r"max_abs=(\d+) would work", str(refusal.value))
    assert found is not None
    suggested = int(found[1])
    plan = plan_integers(10_000, max_clients=clients, max_abs=suggested)
    layout_is_exact(plan.layouts[0], plan)
    # The suggestion gives up less than one part in a thousand of the room there is.
    with pytest.raises(PlanError):
        plan_integers(10_000, max_clients=clients, max_abs=suggested + suggested // 1000 + 2)


@pytest.mark.parametrize("bits", [2, 16])
def test_no_float_segment_is_ever_too_wide(bits: int) -> None:
    # The widest request there is: the refusal for floats exists for other rings only.
    plan = plan_tensors(MAX_VALUES, max_clients=MAX_COHORT, clip=1.0, bits=bits)
    assert plan.layouts[0].digits >= 1


def test_a_modulus_of_57_bits_is_refused_and_56_accepted() -> None:
    check_ring(4096, MODULUS)
    with pytest.raises(PlanError, match="bits=57"):
        check_ring(4096, (1 << 56) + 1)


@pytest.mark.parametrize("degree", [1024, 2048, 8192, 0, -1])
def test_a_ring_without_a_row_in_the_security_table_is_refused(degree: int) -> None:
    with pytest.raises(PlanError, match="ring degree"):
        check_ring(degree, MODULUS)


def test_the_modulus_is_a_prime_with_an_ntt() -> None:
    assert MODULUS == 2**56 - 2**24 + 1
    assert MODULUS % (2 * 4096) == 1
    assert all(pow(a, MODULUS - 1, MODULUS) == 1 for a in (2, 3, 5, 7, 11, 13, 17))
    # Pocklington: q - 1 = 2^24 (2^32 - 1), whose primes are the Fermat numbers' and 2.
    for prime in (2, 3, 5, 17, 257, 65537):
        assert any(
            math.gcd(pow(a, (MODULUS - 1) // prime, MODULUS) - 1, MODULUS) == 1
            for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
        )


@pytest.mark.parametrize(
    ("low", "high"), [(2, 10), (0, 10), (-3, 10), (5, 4), (3, MAX_COHORT + 1), (3, 2)]
)
def test_impossible_cohorts_are_refused(low: int, high: int) -> None:
    with pytest.raises(PlanError, match="clients"):
        plan_integers(10, max_clients=high, max_abs=1, min_clients=low)


def test_segments_must_be_few_and_distinct() -> None:
    one = IntegerSegment("a", 1, 1)
    many = [IntegerSegment(f"s{i}", 1, 1) for i in range(MAX_SEGMENTS + 1)]
    for segments in ([], [one, one], many):
        with pytest.raises(PlanError, match="segments"):
            make_plan(segments, max_clients=3)
    make_plan(many[:MAX_SEGMENTS], max_clients=3)


def test_too_many_values_are_refused_over_all_segments() -> None:
    halves = [IntegerSegment(name, MAX_VALUES // 2 + 1, 1) for name in "ab"]
    with pytest.raises(PlanError, match="split"):
        make_plan(halves, max_clients=3)


@pytest.mark.parametrize("bits", [1, 17, 0, -8])
def test_bits_outside_2_to_16_are_refused(bits: int) -> None:
    with pytest.raises(PlanError, match="bits"):
        plan_tensors(10, max_clients=3, clip=1.0, bits=bits)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_clip_norms_that_are_no_norms_are_refused(clip: float) -> None:
    with pytest.raises(PlanError, match="clip"):
        plan_tensors(10, max_clients=3, clip=clip)


@pytest.mark.parametrize(
    ("weighting", "cap"), [("equal", 2), ("samples", 0), ("samples", 2**53), ("square", 1)]
)
def test_impossible_weightings_are_refused(weighting: str, cap: int) -> None:
    with pytest.raises(PlanError, match="weight"):
        plan_tensors(10, max_clients=3, clip=1.0, weighting=weighting, weight_cap=cap)


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 129, "a\n", "a;b"])
def test_names_that_could_be_misread_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match="name"):
        IntegerSegment(name, 1, 1)
    with pytest.raises(PlanError, match="name"):
        TensorSpec(name, (1,))


def test_empty_segments_are_refused() -> None:
    with pytest.raises(PlanError):
        IntegerSegment("a", 0, 1)
    with pytest.raises(PlanError):
        IntegerSegment("a", 1, 0)
    with pytest.raises(PlanError):
        TensorSpec("a", (3, 0))
    with pytest.raises(PlanError):
        FloatSegment("a", (), 1.0)
    with pytest.raises(PlanError, match="distinctly"):
        FloatSegment("a", (TensorSpec("w", (1,)), TensorSpec("w", (2,))), 1.0)


GOLDEN = [
    FloatSegment("update", (TensorSpec("b", ()), TensorSpec("a", (3, 5))), 0.5, 8, "samples", 100),
    IntegerSegment("counts", 5000, 7),
]


def test_the_digest_is_stable() -> None:
    # A change of this value is a change of protocol: uploads of the two versions never add up.
    plan = make_plan(GOLDEN, max_clients=50, min_clients=5)
    assert plan.digest.hex() == "d9c0a67821aa9f8586c492589ba54b5705b2d134b3534a334c1d78cf52b1c6cc"


def test_the_digest_does_not_depend_on_the_order_in_which_tensors_are_named() -> None:
    tensors = {"b": (2, 3), "a": (4,)}
    backwards = dict(reversed(tensors.items()))
    plans = [plan_tensors(shapes, max_clients=5, clip=1.0) for shapes in (tensors, backwards)]
    assert plans[0].digest == plans[1].digest


def variations() -> list[Plan]:
    update, counts = GOLDEN
    assert isinstance(update, FloatSegment)
    assert isinstance(counts, IntegerSegment)
    a, b = update.tensors
    updates = [
        replace(update, name="other"),
        replace(update, clip=math.nextafter(0.5, 1)),
        replace(update, bits=9),
        replace(update, weighting="equal", weight_cap=1),
        replace(update, weight_cap=101),
        replace(update, tensors=(replace(a, name="aa"), b)),
        replace(update, tensors=(replace(a, shape=(5, 3)), b)),
        replace(update, tensors=(replace(a, shape=(15,)), b)),
        replace(update, tensors=(a, replace(b, shape=(1,)))),
        replace(update, tensors=(a,)),
    ]
    others = [
        replace(counts, name="c"),
        replace(counts, size=5001),
        replace(counts, max_abs=8),
        replace(counts, max_norm=20.0),
        replace(counts, max_norm=math.nextafter(20.0, 21)),
    ]
    plans = [make_plan([changed, counts], max_clients=50, min_clients=5) for changed in updates]
    plans += [make_plan([update, changed], max_clients=50, min_clients=5) for changed in others]
    base = make_plan(GOLDEN, max_clients=50, min_clients=5)
    layout = base.layouts[0]
    for name in (
        *("values", "max_abs", "sum_abs", "base", "digits", "shift", "guard"),
        *("norm", "tolerance"),
    ):
        forged = replace(layout, **{name: getattr(layout, name) + 1})
        plans.append(replace(base, layouts=(forged, base.layouts[1])))
    return [
        *plans,
        base,
        make_plan(GOLDEN[::-1], max_clients=50, min_clients=5),
        make_plan(GOLDEN[:1], max_clients=50, min_clients=5),
        make_plan(GOLDEN, max_clients=50, min_clients=6),
        make_plan(GOLDEN, max_clients=51, min_clients=5),
        *(make_plan(GOLDEN, max_clients=50, min_clients=5, norm_check=check) for check in CHECKS),
    ]


CHECKS = [
    NormCheck(),
    NormCheck(margin=math.nextafter(0.2, 1)),
    NormCheck(sketches=17),
    NormCheck(tolerated=2),
]


def test_every_field_changes_the_digest() -> None:
    digests = [plan.digest for plan in variations()]
    assert len(set(digests)) == len(digests)


def test_explain_names_everything_a_reader_needs() -> None:
    plan = plan_tensors(1_000_000, max_clients=1000, clip=1.0)
    facts = {fact.topic: fact for fact in explain(plan)}
    text = "\n".join(f"{f.topic} {f.value} {f.reason}" for f in facts.values())
    for topic in ("cohort", "ring", "modulus", "security", "noise", "grid", "failure"):
        assert facts[topic].value
    for word in ("digits", "headroom", "ciphertexts", "bytes", "256-bit", "2^-40", str(MODULUS)):
        assert word in text
    assert str(plan.blocks) in facts["ciphertexts"].value
    assert str(plan.payload_bytes) in facts["upload"].value
    assert f"{plan.payload_bytes / 1_000_000:.3f}" in facts["upload"].reason


@settings(deadline=None, max_examples=50)
@given(clients=COHORTS, magnitude=st.integers(1, 1 << 30), size=st.integers(1, 20000))
def test_the_headroom_that_explain_states_is_never_negative(
    clients: int, magnitude: int, size: int
) -> None:
    try:
        plan = plan_integers(size, max_clients=clients, max_abs=magnitude)
    except PlanError:
        assume(False)
    (headroom,) = [fact.value for fact in explain(plan) if "headroom" in fact.topic]
    assert float(headroom.split()[0]) >= 0


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=5))
def test_segments_chunks_and_bytes_tile_the_upload(sizes: list[int]) -> None:
    segments = [IntegerSegment(f"s{i}", size, 3) for i, size in enumerate(sizes)]
    plan = make_plan(segments, max_clients=10)
    position = 0
    for _, layout, blocks in plan.block_ranges():
        assert blocks.start == position
        position = blocks.stop
        assert (layout.blocks - 1) * layout.digits * 4096 < layout.values
        assert layout.values <= layout.blocks * layout.digits * 4096
    assert position == plan.blocks
    lengths = [plan.chunk_blocks(index) for index in range(plan.chunks)]
    assert sum(lengths) == plan.blocks
    assert all(length == CHUNK_BLOCKS for length in lengths[:-1])
    assert plan.payload_bytes == plan.blocks * BLOCK_BYTES
    for index in (-1, plan.chunks):
        with pytest.raises(PlanError, match="chunk index"):
            plan.chunk_blocks(index)


# --- with a norm check ----------------------------------------------------------------------------


NORM_CHECKS = st.builds(NormCheck, st.floats(0.15, 1.0), st.integers(8, 64), st.integers(0, 100))


def checked_layout_is_exact(layout: Layout, plan: Plan) -> None:
    check = plan.norm_check
    assert check is not None
    n, big_r, base, grid = plan.max_clients, layout.sum_abs, layout.base, 1 << layout.shift
    # What accepted clients may add: an update of 1.5 times the norm, all of it in one value.
    assert layout.tolerance == check.tolerated * math.ceil(1.5 * layout.norm)
    assert big_r == n * layout.max_abs + layout.tolerance
    assert base >= 4 * big_r + 2
    assert grid > 2 * layout.guard
    assert grid * base ** (layout.digits - 1) * (4 * big_r + 2) <= MODULUS
    span = grid * big_r * Fraction(base**layout.digits - 1, base - 1) + Fraction(grid, 2)
    assert span < Fraction(MODULUS, 2)
    # An accepted row at 4.5 standard deviations is within half a digit.
    assert base >= 9 * (1 + Fraction(check.margin)) * layout.norm
    # The guard holds an honest cohort's noise, and what the noise audit cannot name.
    unchecked = make_plan(plan.segments, max_clients=n, min_clients=plan.min_clients)
    assert layout.guard == unchecked.layouts[0].guard + 28 * check.tolerated
    assert layout.shift >= unchecked.layouts[0].shift
    # A mask without its lowest byte is quiet enough, though the errors of all blocks add up.
    noise = 10.5 * 4096 * layout.blocks + 256.0**2 / 6 * 4096 * 2 / 3
    assert not layout.norm or noise <= 1e-3 * 4.0**layout.shift * layout.norm**2


@settings(deadline=None, max_examples=200)
@given(
    clients=COHORTS,
    bits=st.integers(2, 16),
    parameters=st.integers(1, 1 << 24),
    weighted=st.booleans(),
    check=NORM_CHECKS,
)
def test_checked_float_plans_keep_every_inequality(
    clients: int, bits: int, parameters: int, weighted: bool, check: NormCheck
) -> None:
    try:
        plan = plan_tensors(
            parameters,
            max_clients=clients,
            clip=3.0,
            bits=bits,
            weighting="samples" if weighted else "equal",
            norm_check=check,
        )
    except PlanError:
        assume(False)
    (layout,), (segment,) = plan.layouts, plan.segments
    checked_layout_is_exact(layout, plan)
    # T is between the bound itself and the largest norm that integers of so many bits have.
    assert layout.norm >= min(segment.norm_bound / segment.step, layout.max_abs)
    assert layout.norm <= math.ceil(layout.max_abs * math.sqrt(layout.values))


@settings(deadline=None, max_examples=200)
@given(
    clients=COHORTS,
    size=st.integers(1, 1 << 24),
    magnitude=st.integers(1, 1 << 40),
    share=st.floats(0, 1),
    check=NORM_CHECKS,
)
def test_checked_integer_plans_keep_every_inequality_or_are_refused(
    clients: int, size: int, magnitude: int, share: float, check: NormCheck
) -> None:
    norm = max(1.0, share * magnitude * math.sqrt(size))
    try:
        plan = plan_integers(
            size, max_clients=clients, max_abs=magnitude, max_norm=norm, norm_check=check
        )
    except PlanError:
        assume(False)
    assert plan.layouts[0].norm == math.ceil(norm)
    checked_layout_is_exact(plan.layouts[0], plan)


@settings(deadline=None, max_examples=100)
@given(clients=COHORTS, bits=st.integers(2, 16), parameters=st.integers(1, 1 << 22))
def test_a_plan_without_a_check_is_what_it_always_was(
    clients: int, bits: int, parameters: int
) -> None:
    # R = nV, B = 4R + 2, the smallest grid above twice the guard, and as many digits as fit.
    layout = plan_tensors(parameters, max_clients=clients, clip=1.0, bits=bits).layouts[0]
    most = clients * (2 ** (bits - 1) - 1)
    assert (layout.sum_abs, layout.base) == (most, 4 * most + 2)
    assert (layout.norm, layout.tolerance) == (0, 0)
    assert 1 << layout.shift > 2 * layout.guard >= 1 << (layout.shift - 1)
    room = MODULUS >> layout.shift
    assert layout.base**layout.digits <= room < layout.base ** (layout.digits + 1)


def test_a_segment_without_a_norm_is_planned_as_if_there_were_no_check() -> None:
    free, held = IntegerSegment("free", 5000, 100), IntegerSegment("held", 5000, 100, 50.0)
    plan = make_plan([free, held], max_clients=20, norm_check=NormCheck(tolerated=0))
    alone = make_plan([free, held], max_clients=20)
    assert plan.layouts[0] == alone.layouts[0]
    assert plan.layouts[1].norm == 50
    with pytest.raises(PlanError, match="max_norm"):
        make_plan([free], max_clients=20, norm_check=NormCheck())


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": 0.149},
        {"margin": 1.001},
        {"margin": math.nan},
        {"margin": -1.0},
        {"sketches": 7},
        {"sketches": 65},
        {"sketches": 16.0},
        {"sketches": True},
        {"tolerated": -1},
        {"tolerated": MAX_COHORT + 1},
        {"tolerated": 1.5},
        {"min_cosine": -1.01},
        {"min_cosine": 0.51},
        {"min_cosine": math.nan},
    ],
)
def test_impossible_checks_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        NormCheck(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [0.0, 0.99, -1.0, math.nan, math.inf, 21.0])
def test_impossible_norms_of_integers_are_refused(norm: float) -> None:
    IntegerSegment("a", 4, 10, 20.0)
    with pytest.raises(PlanError, match="max_norm"):
        IntegerSegment("a", 4, 10, norm)


def test_a_check_that_leaves_no_room_is_refused_with_what_would_help() -> None:
    wide = {"max_clients": 3, "max_abs": 1 << 42, "max_norm": float(1 << 50)}
    plan_integers(1 << 20, max_clients=3, max_abs=1 << 42)
    with pytest.raises(PlanError, match="no norm check"):
        plan_integers(1 << 20, norm_check=NormCheck(), **wide)  # type: ignore[arg-type]


def test_every_field_of_a_check_is_part_of_the_digest() -> None:
    segment = FloatSegment("update", (TensorSpec("w", (30_000,)),), 1.0)
    base = NormCheck(min_cosine=0.0)
    checks = [
        None,
        base,
        replace(base, margin=math.nextafter(0.2, 1)),
        replace(base, sketches=17),
        replace(base, tolerated=2),
        replace(base, min_cosine=None),
        replace(base, min_cosine=math.nextafter(0.0, 1)),
    ]
    plans = [make_plan([segment], max_clients=9, norm_check=check) for check in checks]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert make_plan([segment], max_clients=9, norm_check=base).digest == plans[1].digest


def test_explain_shows_the_check() -> None:
    check = NormCheck(margin=0.25, sketches=20, tolerated=3, min_cosine=-0.125)
    segments = [
        FloatSegment("update", (TensorSpec("w", (30_000,)),), 1.0),
        IntegerSegment("free", 10, 5),
    ]
    plan = make_plan(segments, max_clients=100, norm_check=check)
    facts = {fact.topic: fact for fact in explain(plan)}
    words = facts["norm check"].value + facts["norm check"].reason
    for part in ("20 sketches", "25%", "-0.125", "3 client"):
        assert part in words
    assert str(plan.layouts[0].norm) in facts["update: norm"].value
    assert "free: norm" not in facts
    without = make_plan(segments, max_clients=100)
    assert not [fact for fact in explain(without) if "norm" in fact.topic]
