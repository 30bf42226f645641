"""What a round of very many clients would need, by formulas whose answers can be worked out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.errors import PlanError
from secagg.parameters import MAX_COHORT
from secagg.rpc.footprint import MAX_CONNECTIONS
from secagg.sketch_shape import sketch_bytes
from secagg_bench.suite.report import NOT_MEASURED
from secagg_bench.suite.rows import UNITS, Metric, Row
from secagg_bench.suite.scale import Costs, demand, line, planned, room
from secagg_bench.suite.scale_report import (
    costs_of,
    costs_table,
    demand_table,
    room_table,
    rounds_costs,
    sums_table,
)
from secagg_keyholder.config import KeyHolderSettings
from secagg_keyholder.service import MAX_JUDGED
from secagg_server.config import ServerSettings

PARAMETERS = 100_000
PAYLOAD = planned(PARAMETERS, 1000).payload_bytes
COSTS = Costs(
    upload_bytes=PAYLOAD, take_s=0.004, sketch_s=0.04, admit_s=0.001, judge_s=0.002, open_s=0.1
)
HOUR = 3600.0


def test_a_round_of_a_thousand_is_a_thousand_times_a_client() -> None:
    need = demand(COSTS, PARAMETERS, 1000, HOUR)
    assert (need.upload_bytes, need.sums) == (PAYLOAD, 1)
    assert need.up_bytes == 1000 * PAYLOAD
    assert need.down_bytes == 1000 * 400_000
    plan = planned(PARAMETERS, 1000)
    assert need.sketch_bytes == 1000 * sketch_bytes(plan, direction=False)
    assert need.up_bits_s == pytest.approx(1000 * PAYLOAD * 8 / 3600)
    assert need.down_bits_s == pytest.approx(1000 * 400_000 * 8 / 3600)
    assert need.server_s == pytest.approx(44.0)
    assert need.key_holder_s == pytest.approx(3.1)
    assert need.server_cores == pytest.approx(44.0 / 3600)
    assert need.key_holder_cores == pytest.approx(3.1 / 3600)


def test_without_the_norm_check_nothing_of_it_is_counted() -> None:
    need = demand(COSTS, PARAMETERS, 1000, HOUR, checked=False)
    assert need.sketch_bytes == 0
    assert need.server_s == pytest.approx(4.0)
    assert need.key_holder_s == pytest.approx(1.1)
    unknown = replace(COSTS, sketch_s=math.nan, judge_s=math.nan)
    assert demand(unknown, PARAMETERS, 1000, HOUR, checked=False) == need


def test_longer_uploads_take_the_server_longer_and_the_key_holder_only_to_open() -> None:
    """A plan of a million clients has uploads of twice the bytes of one of a thousand."""
    clients = 1_000_000
    need = demand(COSTS, PARAMETERS, clients, HOUR)
    larger = need.upload_bytes / PAYLOAD
    assert larger == pytest.approx(2.0, abs=0.1)
    assert need.server_s == pytest.approx(clients * (0.004 * larger + 0.04))
    assert need.key_holder_s == pytest.approx(clients * 0.003 + 0.1 * larger)
    several = demand(COSTS, PARAMETERS, clients, HOUR, cohort=1000)
    assert (several.sums, several.upload_bytes) == (1000, PAYLOAD)
    assert several.up_bytes == pytest.approx(need.up_bytes / larger)
    assert several.key_holder_s == pytest.approx(clients * 0.003 + 1000 * 0.1)
    assert demand(COSTS, PARAMETERS, 1001, HOUR, cohort=1000).sums == 2


def test_machines_are_whole_and_none_where_cores_are_not_known() -> None:
    need = demand(COSTS, PARAMETERS, 1000, 1.0)  # 44 cores
    assert [need.machines(cores) for cores in (16, 44, 43, 100)] == [3, 1, 2, 1]
    unknown = demand(replace(COSTS, take_s=math.nan), PARAMETERS, 1000, HOUR)
    assert unknown.machines(16) == 0
    assert not math.isnan(unknown.up_bytes)


def test_more_clients_than_a_sum_holds_are_refused_and_several_sums_are_not() -> None:
    with pytest.raises(PlanError, match="max_clients"):
        demand(COSTS, PARAMETERS, MAX_COHORT + 1, HOUR)
    assert demand(COSTS, PARAMETERS, MAX_COHORT + 1, HOUR, cohort=1000).sums == 1001


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_step_of_a_sum_ends_where_the_planner_says(bits: int, checked: bool) -> None:
    steps = list(room(PARAMETERS, bits=bits, checked=checked))
    sizes = [size for size, _ in steps]
    assert sizes == sorted(set(sizes))
    assert steps[-1][1] == MAX_COHORT
    for (size, most), (larger, _) in pairwise(steps):
        plan = planned(PARAMETERS, most, bits=bits, checked=checked)
        after = planned(PARAMETERS, most + 1, bits=bits, checked=checked)
        assert (plan.payload_bytes, after.payload_bytes) == (size, larger)


@given(st.floats(1e-6, 1.0), st.floats(1e-6, 10.0))
def test_a_straight_line_is_found(slope: float, once: float) -> None:
    found = line({clients: once + slope * clients for clients in (3, 30, 300)})
    assert found == pytest.approx((slope, once), rel=1e-6, abs=1e-9)


def test_one_cohort_makes_no_line() -> None:
    assert all(map(math.isnan, line({3: 1.0})))
    assert all(map(math.isnan, line({})))


def row(scenario: str, system: str, metric: Metric, value: float, **changes: Any) -> Row:  # noqa: ANN401
    values = {
        "scenario": scenario,
        "system": system,
        "version": "1",
        "parameters": 1_000_000,
        "clients": 3,
        "metric": metric,
        "value": value,
        "unit": UNITS[metric],
        "seed": 1,
        "machine": "here",
    }
    return Row.model_validate(values | changes)


CHECKED = "secagg, norm check"
MEASURED = {
    "sizes": [
        row("sizes", "secagg", Metric.UPLOAD, 3_500_000),
        row("sizes", "secagg", Metric.ADD, 0.004),
        row("sizes", "secagg", Metric.OPEN, 0.1),
        row("sizes", "secagg", Metric.ADD, 9.0, parameters=10),
    ],
    "checks": [
        each
        for seed, busy in ((1, 1.0), (2, 5.0), (3, 2.0))
        for each in (
            row("checks", "secagg", Metric.ADD, 0.01 * busy, seed=seed),
            row("checks", CHECKED, Metric.ADD, 0.03 * busy, seed=seed),
            row("checks", "secagg", Metric.OPEN, 0.010, seed=seed, parameters=100_000),
            row("checks", CHECKED, Metric.OPEN, 0.016, seed=seed, parameters=100_000),
        )
    ],
    "clients": [
        row("clients", "secagg", Metric.OPEN, 0.05 + 0.0005 * n, clients=n, parameters=10_000)
        for n in (3, 30, 300)
    ],
    "rounds": [
        row("rounds", system, metric, value * clients + 0.5, clients=clients)
        for system, metric, value, cohorts in (
            ("secagg", Metric.SERVER_CPU, 0.02, (10, 100, 1000)),
            (CHECKED, Metric.SERVER_CPU, 0.07, (10, 100)),
            ("secagg", Metric.KEY_HOLDER_CPU, 0.001, (10, 100, 1000)),
            (CHECKED, Metric.KEY_HOLDER_CPU, 0.004, (10, 100)),
        )
        for clients in cohorts
    ],
}


def test_costs_are_taken_from_where_each_was_measured() -> None:
    costs = costs_of(MEASURED)
    assert (costs.upload_bytes, costs.take_s, costs.open_s) == (3_500_000, 0.004, 0.1)
    assert costs.sketch_s == pytest.approx(0.04), "the median of the repetitions' differences"
    assert costs.judge_s == pytest.approx(0.002), "of three clients"
    assert costs.admit_s == pytest.approx(0.0005)


def test_costs_of_whole_rounds_are_slopes_and_the_check_is_the_difference_of_two() -> None:
    costs = rounds_costs(MEASURED)
    assert costs.upload_bytes == planned(1_000_000, 1000).payload_bytes
    assert (costs.take_s, costs.sketch_s) == pytest.approx((0.02, 0.05))
    assert (costs.admit_s, costs.judge_s, costs.open_s) == pytest.approx((0.001, 0.003, 0.5))


def test_what_the_check_adds_is_of_the_cohorts_that_were_measured_with_it() -> None:
    """A larger cohort, without the check, takes more for each client than the line says."""
    larger = [
        row("rounds", "secagg", metric, 1000.0, clients=5000)
        for metric in (Metric.SERVER_CPU, Metric.KEY_HOLDER_CPU)
    ]
    rounds = [each for each in MEASURED["rounds"] if each.clients < 1000]
    costs = rounds_costs({"rounds": [*rounds, *larger]})
    assert costs.take_s > 0.021
    assert (costs.sketch_s, costs.judge_s) == pytest.approx((0.05, 0.003))


def test_the_tables_have_a_number_everywhere_and_without_results_say_what_is_missing() -> None:
    tables = (costs_table, demand_table, sums_table)
    assert all(NOT_MEASURED not in each(MEASURED) for each in tables)
    assert "server machines of 16 cores | 1 | " in demand_table(MEASURED)
    assert "machines by the cores of whole rounds" in demand_table(MEASURED)
    without = {name: rows for name, rows in MEASURED.items() if name != "rounds"}
    text = demand_table(without)
    assert f"whole rounds | {NOT_MEASURED} |" in text
    assert "machines by the cores of the calculation alone" in text
    assert NOT_MEASURED in costs_table({"sizes": MEASURED["sizes"]})


def test_the_table_of_steps_has_both_kinds_of_plan_for_all_bits() -> None:
    lines = [each for each in room_table({}).splitlines() if each.startswith("| ")][1:]
    assert [each.split(" | ")[:2] for each in lines] == [
        [f"| {bits}", check] for bits in (4, 8, 12, 16) for check in ("no", "yes")
    ]
    assert all(each.endswith("up to 1,000,000 |") for each in lines)


def test_what_the_page_says_of_the_design_is_so() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"A plan takes at most {MAX_COHORT:,} clients" in page
    assert f"judges {MAX_JUDGED} uploads a call" in page
    assert f"({MAX_CONNECTIONS:,} a listener at a time)" in page
    for settings in (ServerSettings, KeyHolderSettings):
        (most,) = (
            each.le for each in settings.model_fields["workers"].metadata if hasattr(each, "le")
        )
        assert page.count(f"up to {most} processes") == 2
    assert "several sums of 5,000 clients take half the bytes" in page
    sizes = [planned(1_000_000, clients).payload_bytes for clients in (5_000, MAX_COHORT)]
    assert sizes[1] / sizes[0] == pytest.approx(2, abs=0.02)
