"""Implicit matrix factorisation with a DP budget: little to release, and users who fit themselves.

The model is the client library's, score(u, i) = <p_u, q_i> + b_i with private p_u, trained so that
noise hurts least:

* **Biases from one release.** Everybody contributes its items as a vector of norm 1; the noisy sum
  is popularity, and b its log-odds under the loss below. Biases are not trained any further.
* **User vectors are fitted at home**, to convergence, whenever the table changes. They are never
  released, hence cost nothing (Jain, Thakkar and Thakurta 2018, "Differentially Private Matrix
  Completion Revisited", section 3; Chien et al. 2021, "Private Alternating Least Squares").
* **One gradient a round**, scaled to the clip norm: it is an outer product of rank one, the errors
  of u on all items times p_u. Few rounds, few dimensions, a large step on the released mean.

Loss of a user with items S: the mean cross-entropy over S, plus ``NEGATIVES`` times that over
negatives, over 1 + NEGATIVES, which is the expectation of what the client library samples.
Negatives are all items or a public sample of them. Read `default_training` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy.mechanism import Channel
from secagg_bench.privacy.population import Clients
from secagg_recommender.evaluation import ScoresFn

__all__ = [
    "NEGATIVES",
    "Federated",
    "Model",
    "OuterProducts",
    "Popularity",
    "fit_users",
    "gradients",
    "losses",
    "popularity",
    "scores_of",
    "train",
]

NEGATIVES = 4
"""Weight of the negatives beside a user's items, as in the client library's training."""

_ENTRIES = 1 << 23  # logits held at a time
_LEAST_COUNT = 0.05  # popularity of an item nobody has, where there is no noise to floor it


@dataclass(frozen=True, slots=True)
class Federated:
    """Hyperparameters of one training.

    Attributes:
        dimensions, rounds: of the factors, and of gradients released.
        rate: of a step, on the mean of gradients of norm 1.
        l2: of user vectors.
        popularity_share: part of the budget for the first release.
        init_std: of the random factors to begin with.
        newton_steps: of a user's fit.
        sample: how many public negatives; 0 for all items.
        participation: part of the clients that contribute to a round.
    """

    dimensions: int = 8
    rounds: int = 6
    rate: float = 60.0
    l2: float = 0.01
    popularity_share: float = 0.15
    init_std: float = 0.03
    newton_steps: int = 4
    sample: int = 0
    participation: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """What is released: float32 ``factors`` (n_items, d) and ``bias`` (n_items,)."""

    factors: NDArray[np.float32] = field(repr=False)
    bias: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Popularity:
    """Everybody's items, as a vector of norm 1."""

    clients: Clients

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.clients.n_items,)

    def __len__(self) -> int:
        return len(self.clients)

    def _values(self) -> NDArray[np.float64]:
        return 1.0 / np.sqrt(self.clients.counts[self.clients.owners])

    def total(self) -> NDArray[np.float64]:
        return self.clients.totals(self._values())

    def rows(self) -> Iterator[NDArray[np.float32]]:
        for user, (first, count) in enumerate(
            zip(self.clients.first, self.clients.counts, strict=True)
        ):
            row = np.zeros(self.shape, dtype=np.float32)
            row[self.clients.items[first : first + count]] = 1.0 / np.sqrt(
                self.clients.counts[user]
            )
            yield row

    def along(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        values = self._values() * direction[self.clients.items]
        return np.asarray(np.add.reduceat(values, self.clients.first), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class OuterProducts:
    """Gradients of user u: errors on items times its vector, scaled to norm 1.

    Attributes:
        own: minus the error on each positive outside the table, float32 of shape (positives,).
        table: the same on public items, (clients, columns); where those are all items, on
            positives, too.
        columns: which items those are.
        vectors: (clients, d).
    """

    clients: Clients
    own: NDArray[np.float32]
    table: NDArray[np.float32]
    columns: NDArray[np.int64]
    vectors: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.clients.n_items, self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.clients)

    def total(self) -> NDArray[np.float64]:
        total = np.zeros(self.shape)
        if self.columns.size < self.shape[0]:
            for place, column in enumerate(self.vectors.T):
                total[:, place] = self.clients.totals(self.own * column[self.clients.owners])
        total[self.columns] += self.table.T @ self.vectors
        return total

    def rows(self) -> Iterator[NDArray[np.float32]]:
        for user, vector in enumerate(self.vectors):
            first = self.clients.first[user]
            mine = slice(first, first + self.clients.counts[user])
            errors = np.zeros(self.shape[0], dtype=np.float32)
            errors[self.columns] = self.table[user]
            errors[self.clients.items[mine]] += self.own[mine]
            yield np.outer(errors, vector)

    def along(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        factors = direction.astype(np.float32)
        inner = np.einsum("un,un->u", self.table, self.vectors @ factors[self.columns].T)
        if self.columns.size < self.shape[0]:
            owners, items = self.clients.owners, self.clients.items
            owned = np.einsum("pd,pd->p", factors[items], self.vectors[owners])
            inner += np.add.reduceat(self.own * owned, self.clients.first)
        return np.asarray(inner, dtype=np.float64)


def popularity(clients: Clients, channel: Channel, share: float) -> NDArray[np.float64]:
    """Noisy popularity of each item, floored where it says nothing: float64 (n_items,)."""
    multiplier = channel.budget.multiplier(share)
    total = channel.release(Popularity(clients), multiplier).total
    return np.maximum(total, max(multiplier, _LEAST_COUNT))


def train(
    clients: Clients, settings: Federated, channel: Channel, rng: np.random.Generator
) -> tuple[Model, list[tuple[Model, NDArray[np.int64]]]]:
    """Train in as many rounds as the settings say.

    Args:
        channel: sums and adds noise; holds the budget.
        rng: of everything that is public: first factors, negatives, who takes part.

    Returns:
        The model, and what each round started from: the model and the public negatives.
    """
    counts = popularity(clients, channel, settings.popularity_share)
    # Log-odds that a sample of the loss at this item is a positive one.
    bias = np.log(counts / counts.sum() * clients.n_items / NEGATIVES).astype(np.float32)
    shape = (clients.n_items, settings.dimensions)
    model = Model((settings.init_std * rng.normal(size=shape)).astype(np.float32), bias)
    multiplier = channel.budget.multiplier(1 - settings.popularity_share, settings.rounds)
    history = []
    for _ in range(settings.rounds):
        negatives = draw_negatives(clients.n_items, settings.sample, rng)
        history.append((model, negatives))
        part = _taking_part(clients, settings.participation, rng)
        released = channel.release(gradients(model, part, settings, negatives), multiplier)
        step = (settings.rate * released.mean).astype(np.float32)
        model = Model(model.factors + step, bias)
    return model, history


def draw_negatives(n_items: int, sample: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Public negatives: all items, or so many distinct ones."""
    if not 0 < sample < n_items:
        return np.arange(n_items)
    return np.sort(rng.choice(n_items, sample, replace=False))


def _taking_part(clients: Clients, share: float, rng: np.random.Generator) -> Clients:
    if share >= 1.0:
        return clients
    count = max(1, round(share * len(clients)))
    return clients.chosen(np.sort(rng.choice(len(clients), count, replace=False)))


def gradients(
    model: Model, clients: Clients, settings: Federated, negatives: NDArray[np.int64]
) -> OuterProducts:
    """What each client contributes to a round: minus the gradient of its loss, of norm 1."""
    vectors = np.empty((len(clients), model.factors.shape[1]), dtype=np.float32)
    own = np.empty(clients.items.size, dtype=np.float32)
    table = np.empty((len(clients), negatives.size), dtype=np.float32)
    for rows, places, batch in clients.batches(_ENTRIES, negatives.size):
        problem = _Problem(model, batch, negatives)
        vectors[rows] = problem.fit(settings.l2, settings.newton_steps)
        own[places], table[rows] = problem.errors(vectors[rows])
    energy = np.add.reduceat(own**2, clients.first) + np.einsum("un,un->u", table, table)
    length = np.sqrt(energy * np.einsum("ud,ud->u", vectors, vectors))
    scale = (1.0 / np.maximum(length, 1e-12)).astype(np.float32)
    own *= scale[clients.owners]
    table *= scale[:, None]
    return OuterProducts(clients, own, table, negatives, vectors)


def fit_users(
    model: Model, clients: Clients, settings: Federated, negatives: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Every client's private vector for a table: float32 (clients, d)."""
    return np.concatenate(
        [
            _Problem(model, batch, negatives).fit(settings.l2, settings.newton_steps)
            for _, _, batch in clients.batches(_ENTRIES, negatives.size)
        ]
    )


def losses(
    model: Model, clients: Clients, settings: Federated, negatives: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Loss of each client's items after fitting its vector to them: float64 (clients,)."""
    return np.concatenate(
        [
            problem.losses(problem.fit(settings.l2, settings.newton_steps))
            for _, _, batch in clients.batches(_ENTRIES, negatives.size)
            for problem in [_Problem(model, batch, negatives)]
        ]
    )


def scores_of(
    model: Model, clients: Clients, settings: Federated, negatives: NDArray[np.int64]
) -> ScoresFn:
    """Scores of all items, for users with the items of the client of the same number."""
    vectors = fit_users(model, clients, settings, negatives)

    def scores(users: NDArray[np.int64]) -> NDArray[np.floating]:
        return vectors[users] @ model.factors.T + model.bias

    return scores


class _Problem:
    """The convex problem of some users' vectors, with the table frozen.

    A dense table has a column for each negative. Where those are all items, it holds users' own
    items as well; otherwise these come as a list of their own, and count nothing in the table.
    """

    def __init__(self, model: Model, clients: Clients, negatives: NDArray[np.int64]) -> None:
        self._clients = clients
        self._complete = negatives.size == clients.n_items
        self._factors, self._bias = model.factors[negatives], model.bias[negatives]
        place = np.full(clients.n_items, -1)
        place[negatives] = np.arange(negatives.size)
        among = place[clients.items]
        self._mine = (clients.owners[among >= 0], among[among >= 0])
        free = negatives.size - np.bincount(self._mine[0], minlength=len(clients))
        each = (NEGATIVES / ((1 + NEGATIVES) * np.maximum(free, 1))).astype(np.float32)
        self._weights = np.repeat(each[:, None], negatives.size, axis=1)
        own = 1.0 / ((1 + NEGATIVES) * clients.counts)
        self._own_weights = own.astype(np.float32)[clients.owners]
        self._weights[self._mine] = self._own_weights if self._complete else 0.0
        if not self._complete:
            self._own_factors = model.factors[clients.items]
            self._own_bias = model.bias[clients.items]

    def fit(self, l2: float, steps: int) -> NDArray[np.float32]:
        """Minimisers by Newton's method from zero: float32 (clients, d)."""
        d = self._factors.shape[1]
        vectors = np.zeros((len(self._clients), d), dtype=np.float32)
        squares = _squares(self._factors)
        ridge = np.float32(l2) * np.eye(d, dtype=np.float32)
        for _ in range(steps):
            chance = self._chances(vectors)
            gradient = np.float32(l2) * vectors - self._pulls(chance) @ self._factors
            hessian = (self._weights * chance * (1.0 - chance)) @ squares
            if not self._complete:
                own = self._own_chances(vectors)
                pulls = self._own_weights * (1.0 - own)
                gradient -= self._by_client(pulls, self._own_factors)
                hessian += self._by_client(pulls * own, _squares(self._own_factors))
            step = np.linalg.solve(hessian.reshape(-1, d, d) + ridge, gradient[:, :, None])
            vectors -= step[:, :, 0]
        return vectors

    def errors(
        self, vectors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Minus the gradient of the loss in scores: of own items outside the table, and in it."""
        own = np.zeros_like(self._own_weights)
        if not self._complete:
            own = self._own_weights * (1.0 - self._own_chances(vectors))
        return own, self._pulls(self._chances(vectors))

    def losses(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Weighted cross-entropy of each client, in nats."""
        chance = self._chances(vectors)
        own = chance[self._mine] if self._complete else self._own_chances(vectors)
        entropy = -self._weights * np.log1p(-chance)
        entropy[self._mine] = 0.0
        missed = np.add.reduceat(-self._own_weights * np.log(own), self._clients.first)
        return np.asarray(missed + entropy.sum(axis=1), dtype=np.float64)

    def _chances(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """That an item of the table is a positive."""
        return _sigmoid(vectors @ self._factors.T + self._bias)

    def _own_chances(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        scores = np.einsum("pd,pd->p", self._own_factors, vectors[self._clients.owners])
        return _sigmoid(scores + self._own_bias)

    def _pulls(self, chance: NDArray[np.float32]) -> NDArray[np.float32]:
        pulls = -self._weights * chance
        if self._complete:
            pulls[self._mine] += self._own_weights
        return pulls

    def _by_client(
        self, weights: NDArray[np.float32], rows: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Weighted sum of each client's rows."""
        summed = np.add.reduceat(weights[:, None] * rows, self._clients.first, axis=0)
        return np.asarray(summed, dtype=np.float32)


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """In place, through tanh, which does not overflow; kept away from 0 and 1."""
    values *= 0.5
    np.tanh(values, out=values)
    values *= 0.5
    values += 0.5
    return np.clip(values, 1e-7, 1 - 1e-7, out=values)


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outer product of each row with itself, flat."""
    return (rows[:, :, None] * rows[:, None, :]).reshape(rows.shape[0], -1)
