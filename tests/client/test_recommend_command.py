"""`secagg-client recommend`: reasons, indexes, cohorts and server scores, on a device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from secagg_client import serve
from secagg_client.cli import app
from secagg_recommender.cohorts import AGE_GENDER, COHORT_COUNTS
from secagg_recommender.ease import Ease
from secagg_recommender.factorisation import init_shared

ITEMS = 300  # of the generated marketplace
DATA, USAGE = 65, 78  # exit codes of data and of settings that cannot be used


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models of every kind, and the released counts of cohorts."""
    rng = np.random.default_rng(0)
    shared: dict[str, Any] = init_shared(ITEMS, 16, 0)
    np.savez(tmp_path / "factors.npz", **shared)
    np.savez(tmp_path / "other.npz", **init_shared(10, 16, 0))  # type: ignore[arg-type]
    weights = rng.normal(size=(ITEMS, ITEMS)).astype(np.float32)
    np.savez(tmp_path / "ease.npz", **Ease(weights).tensors())
    np.savez(tmp_path / "trending.npz", item_scores=np.arange(ITEMS, dtype=np.float32))
    counts = rng.integers(5, 50, (len(AGE_GENDER), ITEMS + 1))
    counts[:, 0], counts[3, 42] = 60, 60
    np.savez(tmp_path / "cohorts.npz", **{COHORT_COUNTS: counts.reshape(-1, 1)})
    mean = (counts.reshape(-1, 1) / 480).astype(np.float32)
    np.savez(tmp_path / "means.npz", **{COHORT_COUNTS: mean})
    np.savez(tmp_path / "small.npz", **{COHORT_COUNTS: counts[:, :9].reshape(-1, 1)})
    return tmp_path


def run(models: Path, *arguments: str, model: str = "factors") -> Result:
    fixed = ["--dataset", "marketplace", "--state-dir", str(models / "state"), "--format", "json"]
    if model:
        fixed += ["--model", str(models / f"{model}.npz")]
    return CliRunner().invoke(app, ["recommend", *fixed, *arguments])


def rows(models: Path, *arguments: str, model: str = "factors") -> list[dict[str, Any]]:
    done = run(models, *arguments, model=model)
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout))


def labels(lines: list[dict[str, Any]]) -> list[str]:
    return [line["item"] for line in lines]


LIKED = ("--items", "3,50,120")


def cohort(models: Path, name: str = "F 50 and over", file: str = "cohorts") -> list[str]:
    return ["--cohort", name, "--cohort-table", str(models / f"{file}.npz")]


@pytest.mark.parametrize("model", ["factors", "ease"])
def test_reasons_are_titles_of_ones_own_items(models: Path, model: str) -> None:
    made = rows(models, *LIKED, "--explain", model=model)
    titles = {line["title"] for line in rows(models, "--items", "9", "--top", "300")}
    assert any(line["because"] for line in made)
    assert all(len(line["because"]) <= 2 and set(line["because"]) <= titles for line in made)
    plain = rows(models, *LIKED, model=model)
    assert labels(plain) == labels(made)
    assert not any(line["because"] for line in plain)


def test_a_table_shows_reasons_only_if_asked_for(models: Path) -> None:
    fixed = [
        "recommend",
        "--dataset",
        "marketplace",
        "--model",
        str(models / "factors.npz"),
        *LIKED,
    ]
    assert "because" not in CliRunner().invoke(app, fixed).stdout
    assert "because" in CliRunner().invoke(app, [*fixed, "--explain"]).stdout


def test_own_items_are_left_out_of_a_model_of_histories(models: Path) -> None:
    made = rows(models, *LIKED, "--top", str(ITEMS), model="ease")
    assert len(made) == ITEMS - 3
    assert not {"3", "50", "120"} & set(labels(made))


