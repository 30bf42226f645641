"""The session model: what it learns, what it refuses, and that its parts add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secagg.optimisers import Optimiser
from secagg.parameters import FloatSegment, IntegerSegment, TensorSpec
from secagg_recommender.attributes import attributes_of
from secagg_recommender.content import ItemContent, item_content
from secagg_recommender.factorisation import SharedTensors
from secagg_recommender.histories import history_model, scores_on
from secagg_recommender.interactions import DataError, Split
from secagg_recommender.learner import Assignment
from secagg_recommender.pair_tables import PairCounts
from secagg_recommender.session_model import (
    ATTRIBUTES,
    DECAYS,
    ITEM_BIAS,
    LONGEST,
    MIX,
    SessionModel,
)
from secagg_recommender.session_silo import (
    SessionConfig,
    SessionSilo,
    init_session,
    session_shapes,
)
from secagg_recommender.stacked import StackedModel, frequent_pairs
from secagg_recommender.trained import UPDATE
from secagg_recommender.transitions import Transitions, transition_counts

ITEMS = 12
CONFIG = SessionConfig(dimensions=8, negatives=12, dropout=0.0)


def content() -> ItemContent:
    """Items 0-5 are shoes, 6-11 socks; each has a make of its own."""
    names = [["shoe" if item < 6 else "sock", f"make {item % 6}"] for item in range(ITEMS)]
    return item_content(attributes_of(names), [str(item) for item in range(ITEMS)], buckets=8)


def split_of(sessions: list[list[int]], n_items: int = ITEMS) -> Split:
    users = np.repeat(np.arange(len(sessions)), [len(items) for items in sessions])
    return Split(
        users.astype(np.int32),
        np.concatenate([np.asarray(items) for items in sessions]).astype(np.int32),
        np.full(len(sessions), -1, dtype=np.int32),
        len(sessions),
        n_items,
    )


def shoe_then_sock() -> Split:
    """Whoever buys a shoe buys the sock of its make next."""
    return split_of([[shoe, shoe + 6] for shoe in range(6)] * 4)


def silo(split: Split | None = None, config: SessionConfig = CONFIG) -> SessionSilo:
    split = split or shoe_then_sock()
    return SessionSilo(0, split, np.arange(split.n_users), content(), config)


def trained(silos: list[SessionSilo], rounds: int, config: SessionConfig = CONFIG) -> SharedTensors:
    """Federated: a gradient of each silo, and a step of the server's optimiser."""
    shared = init_session(content(), config)
    optimiser = Optimiser("adam", learning_rate=0.03, tau=1e-6)
    names, sizes = list(shared), [tensor.size for tensor in shared.values()]
    flat = np.concatenate([tensor.ravel() for tensor in shared.values()])
    state = optimiser.initial(flat.size)
    for number in range(1, rounds + 1):
        updates = [each.train(shared, number).update for each in silos]
        mean = np.mean([np.concatenate([u[n].ravel() for n in names]) for u in updates], axis=0)
        flat, state = optimiser.step(flat, mean.astype(np.float64), state)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        shared = {n: part.reshape(shared[n].shape) for n, part in zip(names, parts, strict=True)}
    return shared


def model(seed: int = 0) -> SessionModel:
    rng = np.random.default_rng(seed)
    parts = (rng.normal(size=shape) for shape in ((ITEMS, 4), (ITEMS,), (len(DECAYS), 4, 4)))
    return SessionModel(*(part.astype(np.float32) for part in parts))


# --- learning -------------------------------------------------------------------------------------


def test_two_silos_learn_what_follows_what() -> None:
    split = shoe_then_sock()
    users = np.arange(split.n_users)
    silos = [SessionSilo(i, split, users[i::2], content(), CONFIG) for i in range(2)]
    found = SessionModel.of(trained(silos, 60), content())
    for shoe in range(6):
        scores = found.score(np.array([shoe]))
        scores[shoe] = -np.inf  # one's own items are never recommended, nor ever negatives
        assert int(np.argmax(scores)) == shoe + 6


def test_a_new_item_is_recommended_where_its_attributes_fit() -> None:
    """A sock of make 2 that nobody has had yet, against an item that is neither."""
    about = content()
    shared = trained([silo()], 60)
    labels = attributes_of([["make 2", "sock"], ["make 4", "shoe"]])
    numbers = {label: number for number, label in enumerate(labels_of(about))}
    new = [[numbers[labels.labels[a]] for a in labels.of(item)] for item in range(2)]
    vectors = np.stack([about.new_vector(shared[ATTRIBUTES], attributes) for attributes in new])
    found = SessionModel.of(shared, about).with_items(vectors)
    scores = found.score(np.array([2]))
    assert scores.shape == (ITEMS + 2,)
    assert scores[ITEMS] > scores[ITEMS + 1]
    assert scores[ITEMS] > np.median(scores[:ITEMS])


