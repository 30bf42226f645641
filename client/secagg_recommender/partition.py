"""Dealing users out to silos."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from secagg_recommender.interactions import DataError

__all__ = ["partition_users"]


def partition_users(n_users: int, n_silos: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Deal users out to silos at random; sizes differ by at most one.

    Returns ``n_silos`` ascending int64 arrays that together hold ``0 … n_users − 1`` once each.

    Raises:
        DataError: there is no silo, or a silo would be empty.
    """
    if not 1 <= n_silos <= n_users:
        raise DataError(
            f"expected 1 <= n_silos <= n_users, got n_silos={n_silos} n_users={n_users}; "
            "ask for fewer silos or load more users"
        )
    order = np.random.default_rng(seed).permutation(n_users)
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, n_silos)]
