"""Local training: what it learns, what it hides, what it reproduces."""

import hashlib
import io
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secagg_recommender import factorisation
from secagg_recommender.factorisation import LocalUpdate, Silo, TrainConfig, fit_user, init_shared
from secagg_recommender.interactions import DataError, Split, from_events, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace

CONFIG = TrainConfig(dimensions=4, batch_size=64, seed=11)


def small_split() -> Split:
    return split_leave_one_out(generate_marketplace(3, n_shoppers=30, n_products=90))


def make_silo(index: int = 0, config: TrainConfig = CONFIG) -> Silo:
    return Silo(index, small_split(), np.arange(0, 30, 2), config)


def fresh_shared(config: TrainConfig = CONFIG) -> dict[str, npt.NDArray[np.float32]]:
    return init_shared(small_split().n_items, config.dimensions, config.seed)


def digest(update: LocalUpdate) -> str:
    return hashlib.sha256(
        update.update["item_factors"].tobytes() + update.update["item_bias"].tobytes()
    ).hexdigest()


# --- configuration and start --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"dimensions": 0},
        {"local_epochs": 0},
        {"batch_size": 0},
        {"negatives": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"learning_rate": 1.01},
        {"l2": -0.1},
        {"l2": float("nan")},
        {"proximal": -0.1},
        {"proximal": float("nan")},
        {"proximal": float("inf")},
    ],
)
def test_impossible_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(change))):
        TrainConfig(**change)


def test_configuration_cannot_be_changed_after_checking() -> None:
    with pytest.raises(FrozenInstanceError):
        CONFIG.l2 = -1.0  # type: ignore[misc]


def test_initial_model_has_documented_shapes_and_follows_the_seed() -> None:
    first, again, other = init_shared(7, 3, 1), init_shared(7, 3, 1), init_shared(7, 3, 2)
    assert {name: x.shape for name, x in first.items()} == {
        "item_factors": (7, 3),
        "item_bias": (7,),
    }
    assert all(tensor.dtype == np.float32 for tensor in first.values())
    assert np.array_equal(first["item_factors"], again["item_factors"])
    assert not np.array_equal(first["item_factors"], other["item_factors"])
    assert not first["item_bias"].any()


@pytest.mark.parametrize(("n_items", "d"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_model_is_refused(n_items: int, d: int) -> None:
    with pytest.raises(DataError, match="n_items"):
        init_shared(n_items, d, 0)


# --- privacy ------------------------------------------------------------------------------------


def test_update_holds_the_shared_tensors_and_nothing_else() -> None:
    update = make_silo().train(fresh_shared(), 1)
    shared = fresh_shared()
    assert {name: (x.shape, x.dtype) for name, x in update.update.items()} == {
        name: (x.shape, x.dtype) for name, x in shared.items()
    }


def test_user_vectors_never_appear_in_the_update() -> None:
    silo = make_silo()
    before = silo.user_vectors
    update = silo.train(fresh_shared(), 1)
    leaving = np.concatenate([x.ravel() for x in update.update.values()])
    for vectors in (before, silo.user_vectors, silo.user_vectors - before):
        # A float32 that is a coordinate of a private vector would be found bit for bit.
        assert not np.isin(vectors.ravel(), leaving).any()


def test_update_does_not_share_memory_with_the_silo() -> None:
    silo, shared = make_silo(), fresh_shared()
    update = silo.train(shared, 1)
    for tensor in update.update.values():
        assert not np.shares_memory(tensor, silo._vectors)
        assert not any(np.shares_memory(tensor, old) for old in shared.values())


def test_returned_user_vectors_are_a_copy() -> None:
    silo = make_silo()
    silo.user_vectors[:] = 0.0
    silo.users[:] = 0
    assert silo.user_vectors.all()
    assert silo.users.tolist() == list(range(0, 30, 2))


# --- negatives ----------------------------------------------------------------------------------


def collected_negatives(split: Split, user: int, draws: int) -> npt.NDArray[np.int64]:
    positives = torch.from_numpy(
        np.stack([split.train_users, split.train_items], axis=1).astype(np.int64)
    )
    sampler = factorisation._NegativeSampler(positives, split.n_users, split.n_items)
    users = torch.full((draws,), user, dtype=torch.long)
    drawn = sampler.draw(users, 4, torch.Generator().manual_seed(user))
    return np.asarray(drawn.numpy().ravel())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 11), max_size=11), min_size=1, max_size=6).filter(
        lambda owned: any(owned)
    )
)
def test_negatives_are_exactly_the_items_a_user_does_not_train_on(owned: list[set[int]]) -> None:
    pairs = [(user, item) for user, items in enumerate(owned) for item in items]
    users, items = np.array(pairs, dtype=np.int32).T
    test_item = np.full(len(owned), -1, np.int32)
    split = Split(users, items, test_item, len(owned), 12)
    for user, own in enumerate(owned):
        # 12 000 uniform draws over at most 12 items miss one with probability below 1e-400.
        assert set(collected_negatives(split, user, 3000).tolist()) == set(range(12)) - own


