"""The recommender's experiments: repeatable runs, sums as under encryption, and the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg.release import Release
from secagg_bench import baselines
from secagg_bench.recommender import report, sums
from secagg_bench.recommender.__main__ import app
from secagg_bench.recommender.sections import SEEDS, candidates, quick, sections, tuned
from secagg_bench.recommender.sums import Encrypting, add_in_the_clear
from secagg_bench.recommender.trials import Trial, World, run
from secagg_recommender.factorisation import TrainConfig

TOY = quick(Trial())
RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.fixture(scope="module")
def world() -> World:
    return World("toy", None)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_description(world: World) -> None:
    first, again, other = (run(replace(TOY, seed=seed), world) for seed in (1, 1, 2))
    timed = {"seconds", "train_s"}
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
    assert first["metrics"] != other["metrics"]


def test_keys_name_what_is_not_at_its_default() -> None:
    assert Trial().key == ""
    assert Trial(bits=3, seed=2).key == "bits=3 seed=2"
    all_rows = [trial for section in sections({}) for trial in section.rows.values()]
    keys = {replace(trial, seed=seed).key for trial in all_rows for seed in SEEDS}
    assert len(keys) == len({replace(t, seed=s) for t in all_rows for s in SEEDS})


def test_floats_average_as_the_baseline_does(world: World) -> None:
    config = baselines.RunConfig(
        TrainConfig(4, batch_size=256), n_silos=4, rounds=2, evaluate_every=1
    )
    expected = baselines.federated_float(world.split, config)
    found = run(replace(TOY, bits=0), world)
    assert found["metrics"]["hr10"] == pytest.approx(expected.metrics.hr10, abs=1e-5)
    assert found["metrics"]["full_ndcg10"] == pytest.approx(expected.metrics.full_ndcg10, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"subset": 0.2, "feedback": True},
        {"rank": 2, "optimiser": "yogi", "server_rate": 0.1},
        {"weak": 0.5, "progress": 0.3},
    ],
    ids=str,
)
def test_encryption_opens_the_sums_in_the_clear(change: dict[str, Any], world: World) -> None:
    trial, encrypted = replace(TOY, **change), Encrypting()
    secret, clear = run(trial, world, encrypted), run(trial, world)
    assert encrypted.rounds == trial.rounds
    assert secret["curve"] == clear["curve"]
    assert all(len(seconds) for seconds in encrypted.seconds.values())


def test_another_sum_under_encryption_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(*given: Any) -> Release:  # noqa: ANN401
        release = add_in_the_clear(*given)
        return replace(release, sums=(release.sums[0] + 1,))

    monkeypatch.setattr(sums, "add_in_the_clear", off_by_one)
    with pytest.raises(RuntimeError, match="round 1"):
        run(TOY, world, Encrypting())


@pytest.mark.parametrize("system", ["local", "centralised", "popular"])
def test_other_systems_are_measured_alike(system: Any, world: World) -> None:  # noqa: ANN401
    found = run(replace(TOY, system=system), world)
    assert set(found["metrics"]) == {"hr10", "ndcg10", "full_hr10", "full_ndcg10"}
    assert found["best"]["hr10"] == pytest.approx(max(found["curve"]), abs=1e-4)


def test_all_in_one_silo_is_centralised(world: World) -> None:
    alone = run(replace(TOY, system="local", silos=1), world)
    assert alone["curve"] == run(replace(TOY, system="centralised"), world)["curve"]


def test_too_few_silos_leave_the_model_as_it_is(world: World) -> None:
    # Of four silos two have one round of two each; a round of fewer than three opens nothing.
    trial = replace(TOY, weak=0.5, presence=0.5, seed=3)
    sizes: list[int] = []

    def counting(plan: Any, number: int, sent: Any, seed: int) -> Release:  # noqa: ANN401
        sizes.append(len(sent))
        return add_in_the_clear(plan, number, sent, seed)

    run(trial, world, counting)
    assert all(size >= 3 for size in sizes)


def test_a_run_that_ends_early_says_why(world: World) -> None:
    assert run(replace(TOY, weak=0.5, progress=0.2, weight_cap=300), world)["failed"]


def test_error_feedback_keeps_what_a_subset_leaves_out(world: World) -> None:
    sizes = []
    for feedback in (False, True):
        seen: list[Any] = []

        def noting(plan: Any, number: int, sent: Any, seed: int) -> Release:  # noqa: ANN401
            seen.append(np.abs(sent[0].update["item_factors"]).sum())  # noqa: B023
            return add_in_the_clear(plan, number, sent, seed)

        run(replace(TOY, subset=0.2, feedback=feedback), world, noting)
        sizes.append(seen)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 1.3 * sizes[0][1]


# --- choices --------------------------------------------------------------------------------------


def test_the_best_candidate_on_the_validation_item_is_used() -> None:
    tried = candidates()["momentum"]
    for best in tried:
        scores = {tuned(t).key: {"metrics": {"hr10": 0.6 if t == best else 0.5}} for t in tried}
        (rows,) = [s.rows for s in sections(scores) if s.name == "optimisers"]
        assert rows["FedAvgM"] == best


def test_candidates_never_see_a_test_item() -> None:
    own = {tuned(trial).seed for tried in candidates().values() for trial in tried}
    assert own.isdisjoint(SEEDS)
    assert all(tuned(trial).validation for tried in candidates().values() for trial in tried)
    assert not any(trial.validation for s in sections({}) for trial in s.rows.values())


# --- page -----------------------------------------------------------------------------------------


def test_a_toy_run_writes_page_and_figure_and_measures_nothing_twice(tmp_path: Path) -> None:
    output, page = tmp_path / "recommender.json", tmp_path / "docs" / "page.md"
    (tmp_path / "latency.json").write_text(
        json.dumps({"title": "Latency", "columns": ["", "ms"], "rows": [["exact", 1.5]]})
    )
    arguments = ["--quick", "--output", str(output), "--page", str(page)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    text = page.read_text(encoding="utf-8")
    for wanted in (
        "most popular",
        "FedAvgM",
        "6 bits",
        "all strong",
        "| exact | 1.500 |",
        "| all |",
    ):
        assert wanted in text
    assert page.with_name("recommender.svg").read_text(encoding="utf-8").startswith("<?xml")
    before = output.read_text(encoding="utf-8")
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "dataset=toy" in first.output
    assert "dataset=toy" not in again.output
    assert output.read_text(encoding="utf-8") == before


def test_without_data_it_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["--output", str(tmp_path / "r.json")], env={"SECAGG_DATA_DIR": None}
    )
    assert result.exit_code != 0
    assert "SECAGG_DATA_DIR" in result.output


def test_tables_of_others_are_printed_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "one_round.json"
    table = {
        "title": "T",
        "columns": ["a|b", "n"],
        "rows": [["x", 12345], ["y", 0.25], ["z", None]],
    }
    file.write_text(json.dumps({"tables": [table, {**table, "title": "U", "note": "why"}]}))
    first, second = map(report.markdown, report.table_from(file))
    assert first.startswith("## T\n\n| a\\|b | n |\n| --- | --: |\n| x | 12,345 |\n| y | 0.250 |")
    assert second.endswith("\nwhy\n")


@pytest.mark.parametrize(
    "broken",
    [
        {"columns": [], "rows": []},
        {"title": "T", "rows": []},
        {"title": "T", "columns": ["a"], "rows": [["x", 1]]},
        {"tables": [{"title": "T"}]},
    ],
)
def test_a_broken_table_is_refused(broken: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "one_round.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"one_round\.json"):
        report.table_from(file)


def test_rounds_to_the_goal_are_those_of_every_seed() -> None:
    assert report._reached([[0.5, 0.65], [0.64, 0.6]]) == "2"
    assert report._reached([[0.5, 0.65], [0.5, 0.6]]) == "2 (1/2)"
    assert report._reached([[0.5], [0.6]]) == "–"


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path) -> None:
    found = json.loads((RESULTS / "recommender.json").read_text(encoding="utf-8"))
    report.write_page(found, RESULTS, tmp_path / "page.md")
    committed = (RESULTS.parents[1] / "docs" / "recommender-results.md").read_text(encoding="utf-8")
    advice = "run `python -m secagg_bench.recommender --draw`"
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == committed, advice
