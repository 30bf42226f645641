"""The kinds of model that this client knows, by name.

Each loads what it needs when it is asked for: torch takes seconds, and no count needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg_client.config import ClientSettings
from secagg_recommender.datasets import Dataset
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.learner import Learner
from secagg_recommender.partition import partition

__all__ = ["load_learner", "train_config"]

_Users = npt.NDArray[np.int64]


def load_learner(settings: ClientSettings, dataset: Dataset, segments: Collection[str]) -> Learner:
    """This client's part of the model that a task is for.

    Args:
        segments: names of what the task's uploads consist of.

    Raises:
        DataError: there is no such silo, or its data cannot be used.
        ConfigurationError: see `PrivateSilo`.
    """
    split = split_leave_one_out(dataset.interactions)
    parts = partition(
        settings.partition,
        split,
        settings.silos,
        settings.seed,
        labels=dataset.kinds,
        alpha=settings.partition_alpha,
    )
    if settings.silo >= len(parts):
        raise DataError(f"expected a silo below {len(parts)}; got silo={settings.silo}")
    return _KINDS[settings.model](settings, split, parts[settings.silo], segments)