def test_negatives_never_contain_training_items_but_do_contain_the_test_item() -> None:
    split = small_split()
    for user in range(split.n_users):
        drawn = set(collected_negatives(split, user, 1000).tolist())
        assert not drawn & set(split.items_of(user).tolist())
        # 4 000 draws over at most 90 items miss the test item with probability below 1e-19.
        assert int(split.test_item[user]) in drawn


def test_negatives_are_uniform() -> None:
    split = small_split()
    drawn = collected_negatives(split, 0, 50_000)
    free = np.setdiff1d(np.arange(split.n_items), split.items_of(0))
    counts = np.bincount(drawn, minlength=split.n_items)[free]
    expected = drawn.size / free.size
    # About 80 items: five standard deviations are passed with probability below 1e-4; fixed seed.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_training_cannot_see_the_test_items() -> None:
    split = small_split()
    hidden = replace(split, test_item=np.full_like(split.test_item, -1))
    with_test, without = (
        Silo(0, s, np.arange(30), CONFIG).train(fresh_shared(), 1) for s in (split, hidden)
    )
    assert digest(with_test) == digest(without)


# --- determinism --------------------------------------------------------------------------------


def test_round_repeats_bit_for_bit_whatever_happened_before() -> None:
    first = make_silo().train(fresh_shared(), 3)
    torch.manual_seed(99)
    torch.rand(7)
    np.random.seed(1)  # noqa: NPY002 - the point of the test
    silo = make_silo()
    again = silo.train(fresh_shared(), 3)
    assert digest(first) == digest(again)
    assert first.loss == again.loss


def test_order_of_silos_plays_no_part() -> None:
    a, b = make_silo(0), make_silo(1)
    first = [digest(a.train(fresh_shared(), 1)), digest(b.train(fresh_shared(), 1))]
    b, a = make_silo(1), make_silo(0)
    second = [digest(b.train(fresh_shared(), 1)), digest(a.train(fresh_shared(), 1))]
    assert first == second[::-1]


@pytest.mark.parametrize("what", ["round", "silo", "seed"])
def test_rounds_silos_and_seeds_draw_differently(what: str) -> None:
    base = digest(make_silo().train(fresh_shared(), 1))
    silo = make_silo(
        index=int(what == "silo"), config=replace(CONFIG, seed=12) if what == "seed" else CONFIG
    )
    if what == "silo":
        silo._vectors = make_silo(0).user_vectors  # Same start, so only the draws can differ.
    assert digest(silo.train(fresh_shared(), 2 if what == "round" else 1)) != base


def test_neighbouring_seeds_do_not_collide() -> None:
    seeds = {
        factorisation.derived_seed("round", s, i, r)
        for s in range(9)
        for i in range(9)
        for r in range(9)
    }
    assert len(seeds) == 9**3
    assert factorisation.derived_seed("round", 1, 23) != factorisation.derived_seed("round", 12, 3)


def test_thread_setting_changes_nothing_and_comes_back() -> None:
    before = torch.get_num_threads()
    first = digest(make_silo().train(fresh_shared(), 1))
    try:
        torch.set_num_threads(2)
        assert digest(make_silo().train(fresh_shared(), 1)) == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_fresh_process_reproduces_two_rounds() -> None:
    code = """
import hashlib, numpy as np
from secagg_recommender.interactions import split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.factorisation import Silo, TrainConfig, init_shared
split = split_leave_one_out(generate_marketplace(3, n_shoppers=30, n_products=90))
config = TrainConfig(dimensions=4, batch_size=64, seed=11)
silo, shared = Silo(0, split, np.arange(0, 30, 2), config), init_shared(split.n_items, 4, 11)
for number in (1, 2):
    u = silo.train(shared, number).update
    print(hashlib.sha256(u["item_factors"].tobytes() + u["item_bias"].tobytes()).hexdigest())
"""
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    silo = make_silo()
    here = [digest(silo.train(fresh_shared(), number)) for number in (1, 2)]
    assert done.stdout.split() == here