def test_an_index_is_kept_until_the_model_is_another(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = rows(models, *LIKED)
    built = rows(models, *LIKED, "--index", "usearch")
    assert labels(built) == labels(exact)
    kept = (models / "state" / "index" / "index.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(serve, "save_index")
        assert rows(models, *LIKED, "--index", "usearch") == built
    np.savez(models / "factors.npz", **init_shared(ITEMS, 16, 1))  # type: ignore[arg-type]
    rows(models, *LIKED, "--index", "usearch")
    assert (models / "state" / "index" / "index.json").read_bytes() != kept


def test_a_missing_extra_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    done = run(models, *LIKED, "--index", "usearch")
    assert done.exit_code == USAGE
    assert "secagg[index]" in done.stderr


# --- cohorts ------------------------------------------------------------------------------------


def test_an_empty_history_starts_from_the_cohort_and_needs_no_model(models: Path) -> None:
    made = rows(models, *cohort(models), "--explain", model="")
    assert made[0]["item"] == "41"
    assert not made[0]["because"]
    assert rows(models, *cohort(models), "--items", "", "--explain", model="") == made


def test_a_model_of_means_gives_the_same_start(models: Path) -> None:
    means = rows(models, *cohort(models, file="means"), "--cohort-clients", "480", model="")
    assert means == rows(models, *cohort(models), model="")


def test_a_cohort_changes_where_a_few_items_lead(models: Path) -> None:
    plain, started = rows(models, *LIKED), rows(models, *LIKED, *cohort(models), "--explain")
    assert labels(plain) != labels(started)
    assert not {"3", "50", "120"} & set(labels(started))
    assert any(line["because"] for line in started)


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--cohort", "F 25-34"], USAGE, "--cohort-table together"),
        (["--cohort", "elves", "--cohort-table", "{}/cohorts.npz"], DATA, "expected a cohort in"),
        (["--cohort", "F 25-34", "--cohort-table", "{}/small.npz"], DATA, "items, got 8"),
        (["--cohort", "F 25-34", "--cohort-table", "{}/factors.npz"], DATA, "name the cohorts"),
        (["--cohort", "F 25-34", "--cohort-table", "{}/nowhere.npz"], DATA, "npz"),
        (["--items", ""], DATA, "from a cohort"),
        (["--items", "3,nothing"], DATA, "unknown=['nothing']"),
        ([], DATA, "exactly one"),
        (["--user", "1", "--items", "3"], DATA, "exactly one"),
        ([*LIKED, "--memory-mb", "1", "--top", "0"], DATA, "k >= 1"),
    ],
)
def test_requests_that_cannot_be_met_say_why(
    models: Path, arguments: list[str], code: int, what: str
) -> None:
    done = run(models, *(argument.format(models) for argument in arguments))
    assert (done.exit_code, what in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("arguments", [["--index", "usearch"], ["--cohort", "F 25-34"]])
def test_a_model_of_histories_takes_neither_index_nor_cohort(
    models: Path, arguments: list[str]
) -> None:
    table = ["--cohort-table", str(models / "cohorts.npz")] if "--cohort" in arguments else []
    done = run(models, *LIKED, *arguments, *table, model="ease")
    assert done.exit_code == DATA
    assert "expected a factor model" in done.stderr


@pytest.mark.parametrize("model", ["other", "trending", "cohorts"])
def test_a_model_that_does_not_fit_is_refused(models: Path, model: str) -> None:
    assert run(models, *LIKED, model=model).exit_code == DATA


# --- server scores ------------------------------------------------------------------------------


def test_server_scores_need_permission(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("asked a server without permission")

    monkeypatch.setattr(serve, "_fetched", never)
    done = run(models, *LIKED, "--server-scores", "trending")
    assert done.exit_code == USAGE
    assert "permission" in done.stderr


def test_server_scores_refine_candidates_that_the_device_has_made(models: Path) -> None:
    own, table = rows(models, *LIKED, "--top", "25"), str(models / "trending.npz")
    allowed = ["--allow-server-scores", "--server-scores", table, "--top", "5"]
    refined = rows(models, *LIKED, *allowed, "--server-weight", "1", "--explain")
    assert labels(refined) == sorted(labels(own), key=int, reverse=True)[:5]
    same = rows(models, *LIKED, *allowed, "--server-weight", "0")
    assert labels(same) == labels(own)[:5]


def test_what_is_asked_of_a_server_does_not_depend_on_the_history(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(_: object, task: str) -> dict[str, Any]:
        asked.append(task)
        return {"item_scores": np.arange(ITEMS, dtype=np.float32)}

    monkeypatch.setattr(serve, "_fetched", fetched)
    for items in ("3,50", "7", "1,2,4,8"):
        rows(models, "--items", items, "--allow-server-scores", "--server-scores", "trending")
    assert asked == ["trending"] * 3


@pytest.mark.parametrize("name", ["other", "ease", "nowhere"])
def test_a_table_that_does_not_fit_is_refused(models: Path, name: str) -> None:
    table = str(models / f"{name}.npz")
    done = run(models, *LIKED, "--allow-server-scores", "--server-scores", table)
    assert done.exit_code == DATA
    assert "expected" in done.stderr


def test_an_unknown_item_is_told_what_items_are_called_and_an_unknown_user_nothing(
    models: Path,
) -> None:
    item = run(models, "--items", "nothing")
    user = run(models, "--user", "nobody")
    assert (item.exit_code, user.exit_code) == (DATA, DATA)
    assert ", such as 0, 1, 2; got" in " ".join(item.stderr.split())
    assert "such as" not in user.stderr
