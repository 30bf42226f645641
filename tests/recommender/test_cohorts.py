"""A start from one's cohort: exact thresholded counts, and what is made of them."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import secagg
from secagg.errors import PlanError, SchemaError
from secagg.parameters import FloatSegment
from secagg.planner import plan_tensors
from secagg.sampling import Stream
from secagg_recommender.cohorts import (
    AGE_GENDER,
    COHORT_COUNTS,
    CohortLearner,
    CohortTable,
    age_gender,
    cells_of,
    cohort_plan,
)
from secagg_recommender.datasets import dataset_folder
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment
from secagg_recommender.movielens import load_movielens_users

REAL_DATA = os.environ.get("SECAGG_DATA_DIR", "")
HAS_USERS = bool(REAL_DATA) and Path(REAL_DATA, "ml-100k", "recbole_ml-100k.user.tsv").is_file()
COHORTS, ITEMS, LEAST = 3, 7, 2
# Two and three people who like alike, and one alone in a cohort.
PEOPLE = [(0, [1, 2]), (0, [1]), (1, [4, 5]), (1, [4]), (1, [0, 4, 5]), (2, [6])]


def learner(cohort: int, items: list[int], most: int = ITEMS) -> CohortLearner:
    return CohortLearner(
        cohort, np.array(items, np.int64), n_cohorts=COHORTS, n_items=ITEMS, most_items=most
    )


def clear(people: list[tuple[int, list[int]]], least: int = LEAST) -> npt.NDArray[np.int64]:
    table = np.zeros((COHORTS, ITEMS + 1), dtype=np.int64)
    for cohort, items in people:
        table[cohort, [0, *(item + 1 for item in set(items))]] += 1
    return np.where(table < least, 0, table).reshape(-1)


def table(people: list[tuple[int, list[int]]] = PEOPLE, least: int = LEAST) -> CohortTable:
    return CohortTable.released(clear(people, least), COHORTS, least)


# --- counting -----------------------------------------------------------------------------------


def encrypted(people: list[tuple[int, list[int]]]) -> npt.NDArray[np.float64]:
    """Cells that the roles release."""
    plan = cohort_plan(COHORTS, ITEMS, max_clients=12, least=LEAST, most_items=ITEMS)
    holder = secagg.KeyHolder(plan)
    server = secagg.Aggregator(holder.context)
    round_ = Assignment(1, {}, {segment.name: segment for segment in plan.segments})
    for cohort, items in people:
        mine = learner(cohort, items)
        upload = {**mine.work(round_).arrays, "contributors": mine.counts()}
        server.add(secagg.Encryptor(holder.context).encrypt_segments(upload))
    release = holder.release(server.aggregate())
    with pytest.raises(SchemaError, match="never leaves the key holder"):
        release.total("contributors")
    return release.mean("update")[COHORT_COUNTS][:, 0] * release.contributors


PERSON = st.tuples(st.integers(0, COHORTS - 1), st.lists(st.integers(0, ITEMS - 1), max_size=ITEMS))


@given(st.lists(PERSON, min_size=3, max_size=12))
@settings(max_examples=8, deadline=None)
def test_released_counts_are_the_clear_ones_above_the_threshold(
    people: list[tuple[int, list[int]]],
) -> None:
    assert np.rint(encrypted(people)).tolist() == clear(people).tolist()


def test_a_model_of_means_is_the_table_again() -> None:
    counts = clear(PEOPLE)
    mean = {COHORT_COUNTS: (counts / len(PEOPLE)).astype(np.float32)[:, None]}
    again = CohortTable.from_model(mean, COHORTS, LEAST, len(PEOPLE))
    assert again.counts.tolist() == table().counts.tolist()
    assert again.members.tolist() == [2, 3, 0]


@given(st.integers(1, 5000))
def test_a_step_is_one_so_that_counting_is_exact(most: int) -> None:
    segment = cohort_plan(1, most, max_clients=5, least=2, most_items=most).segments[0]
    assert isinstance(segment, FloatSegment)
    assert segment.step == 1.0
    assert segment.clip**2 >= most + 1


def test_an_upload_has_the_same_shape_whatever_the_cohort() -> None:
    plan = cohort_plan(COHORTS, ITEMS, max_clients=12, least=LEAST, most_items=ITEMS)
    round_ = Assignment(1, {}, {segment.name: segment for segment in plan.segments})
    made = [learner(cohort, [1, 2]).work(round_).arrays["update"] for cohort in range(COHORTS)]
    blocks = np.stack([one[COHORT_COUNTS].reshape(COHORTS, -1) for one in made])  # type: ignore[call-overload]
    assert blocks.sum(axis=2).tolist() == (3 * np.eye(COHORTS)).tolist()


def test_of_too_many_items_a_part_is_counted_but_always_oneself() -> None:
    cells = cells_of(1, np.arange(ITEMS), COHORTS, ITEMS, 3)
    assert (cells.size, cells[0]) == (4, ITEMS + 1)
    assert set(cells) <= set(range(ITEMS + 1, 2 * ITEMS + 2))


@pytest.mark.parametrize(("cohort", "items"), [(-1, [1]), (COHORTS, [1]), (0, [ITEMS]), (0, [-1])])
def test_cells_that_are_not_there_are_refused(cohort: int, items: list[int]) -> None:
    with pytest.raises(DataError, match="cohorts and items in"):
        learner(cohort, items)


@pytest.mark.parametrize("sides", [(0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_empty_tables_cannot_be_planned(sides: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="at least one"):
        cohort_plan(*sides[:2], max_clients=5, least=2, most_items=sides[2])


def test_a_threshold_of_one_is_none() -> None:
    with pytest.raises(PlanError, match="least from 2"):
        cohort_plan(2, 5, max_clients=5, least=1, most_items=5)


@pytest.mark.parametrize("items", [ITEMS - 1, ITEMS + 1])
def test_a_task_of_another_catalogue_is_refused(items: int) -> None:
    plan = cohort_plan(COHORTS, items, max_clients=5, least=2, most_items=5)
    for segments in (plan.segments, plan_tensors(9, max_clients=5, clip=1.0).segments, ()):
        with pytest.raises(DataError, match="rows in segment"):
            learner(0, [1]).work(Assignment(1, {}, {each.name: each for each in segments}))


# --- rates --------------------------------------------------------------------------------------


def drawn(rates: npt.NDArray[np.float64], members: int, seed: int = 0) -> CohortTable:
    """A table drawn from each cohort's rates, without a threshold to speak of."""
    rng = np.random.default_rng(seed)
    counts = rng.binomial(members, rates)
    sizes = np.full((len(rates), 1), members)
    return CohortTable.released(np.hstack([sizes, counts]), len(rates), 2)


