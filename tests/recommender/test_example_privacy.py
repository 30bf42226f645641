"""Noisy local training: what one interaction can move, what is counted, what is never repeated."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn

from secagg.accounting import example_level
from secagg.errors import ConfigurationError
from secagg.sampling import Stream
from secagg_recommender import example_privacy
from secagg_recommender.evaluation import evaluate, factor_scores
from secagg_recommender.example_gradients import BOUND, Examples, GridOptimizer, Recommender
from secagg_recommender.example_privacy import ExamplePrivacy, PrivateSilo
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, Silo, TrainConfig, init_shared
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.marketplace import generate_marketplace
from secagg_recommender.partition import partition_users

Arrays = tuple[npt.NDArray[np.float32], ...]

CONFIG = TrainConfig(dimensions=4, seed=11)
PRIVACY = ExamplePrivacy(
    epsilon=4.0,
    delta=1e-6,
    noise_multiplier=2.0,
    sampling_rate=0.1,
    steps=3,
    nominal_samples=300,
)


def small_split() -> Split:
    return split_leave_one_out(generate_marketplace(3, n_shoppers=30, n_products=90))


SPLIT = small_split()
USERS = np.arange(0, 30, 2)
SHARED = init_shared(SPLIT.n_items, CONFIG.dimensions, CONFIG.seed)


def streams(label: str = "test") -> Callable[[], Stream]:
    """Streams that repeat from one call of this function to the next."""
    numbers = count()
    return lambda: Stream.derive(label, next(numbers))


def make_silo(
    privacy: ExamplePrivacy = PRIVACY,
    *,
    split: Split = SPLIT,
    ledger: Path | None = None,
    randomness: Callable[[], Stream] = Stream.from_os,
) -> PrivateSilo:
    return PrivateSilo(0, split, USERS, CONFIG, privacy, ledger=ledger, randomness=randomness)


@cache
def trained_state() -> bytes:
    silo = make_silo()
    silo.train(SHARED, 1)
    return silo.state()


def tables(seed: int, scale: float = 0.5, users: int = 5, items: int = 9, d: int = 4) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = ((users, d), (items, d), (items,))
    return tuple((scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes)


def examples(seed: int, size: int, users: int = 5, items: int = 9) -> Arrays:
    rng = np.random.default_rng(seed)
    return rng.integers(0, users, size), rng.integers(0, items, (size, 5))


def optimiser(model: Recommender, **changes: float | Stream) -> GridOptimizer:
    chosen: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.2,
        "expected_batch_size": 10.0,
        "learning_rate": 0.5,
        "stream": Stream.derive("unused"),
    }
    return GridOptimizer(model, **{**chosen, **changes})


def sums(start: Arrays, batch: Examples, **changes: float) -> npt.NDArray[np.int64]:
    """The integers before the noise, of all three tables, one behind the other."""
    model = Recommender(*start)
    step = optimiser(model, learning_rate=0.0, **changes)
    step.descend(batch, 0.01)
    return np.concatenate([p.summed_grad.numpy().reshape(-1) for p in step.params])


def exact_norm(values: npt.NDArray[np.int64]) -> float:
    return math.sqrt(sum(int(value) ** 2 for value in values))


# --- the step -----------------------------------------------------------------------------------


def test_without_noise_and_cut_it_is_a_plain_gradient_step() -> None:
    start, (users, items) = tables(1), examples(2, 13)
    model = Recommender(*start)
    optimiser(model, max_grad_norm=1000.0).descend(Examples(users, items), 0.01)
    p, q, b = (table.astype(np.float64) for table in start)
    slopes = [np.zeros_like(p), np.zeros_like(q), np.zeros_like(b)]
    for user, row in zip(users, items, strict=True):
        slopes[0][user] += 0.01 * p[user]
        for place, item in enumerate(row):
            logit = p[user] @ q[item] + b[item]
            slope = (1.0 / (1.0 + math.exp(-logit)) - (place == 0)) / 5
            slopes[0][user] += slope * q[item]
            slopes[1][item] += slope * p[user] + 0.01 / 5 * q[item]
            slopes[2][item] += slope + 0.01 / 5 * b[item]
    # By the expected size of a batch, 10, though this one has 13.
    expected = [old - 0.5 / 10 * slope for old, slope in zip((p, q, b), slopes, strict=True)]
    for table, values in zip((model.vectors, model.factors, model.bias), expected, strict=True):
        moved = table.weight.detach().numpy().reshape(values.shape)
        np.testing.assert_allclose(moved, values, rtol=0, atol=1e-6)


def test_gradients_of_examples_are_those_of_opacus_own_tables() -> None:
    start, (users, items) = tables(3), examples(4, 20)
    items[0] = [2, 2, 5, 2, 5]  # An item that is positive and negative, and one drawn twice.
    batch = Examples(users, items)
    ours, theirs = Recommender(*start), Recommender(*start)
    for name in ("vectors", "factors", "bias"):
        weights = getattr(theirs, name).weight.detach().clone()
        setattr(theirs, name, nn.Embedding.from_pretrained(weights, freeze=False))  # type: ignore[no-untyped-call]
    for model in (ours, theirs):
        wrapped = GradSampleModule(model, loss_reduction="sum")
        with pytest.warns(UserWarning, match="Full backward hook"):
            (wrapped(batch, 0.01) * batch.weights).sum().backward()
    for own, stock in zip(ours.parameters(), theirs.parameters(), strict=True):
        rows, sample = own.touched, own.grad_sample  # type: ignore[attr-defined]
        dense = torch.zeros_like(stock.grad_sample)  # type: ignore[attr-defined]
        dense.scatter_add_(1, rows[:, :, None].expand_as(sample), sample)
        torch.testing.assert_close(dense, stock.grad_sample)  # type: ignore[attr-defined]
        norms = sample.flatten(1).norm(dim=1), dense.flatten(1).norm(dim=1)
        torch.testing.assert_close(*norms)


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 140),
    scale=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 50.0, 1e6, 1e18]),
    max_grad_norm=st.sampled_from([1e-9, 0.05, 0.2, 1.0, 1e6]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_an_example_moves_the_sums_by_exactly_its_own_cut_gradient(
    seed: int, size: int, scale: float, max_grad_norm: float, data: st.DataObject
) -> None:
    start, (users, items) = tables(seed, scale), examples(seed + 1, size)
    gone = data.draw(st.integers(0, size - 1))
    others = np.arange(size) != gone
    whole = sums(start, Examples(users, items), max_grad_norm=max_grad_norm)
    without = sums(start, Examples(users[others], items[others]), max_grad_norm=max_grad_norm)
    alone = sums(start, Examples(users[[gone]], items[[gone]]), max_grad_norm=max_grad_norm)
    # To the bit, so that no error of floats adds up over a batch, wherever its neighbours stand.
    assert np.array_equal(whole - without, alone)
    assert exact_norm(alone) <= BOUND


@pytest.mark.parametrize("d", [1, 3, 8, 17])
def test_gradients_have_the_same_bits_in_every_batch(d: int) -> None:
    # Before they are put on the grid, which hides most differences: without padding, this fails.
    for seed in range(12):
        start, size = tables(seed, 2.0, 50, 90, d), 2 + 7 * seed % 97
        users, items = examples(seed, size, 50, 90)
        others = np.arange(size) != seed % size
        whole, without = (
            float_gradients(start, Examples(users[kept], items[kept]))
            for kept in (np.arange(size), others)
        )
        for one, other in zip(whole, without, strict=True):
            assert torch.equal(one[:size][others], other[: size - 1])


def float_gradients(start: Arrays, batch: Examples) -> list[torch.Tensor]:
    step = optimiser(Recommender(*start))
    step.descend(batch, 0.01)
    return [gradient.clone() for gradient in step.grad_samples]


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_not() -> None:
    start, (users, items) = tables(1), examples(2, 1)
    batch = Examples(users, items)
    assert exact_norm(sums(start, batch, max_grad_norm=1e-3)) == pytest.approx(BOUND, rel=1e-7)
    loose, looser = (sums(start, batch, max_grad_norm=norm) for norm in (50.0, 100.0))
    assert exact_norm(loose) < BOUND / 10
    np.testing.assert_allclose(loose, 2 * looser, atol=2)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_gradients_that_are_no_numbers_count_as_nothing(value: float) -> None:
    start, (users, items) = tables(1), examples(2, 8)
    start[0][:] = value
    moved = sums(start, Examples(users, items))
    assert exact_norm(moved) <= 8 * BOUND
    assert np.abs(moved).max() <= 8 * BOUND


def test_noise_is_discrete_gaussian_on_all_tables_and_all_there_is_in_an_empty_batch() -> None:
    start = tables(1, users=600, items=700, d=16)
    model = Recommender(*start)
    step = optimiser(model, noise_multiplier=1.5, learning_rate=3.0, stream=Stream.derive("noise"))
    empty = Examples(np.zeros(0, np.int64), np.zeros((0, 5), np.int64))
    step.descend(empty, 0.01)
    for old, table in zip(start, (model.vectors, model.factors, model.bias), strict=True):
        moved = (table.weight.detach().numpy().reshape(old.shape) - old.astype(np.float64)).ravel()
        noise = moved / (-3.0 / 10) / 0.2
        # Standard errors of mean, deviation and kurtosis of n normal values; six of each.
        n = noise.size
        assert abs(noise.mean()) < 6 * 1.5 / math.sqrt(n)
        assert abs(noise.std() / 1.5 - 1) < 6 / math.sqrt(2 * n)
        assert abs(((noise / 1.5) ** 4).mean() - 3) < 6 * math.sqrt(96 / n)
    integers = np.concatenate([p.grad.numpy().ravel() for p in step.params]) / 0.2 * 10 * BOUND
    np.testing.assert_allclose(integers, np.rint(integers), rtol=1e-15, atol=1e-5)
    assert np.unique(np.rint(integers) % 64).size == 64


def test_a_step_cannot_use_gradients_twice() -> None:
    start, (users, items) = tables(1), examples(2, 3)
    step = optimiser(Recommender(*start))
    step.descend(Examples(users, items), 0.01)
    with pytest.raises(ValueError, match="cleared"):
        step.step()


# --- batches ------------------------------------------------------------------------------------


def test_each_interaction_is_in_a_batch_by_a_coin_of_its_own() -> None:
    stream, rate, batches = Stream.derive("coins"), 0.3, 4000
    coins = np.stack([example_privacy._coins(stream, 50, rate) for _ in range(batches)])
    # Six standard errors; the stream is fixed, so this cannot fail by chance.
    assert np.abs(coins.mean(axis=0) - rate).max() < 6 * math.sqrt(rate * (1 - rate) / batches)
    together = np.corrcoef(coins.T)[np.triu_indices(50, 1)]
    assert np.abs(together).max() < 6 / math.sqrt(batches)
    sizes = coins.sum(axis=1)
    variance = 50 * rate * (1 - rate)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt(2 / batches)


@pytest.mark.parametrize(
    ("rate", "least", "most"), [(1.0, 1000, 1000), (1 - 2**-53, 999, 1000), (2.0**-64, 0, 0)]
)
def test_extreme_rates_are_kept(rate: float, least: int, most: int) -> None:
    assert least <= example_privacy._coins(Stream.derive("edge"), 1000, rate).sum() <= most


def test_other_interactions_do_not_touch_an_examples_negatives() -> None:
    # The last interaction gone: all other examples of a full batch are the same to the bit, and
    # the integers before the noise differ by no more than the norm.
    mine = np.flatnonzero(np.isin(SPLIT.train_users, USERS))
    kept = np.delete(np.arange(SPLIT.train_users.size), mine[-1])
    fewer = replace(SPLIT, train_users=SPLIT.train_users[kept], train_items=SPLIT.train_items[kept])
    everything = replace(PRIVACY, sampling_rate=1.0)
    batches = [
        make_silo(everything, split=split)._batch(Stream.derive("full")) for split in (SPLIT, fewer)
    ]
    size = mine.size - 1
    ours, theirs = (batch.items[:size].numpy() for batch in batches)
    assert np.array_equal(ours, theirs)
    start = (make_silo().user_vectors, SHARED[ITEM_FACTORS], SHARED[ITEM_BIAS])
    whole, without = (sums(start, batch) for batch in batches)
    assert 0 < exact_norm(whole - without) <= BOUND


def test_negatives_come_from_the_whole_catalogue_the_users_own_items_included() -> None:
    batch = make_silo(replace(PRIVACY, sampling_rate=1.0))._batch(Stream.derive("negatives"))
    negatives = batch.items[batch.weights > 0, 1:].numpy()
    counts = np.bincount(negatives.ravel(), minlength=SPLIT.n_items)
    expected = negatives.size / SPLIT.n_items
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)
    assert (negatives == batch.items[batch.weights > 0, :1].numpy()).any()


def test_steps_and_divisor_do_not_depend_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = GridOptimizer.scale_grad

    def watched(step: GridOptimizer) -> None:
        before = step.params[0].grad.clone()
        plain(step)
        seen.append(float((before / step.params[0].grad).nanmedian()))

    monkeypatch.setattr(GridOptimizer, "scale_grad", watched)
    trained = make_silo(replace(PRIVACY, sampling_rate=0.02)).train(SHARED, 1)
    assert seen == pytest.approx([0.02 * 300] * PRIVACY.steps)
    assert trained.samples == PRIVACY.nominal_samples
    assert math.isnan(trained.loss)


# --- the silo -----------------------------------------------------------------------------------


def test_training_follows_the_stream_and_nothing_else() -> None:
    first, again = (make_silo(randomness=streams()) for _ in range(2))
    other, fresh = make_silo(randomness=streams("other")), make_silo()
    updates = [silo.train(SHARED, 1).update for silo in (first, again, other, fresh)]
    assert np.array_equal(updates[0][ITEM_FACTORS], updates[1][ITEM_FACTORS])
    assert np.array_equal(first.user_vectors, again.user_vectors)
    for update in updates[2:]:
        assert not np.any(updates[0][ITEM_FACTORS] == update[ITEM_FACTORS])


def test_update_is_the_change_of_the_shared_tensors() -> None:
    update = make_silo().train(SHARED, 1).update
    assert {name: change.shape for name, change in update.items()} == {
        name: tensor.shape for name, tensor in SHARED.items()
    }
    assert all(change.dtype == np.float32 for change in update.values())
    # Noise is on every number: which rows a batch touched does not show.
    assert all(np.count_nonzero(change) == change.size for change in update.values())


def test_user_vectors_move_by_noisy_steps_alone() -> None:
    silo = make_silo(replace(PRIVACY, sampling_rate=1e-9))
    before = silo.user_vectors
    silo.train(SHARED, 1)
    assert np.count_nonzero(silo.user_vectors != before) == before.size


def test_thread_count_is_given_back() -> None:
    threads = torch.get_num_threads()
    make_silo().train(SHARED, 1)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("broken", ["names", "shape", "dtype", "finite"])
def test_models_that_do_not_fit_cost_nothing(broken: str) -> None:
    silo = make_silo()
    model: dict[str, npt.NDArray[Any]] = dict(SHARED)
    if broken == "names":
        del model[ITEM_BIAS]
    elif broken == "shape":
        model[ITEM_BIAS] = model[ITEM_BIAS][1:]
    elif broken == "dtype":
        model[ITEM_BIAS] = model[ITEM_BIAS].astype(np.float64)
    else:
        model[ITEM_BIAS] = np.full_like(model[ITEM_BIAS], np.nan)
    with pytest.raises(DataError):
        silo.train(model, 1)
    assert silo.steps == 0


def test_learns_tastes_on_generated_purchases_at_moderate_noise() -> None:
    split = split_leave_one_out(generate_marketplace())
    config = TrainConfig(dimensions=8)
    privacy = ExamplePrivacy(8.0, 1e-6, 2.0, 0.3, 10, 10_000, learning_rate=600.0)
    silo = PrivateSilo(
        0, split, np.arange(split.n_users), config, privacy, ledger=None, randomness=streams()
    )
    shared = init_shared(split.n_items, config.dimensions, 0)
    untrained = evaluate(factor_scores(silo.user_vectors, shared), split, 0)
    for number in range(1, 6):
        update = silo.train(shared, number).update
        shared = {name: tensor + update[name] for name, tensor in shared.items()}
    trained = evaluate(factor_scores(silo.user_vectors, shared), split, 0)
    personal = evaluate(factor_scores(silo.personal_vectors(shared), shared), split, 0)
    popular = evaluate(lambda users: np.tile(shared[ITEM_BIAS], (users.size, 1)), split, 0)
    assert trained.hr10 > untrained.hr10 + 0.1
    assert trained.hr10 > popular.hr10 + 0.03
    assert personal.hr10 > popular.hr10 + 0.08


def test_personal_vectors_are_never_trained_on() -> None:
    silo, twin = (make_silo(randomness=streams()) for _ in range(2))
    silo.personal_vectors(SHARED)
    first, second = (each.train(SHARED, 1).update for each in (silo, twin))
    assert np.array_equal(first[ITEM_FACTORS], second[ITEM_FACTORS])


# --- the count ----------------------------------------------------------------------------------


def test_epsilon_is_that_of_all_steps_so_far() -> None:
    silo = make_silo()
    assert silo.epsilon == 0
    for number in (1, 2):
        silo.train(SHARED, number)
        assert silo.steps == 3 * number
        assert silo.epsilon == pytest.approx(example_level(2.0, 0.1, 3 * number, 1e-6))


def test_calibrated_noise_allows_the_rounds_and_hardly_more() -> None:
    privacy = ExamplePrivacy.for_rounds(
        10, epsilon=2.0, delta=1e-6, sampling_rate=0.05, steps=20, nominal_samples=1000
    )
    noise = privacy.noise_multiplier
    assert example_level(noise, 0.05, 200, 1e-6) <= 2.0
    assert example_level(noise * 0.97, 0.05, 200, 1e-6) > 2.0


def test_training_stops_at_the_budget_and_says_what_would_do() -> None:
    tight = replace(PRIVACY, epsilon=example_level(2.0, 0.1, 6, 1e-6) + 1e-9)
    silo = make_silo(tight)
    silo.train(SHARED, 1)
    last = silo.train(SHARED, 2)
    vectors = silo.user_vectors
    with pytest.raises(ConfigurationError, match=r"agree on epsilon=[0-9.]+") as refused:
        silo.train(SHARED, 3)
    assert silo.steps == 6
    assert np.array_equal(silo.user_vectors, vectors)
    # What was paid for can still be had.
    assert np.array_equal(silo.train(SHARED, 2).update[ITEM_BIAS], last.update[ITEM_BIAS])
    needed = float(str(refused.value).split("agree on epsilon=")[1].split(",")[0])
    roomier = make_silo(replace(tight, epsilon=needed))
    roomier.restore(silo.state())
    roomier.train(SHARED, 3)


def test_a_first_round_beyond_the_budget_is_refused() -> None:
    silo = make_silo(replace(PRIVACY, epsilon=0.01))
    with pytest.raises(ConfigurationError, match=r"epsilon=0\.01"):
        silo.train(SHARED, 1)


def test_weaker_settings_of_the_past_still_count(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.npz"
    make_silo(replace(PRIVACY, noise_multiplier=1.0, epsilon=50.0), ledger=ledger).train(SHARED, 1)
    silo = make_silo(replace(PRIVACY, sampling_rate=0.05, epsilon=50.0), ledger=ledger)
    silo.train(SHARED, 2)
    assert silo.epsilon == pytest.approx(example_level(1.0, 0.1, 6, 1e-6))


# --- crashes and repetitions --------------------------------------------------------------------


def test_a_round_asked_again_gets_the_same_update_for_nothing() -> None:
    silo = make_silo()
    before = silo.state()
    first = silo.train(SHARED, 1)
    vectors = silo.user_vectors
    first.update[ITEM_BIAS][:] = 7.0  # The caller's copy, not the silo's.
    silo.restore(before)  # What a client does before another attempt at a round.
    again = silo.train(SHARED, 1)
    assert np.count_nonzero(again.update[ITEM_BIAS] == 7.0) == 0
    assert np.array_equal(first.update[ITEM_FACTORS], again.update[ITEM_FACTORS])
    assert np.array_equal(silo.user_vectors, vectors)
    assert silo.steps == 3


def test_an_older_state_does_not_forget_a_newer_update() -> None:
    silo = make_silo()
    silo.train(SHARED, 1)
    before = silo.state()
    second = silo.train(SHARED, 2)
    silo.restore(before)
    again = silo.train(SHARED, 2)
    assert np.array_equal(second.update[ITEM_FACTORS], again.update[ITEM_FACTORS])
    assert silo.steps == 6


def test_another_model_for_the_same_round_is_paid_for() -> None:
    silo = make_silo()
    first = silo.train(SHARED, 1)
    other = {name: tensor + np.float32(0.01) for name, tensor in SHARED.items()}
    second = silo.train(other, 1)
    assert silo.steps == 6
    assert not np.any(first.update[ITEM_FACTORS] == second.update[ITEM_FACTORS])


def test_a_restart_goes_on_where_the_ledger_ends(tmp_path: Path) -> None:
    ledger = tmp_path / "private" / "ledger.npz"
    silo = make_silo(ledger=ledger)
    before = silo.state()
    first = silo.train(SHARED, 1)
    assert ledger.stat().st_mode & 0o777 == 0o600
    back = make_silo(ledger=ledger)
    assert back.steps == 3
    assert np.array_equal(back.user_vectors, silo.user_vectors)
    back.restore(before)
    assert back.steps == 3
    assert np.array_equal(back.train(SHARED, 1).update[ITEM_BIAS], first.update[ITEM_BIAS])
    assert back.steps == 3
    back.train(SHARED, 2)
    assert make_silo(ledger=ledger).steps == 6


def test_steps_are_on_disk_before_the_data_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.npz"

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PrivateSilo, "_batch", crash)
        with pytest.raises(KeyboardInterrupt):
            make_silo(ledger=ledger).train(SHARED, 1)
    back = make_silo(ledger=ledger)
    assert back.steps == 3
    back.train(SHARED, 1)
    assert back.steps == 6


def test_an_update_is_on_disk_before_it_is_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.npz"
    silo = make_silo(ledger=ledger)
    kept, plain = [], example_privacy.write

    def full(path: Path, data: bytes) -> None:
        kept.append(data)
        if len(kept) == 2:
            raise OSError(28, "No space left on device")
        plain(path, data)

    monkeypatch.setattr(example_privacy, "write", full)
    with pytest.raises(ConfigurationError, match="No space left"):
        silo.train(SHARED, 1)
    monkeypatch.undo()
    assert make_silo(ledger=ledger).steps == 3


def test_without_a_writable_ledger_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(example_privacy, "write", broken)
    monkeypatch.setattr(PrivateSilo, "_batch", lambda *_: pytest.fail("looked at the data"))
    with pytest.raises(ConfigurationError, match="Read-only"):
        make_silo(ledger=tmp_path / "ledger.npz").train(SHARED, 1)


def test_two_processes_of_a_silo_share_one_count(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.npz"
    one, two = make_silo(ledger=ledger), make_silo(ledger=ledger)
    one.train(SHARED, 1)
    two.train(SHARED, 1)
    assert make_silo(ledger=ledger).steps == 6


def test_restoring_never_takes_back_a_step() -> None:
    silo = make_silo()
    states = [silo.state()]
    for number in (1, 2):
        silo.train(SHARED, number)
        states.append(silo.state())
    silo.restore(states[0])
    assert silo.steps == 6
    fresh = make_silo()
    fresh.restore(states[2])
    fresh.restore(states[1])
    assert fresh.steps == 6
    assert fresh.epsilon == silo.epsilon


# --- states -------------------------------------------------------------------------------------


def test_vectors_trained_without_noise_are_refused() -> None:
    plain = Silo(0, SPLIT, USERS, CONFIG)
    plain.train(SHARED, 1)
    silo = make_silo()
    vectors = silo.user_vectors
    with pytest.raises(DataError, match="without noise"):
        silo.restore(plain.state())
    assert np.array_equal(silo.user_vectors, vectors)


def test_another_silos_state_is_refused() -> None:
    other = PrivateSilo(1, SPLIT, USERS, CONFIG, PRIVACY, ledger=None)
    other.train(SHARED, 1)
    silo = make_silo()
    with pytest.raises(DataError, match="silo=0"):
        silo.restore(other.state())
    assert silo.steps == 0


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_a_damaged_state_is_refused_or_harmless(place: float, flip: int) -> None:
    state = bytearray(trained_state())
    state[int(place * len(state))] ^= flip
    back = make_silo()
    try:
        back.restore(bytes(state))
    except DataError:
        assert back.steps == 0
    else:
        assert back.steps == 3


@pytest.mark.parametrize(
    "change",
    [
        {"steps": np.int64(-1)},
        {"weakest": np.array([0.0, 0.1])},
        {"weakest": np.array([np.nan, 0.1])},
        {"weakest": np.array([1.0, 1.5])},
        {"weakest": np.array([1.0])},
        {"item_bias": np.zeros(3, np.float32)},
        {"outcome_vectors": np.zeros(3, np.float32)},
        {"vectors": np.zeros((2, 2), np.float32)},
    ],
)
def test_states_with_impossible_parts_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    silo = make_silo()
    silo.train(SHARED, 1)
    file = tmp_path / "state.npz"
    file.write_bytes(silo.state())
    with np.load(file) as saved:
        parts = {name: saved[name] for name in saved.files}
    np.savez(file, **{**parts, **change})
    fresh = make_silo()
    with pytest.raises(DataError):
        fresh.restore(file.read_bytes())
    assert fresh.steps == 0


def test_a_damaged_ledger_stops_the_silo(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.npz"
    ledger.write_bytes(b"not an archive")
    with pytest.raises(DataError):
        make_silo(ledger=ledger)


def test_an_unreadable_ledger_stops_the_silo(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="readable ledger"):
        make_silo(ledger=tmp_path)


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"steps": 0},
        {"nominal_samples": 0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.inf},
        {"learning_rate": 0.0},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        replace(PRIVACY, **change)


def test_a_missing_opacus_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigurationError, match=r"secagg\[example-privacy\]"):
        make_silo()


@pytest.mark.slow
def test_opacus_is_loaded_by_those_who_use_it_alone() -> None:
    code = "import sys, secagg_recommender.example_privacy; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reprs_show_nothing_of_the_data() -> None:
    silo = make_silo()
    trained = silo.train(SHARED, 1)
    assert "array" not in repr((silo, trained, silo._outcome, silo._spent))


def test_private_silos_cover_all_users_like_plain_ones() -> None:
    parts = partition_users(SPLIT.n_users, 3, 0)
    silos = [
        PrivateSilo(index, SPLIT, users, CONFIG, PRIVACY, ledger=None)
        for index, users in enumerate(parts)
    ]
    assert sum(silo.samples for silo in silos) == SPLIT.train_users.size