def labels_of(about: ItemContent) -> tuple[str, ...]:
    """Attributes of the toy catalogue in the order of their numbers."""
    names = [["shoe" if item < 6 else "sock", f"make {item % 6}"] for item in range(ITEMS)]
    found = attributes_of(names).labels
    assert len(found) == about.n_attributes
    return found


def test_the_loss_is_what_uniform_scores_predict() -> None:
    """All scores equal: ln of the number of items, the user's own left out but for the target."""
    shared = {name: np.zeros_like(t) for name, t in init_session(content(), CONFIG).items()}
    loss = silo(split_of([[0, 1]])).train(shared, 1).loss
    # Of 12 drawn, two are the user's own; each other one stands for 11 / 12.
    assert loss == pytest.approx(np.log(1 + 10 * 11 / 12), rel=1e-5)


def test_one_step_is_the_gradient() -> None:
    """Against a difference quotient of the loss."""
    shared = {n: t.astype(np.float32) for n, t in init_session(content(), CONFIG).items()}
    shared[ITEM_BIAS] = np.linspace(-1, 1, ITEMS, dtype=np.float32)
    one = silo()
    update = one.train(shared, 3).update
    rng = np.random.default_rng(0)
    for name in shared:
        direction = rng.normal(size=shared[name].shape).astype(np.float32)
        step = 0.01
        ahead, behind = (
            one.train(shared | {name: (shared[name] + sign * step * direction)}, 3).loss
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        assert -float((update[name] * direction).sum()) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_own_items_are_never_negatives() -> None:
    """With nothing else to draw, there is nothing to learn against."""
    everything = split_of([list(range(ITEMS))])
    trained_on_all = silo(everything).train(init_session(content(), CONFIG), 1)
    assert trained_on_all.loss == 0.0
    assert not any(update.any() for update in trained_on_all.update.values())


def test_only_the_latest_items_of_a_session_count() -> None:
    rng = np.random.default_rng(0)
    names = [["only"]] * 200
    about = item_content(attributes_of(names), [str(n) for n in range(200)], buckets=4)
    long = rng.permutation(200)[: LONGEST + 40].tolist()
    config = replace(CONFIG, negatives=200)
    shared = init_session(about, config)
    users = np.arange(1)
    whole = SessionSilo(0, split_of([long], 200), users, about, config)
    recent = SessionSilo(0, split_of([long[-LONGEST - 1 :]], 200), users, about, config)
    assert whole.samples == recent.samples == LONGEST
    assert whole.train(shared, 1).loss == pytest.approx(recent.train(shared, 1).loss, rel=1e-6)


# --- repeatable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_a_round_repeats_bit_for_bit(steps: int) -> None:
    config = replace(CONFIG, dropout=0.3, steps=steps, learning_rate=0.1)
    shared = init_session(content(), config)
    first = silo(config=config).train(shared, 7)
    again = silo(config=config).train(shared, 7)
    for name in shared:
        np.testing.assert_array_equal(first.update[name], again.update[name])
    other = silo(config=config).train(shared, 8)
    assert any((first.update[name] != other.update[name]).any() for name in shared)


def test_training_leaves_the_model_and_the_generator_alone() -> None:
    shared = init_session(content(), CONFIG)
    before = {name: tensor.copy() for name, tensor in shared.items()}
    silo().train(shared, 1)
    for name, tensor in shared.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_nothing_is_private_but_the_sessions() -> None:
    one = silo()
    assert one.state() == b""
    one.restore(b"")
    with pytest.raises(DataError, match="no private state"):
        one.restore(b"something")


# --- floats ---------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 512))
def test_shared_floats_are_those_that_the_shapes_say(d: int, buckets: int) -> None:
    names = [["a", "b"], ["b"], []]
    about = item_content(attributes_of(names), ["1", "2", "3"], buckets=buckets)
    config = SessionConfig(dimensions=d)
    shared = init_session(about, config)
    assert {n: t.shape for n, t in shared.items()} == session_shapes(about, config)
    assert sum(t.size for t in shared.values()) == 2 * d + 2 * buckets * d + 3 * d * d + 3


def test_beautys_catalogue_takes_less_than_60_thousand_floats() -> None:
    """12,101 items with 637 attributes."""
    names = [[str(item % 637)] for item in range(12_101)]
    about = item_content(attributes_of(names), [str(n) for n in range(12_101)])
    shapes = session_shapes(about, SessionConfig())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 49_893


# --- taking part ----------------------------------------------------------------------------------


def segment(config: SessionConfig = CONFIG) -> FloatSegment:
    shapes = session_shapes(content(), config)
    specs = tuple(TensorSpec(name, shape) for name, shape in shapes.items())
    return FloatSegment(UPDATE, specs, 1.0, 8, "samples", 100)


def test_a_silo_is_a_learner() -> None:
    one = silo(split_of([[0, 1, 2], [3], [4, 5]]))
    assert one.items.tolist() == [0, 1, 2, 3, 4, 5]
    shared = init_session(content(), CONFIG)
    work = one.work(Assignment(1, shared, {UPDATE: segment()}))
    assert work.samples == one.samples == 3
    assert set(work.arrays[UPDATE]) == set(shared)


def test_other_rounds_are_refused() -> None:
    shared = init_session(content(), CONFIG)
    for segments in ({}, {"gram": IntegerSegment("gram", 3, 1)}):
        with pytest.raises(DataError, match="one segment 'update'"):
            silo().work(Assignment(1, shared, segments))


@pytest.mark.parametrize(
    "change",
    [
        {MIX: np.zeros((len(DECAYS), 8, 7), np.float32)},
        {ITEM_BIAS: np.zeros(ITEMS, np.float64)},
        {ITEM_BIAS: np.zeros(ITEMS + 1, np.float32)},
        {"another": np.zeros(1, np.float32)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(DataError, match="float32 tensors of shapes"):
        silo().train(init_session(content(), CONFIG) | change, 1)


def test_a_missing_tensor_is_refused() -> None:
    shared = init_session(content(), CONFIG)
    del shared[MIX]
    with pytest.raises(DataError, match="float32 tensors of shapes"):
        silo().train(shared, 1)
    with pytest.raises(DataError, match="tensors of a session model"):
        SessionModel.of(shared, content())


def test_models_that_are_not_finite_are_refused() -> None:
    shared = init_session(content(), CONFIG)
    shared[ATTRIBUTES][0, 0] = np.nan
    with pytest.raises(DataError, match="finite model"):
        silo().train(shared, 1)


def test_divergence_is_an_error() -> None:
    shared = init_session(content(), CONFIG)
    shared[ATTRIBUTES] = np.full_like(shared[ATTRIBUTES], 1e25)
    with pytest.raises(DataError, match="diverged"):
        silo().train(shared, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dimensions": 0},
        {"negatives": 0},
        {"steps": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
    ],
)
def test_settings_that_cannot_train_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        SessionConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("users", [[], [-1], [99]])
def test_unknown_users_are_refused(users: list[int]) -> None:
    with pytest.raises(DataError, match="expected users"):
        SessionSilo(0, shoe_then_sock(), np.array(users, dtype=np.int64), content(), CONFIG)


def test_silos_without_anything_that_follows_are_refused() -> None:
    with pytest.raises(DataError, match="two training items"):
        silo(split_of([[0], [1]]))


def test_content_of_another_catalogue_is_refused() -> None:
    with pytest.raises(DataError, match="content of the split's 13 items"):
        silo(split_of([[0, 1]], 13))


# --- serving --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=70), st.integers(0, ITEMS - 1))
def test_terms_add_up_to_the_score(history: list[int], item: int) -> None:
    found, items = model(), np.array(history)
    terms = found.terms(items, item)
    assert terms.shape == (len(history),)
    assert terms.sum() + found.bias[item] == pytest.approx(found.score(items)[item], abs=1e-3)


def test_scores_are_those_that_training_sees() -> None:
    """A silo's loss is the cross-entropy of the model's own scores."""
    shared = trained([silo()], 5)
    config = replace(CONFIG, negatives=ITEMS)
    sessions = split_of([[3, 7, 1, 10]])
    loss = silo(sessions, config).train(shared, 1).loss
    found, expected = SessionModel.of(shared, content()), []
    for place in (1, 2, 3):
        history = np.array([3, 7, 1, 10])
        scores = found.score(history[:place]).astype(np.float64)
        target = scores[history[place]]
        others = np.exp(np.delete(scores, history)).sum() * (ITEMS - 1) / ITEMS
        expected.append(np.log(np.exp(target) + others) - target)
    assert loss == pytest.approx(float(np.mean(expected)), rel=1e-4)


def test_tensors_come_back() -> None:
    found = model()
    again = SessionModel.from_tensors(found.tensors())
    assert found.tensors().keys() == SessionModel.names()
    np.testing.assert_array_equal(again.score(np.array([1, 2])), found.score(np.array([1, 2])))


def test_users_of_a_split_are_scored_from_their_sessions() -> None:
    found, sessions = model(), split_of([[1, 2], [3]])
    scores = scores_on(found, sessions)(np.array([1, 0]))
    np.testing.assert_array_equal(scores[1], found.score(np.array([1, 2])))


@pytest.mark.parametrize("history", [[], [ITEMS], [-1], [0.5]])
def test_histories_that_make_no_sense_are_refused(history: list[float]) -> None:
    with pytest.raises(DataError):
        model().score(np.array(history))
    with pytest.raises(DataError):
        model().terms(np.array(history), 0)


def test_unknown_items_are_not_explained() -> None:
    with pytest.raises(DataError, match="items in"):
        model().terms(np.array([0]), ITEMS)


def test_arrays_that_do_not_fit_make_no_model() -> None:
    good = model()
    for wrong in (
        {"bias": good.bias[1:]},
        {"mix": good.mix[:2]},
        {"vectors": good.vectors[:, :3]},
        {"vectors": good.vectors.ravel()},
        {"bias": np.full(ITEMS, np.inf, np.float32)},
    ):
        with pytest.raises(DataError, match="finite vectors, bias and mix"):
            replace(good, **wrong)


def test_new_items_need_vectors_of_the_models_length() -> None:
    with pytest.raises(DataError, match="vectors of 4 numbers"):
        model().with_items(np.zeros((2, 5), dtype=np.float32))


# --- on top of counts -----------------------------------------------------------------------------


def counted(sessions: list[list[int]], n_items: int = ITEMS) -> Transitions:
    pairs = transition_counts([np.array(s) for s in sessions], n_items, (1,))
    return Transitions.of(pairs, np.ones(n_items, dtype=np.int64), backward=0.0, damping=1.0)


def test_counts_lift_what_has_followed() -> None:
    plain = model()
    stacked = StackedModel(plain, counted([[0, 5], [0, 5], [0, 7]]), weight=2.0, gain=10.0)
    lift = stacked.score(np.array([0])) - plain.score(np.array([0]))
    assert lift[5] == pytest.approx(2 * np.log1p(10 * 2 / 3), rel=1e-4)
    assert lift[5] > lift[7] > 1
    assert np.abs(np.delete(lift, [5, 7])).max() < 1e-4
    nothing = StackedModel(plain, counted([[0, 5]]), weight=0.0)
    np.testing.assert_allclose(nothing.score(np.array([0])), plain.score(np.array([0])))


@given(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=9, unique=True))
def test_terms_of_both_add_up(history: list[int]) -> None:
    stacked = StackedModel(model(), counted([[0, 5, 7], [1, 5], [7, 2]]))
    items = np.array(history)
    for item in (5, 7):
        total = stacked.terms(items, item).sum() + stacked.session.bias[item]
        assert total == pytest.approx(stacked.score(items)[item], abs=1e-3)


def test_a_stack_comes_back() -> None:
    stacked = StackedModel(model(), counted([[0, 5]]), weight=1.5, gain=7.0)
    again = StackedModel.from_tensors(stacked.tensors())
    assert stacked.tensors().keys() == StackedModel.names()
    assert isinstance(history_model(stacked.tensors()), StackedModel)
    assert isinstance(history_model(stacked.session.tensors()), SessionModel)
    np.testing.assert_array_equal(again.score(np.array([0])), stacked.score(np.array([0])))


def test_stacks_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="one catalogue"):
        StackedModel(model(), counted([[0, 1]], 13))
    for wrong in ({"weight": -1.0}, {"gain": 0.0}, {"weight": float("nan")}):
        with pytest.raises(DataError, match="weight >= 0"):
            StackedModel(model(), counted([[0, 1]]), **wrong)


def test_frequent_pairs_are_those_of_several() -> None:
    pairs = PairCounts.of(3, np.array([1, 1, 5]), np.array([1, 1, 1]))
    weighted = PairCounts.of(3, np.array([1, 5]), np.array([8, 16]))
    kept = frequent_pairs(weighted, pairs, 2)
    assert (kept.keys.tolist(), kept.counts.tolist()) == ([1], [8])
    assert frequent_pairs(weighted, pairs, 1).keys.tolist() == [1, 5]
    assert frequent_pairs(weighted, pairs, 3).keys.tolist() == []
    for least, other in ((0, pairs), (1, PairCounts.of(4, np.array([1]), np.array([1])))):
        with pytest.raises(DataError, match="least >= 1"):
            frequent_pairs(weighted, other, least)