# --- training -----------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_counts_samples() -> None:
    silo, shared = make_silo(), fresh_shared()
    losses = []
    for number in range(1, 9):
        result = silo.train(shared, number)
        shared = {name: tensor + result.update[name] for name, tensor in shared.items()}
        losses.append(result.loss)
    split = small_split()
    assert result.samples == silo.samples == np.isin(split.train_users, silo.users).sum()
    assert losses[0] == pytest.approx(0.69, abs=0.05)  # ln 2: an untrained model guesses.
    assert losses[-1] < losses[0] - 0.1


def test_shared_tensors_are_left_unchanged() -> None:
    shared = fresh_shared()
    make_silo().train(shared, 1)
    assert np.array_equal(shared["item_factors"], fresh_shared()["item_factors"])


def test_score_follows_the_formula() -> None:
    silo, shared = make_silo(), fresh_shared()
    shared["item_bias"][:] = np.linspace(-1, 1, shared["item_bias"].size, dtype=np.float32)
    scores = silo.score(shared)
    expected = float(silo.user_vectors[2] @ shared["item_factors"][5]) + float(
        shared["item_bias"][5]
    )
    assert scores.dtype == np.float32
    assert scores.shape == (15, small_split().n_items)
    assert scores[2, 5] == pytest.approx(expected, rel=1e-5)


def broken_tensors() -> list[tuple[str, dict[str, npt.NDArray[Any]]]]:
    good = fresh_shared()
    factors, bias = good["item_factors"], good["item_bias"]
    nan = factors.copy()
    nan[1, 1] = np.nan
    return [
        ("names=none", {}),
        ("names=item_bias;", {"item_bias": bias}),
        ("names=", {**good, "user_factors": factors}),
        ("float32 of shape", {**good, "item_factors": factors[:-1]}),
        ("float32 of shape", {**good, "item_factors": factors[:, :-1]}),
        ("float32 of shape", {**good, "item_bias": bias[:, None]}),
        ("float64", {**good, "item_bias": bias.astype(np.float64)}),
        ("finite item_factors, got non_finite=1", {**good, "item_factors": nan}),
    ]


@pytest.mark.parametrize("case", range(8))
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(case: int) -> None:
    message, shared = broken_tensors()[case]
    silo = make_silo()
    before = silo.user_vectors
    with pytest.raises(DataError, match=message):
        silo.train(shared, 1)
    with pytest.raises(DataError, match=message):
        silo.score(shared)
    assert np.array_equal(silo.user_vectors, before)


def test_diverging_training_is_refused_and_changes_nothing() -> None:
    silo, shared = make_silo(), fresh_shared()
    for tensor in shared.values():
        tensor[:] = 3e38  # Finite, as a hostile server could send it; sums of two are not.
    before = silo.user_vectors
    with pytest.raises(DataError, match="diverged"):
        silo.train(shared, 1)
    assert np.array_equal(silo.user_vectors, before)


@pytest.mark.parametrize("users", [[], [-1], [30], [0, 31]])
def test_unknown_or_no_users_are_refused(users: list[int]) -> None:
    with pytest.raises(DataError, match="expected users in"):
        Silo(0, small_split(), np.array(users, dtype=np.int64), CONFIG)


def test_silo_without_training_data_is_refused() -> None:
    empty = np.empty(0, np.int32)
    split = Split(empty, empty, np.full(3, -1, np.int32), 3, 5)
    with pytest.raises(DataError, match="samples=0"):
        Silo(0, split, np.arange(3), CONFIG)


def test_user_with_every_item_is_refused() -> None:
    made = from_events("x", [1] * 3 + [2], [1, 2, 3, 1], range(4))
    split = Split(made.users, made.items, np.full(2, -1, np.int32), 2, 3)
    with pytest.raises(DataError, match="lack at least one"):
        Silo(0, split, np.arange(2), CONFIG)


