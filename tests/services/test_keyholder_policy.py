"""What a key holder agrees to release: plans that break its policy are refused, with what works."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cohort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from key_holders import durable_rounds

from secagg.accounting import Budget
from secagg.errors import ConfigurationError
from secagg.parameters import (
    FloatSegment,
    IntegerSegment,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg_keyholder.policy import Policy

PRIVACY = Privacy("release", 2.0, 4.0, 1e-6)
LIMITED = Policy(max_budget=Budget(4.0, 1e-6))
WITHHELD = Policy(min_row_contributors=5)
ROWS = 4


def counts(privacy: Privacy | None = None) -> Plan:
    return make_plan([IntegerSegment("counts", 8, 100)], max_clients=6, privacy=privacy)


def table(least: int | None, *, beside: bool = False) -> Plan:
    """An item table; with another float segment beside it."""
    rows = 0 if least is None else ROWS
    segments: list[FloatSegment | IntegerSegment] = [
        FloatSegment("items", (TensorSpec("factors", (ROWS, 2)),), 1.0, 12, rows=rows),
        IntegerSegment("contributors", ROWS, 1),
    ]
    if beside:
        segments.append(FloatSegment("layers", (TensorSpec("weight", (3,)),), 1.0))
    threshold = None if least is None else RowThreshold("contributors", least)
    return make_plan(segments, max_clients=6, threshold=threshold)


def refused(policy: Policy, plan: Plan) -> str:
    with pytest.raises(ConfigurationError) as caught:
        policy.check(plan)
    said = str(caught.value)
    assert said.startswith("expected ")
    assert "; got " in said
    return said


def test_by_default_every_plan_is_agreed_to() -> None:
    for plan in (counts(), counts(PRIVACY), counts(replace(PRIVACY, epsilon=1e6)), table(None)):
        Policy().check(plan)


def test_a_cohort_below_the_floor_is_told_the_floor() -> None:
    assert "use 5" in refused(Policy(min_clients=5), cohort.counts_plan(min_clients=4))
    Policy(min_clients=5).check(cohort.counts_plan(min_clients=5))


@pytest.mark.parametrize("policy", [Policy(require_privacy=True), LIMITED])
def test_a_plan_without_privacy_is_refused_where_privacy_is_required(policy: Policy) -> None:
    """Exact sums have no bound, and so exceed every one."""
    assert "which this key holder requires" in refused(policy, counts())
    policy.check(counts(PRIVACY))


def test_the_limit_is_named_to_a_plan_without_privacy() -> None:
    assert "epsilon=4 and delta=1e-06 at the most" in refused(LIMITED, counts())


@pytest.mark.parametrize(
    ("changes", "works"),
    [
        ({"epsilon": math.nextafter(4.0, 5.0)}, "use epsilon=4, delta=1e-06"),
        ({"epsilon": 8.0}, "use epsilon=4, delta=1e-06"),
        ({"delta": 1e-5}, "use epsilon=4, delta=1e-06"),
        ({"delta": math.nextafter(1e-6, 1.0)}, "use epsilon=4, delta=1e-06"),
        ({"epsilon": 1.0, "delta": 1e-5}, "use epsilon=1, delta=1e-06"),
        ({"epsilon": 9.0, "delta": 1e-9}, "use epsilon=4, delta=1e-09"),
    ],
    ids=str,
)
def test_a_budget_beyond_the_limit_is_told_one_that_works(
    changes: dict[str, float], works: str
) -> None:
    assert works in refused(LIMITED, counts(replace(PRIVACY, **changes)))  # type: ignore[arg-type]


@given(epsilon=st.floats(1e-3, 1e3), delta=st.floats(1e-12, 0.05))
def test_a_budget_is_agreed_to_exactly_within_the_limit(epsilon: float, delta: float) -> None:
    plan = counts(replace(PRIVACY, epsilon=epsilon, delta=delta))
    if epsilon <= 4.0 and delta <= 1e-6:
        LIMITED.check(plan)
    else:
        refused(LIMITED, plan)


@pytest.mark.parametrize("mode", ["release", "distributed", "local"])
def test_whoever_adds_the_noise_the_budget_counts(mode: str) -> None:
    LIMITED.check(counts(replace(PRIVACY, mode=mode)))
    refused(LIMITED, counts(replace(PRIVACY, mode=mode, epsilon=5.0)))


@pytest.mark.parametrize("beside", [False, True])
def test_rows_of_fewer_contributors_are_not_agreed_to(beside: bool) -> None:
    assert "got least=2; use least=5" in refused(WITHHELD, table(2, beside=beside))
    assert "got least=4; use least=5" in refused(WITHHELD, table(4, beside=beside))
    for least in (5, 6):
        WITHHELD.check(table(least, beside=beside))


def test_a_model_without_a_threshold_is_not_agreed_to_and_counts_are() -> None:
    assert "got none; use least=5" in refused(WITHHELD, table(None))
    WITHHELD.check(counts())


def test_nothing_is_opened_that_breaks_the_policy(tmp_path: Path) -> None:
    policy = Policy(max_budget=Budget(4.0, 1e-6), min_row_contributors=5)
    rounds = durable_rounds(tmp_path, policy=policy)
    for plan in (counts(), counts(replace(PRIVACY, epsilon=5.0)), table(5)):
        with pytest.raises(ConfigurationError):
            rounds.open(plan, "task", 1, 1, bytes(32))
    assert not list((tmp_path / "round-keys").glob("*.key"))
    rounds.open(counts(PRIVACY), "task", 1, 1, bytes(32))


def test_a_stricter_policy_after_a_restart_stops_rounds_that_are_open(tmp_path: Path) -> None:
    durable_rounds(tmp_path).open(counts(), "task", 1, 1, bytes(32))
    stricter = durable_rounds(tmp_path, policy=LIMITED)
    with pytest.raises(ConfigurationError, match="requires"):
        stricter.open(counts(), "task", 1, 1, bytes(32))
