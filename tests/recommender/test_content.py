"""Item vectors from attributes and hashed codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg_recommender.attributes import attributes_of
from secagg_recommender.content import CODES, ItemContent, hashed_codes, item_content
from secagg_recommender.interactions import DataError

LABELS = tuple(f"B00{number}" for number in range(6))
NAMES = (["a", "x"], ["a", "y"], ["a"], ["b", "x"], ["b", "x"], [])


def catalogue(buckets: int = 8) -> ItemContent:
    return item_content(attributes_of(NAMES), LABELS, buckets=buckets)


def tables(content: ItemContent, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(content.n_attributes, d)).astype(np.float32),
        rng.normal(size=(CODES * content.buckets, d)).astype(np.float32),
    )


def test_vectors_are_weighted_sums_of_attributes_and_codes() -> None:
    content = catalogue()
    attributes, codes = tables(content)
    dense = np.zeros((6, content.n_attributes), dtype=np.float32)
    for item in range(6):
        own = slice(content.indptr[item], content.indptr[item + 1])
        dense[item, content.indices[own]] = content.weights[own]
    expected = dense @ attributes + codes[content.codes].sum(axis=1)
    np.testing.assert_allclose(content.vectors(attributes, codes), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1), [1, 1, 1, 1, 1, 0], atol=1e-6)


def test_rare_attributes_weigh_more() -> None:
    """Of "a" (three items) and "y" (one), the latter tells more."""
    importance = catalogue().importance  # a, b, x, y
    np.testing.assert_allclose(importance**2, np.log(7 / np.array([4, 3, 4, 2])), rtol=1e-6)


def test_an_attribute_of_all_items_tells_nothing_and_breaks_nothing() -> None:
    content = item_content(attributes_of([["all"], ["all"]]), ["1", "2"], buckets=2)
    attributes, codes = tables(content)
    assert not content.weights.any()
    assert np.isfinite(content.vectors(attributes, codes)).all()
    assert np.isfinite(content.new_vector(attributes, [0])).all()


def test_a_new_item_has_the_vector_of_its_attributes_at_once() -> None:
    """The same as a known one of these attributes, but for the codes."""
    content = catalogue()
    attributes, codes = tables(content)
    without_codes = content.vectors(attributes, np.zeros_like(codes))
    for item in range(5):
        own = content.indices[content.indptr[item] : content.indptr[item + 1]]
        new = content.new_vector(attributes, reversed(own.tolist()))
        np.testing.assert_allclose(new, without_codes[item], atol=1e-6)


@pytest.mark.parametrize("wrong", [[], [-1], [4], [0, 99]])
def test_new_items_need_known_attributes(wrong: list[int]) -> None:
    content = catalogue()
    with pytest.raises(DataError, match=r"attributes in \[0, 4\)"):
        content.new_vector(tables(content)[0], wrong)


def test_a_new_item_needs_the_models_table() -> None:
    with pytest.raises(DataError, match="table of 4 attributes"):
        catalogue().new_vector(np.zeros((3, 2), dtype=np.float32), [0])


@pytest.mark.parametrize(
    ("attributes", "codes"),
    [((3, 4), (16, 4)), ((4, 4), (15, 4)), ((4, 4), (16, 5)), ((4,), (16,)), ((4, 4, 1), (16, 4))],
)
def test_tables_of_another_model_are_refused(
    attributes: tuple[int, ...], codes: tuple[int, ...]
) -> None:
    with pytest.raises(DataError, match="4 attributes and 16 codes"):
        catalogue().vectors(np.zeros(attributes, np.float32), np.zeros(codes, np.float32))


@pytest.mark.parametrize(("labels", "buckets"), [(LABELS[:5], 8), (LABELS, 0)])
def test_catalogues_that_do_not_fit_are_refused(labels: tuple[str, ...], buckets: int) -> None:
    with pytest.raises(DataError, match="a label for each of 6 items"):
        item_content(attributes_of(NAMES), labels, buckets=buckets)


def test_a_data_set_without_attributes_has_no_content() -> None:
    with pytest.raises(DataError, match="with attributes of its items"):
        item_content(None, LABELS)


@given(st.lists(st.text(max_size=8), max_size=30), st.integers(1, 100))
def test_codes_depend_on_the_label_alone(labels: list[str], buckets: int) -> None:
    """Not on an item's place, which often tells what was bought next."""
    codes = hashed_codes(labels, buckets)
    assert codes.shape == (len(labels), CODES)
    np.testing.assert_array_equal(codes // buckets, np.tile(np.arange(CODES), (len(labels), 1)))
    np.testing.assert_array_equal(codes, hashed_codes(labels[::-1], buckets)[::-1])


def test_codes_are_the_same_on_every_device() -> None:
    assert hashed_codes(["B0001"], 256).tolist() == [[141, 340]]


def test_codes_spread_evenly_and_do_not_follow_numbers() -> None:
    codes = hashed_codes([str(number) for number in range(8000)], 16)
    for part in range(CODES):
        counts = np.bincount(codes[:, part] - 16 * part, minlength=16)
        assert counts.min() > 400
        assert counts.max() < 600
    neighbours = (codes[1:, 0] == codes[:-1, 0]).mean()
    assert abs(neighbours - 1 / 16) < 0.02
