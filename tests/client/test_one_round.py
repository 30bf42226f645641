"""Models of one round on the command line: the task, the sums, the model, the list."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from secagg.errors import ConfigurationError, InputError
from secagg.parameters import IntegerSegment
from secagg_client.cli import app
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner
from secagg_client.one_round import model_from_sums, prepare_counts
from secagg_recommender.datasets import load_dataset
from secagg_recommender.ease import GRAM, Ease
from secagg_recommender.histories import history_model
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment
from secagg_recommender.transitions import Transitions
from secagg_server.task_files import read_task

SILOS = 3
KINDS = {"ease": Ease, "transitions": Transitions}


def settings(model: str, **more: Any) -> ClientSettings:  # noqa: ANN401
    return ClientSettings(dataset="marketplace", model=model, silos=SILOS, **more)


def summed(model: str, folder: Path) -> dict[str, npt.NDArray[np.int64]]:
    """What a round over all silos would release, within what its task plans."""
    plan = read_task(prepare_counts(settings(model), folder)).plan
    segments = {segment.name: segment for segment in plan.segments}
    works = []
    for silo in range(SILOS):
        part = Part.of(settings(model, silo=silo))
        work = load_learner(part, segments).work(Assignment(1, {}, segments))
        assert work is not None
        works.append(work.arrays)
    for name, segment in segments.items():
        assert isinstance(segment, IntegerSegment)
        assert max(np.abs(work[name]).max() for work in works) <= segment.max_abs
        bound = segment.max_norm or np.inf
        assert max(np.linalg.norm(np.asarray(work[name])) for work in works) <= bound
    return {name: np.sum([work[name] for work in works], axis=0) for name in segments}


@pytest.mark.parametrize("model", KINDS)
def test_from_task_to_model(model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "sums.npz", contributors=SILOS, **summed(model, tmp_path))
    sums, output = tmp_path / "sums.npz", tmp_path / "model.npz"
    made = CliRunner().invoke(app, ["count-model", str(sums), str(output)])
    assert made.exit_code == 0, made.output
    with np.load(output) as tensors:
        found = history_model(dict(tensors))
    assert isinstance(found, KINDS[model])
    assert found.n_items == load_dataset("marketplace").n_items


def test_a_counted_model_recommends_to_somebody_unseen(tmp_path: Path) -> None:
    np.savez(tmp_path / "sums.npz", **summed("ease", tmp_path))
    model_from_sums(tmp_path / "sums.npz", tmp_path / "model.npz")
    liked = load_dataset("marketplace").item_labels[3]
    arguments = ["recommend", "--dataset", "marketplace", "--items", liked, "--top", "4"]
    arguments += ["--model", str(tmp_path / "model.npz"), "--format", "json"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.output)
    assert len(rows) == 4
    assert liked not in {row["item"] for row in rows}


@pytest.mark.parametrize("model", KINDS)
def test_the_command_writes_the_task_alone(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    arguments = ["prepare", str(folder), "--model", model, "--dataset", "marketplace"]
    answer = CliRunner().invoke(app, [*arguments, "--silos", "4", "--task", "counts"])
    assert answer.exit_code == 0, answer.output
    spec = read_task(folder / "task.toml")
    assert (spec.task_id, spec.rounds, spec.plan.max_clients) == ("counts", 1, 4)
    assert spec.model is None
    assert spec.plan.norm_check is not None
    assert [path.name for path in folder.iterdir()] == ["task.toml"]


@pytest.mark.parametrize(
    "more",
    [
        ["--row-threshold", "3"],
        ["--privacy", "release", "--epsilon", "8", "--delta", "1e-5"],
        ["--epsilon", "8"],
    ],
)
def test_exact_counts_take_no_noise_and_no_threshold(more: list[str], tmp_path: Path) -> None:
    arguments = ["prepare", str(tmp_path / "work"), "--model", "ease", "--dataset", "marketplace"]
    answer = CliRunner().invoke(app, arguments + more)
    assert answer.exit_code == ConfigurationError.exit_code
    assert not (tmp_path / "work").exists()


def test_a_trained_model_is_not_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="factorisation"):
        prepare_counts(settings("factorisation"), tmp_path)


def test_sums_of_another_task_make_no_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "sums.npz", contributors=3, clicks=np.zeros(4, dtype=np.int64))
    with pytest.raises(DataError, match="clicks"):
        model_from_sums(tmp_path / "sums.npz", tmp_path / "model.npz")
    assert not (tmp_path / "model.npz").exists()


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_archive_makes_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "sums.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"\.npz"):
        model_from_sums(tmp_path / "sums.npz", tmp_path / "model.npz")


@pytest.mark.parametrize("ridge", [0.0, -3.0])
def test_the_ridge_is_refused_before_anything_is_written(ridge: float, tmp_path: Path) -> None:
    np.savez(tmp_path / "sums.npz", **{GRAM: np.array([2, 1, 2])})
    with pytest.raises(DataError, match="ridge"):
        model_from_sums(tmp_path / "sums.npz", tmp_path / "model.npz", ridge=ridge)
    assert not (tmp_path / "model.npz").exists()


def test_a_client_of_another_data_set_sends_nothing(tmp_path: Path) -> None:
    plan = read_task(prepare_counts(settings("ease"), tmp_path)).plan
    segments = {"gram": IntegerSegment("gram", plan.segments[0].values + 1, 1)}
    learner = load_learner(Part.of(settings("ease")), segments)
    with pytest.raises(DataError, match="same data set"):
        learner.work(Assignment(1, {}, segments))
