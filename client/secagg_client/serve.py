"""Recommendations on the device: from a trained user's vector, or one fitted to a few items."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secagg.archive import read_npz
from secagg_client.config import ClientSettings
from secagg_client.learners import train_config
from secagg_client.session import ClientSession
from secagg_client.state_dir import StateDir
from secagg_recommender.datasets import load_dataset
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, SharedTensors, fit_user
from secagg_recommender.interactions import DataError, Interactions, split_leave_one_out
from secagg_recommender.recommend import recommend

__all__ = ["Suggestion", "recommend_for"]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One line of the list, with the item's own label and title."""

    rank: int
    item: str
    title: str
    score: float


def recommend_for(
    settings: ClientSettings,
    *,
    user: str | None,
    items: str | None,
    top: int,
    model: Path | None,
) -> list[Suggestion]:
    """The ``top`` best items for a user of the data set, or for somebody who likes ``items``.

    Args:
        user: label of a user; its own training items are left out.
        items: comma-separated labels of items that an unseen user likes.
        model: ``.npz`` with the shared tensors; the server's newest version when None.

    Raises:
        DataError: neither or both given, an unknown label, or a model that does not fit.
        SecaggError: the server cannot be reached.
    """
    if (user is None) == (items is None):
        raise DataError("expected either a user or a list of items; give exactly one of them")
    interactions = load_dataset(settings.dataset, settings.data_dir)
    shared = _read_model(model) if model else _fetch_model(settings)
    if shared[ITEM_BIAS].size != interactions.n_items:
        raise DataError(
            f"expected a model of {interactions.n_items} items; got {shared[ITEM_BIAS].size}; "
            "use the data set that the model was trained on"
        )
    own, vector = _history(settings, interactions, user, items)
    if vector is None:
        vector = fit_user(shared, own, train_config(settings))
    return [
        Suggestion(row.rank, interactions.item_labels[row.item], row.title, row.score)
        for row in recommend(vector, shared, own, top, interactions.item_titles)
    ]


def _read_model(file: Path) -> SharedTensors:
    tensors = read_npz(file)
    if not {ITEM_FACTORS, ITEM_BIAS} <= tensors.keys():
        raise DataError(f"expected {ITEM_FACTORS} and {ITEM_BIAS} in {file}; got {sorted(tensors)}")
    return {name: tensors[name] for name in (ITEM_FACTORS, ITEM_BIAS)}


def _fetch_model(settings: ClientSettings) -> SharedTensors:
    with ClientSession(
        settings.server, settings.task, settings.credentials(), insecure=settings.insecure
    ) as session:
        tensors = session.latest_model().tensors
    if not {ITEM_FACTORS, ITEM_BIAS} <= tensors.keys():
        raise DataError(
            f"expected a task whose model is {ITEM_FACTORS} and {ITEM_BIAS}; it has "
            f"{sorted(tensors)}"
        )
    return tensors


def _history(
    settings: ClientSettings, interactions: Interactions, user: str | None, items: str | None
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """A user's own items, and the private vector where this device has one."""
    if items is not None:
        wanted = [label.strip() for label in items.split(",") if label.strip()]
        return _ids("item", interactions.item_labels, wanted), None
    number = int(_ids("user", interactions.user_labels, [str(user)])[0])
    own = split_leave_one_out(interactions).items_of(number).astype(np.int64)
    return own, _private_vector(settings, number)


def _ids(kind: str, labels: tuple[str, ...], wanted: list[str]) -> NDArray[np.int64]:
    numbers = {label: number for number, label in enumerate(labels)}
    unknown = [label for label in wanted if label not in numbers]
    if unknown or not wanted:
        raise DataError(
            f"expected known {kind} labels; got unknown={unknown[:5]}; see the data set"
        )
    return np.array([numbers[label] for label in wanted], dtype=np.int64)


def _private_vector(settings: ClientSettings, user: int) -> NDArray[np.float32] | None:
    state = StateDir(settings.state_dir).latest_vectors()
    if state is None:
        return None
    with np.load(io.BytesIO(state), allow_pickle=False) as saved:
        row = np.flatnonzero(saved["users"] == user)
        vectors: NDArray[np.float32] = saved["vectors"]
        return vectors[row[0]] if row.size else None
