"""A session model on the command line: the task, an update, the model, the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg.archive import read_npz
from secagg.quantize import flatten
from secagg_client.cli import app
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner
from secagg_client.serve import recommend_for
from secagg_client.session_task import OPTIMISER, prepare_session, session_model_of
from secagg_recommender.datasets import load_dataset, read_dataset
from secagg_recommender.histories import histories_of
from secagg_recommender.interactions import DataError, split_leave_one_out
from secagg_recommender.learner import Assignment
from secagg_recommender.session_silo import SessionSilo
from secagg_recommender.transitions import Transitions, transition_counts
from secagg_server.task_files import read_task

SILOS = 3


@pytest.fixture
def beauty(tmp_path: Path) -> Path:
    """A folder in Amazon Beauty's format: twelve users, eight items."""
    folder = tmp_path / "amazon-beauty"
    folder.mkdir()
    users = [[1 + (start + step) % 8 for step in range(5)] for start in range(12)]
    lines = [" ".join(map(str, [user, *items])) for user, items in enumerate(users, start=1)]
    (folder / "s3rec_Beauty.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    attributes = {str(item): [1 + item % 2, 3 + item % 3] for item in range(1, 9)}
    text = json.dumps(attributes)
    (folder / "s3rec_Beauty_item2attributes.json").write_text(text, encoding="utf-8")
    return tmp_path


def settings(data_dir: Path, **more: Any) -> ClientSettings:  # noqa: ANN401
    given = {"model": "session", "silos": SILOS, "dimensions": 4} | more
    return ClientSettings(dataset="amazon-beauty", data_dir=data_dir, **given)


def options(data_dir: Path) -> list[str]:
    return ["--dataset", "amazon-beauty", "--data-dir", str(data_dir)]


def test_from_task_to_list(beauty: Path, tmp_path: Path) -> None:
    runner, folder = CliRunner(), tmp_path / "work"
    asked = [*options(beauty), "--model", "session", "--silos", str(SILOS), "--dimensions", "4"]
    made = runner.invoke(app, ["prepare", str(folder), *asked, "--rounds", "7"])
    assert made.exit_code == 0, made.output
    task = read_task(folder / "task.toml")
    (segment,) = task.plan.segments
    with np.load(folder / "initial.npz") as file:
        shared = dict(file)
    updates = []
    for silo in range(SILOS):
        learner = load_learner(Part.of(settings(beauty, silo=silo)), {segment.name})
        assert isinstance(learner, SessionSilo)
        work = learner.work(Assignment(1, shared, {segment.name: segment}))
        assert work is not None
        updates.append(flatten(segment, work.arrays[segment.name]))
    assert len({update.tobytes() for update in updates}) == SILOS
    for more in ([], ["--pairs", str(pairs_of(beauty, tmp_path))]):
        asked = ["--model", str(folder / "initial.npz"), "--items", "1,2", *more]
        listed = runner.invoke(app, ["recommend", *asked, *options(beauty)])
        assert listed.exit_code == 0, listed.output


def pairs_of(beauty: Path, folder: Path) -> Path:
    """What devices keep of a count of transitions."""
    split = split_leave_one_out(load_dataset("amazon-beauty", beauty))
    histories = histories_of(split, range(split.n_users))
    counted = transition_counts(histories, split.n_items)
    popularity = np.bincount(split.train_items, minlength=split.n_items)
    file = folder / "pairs.npz"
    np.savez(file, **Transitions.of(counted, popularity).tensors())
    return file


def test_pairs_on_top_change_the_list(beauty: Path, tmp_path: Path) -> None:
    dataset = read_dataset("amazon-beauty", beauty)
    _, initial = prepare_session(settings(beauty), tmp_path / "work", rounds=1)
    lists = [
        recommend_for(settings(beauty), user=None, items="1,2", top=3, model=initial, pairs=pairs)
        for pairs in (None, pairs_of(beauty, tmp_path))
    ]
    alone, stacked = ([row.score for row in rows] for rows in lists)
    assert alone != stacked
    assert session_model_of(read_npz(initial), dataset).n_items == len(
        dataset.interactions.item_labels
    )


@pytest.mark.parametrize("swapped", [True, False])
def test_pairs_go_on_top_of_a_session_model_only(
    beauty: Path, tmp_path: Path, swapped: bool
) -> None:
    _, initial = prepare_session(settings(beauty), tmp_path / "work", rounds=1)
    pairs = pairs_of(beauty, tmp_path)
    model, on_top = (pairs, pairs) if swapped else (initial, initial)
    with pytest.raises(DataError, match="leave --pairs out"):
        recommend_for(settings(beauty), user=None, items="1", top=3, model=model, pairs=on_top)


def test_the_task_steps_with_adam_unless_asked_otherwise(beauty: Path, tmp_path: Path) -> None:
    task, _ = prepare_session(settings(beauty), tmp_path / "work", rounds=9)
    found = read_task(task)
    assert found.rounds == 9
    assert found.optimiser == OPTIMISER


@pytest.mark.parametrize("option", [["--low-rank", "2"], ["--bits", "6"], ["--patience", "3"]])
def test_options_of_other_models_are_refused(
    beauty: Path, tmp_path: Path, option: list[str]
) -> None:
    asked = ["prepare", str(tmp_path / "work"), *options(beauty), "--model", "session", *option]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code != 0
    assert "session model" in " ".join(refused.output.split())
    assert not (tmp_path / "work").exists()


def test_data_without_attributes_is_refused(tmp_path: Path) -> None:
    plain = ClientSettings(dataset="marketplace", model="session", silos=SILOS)
    with pytest.raises(DataError, match="attributes of its items"):
        prepare_session(plain, tmp_path, rounds=1)
    with pytest.raises(DataError, match="attributes of its items"):
        load_learner(Part.of(plain), {"update"})


def test_tensors_of_another_model_are_refused(beauty: Path, tmp_path: Path) -> None:
    other = {"item_factors": np.zeros((8, 2), np.float32)}
    with pytest.raises(DataError, match="tensors of a session model"):
        session_model_of(other, read_dataset("amazon-beauty", beauty))
