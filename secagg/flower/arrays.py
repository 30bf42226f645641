"""Between Flower's array records and the tensors of a plan.

Arrays of floats of any width are what is trained: they travel as differences, are summed as
float32, and come back in the width they had. All others (counters of a normalisation layer, masks,
empty arrays) stay as the server has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from secagg.errors import PlanError, SchemaError
from secagg.parameters import TensorSpec

__all__ = ["as_received", "difference", "moved", "tensors_of"]


def tensors_of(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays of floats, by the names that a plan has for them.

    Those are the record's own, unless one of them is none that a plan may have: then all of them
    are numbered in the order of the record's names.

    Returns:
        float16, float32 or float64 arrays as they are in the record.

    Raises:
        SchemaError: an array cannot be read, holds complex numbers, or no array holds floats.
    """
    floats = _floats(record)
    names = _plan_names(floats)
    return {names[key]: array for key, array in floats.items()}


def difference(received: ArrayRecord, trained: ArrayRecord) -> dict[str, NDArray[np.float64]]:
    """What training has changed: trained - received, by the names of the plan.

    Args:
        received: the model as it came.
        trained: arrays of the same names and shapes.

    Raises:
        SchemaError: others. NaN and infinity are for the quantiser to refuse.
    """
    if trained.keys() != received.keys():
        missing, extra = sorted(received.keys() - trained.keys()), trained.keys() - received.keys()
        raise SchemaError(
            f"expected the arrays that were received, {len(received)} of them; got "
            f"{missing=}, unexpected={sorted(extra)}; reply with the same names"
        )
    before = _floats(received)
    names = _plan_names(before)
    return {names[key]: _changed(key, old, trained[key]) for key, old in before.items()}


def moved(received: ArrayRecord, mean: Mapping[str, NDArray[np.float64]]) -> ArrayRecord:
    """The model plus a mean difference, each array in the width it had.

    Args:
        mean: float64 by the names of the plan, see `tensors_of`.
    """
    before = _floats(received)
    names = _plan_names(before)
    after = {
        key: Array(np.asarray((old.astype(np.float64) + mean[names[key]]).astype(old.dtype)))
        for key, old in before.items()
    }
    return ArrayRecord({key: after.get(key, array) for key, array in received.items()})


def as_received(received: ArrayRecord, result: ArrayRecord) -> ArrayRecord:
    """What a strategy made of a model, in the widths that the model had.

    Flower's strategies turn counters into float64, and some widen floats. Arrays that the model
    did not have are left as they are.

    Raises:
        SchemaError: an array cannot be read, or holds complex numbers.
    """
    return ArrayRecord({key: _as(key, received.get(key), array) for key, array in result.items()})


def _as(key: str, before: Array | None, after: Array) -> Array:
    if before is None or before.dtype == after.dtype:
        return after
    if not _trained(old := _read(key, before)):
        return before
    return Array(np.asarray(_read(key, after).astype(old.dtype)))


def _trained(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and array.size > 0


def _floats(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    arrays = {key: _read(key, record[key]) for key in sorted(record)}
    found = {key: array for key, array in arrays.items() if _trained(array)}
    if not found:
        raise SchemaError(
            f"expected a model with at least one array of floats; got {len(arrays)} arrays without "
            "any; there is nothing to average"
        )
    return found


def _read(key: str, array: Array) -> NDArray[Any]:
    try:
        found = array.numpy()
    # Over damaged bytes numpy raises what its parts do: of zip files, of Python's own tokens.
    except Exception:
        raise SchemaError(
            f"array {key!r}: expected one that numpy wrote; got another serialisation; use "
            "ArrayRecord(state_dict) or a list of numpy arrays"
        ) from None
    if found.dtype.kind == "c":
        raise SchemaError(
            f"array {key!r}: expected real numbers; got {found.dtype}; split it into two arrays"
        )
    return found


def _plan_names(keys: Iterable[str]) -> dict[str, str]:
    ordered = sorted(keys)
    try:
        for key in ordered:
            TensorSpec(key, ())
    except PlanError:
        return {key: f"{place:04}" for place, key in enumerate(ordered)}
    return {key: key for key in ordered}


def _changed(key: str, old: NDArray[Any], reply: Array) -> NDArray[np.float64]:
    new = _read(key, reply)
    if new.shape != old.shape:
        raise SchemaError(
            f"array {key!r}: expected shape={old.shape}, as received; got shape={new.shape}; reply "
            "with the model that was trained"
        )
    if new.dtype.kind not in "fiu":
        raise SchemaError(f"array {key!r}: expected floats; got {new.dtype}; convert it")
    # In float64, so that a small step away from a large value is not rounded before it is summed.
    return new.astype(np.float64) - old.astype(np.float64)