def test_a_cohorts_favourite_comes_first_for_it_alone() -> None:
    rates = np.full((2, 40), 0.3)
    rates[0, 5] = rates[1, 9] = 0.9
    made = drawn(rates, 200)
    assert (made.start(0).argmax(), made.start(1).argmax()) == (5, 9)
    assert made.start(0)[5] > made.popularity()[5] > made.start(1)[5]


def test_cohorts_that_do_not_differ_start_from_what_is_popular() -> None:
    rates = np.tile(np.linspace(0.05, 0.9, 60), (4, 1))
    made = drawn(rates, 100)
    assert made.strength() > 500
    assert np.abs(made.start(2) - made.popularity()).max() < 0.2


def test_the_strength_is_that_of_the_prior_rates_come_from() -> None:
    rng, overall = np.random.default_rng(0), np.linspace(0.2, 0.8, 400)
    rates = rng.beta(30 * overall, 30 * (1 - overall), (8, 400))
    assert 24 < drawn(rates, 150).strength() < 40


def test_a_cohort_that_was_withheld_starts_from_what_is_popular() -> None:
    made = table()
    assert made.members[2] == 0
    assert np.allclose(made.start(2), made.popularity())


def test_a_withheld_cell_is_below_the_threshold_and_not_nothing() -> None:
    """Everybody else has the item; this cohort's cell is missing: few, but perhaps not none."""
    cells = np.array([[50, 40, 10], [50, 0, 10]])
    made = CohortTable.released(cells, 2, 10)
    rate, strength = 1 / (1 + np.exp(-made.start(1))), made.strength()
    assert rate[0] == pytest.approx((9 + strength * 40.5 / 101) / (50 + strength))


