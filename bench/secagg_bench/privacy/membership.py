"""Was this user among those a model was trained on? Attacks on what is released, and their limit.

Cohorts are random halves of the users; every user is attacked in every cohort. An attacker knows
the user's items, the hyperparameters and everything public (first factors, negatives), and sees

* the **final model** alone: the loss of a vector fitted to the user's items ("loss"); or
* **every release**: the inner product of what the user would have contributed with each noisy sum,
  weighted by 1/z**2 ("alignment"), which is the likelihood ratio where all other clients are known.

Each statistic is used as it is, and in a likelihood ratio of Gaussians per user that other cohorts
calibrate, with and without the user (Carlini et al. 2022, "Membership Inference Attacks From First
Principles", algorithm 1, with one variance for all users as for few shadow models). The canary is
the worst case: a user with items that nobody else has, in a small cohort. Read `settings` next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from secagg_bench.privacy.federated import Federated, Popularity, draw_negatives, gradients, losses
from secagg_bench.privacy.federated import train as train_federated
from secagg_bench.privacy.mechanism import Budget, Channel
from secagg_bench.privacy.population import Clients

__all__ = [
    "FPR",
    "Attacked",
    "Success",
    "attack_cohorts",
    "canary_trials",
    "gaussian_bound",
    "likelihood_ratios",
    "success",
    "tpr_bound",
]

FPR = 0.01
"""False positive rate at which true positives are counted."""

Statistics = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Attacked:
    """Statistics of every user in every cohort: arrays of shape (cohorts, users)."""

    members: NDArray[np.bool_] = field(repr=False)
    statistics: Statistics = field(repr=False)


@dataclass(frozen=True, slots=True)
class Success:
    """Of one attack, with 95 % intervals by a bootstrap over cohorts."""

    auc: tuple[float, float, float]
    tpr: tuple[float, float, float]


def attack_cohorts(
    clients: Clients,
    settings: Federated,
    budget: Budget,
    cohorts: int,
    seed: int,
    done: Callable[[], None],
) -> Attacked:
    """Train on so many random halves, and take every user's statistics."""
    rng = np.random.default_rng([seed, 1])
    members = rng.random((cohorts, len(clients))).argsort(axis=1) < len(clients) // 2
    rows: list[Statistics] = []
    for member in members:
        cohort = clients.chosen(np.flatnonzero(member))
        rows.append(_statistics(clients, cohort, settings, Channel(budget, rng), seed))
        done()
    return Attacked(members, {name: np.stack([row[name] for row in rows]) for name in rows[0]})


def canary_trials(
    clients: Clients,
    settings: Federated,
    budget: Budget,
    size: int,
    trials: int,
    seed: int,
    done: Callable[[], None],
) -> Attacked:
    """Cohorts of a few random users and a canary, which contributes zeros in every second one.

    It has as many items as the median user, the least popular ones. One column: the canary.
    """
    rng = np.random.default_rng([seed, 2])
    count = int(np.median(clients.counts))
    rare = np.argsort(clients.totals(np.ones(clients.items.size)), kind="stable")[:count]
    canary = Clients(np.array([count]), rare.astype(np.int64), clients.n_items)
    members = np.arange(trials) % 2 == 0
    rows: list[Statistics] = []
    for member in members:
        cohort = clients.chosen(rng.choice(len(clients), size - 1, replace=False))
        if member:
            cohort = Clients(
                np.append(cohort.counts, canary.counts),
                np.append(cohort.items, canary.items),
                clients.n_items,
            )
        channel = Channel(budget, rng, absent=int(not member))
        rows.append(_statistics(canary, cohort, settings, channel, seed))
        done()
    statistics = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Attacked(members[:, None], statistics)


def _statistics(
    targets: Clients,
    cohort: Clients,
    settings: Federated,
    channel: Channel,
    seed: int,
) -> Statistics:
    """Of all targets, after training on one cohort."""
    public = np.random.default_rng([seed, 3])
    model, history = train_federated(cohort, settings, channel, public)
    would_be = [Popularity(targets)] + [
        gradients(before, targets, settings, negatives) for before, negatives in history
    ]
    weights = [1.0 / (each.multiplier or 1.0) ** 2 for each in channel.releases]
    alignment = sum(
        weight * each.along(release.total)
        for weight, each, release in zip(weights, would_be, channel.releases, strict=True)
    )
    negatives = draw_negatives(targets.n_items, settings.sample, public)
    return {
        "loss": -losses(model, targets, settings, negatives),
        "alignment": np.asarray(alignment, dtype=np.float64),
    }


def likelihood_ratios(
    statistic: NDArray[np.float64], members: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Log-ratio of "in" to "out" of each entry, by Gaussians fitted to all other cohorts.

    Args:
        statistic, members: of shape (cohorts, users). Entries whose user has fewer than two other
            cohorts on a side get 0, which says nothing.
    """
    spread, means = [], []
    enough = np.ones(statistic.shape, dtype=bool)
    for side in (members, ~members):
        values = np.where(side, statistic, 0.0)
        count = side.sum(axis=0) - side
        enough &= count >= 2
        mean = (values.sum(axis=0) - values) / np.maximum(count, 1)
        means.append(mean)
        spread.append(np.square(statistic - mean)[side & (count >= 2)])
    variance = max(float(np.mean(np.concatenate(spread))), 1e-300)
    inside, outside = means
    ratio = (np.square(statistic - outside) - np.square(statistic - inside)) / (2 * variance)
    return np.where(enough, ratio, 0.0)


def success(
    scores: NDArray[np.float64], members: NDArray[np.bool_], resamples: int = 500
) -> Success:
    """AUC, and true positives at a false positive rate of `FPR`, over all entries."""
    rng = np.random.default_rng(0)
    cohorts = len(scores)
    drawn = [_measure(scores, members)]
    for _ in range(resamples):
        rows = rng.integers(cohorts, size=cohorts)
        if 0 < members[rows].sum() < members[rows].size:
            drawn.append(_measure(scores[rows], members[rows]))
    point, low, high = drawn[0], *np.percentile(drawn, [2.5, 97.5], axis=0)
    auc, tpr = zip(point, low, high, strict=True)
    return Success(_floats(auc), _floats(tpr))


def _floats(values: Iterable[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _measure(scores: NDArray[np.float64], members: NDArray[np.bool_]) -> tuple[float, float]:
    inside, outside = scores[members], scores[~members]
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left") + np.searchsorted(ordered, inside, "right")
    auc = below.mean() / (2 * outside.size)  # ties count half
    threshold = np.quantile(outside, 1 - FPR, method="higher")
    return float(auc), float(np.mean(inside > threshold))


def tpr_bound(budget: Budget) -> float:
    """Most true positives at `FPR` that (epsilon, delta) allows any attack on one client.

    Kairouz, Oh and Viswanath 2015, "The Composition Theorem for Differential Privacy", theorem 2.1.
    """
    if math.isinf(budget.epsilon):
        return 1.0
    grow = math.exp(min(budget.epsilon, 700.0))
    return min(1.0, grow * FPR + budget.delta, 1 - (1 - budget.delta - FPR) / grow)


def gaussian_bound(budget: Budget) -> float:
    """The same for Gaussian noise of that zCDP: a shift by sqrt(2 rho) standard deviations.

    Dong, Roth and Su 2022, "Gaussian Differential Privacy", corollary 3.3.
    """
    if math.isinf(budget.epsilon):
        return 1.0
    normal = NormalDist()
    return normal.cdf(normal.inv_cdf(FPR) + math.sqrt(2 * budget.rho))
