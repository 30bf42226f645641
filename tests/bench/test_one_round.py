"""One encrypted round of counts: what is opened is what all data in one place has, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from secagg.errors import InputError, NormError, QuorumError, SchemaError
from secagg.parameters import IntegerSegment, NormCheck
from secagg.planner import make_plan
from secagg_bench.recommender import one_round, one_round_runs, one_round_services
from secagg_bench.recommender.encrypted_round import Costs, encrypted_round
from secagg_bench.recommender.one_round_runs import Sizes, held_back
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import Interactions, from_events, split_leave_one_out

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "one_round.json"
SIZES = Sizes((4,), transition_clients=3, most=300, dense_blocks=3, dense_measured=2)


def small(_name: str, _data_dir: Path | None) -> Interactions:
    """The first shoppers of the marketplace, and its first products."""
    whole = load_dataset("marketplace")
    kept = (whole.users < 16) & (whole.items < 60)
    users, items = whole.users[kept], whole.items[kept]
    return from_events("small", users, items, np.arange(users.size))


def silent(_name: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """All sections on small data; each user of it is a client of EASE once."""
    sizes = replace(SIZES, ease_clients=(4, small("", None).n_users))
    nowhere = Path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_round_runs, "load_dataset", small)
        return {
            "ease": one_round_runs.ease_runs(nowhere, sizes, silent),
            "transitions": one_round_runs.transition_runs(nowhere, sizes, silent),
            "dense": one_round_runs.dense_runs(nowhere, sizes, silent),
        }


def counts(value: int) -> dict[str, npt.NDArray[np.int64]]:
    return {"counts": np.full(10, value)}


# --- a round ---


@pytest.mark.parametrize("check", [None, NormCheck()])
def test_the_sum_is_opened_and_every_step_timed(check: NormCheck | None) -> None:
    plan = make_plan([IntegerSegment("counts", 10, 9, 28.0)], max_clients=4, norm_check=check)
    seen: list[int] = []
    clients = [lambda value=value: counts(value) for value in (1, -2, 8)]
    release, costs = encrypted_round(plan, clients, seen.append)
    np.testing.assert_array_equal(release.total(), np.full(10, 7))
    assert seen == [1, 2, 3]
    checked = 3 if check else 0
    lengths = {step: len(times) for step, times in costs.seconds.items()}
    assert lengths == {
        **{"compute": 3, "encrypt": 3, "add": 3, "open": 1},
        **{"sketch": checked, "judge": checked},
    }
    summary = costs.summary()
    assert (summary["clients"], summary["upload_bytes"]) == (3, plan.payload_bytes)
    assert ("judge_s" in summary) == (check is not None)
    assert (summary["sketch_bytes"] > 0) == (check is not None)


def test_too_few_clients_open_nothing() -> None:
    plan = make_plan([IntegerSegment("counts", 10, 9)], max_clients=4)
    with pytest.raises(QuorumError):
        encrypted_round(plan, [lambda: counts(1)] * 2)


def test_counts_beyond_the_plan_are_not_sent() -> None:
    plan = make_plan([IntegerSegment("counts", 10, 9)], max_clients=4)
    with pytest.raises(InputError, match="counts"):
        encrypted_round(plan, [lambda: counts(10)] * 3)


def test_another_segment_is_not_sent() -> None:
    plan = make_plan([IntegerSegment("others", 10, 9)], max_clients=4)
    with pytest.raises(SchemaError, match="others"):
        encrypted_round(plan, [lambda: counts(1)] * 3)


def test_a_refusal_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([IntegerSegment("counts", 10, 9, 28.0)], max_clients=4, norm_check=NormCheck())
    monkeypatch.setattr("secagg.keyholder.passes", lambda *_: False)
    with pytest.raises(NormError, match="refused"):
        encrypted_round(plan, [lambda: counts(1)] * 3)


def test_a_sum_of_steps_that_never_ran_has_no_median() -> None:
    costs = Costs(7, 0)
    costs.timed("encrypt", lambda: None)
    assert set(costs.summary()) == {"upload_bytes", "sketch_bytes", "clients", "encrypt_s"}


# --- what is held back ---


def test_the_latest_training_item_is_held_back_but_never_the_only_one() -> None:
    users, items = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 0, 2]
    split = split_leave_one_out(from_events("toy", users, items, np.arange(6)))
    held = held_back(split)
    assert [held.items_of(user).tolist() for user in range(3)] == [[0], [1], [2]]
    np.testing.assert_array_equal(held.test_item, split.test_item)


# --- the runs ---


def test_ease_is_identical_with_every_cohort_check_and_training(measured: dict[str, Any]) -> None:
    runs = measured["ease"]["runs"]
    assert [run["costs"]["clients"] for run in runs] == [4] * 3 + [small("", None).n_users] * 3
    assert all(run["identical"] for run in runs)
    whole = {run["sha256"] for run in runs if run["training"] == "all"}
    held = {run["sha256"] for run in runs if run["training"] == "held back"}
    assert len(whole) == len(held) == 1
    assert whole != held


def test_transitions_are_identical_as_pairs_and_dense(measured: dict[str, Any]) -> None:
    found = measured["transitions"]
    assert [run["checked"] for run in found["runs"]] == [False, True]
    assert all(run["identical"] for run in found["runs"])
    assert len({run["sha256"] for run in found["runs"]}) == 1
    assert len(found["floors"]) == 8
    assert [run["identical"] for run in measured["dense"]["runs"]] == [True, True]


def test_a_sum_that_differs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = one_round_runs.gram_triangle
    monkeypatch.setattr(one_round_runs, "load_dataset", small)
    monkeypatch.setattr(one_round_runs, "gram_triangle", lambda *given: real(*given) + 1)
    runs = one_round_runs.ease_runs(tmp_path, SIZES, silent)["runs"]
    assert not any(run["identical"] for run in runs)


# --- the command ---


def fake(name: str, told: list[str]) -> Any:  # noqa: ANN401
    def measured(*_: object) -> dict[str, Any]:
        told.append(name)
        return {"runs": [], "floors": []}

    return measured


def test_only_what_is_missing_or_asked_for_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    output = tmp_path / "results.json"
    monkeypatch.setattr(one_round, "SECTIONS", {name: fake(name, told) for name in ("ease", "b")})
    arguments = ["--output", str(output), "--data-dir", str(tmp_path)]
    for more in ([], [], ["--only", "b"]):
        answer = CliRunner().invoke(one_round.app, arguments + more)
        assert answer.exit_code == 0, answer.output
    assert told == ["ease", "b", "b"]
    assert json.loads(output.read_text())["tables"][0]["rows"] == []


@pytest.mark.parametrize("arguments", [["--only", "everything"], []])
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SECAGG_DATA_DIR", raising=False)
    arguments += ["--output", str(tmp_path / "results.json")]
    if "--only" in arguments:
        arguments += ["--data-dir", str(tmp_path)]
    assert CliRunner().invoke(one_round.app, arguments).exit_code != 0
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("missing", [set(), {"dense"}, {"ease", "dense"}])
def test_every_table_has_a_cell_for_each_column(
    measured: dict[str, Any], missing: set[str]
) -> None:
    found = json.loads(json.dumps({name: measured[name] for name in measured.keys() - missing}))
    tables = one_round.tables(found)
    assert len(tables) == 3 - ("ease" in missing)
    for table in tables:
        assert set(table) == {"title", "columns", "rows", "note"}
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


@pytest.mark.slow
def test_the_services_open_the_same_sum() -> None:
    told: list[int] = []
    found = one_round_services.service_run("marketplace", None, 3, lambda *s: told.append(s[1]))
    assert found["identical"]
    assert found["contributors"] == 3
    assert max(told) <= 3
    assert one_round.tables({"services": found})[0]["rows"][0][:2] == [3, "yes"]


@pytest.mark.skipif(not RESULTS.is_file(), reason="nothing has been measured")
def test_the_committed_results_are_identical_and_above_the_floor() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    runs = [*found["ease"]["runs"], *found["transitions"]["runs"], *found["dense"]["runs"]]
    assert all(run["identical"] for run in [*runs, found["services"]])
    assert {run["costs"]["clients"] for run in found["ease"]["runs"]} == {8, 943}
    held = [run["metrics"] for run in found["ease"]["runs"] if run["training"] == "held back"]
    for metrics in held:
        assert (round(metrics["full_hr10"], 3), round(metrics["full_ndcg10"], 3)) == (0.139, 0.070)
        assert metrics["hr10"] == pytest.approx(0.653, abs=0.01)
    best = found["transitions"]["runs"][0]["metrics"]
    assert best["hr10"] > 0.441
    assert best["ndcg10"] > 0.3156
    assert best["full_hr10"] > 0.0706
    assert best["full_ndcg10"] > 0.0418
    assert found["tables"] == one_round.tables(found)
