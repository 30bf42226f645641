"""The session bench on a toy: rounds in the clear and encrypted, stacks, new items, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg_bench.recommender import session_runs, sessions
from secagg_bench.recommender.session_runs import (
    Federation,
    Recipe,
    SessionData,
    cold_run,
    session_run,
    stacks,
)
from secagg_recommender.attributes import attributes_of
from secagg_recommender.content import ItemContent, item_content
from secagg_recommender.evaluation import Evaluator
from secagg_recommender.interactions import Split
from secagg_recommender.session_silo import SessionConfig
from secagg_recommender.trained import hold_out

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "sessions.json"
USERS, ITEMS = 24, 30
RECIPE = Recipe(
    "clear",
    silos=6,
    cohort=3,
    rounds=3,
    buckets=4,
    config=SessionConfig(dimensions=4, negatives=20),
)


class Toy(SessionData):
    """Users that walk through the catalogue, each from a place of its own."""

    @cached_property
    def split(self) -> Split:
        walks = np.array([[(user + step) % ITEMS for step in range(6)] for user in range(USERS)])
        return Split(
            np.repeat(np.arange(USERS), 5).astype(np.int32),
            walks[:, :5].ravel().astype(np.int32),
            walks[:, 5].astype(np.int32),
            USERS,
            ITEMS,
        )

    def content(self, buckets: int) -> ItemContent:
        names = [[f"shelf {item // 5}"] for item in range(ITEMS)]
        return item_content(attributes_of(names), [str(i) for i in range(ITEMS)], buckets=buckets)


def silent(_name: str, _done: int, _total: int) -> None:
    pass


def test_encrypted_rounds_open_the_sums_in_the_clear() -> None:
    """So that the models are the same, bit for bit."""
    clear, _ = session_run(RECIPE, Toy(None), silent)
    encrypted, found = session_run(replace(RECIPE, kind="encrypted"), Toy(None), silent)
    assert found["identical_rounds"] == RECIPE.rounds
    for name, tensor in clear.items():
        np.testing.assert_array_equal(tensor, encrypted[name])


def test_quantised_and_float_models_are_close_and_not_equal() -> None:
    clear, _ = session_run(replace(RECIPE, rounds=1, tau=1.0), Toy(None), silent)
    floats, _ = session_run(replace(RECIPE, kind="float", rounds=1, tau=1.0), Toy(None), silent)
    for name, tensor in clear.items():
        np.testing.assert_allclose(tensor, floats[name], atol=1e-3)
    assert any((clear[name] != floats[name]).any() for name in clear)


def test_validation_items_are_held_back_unless_asked_for() -> None:
    data = Toy(None)
    assert data.train.train_items.size == data.split.train_items.size - USERS
    held = {(u, i) for u, i in enumerate(hold_out(data.split).test_item.tolist())}
    seen = set(zip(data.train.train_users.tolist(), data.train.train_items.tolist(), strict=True))
    assert not held & seen
    _, found = session_run(replace(RECIPE, kind="float"), data, silent)
    assert "validation" in found
    _, whole = session_run(replace(RECIPE, kind="float", whole=True), data, silent)
    assert "validation" not in whole
    assert found["floats"] == whole["floats"] == 6 * 4 + 2 * 4 * 4 + 3 * 16 + ITEMS


def test_everybody_takes_part_equally_often() -> None:
    data = Toy(None)
    federation = Federation(RECIPE, data.train, data.content(4))
    drawn = [federation._drawn() for _ in range(4)]
    for first, second in (drawn[:2], drawn[2:]):
        assert sorted(first + second) == list(range(6))


def test_stacks_tell_their_numbers_apart() -> None:
    data = Toy(None)
    shared, _ = session_run(RECIPE, data, silent)
    several, neighbours, everything = stacks(shared, RECIPE, data)
    assert 0 < several["pairs"] < neighbours["pairs"] < everything["pairs"]
    assert neighbours["alone"]["hr10"] > 0.5  # the walk goes on as it has for others
    assert all(0 <= each["test"]["hr10"] <= 1 for each in (several, neighbours, everything))


def test_new_items_are_out_of_training_and_ranked_by_their_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained_on: list[Split] = []

    class Watched(Federation):
        def __init__(self, recipe: Recipe, split: Split, content: ItemContent) -> None:
            trained_on.append(split)
            super().__init__(recipe, split, content)

    monkeypatch.setattr(session_runs, "Federation", Watched)
    found = cold_run(replace(RECIPE, kind="float"), Toy(None), silent, share=0.2)
    (split,) = trained_on
    items, left = np.unique(Toy(None).train.train_items), np.unique(split.train_items)
    assert items.size - found["items"] <= left.size < items.size
    assert found["items"] == ITEMS // 5
    assert 0 < found["users"] < USERS
    assert [row["vector"] for row in found["rows"]] == ["of its attributes", "none"]
    # Without vectors they are all alike, and ties are lost.
    assert found["rows"][1]["test"]["full_hr10"] <= 0.5


def test_the_command_saves_each_section_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {
        "encrypted": replace(RECIPE, kind="encrypted", rounds=1),
        "whole": replace(RECIPE, whole=True, rounds=1),
        "float": replace(RECIPE, kind="float", rounds=1),
        "new items": replace(RECIPE, kind="float", rounds=1),
        "float, seed 1": replace(RECIPE, kind="float", rounds=1, seed=1),
    }
    monkeypatch.setattr(sessions, "SECTIONS", recipes)
    monkeypatch.setattr(sessions, "SessionData", Toy)
    output = tmp_path / "sessions.json"
    asked = ["--output", str(output), "--data-dir", str(tmp_path)]
    first = CliRunner().invoke(sessions.app, asked)
    assert first.exit_code == 0, first.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(recipes) < set(found)
    for table in found["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert "mean and deviation of 2 seeds" in found["tables"][0]["note"]
    monkeypatch.setattr(sessions, "measure", None)  # nothing is measured again
    assert CliRunner().invoke(sessions.app, asked).exit_code == 0
    assert json.loads(output.read_text(encoding="utf-8")) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [([], "SECAGG_DATA_DIR"), (["--data-dir", ".", "--only", "nothing"], "sections of")],
)
def test_commands_that_make_no_sense_are_refused(
    asked: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECAGG_DATA_DIR", raising=False)
    refused = CliRunner().invoke(sessions.app, ["--output", str(tmp_path / "x.json"), *asked])
    assert refused.exit_code != 0
    assert message in " ".join(refused.output.split())
    assert not (tmp_path / "x.json").exists()


def test_evaluators_rank_the_right_items() -> None:
    data = Toy(None)
    assert isinstance(data.test, Evaluator)
    assert data.validation.users.size == data.test.users.size == USERS
    np.testing.assert_array_equal(
        hold_out(data.split).test_item, [(user + 4) % ITEMS for user in range(USERS)]
    )


@pytest.mark.skipif(not RESULTS.is_file(), reason="not measured yet")
def test_measured_tables_are_those_of_the_measured_runs() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["tables"] == sessions.tables(found)
    run = found["encrypted"]["run"]
    assert run["identical_rounds"] == run["recipe"]["rounds"]
    assert run["recipe"]["cohort"] >= 100
    assert run["floats"] <= 60_000
