"""The task that counts cohorts: prepared, joined by one person a client, and served from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import secagg
from secagg.errors import ConfigurationError
from secagg_client.cli import app
from secagg_client.cohort_task import prepare_cohorts
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner
from secagg_client.participate import _counts
from secagg_client.serve import CohortStart, recommend_for
from secagg_recommender.cohorts import AGE_GENDER, COHORT_COUNTS, CohortTable
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment
from secagg_server.task_files import read_task

ITEMS, USERS = 300, 600  # of the generated marketplace


def settings(tmp_path: Path, silo: int = 0, **changes: Any) -> ClientSettings:  # noqa: ANN401
    values = {"dataset": "marketplace", "silos": USERS, "silo": silo, "model": "cohorts"}
    values |= {"cohort": AGE_GENDER[silo % 2], "state_dir": tmp_path / "s"}
    return ClientSettings(**(values | changes))


def test_people_join_the_prepared_task_and_newcomers_start_from_its_model(tmp_path: Path) -> None:
    spec = read_task(prepare_cohorts(settings(tmp_path), tmp_path, least=2))
    plan = spec.plan
    holder = secagg.KeyHolder(plan)
    server = secagg.Aggregator(holder.context)
    round_ = Assignment(1, {}, {segment.name: segment for segment in plan.segments})
    people, has = 24, np.zeros((2, ITEMS), dtype=int)
    challenger = secagg.Challenger(holder.context)
    for silo in range(people):
        part = Part.of(settings(tmp_path, silo))
        learner = load_learner(part, round_.segments)
        work = learner.work(round_)
        assert work is not None
        identity = secagg.SigningKey.generate()
        commitment = challenger.commitment(identity.public)
        client = secagg.Encryptor(holder.context, identity, commitment=commitment)
        upload = client.encrypt_segments({**work.arrays, **_counts(plan, learner)})
        holder.admit(upload.admission)
        holder.submit_sketch(challenger.sketch(upload))
        server.add(upload)
        has[silo % 2, part.split.items_of(int(part.users[0]))] += 1
    assert all(verdict.accepted for verdict in holder.verdicts())
    release = holder.release(server.aggregate())
    with np.load(tmp_path / "initial.npz") as initial:
        model = release.applied_to(initial[COHORT_COUNTS].reshape(-1))
    np.savez(tmp_path / "cohorts.npz", **{COHORT_COUNTS: model.reshape(-1, 1)})
    start = CohortStart(AGE_GENDER[1], tmp_path / "cohorts.npz", clients=people, least=2)
    (best, *_) = recommend_for(
        settings(tmp_path), user=None, items=None, top=1, model=None, cohort=start
    )
    clear = np.zeros((len(AGE_GENDER), ITEMS + 1))
    clear[:2, 0], clear[:2, 1:] = people // 2, np.where(has < 2, 0, has)
    expected = CohortTable.released(clear, len(AGE_GENDER), 2).start(1)
    assert (int(best.item), best.score) == (expected.argmax(), pytest.approx(expected.max()))


@pytest.mark.parametrize("cohort", [None, "elves", "", "f 25-34"])
def test_nobody_joins_without_a_cohort(tmp_path: Path, cohort: str | None) -> None:
    with pytest.raises(ConfigurationError, match="setting cohort") as refused:
        load_learner(Part.of(settings(tmp_path, cohort=cohort)), ())
    assert not cohort or f"got {cohort}" not in str(refused.value)


def test_several_people_are_no_one_client(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one person a client, got users=300"):
        load_learner(Part.of(settings(tmp_path, silos=2)), ())


@pytest.mark.parametrize(
    ("options", "code"),
    [([], 0), (["--row-threshold", "9"], 0), (["--bits", "8"], 78), (["--optimiser", "adam"], 78)],
)
def test_a_threshold_is_all_there_is_to_choose(
    tmp_path: Path, options: list[str], code: int
) -> None:
    fixed = ["prepare", str(tmp_path / "w"), "--model", "cohorts", "--dataset", "marketplace"]
    done = CliRunner().invoke(app, [*fixed, "--silos", "30", *options])
    assert done.exit_code == code, done.output
    if code == 0:
        plan = read_task(tmp_path / "w" / "task.toml").plan
        assert plan.threshold is not None
        assert (plan.threshold.least, plan.max_clients) == (9 if options else 5, 30)
