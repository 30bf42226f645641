"""Tensors by name to one vector, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["flatten", "shaped"]


def flatten(update: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """All values in one vector, in the order of the mapping, of the arrays' dtype."""
    return np.concatenate([each.reshape(-1) for each in update.values()])


def shaped(vector: NDArray[Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """The reverse: views of a vector, in the order of the shapes."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
    parts = np.split(vector, ends)
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