# --- state --------------------------------------------------------------------------------------


def test_restored_silo_continues_like_the_one_that_never_stopped() -> None:
    silo, shared = make_silo(), fresh_shared()
    silo.train(shared, 1)
    saved = silo.state()
    expected = silo.train(shared, 2)
    restarted = make_silo()
    restarted.restore(saved)
    assert digest(restarted.train(shared, 2)) == digest(expected)
    assert np.array_equal(restarted.user_vectors, silo.user_vectors)


def test_restoring_lets_a_round_be_repeated() -> None:
    silo, shared = make_silo(), fresh_shared()
    before = silo.state()
    first = digest(silo.train(shared, 1))
    assert digest(silo.train(shared, 1)) != first
    silo.restore(before)
    assert digest(silo.train(shared, 1)) == first


def saved_arrays(**arrays: Any) -> bytes:  # noqa: ANN401
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def bad_states() -> list[tuple[str, bytes]]:
    silo = make_silo()
    vectors, users = silo.user_vectors, silo.users
    bad = vectors.copy()
    bad[0, 0] = np.inf
    objects = np.array([{}], dtype=object)
    return [
        ("saved silo state", b""),
        ("saved silo state", b"not an archive"),
        ("saved silo state", silo.state()[:-40]),
        ("saved silo state", saved_arrays(silo=0, users=users)),
        ("saved silo state", saved_arrays(silo=0, users=users, vectors=objects)),
        ("state of silo=0", make_silo(1).state()),
        ("state of silo=0", saved_arrays(silo=0, users=users[:-1], vectors=vectors)),
        ("state of silo=0", saved_arrays(silo=np.zeros(2), users=users, vectors=vectors)),
        ("float32 of shape", saved_arrays(silo=0, users=users, vectors=vectors[:-1])),
        ("float32 of shape", saved_arrays(silo=0, users=users, vectors=vectors.astype(float))),
        ("finite user vectors", saved_arrays(silo=0, users=users, vectors=bad)),
    ]


@pytest.mark.parametrize("case", range(11))
def test_unusable_state_is_refused_and_changes_nothing(case: int) -> None:
    message, state = bad_states()[case]
    silo = make_silo()
    before = silo.user_vectors
    with pytest.raises(DataError, match=message):
        silo.restore(state)
    assert np.array_equal(silo.user_vectors, before)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400))
def test_arbitrary_state_bytes_raise_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError):
        make_silo_once().restore(content)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_state_never_raises_anything_else(position: int, flip: int) -> None:
    silo = make_silo_once()
    content = bytearray(silo.state())
    content[position % len(content)] ^= flip
    try:
        silo.restore(bytes(content))
    except DataError:
        return


_SILO: list[Silo] = []


def make_silo_once() -> Silo:
    """One silo for the fuzz tests, which leave it usable."""
    if not _SILO:
        _SILO.append(make_silo())
    return _SILO[0]


# --- new users ----------------------------------------------------------------------------------


def trained_table() -> dict[str, npt.NDArray[np.float32]]:
    silo, shared = Silo(0, small_split(), np.arange(30), CONFIG), fresh_shared()
    for number in range(1, 11):
        update = silo.train(shared, number).update
        shared = {name: tensor + update[name] for name, tensor in shared.items()}
    return shared


def test_fitted_vector_is_the_minimum_of_its_objective() -> None:
    shared, own = trained_table(), np.array([3, 14, 15])
    fitted = fit_user(shared, own, CONFIG).astype(np.float64)
    n_items = shared["item_bias"].size

    def objective(vector: npt.NDArray[np.float64]) -> float:
        logits = shared["item_factors"] @ vector + shared["item_bias"]
        positive = np.logaddexp(0, -logits[own]).mean()
        negative = np.logaddexp(0, np.delete(logits, own)).mean()
        assert len(np.delete(logits, own)) == n_items - 3
        return float((positive + 4 * negative) / 5 + 0.5 * CONFIG.l2 * vector @ vector)

    best = objective(fitted)
    rng = np.random.default_rng(0)
    for size in (1e-2, 0.1, 1.0):
        for _ in range(20):
            direction = rng.normal(size=fitted.size)
            assert objective(fitted + size * direction / np.linalg.norm(direction)) > best


