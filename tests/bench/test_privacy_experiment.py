"""The privacy experiment: what clients contribute is bounded, attacks stay below their bound."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from secagg_bench.privacy import cooccurrence, default_training, federated, membership
from secagg_bench.privacy.__main__ import app
from secagg_bench.privacy.mechanism import Budget, Channel, Contributions, Release
from secagg_bench.privacy.methods import METHODS, Trial
from secagg_bench.privacy.population import (
    Clients,
    bootstrap,
    load_split,
    validation_split,
)
from secagg_bench.privacy.ranking import UserEvaluator, interval
from secagg_bench.privacy.report import markdown, save_figure
from secagg_bench.privacy.run import SECTIONS, measure, validate
from secagg_bench.privacy.settings import Sizes, Tuned, delta_of, quick, tuned
from secagg_recommender.evaluation import Evaluator
from secagg_recommender.factorisation import TrainConfig, fit_user, init_shared
from secagg_recommender.interactions import NO_TEST_ITEM, DataError, Split

pytestmark = pytest.mark.timeout(300)  # small trainings, on a machine that may be busy

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "privacy.json"
NO_NOISE = Budget(math.inf, 1e-3)


@cache
def toy() -> Split:
    return load_split("toy", None)


@cache
def toy_clients() -> Clients:
    return Clients.of(toy())


def channel(budget: Budget = NO_NOISE, bits: int | None = None) -> Channel:
    return Channel(budget, np.random.default_rng(0), bits)


def toy_model(d: int = 4) -> federated.Model:
    shared = init_shared(toy().n_items, d, 3)
    rng = np.random.default_rng(2)
    bias = rng.normal(-3.0, 1.0, toy().n_items).astype(np.float32)
    return federated.Model(5 * shared["item_factors"], bias)


def contributions(kind: str) -> Contributions:
    clients, d = toy_clients(), 3
    if kind == "popularity":
        return federated.Popularity(clients)
    if kind.startswith("gradients"):
        sample = 0 if kind == "gradients" else 40
        negatives = federated.draw_negatives(clients.n_items, sample, np.random.default_rng(1))
        return federated.gradients(toy_model(), clients, federated.Federated(), negatives)
    if kind == "pairs":
        return cooccurrence.Pairs(clients, np.arange(5, 25))
    rng = np.random.default_rng(1)
    changes = rng.normal(size=(clients.items.size, d)).astype(np.float32)
    lengths = np.sqrt(np.add.reduceat((changes**2).sum(axis=1), clients.first))
    changes /= lengths[clients.owners, None]
    return default_training.LocalRows(clients, changes)


KINDS = ("popularity", "gradients", "gradients of a sample", "pairs", "rows")


# --- populations ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.data())
@settings(max_examples=50, deadline=None)
def test_chosen_clients_keep_their_items(counts: list[int], data: st.DataObject) -> None:
    clients = Clients(np.array(counts), np.arange(sum(counts)), max(sum(counts), 2))
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=30))
    chosen = clients.chosen(np.array(rows))
    expected = [
        clients.items[clients.first[row] : clients.first[row] + counts[row]] for row in rows
    ]
    assert np.array_equal(chosen.items, np.concatenate(expected))
    assert np.array_equal(chosen.counts, np.array(counts)[rows])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_client_once_in_order(
    counts: list[int], entries: int, width: int
) -> None:
    clients = Clients(np.array(counts), np.arange(sum(counts)), sum(counts))
    batches = list(clients.batches(entries, width))
    assert np.array_equal(np.concatenate([each.items for _, _, each in batches]), clients.items)
    rows = np.concatenate([np.arange(len(clients))[part] for part, _, _ in batches])
    assert np.array_equal(rows, np.arange(len(clients)))
    for part, places, each in batches:
        assert np.array_equal(each.counts, clients.counts[part])
        assert np.array_equal(each.items, clients.items[places])


@given(st.integers(1, 300), st.floats(0.0, 1.0), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_bootstrap_draws_whole_users_and_drops_some_of_their_items(
    count: int, keep: float, seed: int
) -> None:
    users = toy_clients()
    drawn = bootstrap(users, count, keep, np.random.default_rng(seed))
    assert len(drawn) == count
    assert drawn.counts.min() >= 1
    whole = {
        tuple(users.items[first : first + size])
        for first, size in zip(users.first, users.counts, strict=True)
    }
    if keep == 1.0:
        mine = zip(drawn.first, drawn.counts, strict=True)
        assert all(tuple(drawn.items[first : first + size]) in whole for first, size in mine)


def test_a_bootstrap_keeps_the_share_asked_for() -> None:
    drawn = bootstrap(toy_clients(), 3000, 0.8, np.random.default_rng(0))
    assert drawn.counts.mean() / toy_clients().counts.mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("counts", "items"), [([], []), ([1, 0], [3]), ([2], [1]), ([1, 1], [0, 1, 2])]
)
def test_clients_without_items_are_refused(counts: list[int], items: list[int]) -> None:
    with pytest.raises(DataError, match="one item or more"):
        Clients(np.array(counts, dtype=np.int64), np.array(items, dtype=np.int64), 5)


def test_no_item_is_both_validation_and_training_or_test() -> None:
    split, held_out = toy(), validation_split(toy())
    assert (held_out.test_item != split.test_item).all()
    for user in range(split.n_users):
        mine = held_out.test_item[user]
        assert mine == split.items_of(user)[-1]
        assert np.array_equal(held_out.items_of(user), split.items_of(user)[:-1])


def test_sequences_are_read_in_time_order_and_repeats_count_last(tmp_path: Path) -> None:
    folder = tmp_path / "amazon-beauty"
    folder.mkdir()
    (folder / "s3rec_Beauty.txt").write_text("1 7 9 7 20\n2 9 20\n", encoding="ascii")
    split = load_split("amazon-beauty", tmp_path)
    assert (split.n_users, split.n_items) == (2, 3)  # items 7, 9, 20 become 0, 1, 2
    assert split.items_of(0).tolist() == [1, 0]
    assert split.items_of(1).tolist() == [1]
    assert split.test_item.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["amazon-beauty", "ml-100k", "no-such"])
def test_missing_data_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_split(name, tmp_path)


# --- what clients contribute ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_client_contributes_more_than_norm_one(kind: str) -> None:
    lengths = [np.linalg.norm(row) for row in contributions(kind).rows()]
    assert len(lengths) == len(toy_clients())
    assert max(lengths) <= 1 + 1e-5
    if kind != "pairs":  # whose clients may have none of the items
        assert min(lengths) >= 1 - 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_total_is_the_sum_of_the_rows(kind: str) -> None:
    given_ = contributions(kind)
    rows = [row.astype(np.float64) for row in given_.rows()]
    assert rows[0].shape == given_.shape
    np.testing.assert_allclose(given_.total(), np.sum(rows, axis=0), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_along_is_the_inner_product_with_each_row(kind: str) -> None:
    given_ = contributions(kind)
    direction = np.random.default_rng(5).normal(size=given_.shape)
    expected = [float(np.vdot(row.astype(np.float64), direction)) for row in given_.rows()]
    np.testing.assert_allclose(given_.along(direction), expected, atol=1e-4)


def test_vectors_are_those_that_the_client_library_fits() -> None:
    model, clients = toy_model(), toy_clients()
    options = federated.Federated(newton_steps=12, l2=0.02)
    vectors = federated.fit_users(model, clients, options, np.arange(clients.n_items))
    shared = {"item_factors": model.factors, "item_bias": model.bias}
    config = TrainConfig(dimensions=4, l2=0.02, negatives=federated.NEGATIVES)
    for user in range(0, len(clients), 17):
        expected = fit_user(shared, toy().items_of(user), config)
        np.testing.assert_allclose(vectors[user], expected, atol=2e-3)


def test_gradients_point_down_the_loss() -> None:
    model, clients = toy_model(), toy_clients()
    options, everything = federated.Federated(newton_steps=12), np.arange(clients.n_items)
    before = federated.losses(model, clients, options, everything)
    rows = federated.gradients(model, clients, options, everything).rows()
    for user, row in zip(range(8), rows, strict=False):
        moved = federated.Model(model.factors + 0.05 * row, model.bias)
        after = federated.losses(moved, clients.chosen(np.array([user])), options, everything)
        assert after[0] < before[user]


def test_local_training_is_what_torch_does() -> None:
    clients = toy_clients().chosen(np.arange(6))
    config = TrainConfig(dimensions=5, local_epochs=3)
    shared = init_shared(clients.n_items, 5, 1)
    rng = np.random.default_rng(4)
    vectors = rng.normal(0, 0.1, (6, 5)).astype(np.float32)
    touched, positive = default_training.touch(clients, 4, rng)
    got, changes = default_training.local_training(shared, vectors, touched, positive, config)
    for user in range(6):
        mine = slice(touched.first[user], touched.first[user] + touched.counts[user])
        items = touched.items[mine]
        parameters = [
            torch.tensor(array, requires_grad=True)
            for array in (
                vectors[user],
                shared["item_factors"][items],
                shared["item_bias"][items],
            )
        ]
        p, q, b = parameters
        optimiser = torch.optim.Adam(parameters, lr=config.learning_rate)
        target = torch.tensor(positive[mine], dtype=torch.float32)
        for _ in range(config.local_epochs):
            optimiser.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(q @ p + b, target)
            size = p.square().sum() + q.square().sum(dim=1).mean() + b.square().mean()
            (loss + 0.5 * config.l2 * size).backward()
            optimiser.step()
        np.testing.assert_allclose(got[user], p.detach().numpy(), atol=1e-4)
        moved = q.detach().numpy() - shared["item_factors"][items]
        np.testing.assert_allclose(changes[mine, :-1], moved, atol=1e-4)
        np.testing.assert_allclose(changes[mine, -1], b.detach().numpy(), atol=1e-4)


def test_touched_rows_are_all_positives_and_distinct() -> None:
    clients = toy_clients()
    touched, positive = default_training.touch(clients, 4, np.random.default_rng(0))
    pairs = touched.owners * clients.n_items + touched.items
    assert np.unique(pairs).size == pairs.size
    own = np.sort(clients.owners * clients.n_items + clients.items)
    assert np.array_equal(pairs[positive], own)


# --- the mechanism --------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("releases", [1, 7])
def test_releases_spend_their_share_of_the_budget(
    epsilon: float, share: float, releases: int
) -> None:
    budget = Budget(epsilon, 1e-4)
    z = budget.multiplier(share, releases)
    assert releases / (2 * z**2) == pytest.approx(share * budget.rho)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_no_method_spends_more_than_the_budget(method: str, epsilon: float) -> None:
    used = channel(Budget(epsilon, 1e-3))
    users = toy_clients()
    METHODS[method](Trial(users, users, tuned("toy", 120, 1.0), used, np.random.default_rng(1)))
    spent = sum(0.5 / each.multiplier**2 for each in used.releases)
    assert spent == pytest.approx(used.budget.rho)
    assert all(each.contributors == len(users) for each in used.releases)


def test_an_infinite_budget_adds_no_noise() -> None:
    given_ = federated.Popularity(toy_clients())
    released = channel().release(given_, NO_NOISE.multiplier())
    np.testing.assert_array_equal(released.total, given_.total())


@pytest.mark.parametrize("bits", [None, 8])
def test_noise_is_z_on_every_coordinate_of_the_sum(bits: int | None) -> None:
    given_ = federated.gradients(
        toy_model(8), toy_clients(), federated.Federated(), np.arange(toy().n_items)
    )
    released = channel(Budget(8.0, 1e-3), bits=bits).release(given_, 3.0)
    noise = released.total - given_.total()
    # Conditional rounding may make integers a little longer than the clip norm.
    assert 2.85 < noise.std() < (3.2 if bits is None else 3.6)
    assert abs(noise.mean()) < 0.5


@pytest.mark.parametrize(("bits", "most"), [(4, 2.0), (8, 0.2), (16, 0.01)])
def test_more_bits_come_closer_to_the_exact_sum(bits: int, most: float) -> None:
    given_ = federated.Popularity(toy_clients())
    released = channel(bits=bits).release(given_, 0.0)
    assert np.abs(released.total - given_.total()).max() < most


class Watching(Channel):
    """Keeps the longest contribution and all counts of contributors, over all channels."""

    longest = 0.0
    counts: ClassVar[set[int]] = set()

    def release(self, contributions: Contributions, multiplier: float) -> Release:
        lengths = [float(np.linalg.norm(row)) for row in contributions.rows()]
        Watching.longest = max(Watching.longest, *lengths)
        released = super().release(contributions, multiplier)
        Watching.counts.add(released.contributors)
        return released


@pytest.fixture
def watching() -> type[Watching]:
    Watching.longest = 0.0
    Watching.counts.clear()
    return Watching


@pytest.mark.parametrize("method", sorted(METHODS))
def test_whatever_is_released_holds_nobody_beyond_norm_one(
    method: str, watching: type[Watching]
) -> None:
    users = toy_clients()
    used = watching(Budget(8.0, 1e-3), np.random.default_rng(0))
    chosen = Tuned(
        federated.Federated(dimensions=3, rounds=2),
        cooccurrence.Cooccurrence(items=20),
        default_training.DefaultTraining(rounds=2, clip=0.1),
    )
    METHODS[method](Trial(users, users, chosen, used, np.random.default_rng(1)))
    assert 0.99 < watching.longest <= 1 + 1e-5


def test_a_canary_that_is_absent_is_counted_all_the_same(
    watching: type[Watching], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "Channel", watching)
    options = federated.Federated(dimensions=2, rounds=1)
    membership.canary_trials(toy_clients(), options, NO_NOISE, 7, 4, 0, lambda: None)
    assert watching.counts == {7}


def test_releases_do_not_show_in_a_repr() -> None:
    released = channel().release(federated.Popularity(toy_clients()), 0.0)
    assert "total" not in repr(released)


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dp_federated", "dp_cooccurrence"])
def test_without_noise_it_beats_popularity(method: str) -> None:
    users, evaluator = toy_clients(), UserEvaluator(toy(), 1)
    trial = Trial(users, users, tuned("toy", 120, 0.0), channel(), np.random.default_rng(0))
    mine = evaluator.by_user(METHODS[method](trial)).mean(axis=1)
    popular = evaluator.by_user(METHODS["dp_popularity"](trial)).mean(axis=1)
    assert mine[1] > popular[1]  # NDCG@10


def test_federated_averaging_serves_only_those_who_trained() -> None:
    users = toy_clients()
    others = users.chosen(np.arange(10))
    trial = Trial(others, users, Tuned(), channel(), np.random.default_rng(0))
    with pytest.raises(ValueError, match="clients that are the users"):
        METHODS["dp_fedavg"](trial)


def test_participation_thins_every_round() -> None:
    used, options = channel(), federated.Federated(dimensions=3, rounds=2, participation=0.25)
    federated.train(toy_clients(), options, used, np.random.default_rng(0))
    assert [each.contributors for each in used.releases] == [120, 30, 30]


def test_metrics_by_user_average_to_the_library_s() -> None:
    scores = METHODS["dp_popularity"](
        Trial(toy_clients(), toy_clients(), Tuned(), channel(), np.random.default_rng(0))
    )
    by_user = UserEvaluator(toy(), 3).by_user(scores)
    expected = Evaluator(toy(), 3).evaluate(scores)
    assert by_user.shape == (4, int(np.sum(toy().test_item != NO_TEST_ITEM)))
    assert by_user.mean(axis=1) == pytest.approx(
        [expected.hr10, expected.ndcg10, expected.full_hr10, expected.full_ndcg10]
    )


def test_the_interval_covers_the_mean_of_normal_draws() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = interval(rng.normal(size=(1, 150)))
        covered += found.low <= 0.0 <= found.high
    assert 180 <= covered <= 199


def test_one_seed_has_no_interval_over_seeds() -> None:
    assert math.isnan(interval(np.ones((1, 9))).seed_half_width)
    assert interval(np.ones((3, 9))).seed_half_width == 0.0


# --- membership -----------------------------------------------------------------------------------


def test_an_attack_that_knows_finds_everybody() -> None:
    members = np.random.default_rng(0).random((20, 50)) < 0.5
    found = membership.success(members.astype(float), members)
    assert found.auc[0] == 1.0
    assert found.tpr[0] == 1.0


def test_a_guess_finds_as_many_as_it_accuses() -> None:
    rng = np.random.default_rng(0)
    members = rng.random((40, 200)) < 0.5
    found = membership.success(rng.random(members.shape), members)
    assert found.auc[0] == pytest.approx(0.5, abs=0.02)
    assert found.tpr[0] == pytest.approx(0.01, abs=0.006)


def test_constant_scores_are_worth_nothing() -> None:
    members = np.arange(400).reshape(4, 100) % 2 == 0
    found = membership.success(np.zeros(members.shape), members)
    assert found.auc[0] == 0.5
    assert found.tpr[0] == 0.0


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_gaussian_noise_meets_its_bound_and_no_more(epsilon: float) -> None:
    budget = Budget(epsilon, 1e-4)
    rng = np.random.default_rng(0)
    members = rng.random((50, 1000)) < 0.5
    shift = math.sqrt(2 * budget.rho)
    scores = members * shift + rng.normal(size=members.shape)
    found = membership.success(scores, members, resamples=1)
    assert found.tpr[0] == pytest.approx(membership.gaussian_bound(budget), abs=0.02)
    assert membership.gaussian_bound(budget) <= membership.tpr_bound(budget)


def test_the_bounds_grow_with_epsilon_and_never_pass_one() -> None:
    bounds = [membership.tpr_bound(Budget(e, 1e-3)) for e in (0.01, 1.0, 8.0, math.inf)]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(0.01, abs=0.002)
    assert bounds[-1] == 1.0
    assert membership.gaussian_bound(NO_NOISE) == 1.0


def test_likelihood_ratios_take_out_what_differs_between_users() -> None:
    rng = np.random.default_rng(0)
    members = rng.random((30, 80)) < 0.5
    statistic = members + 0.5 * rng.normal(size=members.shape) + 20 * rng.normal(size=80)
    plain = membership.success(statistic, members).auc[0]
    ratios = membership.likelihood_ratios(statistic, members)
    assert plain < 0.6
    assert membership.success(ratios, members).auc[0] > 0.85


def test_a_likelihood_ratio_does_not_look_at_its_own_cohort() -> None:
    rng = np.random.default_rng(0)
    members, statistic = rng.random((12, 300)) < 0.5, rng.normal(size=(12, 300))
    ratios = membership.likelihood_ratios(statistic, members)
    assert membership.success(ratios, members).auc[0] == pytest.approx(0.5, abs=0.03)


def test_users_that_were_hardly_ever_out_are_not_judged() -> None:
    members = np.ones((6, 3), dtype=bool)
    members[0, 1], members[:3, 2] = False, False
    ratios = membership.likelihood_ratios(np.random.default_rng(0).normal(size=(6, 3)), members)
    assert not ratios[:, :2].any()
    assert ratios[:, 2].all()


def test_noise_hides_the_canary_that_shows_without() -> None:
    def attacked(budget: Budget) -> float:
        options = federated.Federated(dimensions=2, rounds=2)
        trials = membership.canary_trials(toy_clients(), options, budget, 5, 60, 0, lambda: None)
        return membership.success(trials.statistics["alignment"], trials.members).auc[0]

    assert attacked(NO_NOISE) > 0.99
    assert attacked(Budget(0.2, 1e-3)) < 0.75


# --- results --------------------------------------------------------------------------------------


def tiny() -> Sizes:
    sizes = quick()
    small = [
        type(each)(each.dataset, each.factor, each.methods, 2, (8.0, math.inf))
        for each in (*sizes.populations, *sizes.larger)
    ]
    return Sizes(
        populations=(small[0],),
        larger=(small[1],),
        swept="toy",
        sweep_seeds=1,
        clients=(0.5,),
        bits=(4,),
        participation=(0.5,),
        cohorts=4,
        attacked=(8.0, math.inf),
        canary_sizes=(4,),
        canary_trials=8,
        local_users=1,
    )


@cache
def results() -> dict[str, Any]:
    found: dict[str, Any] | None = None
    for section in SECTIONS:
        found = measure(tiny(), None, lambda *_: None, section, earlier=found)
    assert found is not None
    return found


def test_every_section_is_measured_and_survives_json() -> None:
    assert set(results()["sections"]) == set(SECTIONS)
    text = json.dumps(results(), allow_nan=False)
    assert json.loads(text) == results()


def test_measuring_again_gives_the_same_rows() -> None:
    again = measure(tiny(), None, lambda *_: None, "membership", earlier=results())
    assert again["sections"]["membership"]["rows"] == results()["sections"]["membership"]["rows"]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("utility", "mean", 1.2),
        ("utility", "ci_low", 0.99),
        ("sweeps", "ci_high", -0.1),
        ("membership", "auc", -0.2),
        ("membership", "tpr_ci_low", 1.1),
    ],
)
def test_rows_out_of_range_are_refused(section: str, field: str, value: float) -> None:
    broken = copy.deepcopy(results())
    broken["sections"][section]["rows"][0][field] = value
    with pytest.raises(ValueError, match="expected means"):
        validate(broken)


def test_a_finite_epsilon_without_noise_is_refused() -> None:
    broken = copy.deepcopy(results())
    row = next(row for row in broken["sections"]["sweeps"]["rows"] if row["epsilon"] is not None)
    row["noise_multiplier"] = 0.0
    with pytest.raises(ValueError, match="expected noise"):
        validate(broken)


@pytest.mark.parametrize("damage", [{}, {"sections": {"no such": {}}}, {"sections": {}, "x": 1}])
def test_other_documents_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected sections"):
        validate(damage)


def test_a_section_without_rows_is_refused() -> None:
    broken = copy.deepcopy(results())
    broken["sections"]["utility"]["rows"] = []
    with pytest.raises(ValueError, match="expected rows"):
        validate(broken)


@pytest.mark.parametrize("only", ["utility", "membership", "sweeps", "larger", ""])
def test_tables_and_figure_come_from_the_results_alone(only: str, tmp_path: Path) -> None:
    chosen = copy.deepcopy(results())
    if only:
        chosen["sections"] = {only: chosen["sections"][only]}
    text = markdown(json.loads(json.dumps(chosen)))
    assert "nan" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 3
    save_figure(chosen, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_command_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    runner, files = CliRunner(), ["--output", str(tmp_path / "none.json")]
    environment = {"SECAGG_DATA_DIR": ""}
    for arguments in ([], ["--quick", "--only", "everything"], ["--draw"]):
        outcome = runner.invoke(app, [*arguments, *files], env=environment)
        assert outcome.exit_code not in (0, 1), arguments
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_the_quick_command_writes_everything(tmp_path: Path) -> None:
    names = {name: tmp_path / name for name in ("results.json", "figure.svg", "tables.md")}
    arguments = ["--quick", "--output", str(names["results.json"])]
    arguments += ["--figure", str(names["figure.svg"]), "--table", str(names["tables.md"])]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert all(path.stat().st_size > 1000 for path in names.values())
    validate(json.loads(names["results.json"].read_text(encoding="utf-8")))


def test_delta_is_below_one_by_the_number_of_clients() -> None:
    assert all(delta_of(clients) < 1 / clients for clients in (2, 943, 10**6))


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results have been written")
def test_published_results_hold_and_name_no_machine() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    published = json.loads(text)
    validate(published)
    assert set(published["sections"]) == set(SECTIONS)
    assert "/work" not in text
    assert "/home" not in text
