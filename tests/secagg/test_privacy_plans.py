"""Plans with differential privacy: noise that covers what it must, and fits where it must."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.discrete_gaussian import discrete_gaussian
from secagg.errors import PlanError
from secagg.parameters import (
    MODULUS,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    Segment,
    TensorSpec,
)
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.privacy import multipliers, noise_norm, release_rho, sensitivity
from secagg.sampling import Stream

MODES = ["release", "distributed", "local"]
TABLE = (TensorSpec("bias", (50,)), TensorSpec("factors", (50, 6)))


def private(mode: str = "release", multiplier: float = 1.0, clients: int = 0) -> Privacy:
    return Privacy(mode, multiplier, epsilon=8.0, delta=1e-5, honest_clients=clients)


def planned(
    privacy: Privacy, *more: Segment, parameters: int = 5000, bits: int = 8, least: int = 5
) -> Plan:
    update = FloatSegment("update", (TensorSpec("w", (parameters,)),), 1.0, bits)
    return make_plan([update, *more], max_clients=100, min_clients=least, privacy=privacy)


# --- the cost of a release ----------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    multiplier=st.floats(0.05, 50.0),
    bits=st.integers(2, 12),
    least=st.integers(3, 100),
    integers=st.integers(0, 3),
    share=st.floats(0.01, 0.99),
)
def test_a_release_never_costs_more_than_its_multiplier_says(
    mode: str, multiplier: float, bits: int, least: int, integers: int, share: float
) -> None:
    more = [IntegerSegment(f"counts{i}", 10 + i, 1 + i) for i in range(integers)]
    privacy = replace(private(mode, multiplier), integer_share=share)
    plan = planned(privacy, *more, bits=bits, least=least)
    rho = release_rho(plan)
    assert rho <= (1 + 1e-9) / (2 * multiplier**2)
    # Nor much less, but for standard deviations that are rounded up to whole numbers.
    assert all(std >= 1 for std in plan.noise_stds)
    if min(plan.noise_stds) > 100:
        assert rho >= 0.96 / (2 * multiplier**2)


def test_without_privacy_a_release_has_no_bound() -> None:
    assert release_rho(plan_tensors(10, max_clients=3, clip=1.0)) == math.inf


def test_shares_add_up_to_the_whole() -> None:
    update = FloatSegment("update", TABLE, 1.0)
    counts = [IntegerSegment("a", 5, 1), IntegerSegment("b", 5, 1)]
    for segments in ([update], counts, [update, *counts]):
        found = multipliers(private(multiplier=2.0), segments)
        assert sum(1 / z**2 for z in found) == pytest.approx(1 / 4)
    assert multipliers(private(), [update, *counts])[0] == pytest.approx(1 / math.sqrt(0.9))


@pytest.mark.parametrize("honest", [1, 2, 4, 5])
def test_the_smallest_cohort_carries_the_full_noise(honest: int) -> None:
    """Independently of `release_rho`: variances add up."""
    plan = planned(private("distributed", clients=honest))
    (segment,), (std,) = plan.segments, plan.noise_stds
    assert honest * std**2 >= sensitivity(segment) ** 2
    assert honest * (std - 1) ** 2 < sensitivity(segment) ** 2


def test_by_default_those_that_may_break_the_plan_are_not_counted_on() -> None:
    assert planned(private("distributed")).privacy == private("distributed", clients=5)
    checked = plan_tensors(
        5000,
        max_clients=100,
        min_clients=5,
        clip=1.0,
        norm_check=NormCheck(0.3, tolerated=2),
        privacy=private("distributed"),
    )
    assert checked.privacy == private("distributed", clients=3)
    assert planned(private("local")).privacy == private("local", clients=1)


# --- room for the noise -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    clients=st.integers(3, 2000),
    bits=st.integers(2, 10),
    multiplier=st.floats(0.1, 4.0),
    checked=st.booleans(),
)
def test_the_largest_sum_with_its_noise_stays_below_half_of_the_modulus(
    mode: str, clients: int, bits: int, multiplier: float, checked: bool
) -> None:
    plan = plan_tensors(
        3000,
        max_clients=clients,
        clip=1.0,
        bits=bits,
        norm_check=NormCheck(0.3) if checked else None,
        privacy=private(mode, multiplier),
    )
    for layout in plan.upload_layouts:
        most = clients * (2 ** (bits - 1) - 1) + layout.summed_noise(clients) + layout.tolerance
        assert layout.sum_abs >= most
        assert layout.base >= 4 * layout.sum_abs + 2
        span = layout.sum_abs * sum(layout.base**digit for digit in range(layout.digits))
        assert (span << layout.shift) + layout.guard < MODULUS // 2
        assert 1 << layout.shift > 2 * layout.guard


def test_client_noise_takes_ciphertexts_of_its_own_and_a_guard_for_both() -> None:
    plain, noised = planned(private()), planned(private("distributed"))
    assert plain.noise_layouts == ()
    assert plain.blocks == plain.sum_blocks
    assert noised.blocks == 2 * noised.sum_blocks
    assert [layout.blocks for layout in noised.noise_layouts] == [noised.sum_blocks]
    assert noised.layouts[0].guard > plain.layouts[0].guard * 1.4
    ranges = [blocks for _, blocks in noised.upload_ranges()]
    assert [blocks for _, _, blocks in noised.block_ranges()] == ranges[:1]
    assert ranges[-1].stop == noised.blocks


@pytest.mark.parametrize("check", [None, NormCheck()])
def test_all_of_the_noise_hides_in_the_updates_own_ciphertexts(check: NormCheck | None) -> None:
    """Server and key holder together open nothing without it."""
    plan = plan_tensors(5000, max_clients=9, clip=1.0, norm_check=check, privacy=private("local"))
    assert plan.noise_layouts == ()
    assert plan.blocks == plan.sum_blocks
    (layout,), (std,), (most,) = plan.layouts, plan.noise_stds, plan.upload_abs
    assert most == 127 + 10 * std
    if check:
        # Of an update and its noise together: long, but not much longer than they are.
        assert std * math.sqrt(layout.values) < layout.norm < 1.1 * std * math.sqrt(layout.values)


def test_the_noise_of_a_release_needs_no_room() -> None:
    """The key holder adds it to what it has opened."""
    plan = planned(private(multiplier=1000.0))
    without = plan_tensors(5000, max_clients=100, min_clients=5, clip=1.0)
    assert plan.layouts == without.layouts


@pytest.mark.parametrize(("std", "count"), [(2, 1), (2, 4096), (300, 100), (5000, 30_000)])
def test_a_noise_stays_within_its_norm(std: int, count: int) -> None:
    drawn = [
        discrete_gaussian(Stream.derive("test noise", number), std, count).astype(float)
        for number in range(50)
    ]
    norms = [float(np.linalg.norm(noise)) for noise in drawn]
    assert max(norms) <= noise_norm(std, count)
    if count > 1000:
        assert noise_norm(std, count) < 1.2 * max(norms)


# --- what is refused, with what would work -------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "central"},
        {"mode": ""},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"integer_share": 0.0},
        {"integer_share": 1.0},
        {"integer_share": math.nan},
        {"honest_clients": -1},
        {"honest_clients": 1},  # of a release
        {"honest_clients": 1.5},
        {"mode": "local", "honest_clients": 2},
    ],
)
def test_no_such_privacy(change: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="expected"):
        replace(private(), **change)  # type: ignore[arg-type]


def test_no_noise_is_not_privacy() -> None:
    with pytest.raises(PlanError, match="leave privacy out for no noise"):
        private(multiplier=0.0)


def test_a_cohort_below_the_calibrated_minimum_is_refused_with_both_ways_out() -> None:
    with pytest.raises(PlanError, match="min_clients=9 would work, or honest_clients=5"):
        planned(private("distributed", clients=9), least=5)
    planned(private("distributed", clients=9), least=9)
    planned(private("distributed", clients=5), least=5)


def test_weights_are_data_as_well() -> None:
    with pytest.raises(PlanError, match="equal weights"):
        plan_tensors(
            10,
            max_clients=3,
            clip=1.0,
            weighting="samples",
            weight_cap=10,
            privacy=private(),
        )


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (NormCheck(), "margin=0.3 would work"),
        (NormCheck(0.29), "margin=0.3 would work"),
        (NormCheck(0.3, min_cosine=-0.1), "leave min_cosine out"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_check_that_refuses_honest_clients_now_and_then_is_for_noisy_updates_only(
    mode: str, check: NormCheck, why: str
) -> None:
    """A refusal is no noisy sum: what it tells of an update is not accounted for."""
    if mode == "local" and check.min_cosine is None:
        # What is judged is noisy by itself.
        plan_tensors(9000, max_clients=9, clip=1.0, norm_check=check, privacy=private(mode))
        return
    with pytest.raises(PlanError, match=why):
        plan_tensors(9000, max_clients=9, clip=1.0, norm_check=check, privacy=private(mode))


@pytest.mark.parametrize("check", [None, NormCheck(0.3)])
@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_noise_that_the_modulus_has_no_room_for_is_refused_with_what_fits(
    mode: str, check: NormCheck | None
) -> None:
    def plan(multiplier: float) -> Plan:
        return plan_tensors(
            100_000,
            max_clients=1000,
            clip=1.0,
            bits=16,
            norm_check=check,
            privacy=private(mode, multiplier),
        )

    with pytest.raises(PlanError) as refused:
        plan(1e5)
    found = re.search(r"noise_multiplier=([0-9.e+-]+) would work", str(refused.value))
    assert found
    plan(float(found[1]))
    with pytest.raises(PlanError):
        plan(float(found[1]) * 1.02)


def test_noise_that_cannot_be_drawn_is_refused_with_what_can() -> None:
    def plan(multiplier: float) -> Plan:
        return plan_integers(
            10, max_clients=3, max_abs=1 << 35, privacy=private(multiplier=multiplier)
        )

    with pytest.raises(PlanError) as refused:
        plan(1e6)
    works = float(re.search(r"noise_multiplier=([0-9.e+-]+) would", str(refused.value))[1])  # type: ignore[index]
    plan(works)


# --- rows and thresholds -------------------------------------------------------------------------


def table(**changes: object) -> FloatSegment:
    return replace(FloatSegment("update", TABLE, 1.0, 12, rows=50), **changes)  # type: ignore[arg-type]


def counts(**changes: object) -> IntegerSegment:
    return replace(IntegerSegment("contributors", 50, 1), **changes)  # type: ignore[arg-type]


def test_rows_are_rotated_by_the_powers_of_two_of_their_width() -> None:
    assert table().rotations == ((50, 4), (50, 2), (50, 1))
    assert table().values == table().parameters == 350
    assert table(clip_bit=True).values == 351


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 49},
        {"rows": -1},
        {"rows": 1.0},
        {"tensors": (*TABLE, TensorSpec("scale", ()))},
        {"tensors": (*TABLE, TensorSpec("mean", (6,)))},
        {"weighting": "samples", "weight_cap": 5},
        {"rows": 0, "clip_bit": True, "weighting": "samples", "weight_cap": 5},
    ],
)
def test_no_such_rows(changes: dict[str, object]) -> None:
    with pytest.raises(PlanError, match="expected"):
        table(**changes)


@pytest.mark.parametrize("least", [0, 1, -5, 1_000_001, 2.0])
def test_no_such_threshold(least: int) -> None:
    with pytest.raises(PlanError, match="expected"):
        RowThreshold("contributors", least)


@pytest.mark.parametrize(
    "segments",
    [
        [table()],
        [counts()],
        [table(rows=0, bits=8), counts()],
        [table(), table(name="second"), counts()],
        [table(), counts(size=49)],
        [table(), counts(max_abs=2)],
        [table(), counts(name="others")],
    ],
)
def test_a_threshold_needs_one_table_and_a_count_for_each_of_its_rows(
    segments: list[Segment],
) -> None:
    with pytest.raises(PlanError, match="expected"):
        make_plan(segments, max_clients=9, threshold=RowThreshold("contributors", 3))


def test_a_direction_check_of_rows_is_refused() -> None:
    big = FloatSegment("update", (TensorSpec("w", (9000,)),), 1.0, 12, rows=9000)
    with pytest.raises(PlanError, match="rows that stay apart"):
        make_plan([big], max_clients=9, norm_check=NormCheck(min_cosine=0.0))


def variations() -> list[Plan]:
    base = [table(), counts()]
    return [
        make_plan(base, max_clients=9),
        make_plan([table(clip_bit=True), counts()], max_clients=9),
        make_plan([table(rows=0), counts()], max_clients=9),
        make_plan(base, max_clients=9, threshold=RowThreshold("contributors", 3)),
        make_plan(base, max_clients=9, threshold=RowThreshold("contributors", 4)),
        *(make_plan(base, max_clients=9, privacy=private(mode)) for mode in MODES),
        make_plan(base, max_clients=9, privacy=private("distributed", clients=2)),
        make_plan(base, max_clients=9, privacy=private(multiplier=1.0000001)),
        make_plan(base, max_clients=9, privacy=replace(private(), epsilon=9.0)),
        make_plan(base, max_clients=9, privacy=replace(private(), delta=1e-6)),
        make_plan(base, max_clients=9, privacy=replace(private(), integer_share=0.2)),
    ]


def test_every_part_of_it_is_in_the_digest() -> None:
    digests = [plan.digest for plan in variations()]
    assert len(set(digests)) == len(digests)


def test_whole_numbers_are_the_same_as_floats() -> None:
    """What comes over the wire is always a float."""
    ours = make_plan([counts()], max_clients=9, privacy=Privacy("release", 1, 8, 1e-5))
    theirs = make_plan([counts()], max_clients=9, privacy=Privacy("release", 1.0, 8.0, 1e-5))
    assert ours.digest == theirs.digest
