"""The data sets by name, for settings and command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from secagg_recommender.interactions import DataError, Interactions
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.movielens import load_movielens

__all__ = ["DatasetName", "load_dataset"]

DatasetName = Literal["ml-100k", "marketplace"]


def load_dataset(source: str, data_dir: Path | str | None = None) -> Interactions:
    """Load ``"marketplace"`` (generated, needs no files) or ``"ml-100k"`` from ``data_dir``.

    ``data_dir`` is the MovieLens folder itself or a folder that holds it as ``ml-100k/``. Nothing
    is downloaded: see :func:`fetch_movielens`.

    Raises:
        DataError: unknown source, no folder given where one is needed, or unusable files.
    """
    if source == "marketplace":
        return generate_marketplace()
    if source != "ml-100k":
        raise DataError(
            f"expected source 'ml-100k' or 'marketplace', got source={source!r}; pick one of them"
        )
    if data_dir is None:
        raise DataError(
            "expected a folder with MovieLens 100K, got data_dir=None; pass one, or call "
            "fetch_movielens(cache_dir) and pass what it returns"
        )
    nested = Path(data_dir) / "ml-100k"
    return load_movielens(nested if nested.is_dir() else data_dir)
