"""Everything that is compared: how each method trains on clients and scores the users evaluated.

A method sees the clients that train (perhaps a larger population, or a part of it) and gives scores
for the real users, whose own vectors cost nothing: they are made on their devices. Read `run` next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy import cooccurrence, default_training, federated
from secagg_bench.privacy.mechanism import Channel
from secagg_bench.privacy.population import Clients
from secagg_bench.privacy.settings import Tuned
from secagg_recommender.evaluation import ScoresFn
from secagg_recommender.factorisation import Silo, TrainConfig, init_shared
from secagg_recommender.interactions import NO_TEST_ITEM, Split

__all__ = ["LABELS", "METHODS", "Trial", "popular", "sampled_local_only"]

LABELS: Final = {
    "popular": "most popular (not private)",
    "local": "local only",
    "dp_popularity": "DP popularity",
    "dp_fedavg": "plain DP-FedAvg",
    "dp_federated": "DP matrix factorisation",
    "dp_cooccurrence": "DP co-occurrence",
}

_LOCAL_ROUNDS = 25


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One training: who trains, for whom it scores, and with what.

    Attributes:
        public: randomness that everybody knows.
        participation: part of the clients in each round, where there is more than one round.
    """

    clients: Clients
    users: Clients
    tuned: Tuned
    channel: Channel
    public: np.random.Generator
    participation: float = 1.0


def popular(clients: Clients) -> ScoresFn:
    """Exact popularity for everybody."""
    return _constant(clients.totals(np.ones(clients.items.size)))


def _constant(counts: NDArray[np.float64]) -> ScoresFn:
    def scores(users: NDArray[np.int64]) -> NDArray[np.floating]:
        return np.broadcast_to(counts, (users.size, counts.size))

    return scores


def _dp_popularity(trial: Trial) -> ScoresFn:
    return _constant(federated.popularity(trial.clients, trial.channel, 1.0))


def _dp_fedavg(trial: Trial) -> ScoresFn:
    """Scores with the vectors that clients trained along, so that clients have to be the users."""
    if trial.clients is not trial.users:
        raise ValueError("expected clients that are the users evaluated; pick another method")
    return default_training.train(trial.clients, trial.tuned.fedavg, trial.channel, trial.public)


def _dp_federated(trial: Trial) -> ScoresFn:
    settings = replace(trial.tuned.federated, participation=trial.participation)
    model, _ = federated.train(trial.clients, settings, trial.channel, trial.public)
    negatives = federated.draw_negatives(trial.users.n_items, settings.sample, trial.public)
    return federated.scores_of(model, trial.users, settings, negatives)


def _dp_cooccurrence(trial: Trial) -> ScoresFn:
    weights = cooccurrence.train(trial.clients, trial.tuned.cooccurrence, trial.channel)
    return weights.scores_of(trial.users)


METHODS: Final[dict[str, Callable[[Trial], ScoresFn]]] = {
    "dp_popularity": _dp_popularity,
    "dp_fedavg": _dp_fedavg,
    "dp_federated": _dp_federated,
    "dp_cooccurrence": _dp_cooccurrence,
}
"""Methods that take a budget; without noise where it is infinite."""


def sampled_local_only(split: Split, count: int, seed: int) -> tuple[Split, ScoresFn]:
    """Every user alone, trained as the client library does, for a random part of the users.

    Returns:
        The split with test items of those users only, and their scores.
    """
    tested = np.flatnonzero(split.test_item != NO_TEST_ITEM)
    rng = np.random.default_rng([seed, 4])
    chosen = rng.choice(tested, min(count, tested.size), replace=False)
    test = np.full(split.n_users, NO_TEST_ITEM, dtype=np.int32)
    test[chosen] = split.test_item[chosen]
    config = TrainConfig(seed=seed)

    def alone(user: int) -> NDArray[np.float32]:
        shared = init_shared(split.n_items, config.dimensions, seed)
        silo = Silo(user, split, np.array([user]), config)
        for number in range(1, _LOCAL_ROUNDS + 1):
            update = silo.train(shared, number).update
            shared = {name: tensor + update[name] for name, tensor in shared.items()}
        return np.asarray(silo.score(shared)[0])

    def scores(users: NDArray[np.int64]) -> NDArray[np.floating]:
        return np.stack([alone(int(user)) for user in users])

    return replace(split, test_item=test), scores
