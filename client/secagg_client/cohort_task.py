"""The task that counts cohorts: what an operator starts, and what a person's client says in it.

One client is one person: a silo of one user. Its cohort is a setting of its own, and leaves the
device only as the encrypted block that it counts in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from secagg.errors import ConfigurationError
from secagg.parameters import FloatSegment
from secagg_client.config import ClientSettings
from secagg_client.learners import Part
from secagg_recommender.cohorts import AGE_GENDER, COHORT_COUNTS, CohortLearner, cohort_plan
from secagg_recommender.datasets import load_dataset
from secagg_recommender.interactions import DataError

__all__ = ["LEAST", "cohort_learner", "prepare_cohorts"]

LEAST: Final = 5
"""Contributors that a cell must have, unless said otherwise."""

_TASK: Final = """\
# Counts by cohort on {dataset}, in one round; start it with
#   secagg-server task create {folder}/task.toml --model {folder}/initial.npz
# and when it is done, start newcomers from it with
#   secagg-client model --task {task} cohorts.npz
#   secagg-client recommend --cohort NAME --cohort-table cohorts.npz --cohort-clients {clients}
# where the number is that of the clients who took part (secagg-server task show {task}).
task_id = "{task}"
max_clients = {clients}
rounds = 1

[update]
clip = {clip!r}
bits = {bits}
rows = {rows}

[[update.tensors]]
name = "{name}"
shape = [{rows}, 1]

[threshold]
least = {least}
"""


def prepare_cohorts(settings: ClientSettings, folder: Path, *, least: int = LEAST) -> Path:
    """Write the task and its model of zeros, for as many people as there are silos.

    Returns:
        The task's file, ``task.toml`` in the folder.

    Raises:
        DataError: the data cannot be used.
        PlanError: no exact plan exists.
    """
    n_items = load_dataset(settings.dataset, settings.data_dir).n_items
    plan = cohort_plan(
        len(AGE_GENDER),
        n_items,
        max_clients=settings.silos,
        least=least,
        most_items=n_items,
    )
    (table,) = (segment for segment in plan.segments if isinstance(segment, FloatSegment))
    text = _TASK.format(
        dataset=settings.dataset,
        folder=folder,
        task=settings.task,
        clients=settings.silos,
        clip=table.clip,
        bits=table.bits,
        rows=table.rows,
        name=COHORT_COUNTS,
        least=least,
    )
    folder.mkdir(parents=True, exist_ok=True)
    zeros = {COHORT_COUNTS: np.zeros((table.rows, 1), np.float32)}
    np.savez(folder / "initial.npz", **zeros)  # type: ignore[arg-type]  # the name is ours
    file = folder / "task.toml"
    file.write_text(text, encoding="utf-8")
    return file


def cohort_learner(part: Part) -> CohortLearner:
    """What this client has to say.

    Raises:
        ConfigurationError: no cohort, or an unknown one.
        DataError: a silo of more than one person.
    """
    cohort = part.settings.cohort
    if cohort not in AGE_GENDER:
        raise ConfigurationError(
            f"expected the setting cohort to be one of {list(AGE_GENDER)}; got "
            f"{'none' if cohort is None else 'another'}; set it, or do not join this task"
        )
    if part.users.size != 1:
        raise DataError(
            f"expected one person a client, got users={part.users.size}; deal the users out to as "
            "many silos"
        )
    items = part.split.items_of(int(part.users[0]))
    return CohortLearner(
        AGE_GENDER.index(cohort),
        items,
        n_cohorts=len(AGE_GENDER),
        n_items=part.split.n_items,
        most_items=part.split.n_items,
    )