@given(st.lists(PERSON, min_size=3, max_size=30), st.integers(2, 5))
def test_log_odds_are_finite_whatever_was_counted(
    people: list[tuple[int, list[int]]], least: int
) -> None:
    cells = clear(people, least)
    if cells.reshape(COHORTS, -1)[:, 0].any():
        made = CohortTable.released(cells, COHORTS, least)
        assert all(np.isfinite(made.start(cohort)).all() for cohort in range(COHORTS))
        assert np.isfinite(made.popularity()).all()


def test_noise_below_zero_counts_as_zero() -> None:
    noise = np.array([int(Stream.derive("t", b"x").uint32(1)[0] % 5) - 9, -3, 2, 1])
    made = CohortTable.released(np.concatenate([[9], noise[1:]]), 1, 2)
    assert made.counts.tolist() == [[0, 2, 1]]


@pytest.mark.parametrize(
    ("cells", "cohorts", "least"),
    [
        (np.ones(7), 2, 2),
        (np.ones(2), 2, 2),
        (np.ones(0), 1, 2),
        (np.ones(8), 0, 2),
        (np.array([4.0, np.nan]), 1, 2),
        (np.array([4.0, np.inf]), 1, 2),
        (np.array([0.0, 3.0]), 1, 2),
    ],
)
def test_tables_that_cannot_be_are_refused(
    cells: npt.NDArray[np.float64], cohorts: int, least: int
) -> None:
    with pytest.raises(DataError, match="expected"):
        CohortTable.released(cells, cohorts, least)


@pytest.mark.parametrize(("name", "clients"), [("item_bias", 5), (COHORT_COUNTS, 0)])
def test_models_of_another_task_are_refused(name: str, clients: int) -> None:
    with pytest.raises(DataError, match="name the cohorts' task"):
        CohortTable.from_model({name: np.ones((8, 1), np.float32)}, 2, 2, clients)


@pytest.mark.parametrize("cohort", [-1, COHORTS])
def test_a_cohort_that_is_not_there_is_refused(cohort: int) -> None:
    with pytest.raises(DataError, match="expected a cohort in"):
        table().start(cohort)


@pytest.mark.realdata
@pytest.mark.skipif(not HAS_USERS, reason="SECAGG_DATA_DIR has no users of MovieLens 100K")
def test_the_users_of_movielens_fall_into_cohorts() -> None:
    people = load_movielens_users(dataset_folder("ml-100k", REAL_DATA)).values()
    cohorts = [age_gender(person.age, person.gender) for person in people]
    assert np.bincount(cohorts).tolist() == [68, 79, 92, 34, 166, 231, 182, 91]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age", "gender", "name"),
    [(0, "F", "F under 25"), (24, "M", "M under 25"), (25, "F", "F 25-34"), (34, "M", "M 25-34"),
     (49, "F", "F 35-49"), (50, "M", "M 50 and over"), (120, "F", "F 50 and over")],
)  # fmt: skip
def test_everybody_has_a_cohort(age: int, gender: str, name: str) -> None:
    assert AGE_GENDER[age_gender(age, gender)] == name


@pytest.mark.parametrize(("age", "gender"), [(-1, "F"), (121, "M"), (30, "X"), (30, "")])
def test_nobody_is_put_into_a_cohort_by_guessing(age: int, gender: str) -> None:
    with pytest.raises(DataError, match="leave the cohort out") as refused:
        age_gender(age, gender)
    assert str(age) not in str(refused.value).replace("0 to 120", "")
