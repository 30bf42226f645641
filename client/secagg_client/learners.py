"""The kinds of model that this client knows, by name, and its part of the data.

Each kind loads what it needs when it is asked for: torch takes seconds, and no count needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from secagg_client.config import ClientSettings
from secagg_recommender.datasets import Dataset, read_dataset
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.learner import Learner
from secagg_recommender.partition import Parts, partition

if TYPE_CHECKING:
    from secagg_recommender.factorisation import Silo, TrainConfig
    from secagg_recommender.trained import WithinBudget

__all__ = ["KINDS", "Part", "load_learner", "load_silo", "silos_of", "train_config"]


@dataclass(frozen=True)
class Part:
    """What this client has to learn from.

    Attributes:
        users: of the data set, by number.
    """

    settings: ClientSettings
    dataset: Dataset
    split: Split
    users: npt.NDArray[np.int64]

    @classmethod
    def of(cls, settings: ClientSettings) -> Part:
        """This client's silo of the data set.

        Raises:
            DataError: the data cannot be used, or there is no such silo.
        """
        dataset = read_dataset(settings.dataset, settings.data_dir)
        split = split_leave_one_out(dataset.interactions)
        parts = silos_of(settings, dataset, split)
        if settings.silo >= len(parts):
            raise DataError(f"expected a silo below {len(parts)}; got silo={settings.silo}")
        return cls(settings, dataset, split, parts[settings.silo])


def silos_of(settings: ClientSettings, dataset: Dataset, split: Split) -> Parts:
    """The users of each silo, as the settings deal them out.

    Raises:
        DataError: a silo would be empty; see `partition`.
    """
    return partition(
        settings.partition,
        split,
        settings.silos,
        settings.seed,
        labels=dataset.kinds,
        alpha=settings.partition_alpha,
    )


def load_learner(part: Part, segments: Collection[str]) -> Learner:
    """This client's part of the model that a task is for.

    Args:
        segments: names of what the task's uploads consist of.

    Raises:
        DataError: the data cannot be used for it.
        ConfigurationError: see `PrivateSilo`.
    """
    return KINDS[part.settings.model](part, segments)


def load_silo(part: Part) -> Silo:
    """This client's part of the data, to be trained on.

    Raises:
        DataError, ConfigurationError: see `load_learner`.
    """
    return _silo(part, part.split)


def train_config(settings: ClientSettings) -> TrainConfig:
    """How this client trains."""
    from secagg_recommender.factorisation import TrainConfig

    return TrainConfig(
        dimensions=settings.dimensions,
        local_epochs=settings.local_epochs,
        proximal=settings.proximal,
        seed=settings.seed,
    )


def _factorisation(part: Part, segments: Collection[str]) -> Learner:
    from secagg_recommender.trained import VALIDATION, Trained, hold_out

    held_out = hold_out(part.split) if VALIDATION in segments else None
    return Trained(_silo(part, held_out or part.split), held_out, _within(part.settings))


def _ease(part: Part, _segments: Collection[str]) -> Learner:
    from secagg_recommender.ease import EaseLearner

    return EaseLearner(part.split, part.users)


def _transitions(part: Part, _segments: Collection[str]) -> Learner:
    from secagg_recommender.transitions import TransitionsLearner

    return TransitionsLearner(part.split, part.users)


def _session(part: Part, _segments: Collection[str]) -> Learner:
    from secagg_client.session_task import content_and_config
    from secagg_recommender.session_silo import SessionSilo

    content, config = content_and_config(part.settings, part.dataset)
    return SessionSilo(part.settings.silo, part.split, part.users, content, config)


def _cohorts(part: Part, _segments: Collection[str]) -> Learner:
    from secagg_client.cohort_task import cohort_learner

    return cohort_learner(part)


KINDS: Final[Mapping[str, Callable[[Part, Collection[str]], Learner]]] = {
    "factorisation": _factorisation,
    "ease": _ease,
    "transitions": _transitions,
    "session": _session,
    "cohorts": _cohorts,
}
"""How each kind of model is loaded, by its name in the settings."""


def _within(settings: ClientSettings) -> WithinBudget | None:
    from secagg_recommender.devices import Budget
    from secagg_recommender.trained import WithinBudget

    if settings.max_train_seconds is None and settings.max_upload_bytes is None:
        return None
    budget = Budget(settings.max_train_seconds, settings.max_upload_bytes)
    return WithinBudget(budget, settings.seed, settings.state_dir / "workload.json")


def _silo(part: Part, split: Split) -> Silo:
    from secagg_recommender.factorisation import Silo

    settings, config = part.settings, train_config(part.settings)
    if settings.example_epsilon is None:
        return Silo(settings.silo, split, part.users, config)
    # opacus takes seconds to load, and is an extra.
    from secagg_recommender.example_privacy import ExamplePrivacy, PrivateSilo

    privacy = ExamplePrivacy.for_rounds(
        settings.example_rounds,
        epsilon=settings.example_epsilon,
        delta=settings.example_delta,
        sampling_rate=settings.example_rate,
        steps=settings.example_steps,
        nominal_samples=settings.example_samples,
    )
    ledger = settings.state_dir / "example-privacy.npz"
    return PrivateSilo(settings.silo, split, part.users, config, privacy, ledger=ledger)
