"""Plain DP-FedAvg: the client library's local training, as it is, with one user a client.

User vectors and copies of the touched rows of the table take two steps of Adam a round, as
`secagg_recommender.factorisation.Silo` would with the same configuration; what came of the rows is
clipped, summed, noised and averaged (McMahan et al. 2018, "Learning Differentially Private
Recurrent Language Models"). Two things differ from a silo, for speed: a round's negatives serve
both epochs, and repeats among them are dropped. Read `cooccurrence` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy.mechanism import Channel
from secagg_bench.privacy.population import Clients
from secagg_recommender.evaluation import ScoresFn, factor_scores
from secagg_recommender.factorisation import (
    ITEM_BIAS,
    ITEM_FACTORS,
    SharedTensors,
    TrainConfig,
    init_shared,
)

__all__ = ["DefaultTraining", "LocalRows", "local_training", "train"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam, torch's defaults
_ROWS = 8192  # touched at a time, which a cache holds


@dataclass(frozen=True, slots=True)
class DefaultTraining:
    """The client library's configuration, with what federating it takes.

    Attributes:
        config: of local training.
        rounds: of averaging.
        clip: L2 norm of one user's update.
        rate: of a step on the mean update; 1 is plain averaging.
    """

    config: TrainConfig = field(default_factory=TrainConfig)
    rounds: int = 25
    clip: float = 1.0
    rate: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class LocalRows:
    """Updates of the rows each client touched, in units of the clip norm, and clipped to it.

    Attributes:
        touched: which rows, client after client; `counts` says how many each.
        changes: float32 of shape (rows, d + 1), the bias last.
    """

    touched: Clients
    changes: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.touched.n_items, self.changes.shape[1])

    def __len__(self) -> int:
        return len(self.touched)

    def total(self) -> NDArray[np.float64]:
        return np.stack([self.touched.totals(column) for column in self.changes.T], axis=1)

    def rows(self) -> Iterator[NDArray[np.float32]]:
        for first, count in zip(self.touched.first, self.touched.counts, strict=True):
            row = np.zeros(self.shape, dtype=np.float32)
            row[self.touched.items[first : first + count]] = self.changes[first : first + count]
            yield row

    def along(self, direction: NDArray[np.float64]) -> NDArray[np.float64]:
        inner = np.einsum("rd,rd->r", self.changes, direction[self.touched.items])
        return np.asarray(np.add.reduceat(inner, self.touched.first), dtype=np.float64)


def train(
    clients: Clients, settings: DefaultTraining, channel: Channel, rng: np.random.Generator
) -> ScoresFn:
    """Train, and score with the vectors that the clients trained along."""
    shared = init_shared(clients.n_items, settings.config.dimensions, settings.config.seed)
    vectors = rng.normal(0.0, 0.1, (len(clients), settings.config.dimensions)).astype(np.float32)
    multiplier = channel.budget.multiplier(releases=settings.rounds)
    for _ in range(settings.rounds):
        touched, positive = touch(clients, settings.config.negatives, rng)
        changes = np.empty((touched.items.size, vectors.shape[1] + 1), dtype=np.float32)
        for rows, places, batch in touched.batches(_ROWS):
            vectors[rows], changes[places] = local_training(
                shared, vectors[rows], batch, positive[places], settings.config
            )
        lengths = np.sqrt(np.add.reduceat(np.einsum("rd,rd->r", changes, changes), touched.first))
        scale = (1.0 / np.maximum(lengths, settings.clip)).astype(np.float32)
        changes *= scale[touched.owners, None]
        updates = LocalRows(touched, changes)
        mean = settings.rate * settings.clip * channel.release(updates, multiplier).mean
        shared = {
            ITEM_FACTORS: shared[ITEM_FACTORS] + mean[:, :-1].astype(np.float32),
            ITEM_BIAS: shared[ITEM_BIAS] + mean[:, -1].astype(np.float32),
        }
    return factor_scores(vectors, shared)


def touch(
    clients: Clients, negatives: int, rng: np.random.Generator
) -> tuple[Clients, NDArray[np.bool_]]:
    """Rows each client trains on: its items, and draws of others, of which repeats are dropped.

    Returns:
        The rows as clients' items, ascending, and which of them are positives.
    """
    own = clients.owners * clients.n_items + clients.items
    owners = np.repeat(clients.owners, negatives)
    drawn = owners * clients.n_items + rng.integers(clients.n_items, size=owners.size)
    # The last bit sorts a positive before negatives of the same client and item.
    marked = np.sort(np.concatenate([2 * own, 2 * drawn + 1]))
    marked = marked[np.append(True, np.diff(marked >> 1) > 0)]
    owner, item = np.divmod(marked >> 1, clients.n_items)
    counts = np.bincount(owner, minlength=len(clients)).astype(np.int64)
    return Clients(counts, item, clients.n_items), marked % 2 == 0


def local_training(
    shared: SharedTensors,
    vectors: NDArray[np.float32],
    touched: Clients,
    positive: NDArray[np.bool_],
    config: TrainConfig,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One step of Adam an epoch, on each client's mean loss, from the shared rows.

    Returns:
        New vectors, (clients, d), and changes of the touched rows, (rows, d + 1), bias last.
    """
    start = np.concatenate(
        [shared[ITEM_FACTORS][touched.items], shared[ITEM_BIAS][touched.items, None]], axis=1
    )
    parameters = [vectors.copy(), start.copy()]
    moments = [[np.zeros_like(each), np.zeros_like(each)] for each in parameters]
    weight = (1.0 / touched.counts).astype(np.float32)[touched.owners, None]
    for step in range(1, config.local_epochs + 1):
        vector, rows = parameters
        mine = vector[touched.owners]
        logits = np.einsum("rd,rd->r", mine, rows[:, :-1]) + rows[:, -1]
        error = (0.5 * (1.0 + np.tanh(0.5 * logits)) - positive).astype(np.float32)[:, None]
        pulls = np.concatenate([error * mine, error], axis=1) + config.l2 * rows
        gradients = [
            np.add.reduceat(weight * error * rows[:, :-1], touched.first) + config.l2 * vector,
            weight * pulls,
        ]
        for parameter, gradient, moment in zip(parameters, gradients, moments, strict=True):
            _adam(
                parameter,
                gradient.astype(np.float32, copy=False),
                moment,
                step,
                config.learning_rate,
            )
    return parameters[0], parameters[1] - start


def _adam(
    parameter: NDArray[np.float32],
    gradient: NDArray[np.floating],
    moment: list[NDArray[np.float32]],
    step: int,
    rate: float,
) -> None:
    """One step, in place (Kingma and Ba 2015, "Adam", algorithm 1)."""
    for index, (beta, power) in enumerate(zip(_BETAS, (1, 2), strict=True)):
        target = (gradient**power).astype(np.float32, copy=False)
        moment[index] += np.float32(1 - beta) * (target - moment[index])
    mean, square = (
        each / np.float32(1 - beta**step) for each, beta in zip(moment, _BETAS, strict=True)
    )
    parameter -= np.float32(rate) * mean / (np.sqrt(square) + np.float32(_EPSILON))