def test_fitted_user_is_shown_own_items_higher() -> None:
    shared, own = trained_table(), np.array([3, 14, 15])
    fitted = fit_user(shared, own, CONFIG)
    gain = shared["item_factors"] @ fitted
    assert fitted.dtype == np.float32
    assert gain[own].mean() > np.delete(gain, own).mean()


def test_fit_ignores_order_and_repeats_and_is_deterministic() -> None:
    shared = trained_table()
    first = fit_user(shared, np.array([1, 2, 3]), CONFIG)
    assert np.array_equal(first, fit_user(shared, np.array([3, 1, 2, 2]), CONFIG))


def test_fit_is_finite_without_regularisation() -> None:
    fitted = fit_user(trained_table(), np.array([5]), replace(CONFIG, l2=0.0))
    assert np.isfinite(fitted).all()


@pytest.mark.parametrize(
    "items",
    [np.array([], np.int64), np.array([-1]), np.array([90]), np.arange(90), np.array([0.5])],
)
def test_unusable_items_of_a_new_user_are_refused(items: npt.NDArray[Any]) -> None:
    shared = init_shared(90, CONFIG.dimensions, 0)
    with pytest.raises(DataError, match="item_ids="):
        fit_user(shared, items, CONFIG)


def test_fit_refuses_a_table_of_another_model() -> None:
    with pytest.raises(DataError, match="float32 of shape"):
        fit_user(init_shared(9, 5, 0), np.array([1]), CONFIG)
    with pytest.raises(DataError, match="names=none"):
        fit_user({}, np.array([1]), CONFIG)


def test_an_update_never_shows_itself_in_text() -> None:
    """Sample counts and losses describe private data; no log line may carry them by accident."""
    update = LocalUpdate({"item_bias": np.full(3, 0.125, dtype=np.float32)}, 4711, 0.987)
    shown = f"{update} {update!r}"
    assert not any(secret in shown for secret in ("4711", "0.987", "0.125"))


# --- FedProx --------------------------------------------------------------------------------------


def descended(mu: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> LocalUpdate:
    """Some steps of plain gradient descent, so that steps are gradients."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    silo = make_silo(config=replace(CONFIG, learning_rate=1.0, proximal=mu))
    return silo.train(fresh_shared(), 1, steps=steps)


def test_a_proximal_step_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Li et al. 2020, equation 2: the gradient of mu/2 ||w - w_t||^2 is mu (w - w_t), which is zero
    # in the first step, and mu times the first step in the second.
    first = descended(0.0, 1, monkeypatch).update
    plain = descended(0.0, 2, monkeypatch).update
    proximal = descended(0.3, 2, monkeypatch).update
    for name in plain:
        expected = plain[name] - 0.3 * first[name]
        assert np.allclose(proximal[name], expected, atol=1e-6)
        assert not np.allclose(plain[name], expected, atol=1e-6)


def test_the_first_proximal_step_is_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, proximal = (descended(mu, 1, monkeypatch) for mu in (0.0, 5.0))
    assert digest(plain) == digest(proximal)


def test_private_vectors_are_not_held_back() -> None:
    # An infinite mu in all but name: the shared tensors stay, the user vectors still learn.
    silo = make_silo(config=replace(CONFIG, proximal=1e12, learning_rate=0.02))
    before = silo.user_vectors
    silo.train(fresh_shared(), 1)
    assert np.abs(silo.user_vectors - before).max() > 0.05


def test_the_proximal_term_keeps_updates_short() -> None:
    norms = []
    for mu in (0.0, 0.01, 1.0):
        update = make_silo(config=replace(CONFIG, proximal=mu)).train(fresh_shared(), 1).update
        norms.append(sum(float(np.square(change).sum()) for change in update.values()))
    assert norms[0] > norms[1] > norms[2]


def test_without_a_proximal_weight_there_is_no_proximal_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = make_silo().train(fresh_shared(), 1)
    # Not even one that is zero: adding it could round elsewhere.
    monkeypatch.setattr(factorisation, "_squared_distance", None)
    assert digest(make_silo().train(fresh_shared(), 1)) == digest(plain)
    with pytest.raises(TypeError):
        make_silo(config=replace(CONFIG, proximal=1.0)).train(fresh_shared(), 1)
