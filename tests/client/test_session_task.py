"""A session model on the command line: the task, an update, the model, the list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from secagg.quantize import flatten
from secagg_client.cli import app
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner
from secagg_client.session_task import OPTIMISER, prepare_session
from secagg_recommender.histories import history_model
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment
from secagg_recommender.session_model import SessionModel
from secagg_recommender.session_silo import SessionSilo
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
    output = tmp_path / "model.npz"
    initial = str(folder / "initial.npz")
    built = runner.invoke(app, ["session-model", initial, str(output), *options(beauty)])
    assert built.exit_code == 0, built.output
    with np.load(output) as tensors:
        assert isinstance(history_model(dict(tensors)), SessionModel)
    listed = runner.invoke(
        app, ["recommend", "--model", str(output), "--items", "1,2", "--top", "3", *options(beauty)]
    )
    assert listed.exit_code == 0, listed.output


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
    np.savez(tmp_path / "other.npz", item_factors=np.zeros((8, 2), np.float32))
    asked = ["session-model", str(tmp_path / "other.npz"), str(tmp_path / "out.npz")]
    refused = CliRunner().invoke(app, [*asked, *options(beauty)])
    assert refused.exit_code != 0
    assert "tensors of a session model" in " ".join(refused.output.split())
    assert not (tmp_path / "out.npz").exists()
