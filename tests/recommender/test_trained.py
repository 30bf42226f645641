"""A silo that trains, as a learner: its update, its figure, and its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg.parameters import FloatSegment, IntegerSegment, TensorSpec
from secagg_recommender import trained as trained_module
from secagg_recommender.devices import Budget
from secagg_recommender.factorisation import Silo, TrainConfig, init_shared
from secagg_recommender.interactions import (
    NO_TEST_ITEM,
    DataError,
    Split,
    split_leave_one_out,
)
from secagg_recommender.learner import Assignment
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.trained import Trained, WithinBudget, hold_out

CONFIG = TrainConfig(dimensions=4, batch_size=64)
SPLIT = split_leave_one_out(generate_marketplace(0, n_shoppers=40, n_products=100))
ITEMS = SPLIT.n_items
TENSORS = (TensorSpec("item_bias", (ITEMS,)), TensorSpec("item_factors", (ITEMS, 4)))
FIGURE = IntegerSegment("validation", 2, 1000)


def assignment(number: int = 1, *, weighting: str = "samples", figure: bool = False) -> Assignment:
    cap = 10_000 if weighting == "samples" else 1
    update = FloatSegment("update", TENSORS, 1.0, 8, weighting, cap)
    segments = {"update": update} | ({"validation": FIGURE} if figure else {})
    return Assignment(number, init_shared(ITEMS, 4, 0), segments, rounds=10, upload_bytes=1000)


def silo(split: Split = SPLIT) -> Silo:
    return Silo(0, split, np.arange(20), CONFIG)


def test_the_work_is_the_silos_own_update() -> None:
    work = Trained(silo()).work(assignment())
    assert work is not None
    own = silo().train(assignment().model, 1)
    assert work.samples == own.samples
    assert work.arrays.keys() == {"update"}
    for name, value in own.update.items():
        np.testing.assert_array_equal(work.arrays["update"][name], value)  # type: ignore[call-overload]
    assert "array" not in repr(work)


def test_what_a_learner_remembers_gives_the_same_work_again() -> None:
    learner = Trained(silo())
    before = learner.state()
    first = learner.work(assignment(1))
    learner.restore(before)
    again = learner.work(assignment(1))
    assert first is not None
    assert again is not None
    for name, value in first.arrays["update"].items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(value, again.arrays["update"][name])  # type: ignore[call-overload]


@pytest.mark.parametrize("segments", [{}, {"gram": FIGURE}, {"update": FIGURE}])
def test_a_round_for_another_kind_of_model_is_refused(segments: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="kind of model that the task is for"):
        Trained(silo()).work(Assignment(1, init_shared(ITEMS, 4, 0), segments))


# --- the figure ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_holding_out_takes_each_users_last_item_and_leaves_at_least_one(counts: list[int]) -> None:
    users = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    items = np.arange(users.size, dtype=np.int32)
    split = Split(users, items, np.full(len(counts), 99, np.int32), len(counts), 100)
    held = hold_out(split)
    for user, count in enumerate(counts):
        own = split.items_of(user)
        if count < 2:
            assert held.test_item[user] == NO_TEST_ITEM
            np.testing.assert_array_equal(held.items_of(user), own)
        else:
            assert held.test_item[user] == own[-1]
            np.testing.assert_array_equal(held.items_of(user), own[:-1])


def test_the_figure_counts_the_users_whose_held_out_item_is_among_the_best() -> None:
    held = hold_out(SPLIT)
    mine, asked = silo(held), assignment(figure=True)
    model = dict(asked.model)
    for number in range(20):  # until it knows best what its users have already
        update = mine.train(model, number).update
        model = {name: value + update[name] for name, value in model.items()}
    # The same, user by user, by sorting.
    scores, expected = mine.score(model), 0
    work = Trained(mine, held).work(Assignment(1, model, asked.segments))
    assert work is not None
    hits, users = np.asarray(work.arrays["validation"]).tolist()
    assert users == 20
    for user in range(20):
        free = np.setdiff1d(np.arange(ITEMS), held.items_of(user))
        best = free[np.argsort(-scores[user, free])][:10]
        expected += int(held.test_item[user]) in best.tolist()
    assert hits == expected


def test_equal_scores_are_no_hit() -> None:
    """A model that knows nothing finds nothing."""
    held = hold_out(SPLIT)
    given_ = assignment(figure=True)
    flat = {name: np.zeros_like(value) for name, value in given_.model.items()}
    learner = Trained(silo(held), held)
    work = learner.work(Assignment(1, flat, given_.segments))
    assert work is not None
    np.testing.assert_array_equal(work.arrays["validation"], [0, 20])


def test_whoever_holds_nothing_out_tells_nothing() -> None:
    work = Trained(silo()).work(assignment(figure=True))
    assert work is not None
    np.testing.assert_array_equal(work.arrays["validation"], [0, 0])


def test_the_held_out_item_is_not_trained_on() -> None:
    held = hold_out(SPLIT)
    learner = Trained(silo(held), held)
    own = {int(item) for user in range(20) for item in held.items_of(user)}
    assert set(learner.items.tolist()) == own


# --- budgets ------------------------------------------------------------------------------------


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second here, whatever else the machine does."""
    monkeypatch.setattr(trained_module, "seconds_per_step", lambda _silo, _model: 1.0)


@pytest.mark.usefixtures("steady")
def test_a_weak_device_does_less_of_fewer_rounds_and_weighs_more(tmp_path: Path) -> None:
    budget = Budget(train_seconds=2.0, upload_bytes=5000)
    learner = Trained(silo(), None, WithinBudget(budget, 0, tmp_path / "workload.json"))
    works = [learner.work(assignment(number)) for number in range(1, 11)]
    done = [work for work in works if work is not None]
    assert len(done) == 5
    full = silo()
    assert full.full_steps > 2
    expected = round(full.samples * full.full_steps / 2 * 10 / 5)
    assert {work.samples for work in done} == {expected}


@pytest.mark.usefixtures("steady")
def test_a_restart_and_a_busier_machine_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, budget = tmp_path / "workload.json", Budget(train_seconds=2.0)
    first = Trained(silo(), None, WithinBudget(budget, 0, file)).work(assignment())
    monkeypatch.setattr(trained_module, "seconds_per_step", lambda _silo, _model: 100.0)
    again = Trained(silo(), None, WithinBudget(budget, 0, file)).work(assignment())
    assert first is not None
    assert again is not None
    assert first.samples == again.samples


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"steps": 1}', "null"])
def test_a_damaged_workload_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "workload.json"
    file.write_text(text)
    learner = Trained(silo(), None, WithinBudget(Budget(2.0), 0, file))
    with pytest.raises(DataError, match="remove the file"):
        learner.work(assignment())


@pytest.mark.usefixtures("steady")
def test_equal_weights_cannot_make_up_for_what_a_device_leaves_out(tmp_path: Path) -> None:
    within = WithinBudget(Budget(upload_bytes=5000), 0, tmp_path / "workload.json")
    learner = Trained(silo(), None, within)
    with pytest.raises(DataError, match="weighs updates by samples"):
        _ = [learner.work(assignment(number, weighting="equal")) for number in range(1, 11)]
    whole = WithinBudget(Budget(upload_bytes=10_000), 0, tmp_path / "other.json")
    assert Trained(silo(), None, whole).work(assignment(weighting="equal")) is not None
