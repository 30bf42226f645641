"""Starting from a model that has been trained already, on this catalogue or on another one.

A model's file may name its items beside its tensors. Then rows go to the items of the same label,
and items that it does not know start afresh; a file without labels must be of the same catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError

if TYPE_CHECKING:
    from secagg_recommender.factorisation import SharedTensors

__all__ = ["LABELS", "labels_of", "warm_start"]

LABELS: Final = "item_labels"
"""Name of the array of labels, one a row, as text."""


def warm_start(
    model: Mapping[str, npt.NDArray[Any]], labels: Sequence[str], fresh: SharedTensors
) -> tuple[SharedTensors, int]:
    """The tensors to start from, and of how many items they know something.

    Args:
        model: arrays by name, as a model's file holds them; others than the wanted are ignored.
        labels: of the catalogue's items, in order.
        fresh: what a start without a model would be, float32, one row an item.

    Raises:
        DataError: a tensor is missing, of another width, or not finite; no item is known; or a
            model without labels is of another number of items.
    """
    missing = sorted(fresh.keys() - model.keys())
    if missing:
        raise DataError(f"expected a model of {sorted(fresh)}, got none of {missing}")
    rows, places = _matched(model, labels, model[next(iter(fresh))].shape[:1])
    started = {}
    for name, tensor in fresh.items():
        known = _checked(name, model[name], tensor)
        started[name] = tensor.copy()
        started[name][places] = known[rows]
    return started, places.size


def labels_of(model: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.str_]:
    """The labels that a model's file names its items by, in the order of its rows.

    Raises:
        DataError: there are none, or they are not distinct texts.
    """
    labels = model.get(LABELS)
    if labels is None or labels.dtype.kind != "U" or labels.ndim != 1:
        raise DataError(f"expected texts {LABELS!r}, such as in the initial.npz of prepare")
    if np.unique(labels).size != labels.size:
        raise DataError(f"expected distinct {LABELS!r}, got one twice; name the items anew")
    return labels


def _matched(
    model: Mapping[str, npt.NDArray[Any]], labels: Sequence[str], found: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the model, and the items of the catalogue that they are about."""
    if LABELS not in model:
        if found != (len(labels),):
            raise DataError(
                f"expected a model of this catalogue's {len(labels)} items, as it does not name "
                f"its own, got rows={found}; take a file with {LABELS!r}, such as prepare writes"
            )
        every = np.arange(len(labels))
        return every, every
    theirs = labels_of(model)
    if theirs.shape != found:
        raise DataError(
            f"expected a label for each of the model's rows={found}, got {theirs.size}; name its "
            "items anew"
        )
    row_of = {label: row for row, label in enumerate(theirs.tolist())}
    pairs = [(row_of[label], item) for item, label in enumerate(labels) if label in row_of]
    if not pairs:
        raise DataError(
            "expected a model that knows an item of this catalogue, got none; take one of the "
            "same shop, or start without a model"
        )
    rows, places = np.array(pairs, dtype=np.int64).T
    return rows, places


def _checked(
    name: str, tensor: npt.NDArray[Any], fresh: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    if tensor.dtype.kind != "f" or tensor.shape[1:] != fresh.shape[1:] or not tensor.ndim:
        raise DataError(
            f"expected {name} as floats with sides {fresh.shape[1:]} beside the items, got "
            f"dtype={tensor.dtype} shape={tensor.shape}; prepare with the model's dimensions"
        )
    values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"expected a finite {name}, got NaN or infinity; take another model")
    return values
