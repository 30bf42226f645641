"""The two pictures of the product catalogue."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from secagg_bench.recommender.figures import save_figures
from secagg_recommender.catalogue import Catalogue
from secagg_recommender.interactions import DataError


@pytest.fixture
def catalogue() -> Catalogue:
    rng = np.random.default_rng(0)
    price = 10 ** rng.uniform(2, 5, 60)
    frame = pd.DataFrame(
        {
            "price": price,
            "list_price": price * 2,
            "discount": rng.uniform(0, 1, 60),
            "rating": rng.uniform(1, 5, 60),
            "rating_count": np.arange(60.0),
            "currency": "EUR",
        }
    )
    frame.loc[:9, "rating"] = np.nan
    return Catalogue(frame, ())


def test_both_are_written(catalogue: Catalogue, tmp_path: Path) -> None:
    paths = save_figures(catalogue, tmp_path / "new")
    assert [path.name for path in paths] == ["catalogue-correlation.svg", "catalogue-pairs.svg"]
    # Text is drawn as shapes; matplotlib leaves it beside them as a comment.
    words = [path.read_text(encoding="utf-8") for path in paths]
    for name in ("price", "discount", "rating", "number of ratings"):
        assert f"<!-- {name} -->" in words[0]
    assert "among 60 products" in words[0]
    assert "<!-- list price, EUR -->" in words[1]
    assert not any("<dc:date>" in text for text in words)


def test_prices_that_cannot_be_compared_are_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    frame = catalogue.frame.copy()
    frame.loc[0, "currency"] = "USD"
    with pytest.raises(DataError, match="EUR, USD"):
        save_figures(replace(catalogue, frame=frame), tmp_path)


def test_too_few_products_are_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="products=2"):
        save_figures(replace(catalogue, frame=catalogue.frame[8:12]), tmp_path)
    assert not list(tmp_path.iterdir())
