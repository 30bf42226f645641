"""What `tuning` chose, by dataset and budget, and how much is measured.

Hyperparameters were chosen on validation items (each user's last but one), never on test items.
The choice itself looked at private data and is not accounted for: a deployment would choose on
public data, or pay for it (Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi
Differential Privacy").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from secagg_bench.privacy.cooccurrence import Cooccurrence
from secagg_bench.privacy.default_training import DefaultTraining
from secagg_bench.privacy.federated import Federated

__all__ = ["Population", "Sizes", "Tuned", "delta_of", "quick", "tuned"]


@dataclass(frozen=True, slots=True)
class Tuned:
    """Hyperparameters of every method."""

    federated: Federated = field(default_factory=Federated)
    cooccurrence: Cooccurrence = field(default_factory=Cooccurrence)
    fedavg: DefaultTraining = field(default_factory=lambda: DefaultTraining(clip=0.3, rate=25.0))


@dataclass(frozen=True, slots=True)
class Population:
    """Clients of one figure: a dataset, times a factor by bootstrap, and what is run on it."""

    dataset: str
    factor: int = 1
    methods: tuple[str, ...] = ("dp_popularity", "dp_fedavg", "dp_federated", "dp_cooccurrence")
    seeds: int = 5
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, math.inf)


_NO_FEDAVG = ("dp_popularity", "dp_federated", "dp_cooccurrence")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        populations: of the curves of utility against epsilon; of the real users.
        larger: the same, of larger populations.
        swept: dataset of the sweeps over one factor, with their epsilons and seeds.
        clients: how many of the users train, in parts of all; above 1 by bootstrap.
        bits, participation: of the sweeps.
        keep: part of its items that a client keeps in a bootstrap.
        cohorts: of the membership attack.
        attacked: epsilons of both attacks.
        canary_sizes, canary_trials: of the canary's cohorts.
        local_users: how many users train alone.
    """

    populations: tuple[Population, ...] = (
        Population("ml-100k"),
        Population("amazon-beauty", 1, _NO_FEDAVG, 3),
        Population("amazon-beauty", 1, ("dp_fedavg",), 3, (1.0, 8.0, math.inf)),
    )
    larger: tuple[Population, ...] = (
        Population("ml-100k", 10, _NO_FEDAVG, 3),
        Population("ml-100k", 100, ("dp_popularity", "dp_cooccurrence"), 3),
        Population("ml-100k", 100, ("dp_federated",), 3, (1.0, 8.0)),
    )
    swept: str = "ml-100k"
    sweep_epsilons: tuple[float, ...] = (8.0, math.inf)
    sweep_seeds: int = 3
    clients: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    bits: tuple[int, ...] = (2, 4, 8, 16)
    participation: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    keep: float = 0.8
    cohorts: int = 32
    attacked: tuple[float, ...] = (1.0, 8.0, math.inf)
    canary_sizes: tuple[int, ...] = (10, 30)
    canary_trials: int = 600
    local_users: int = 100


def quick() -> Sizes:
    """A toy run of seconds, on generated data."""
    return Sizes(
        populations=(Population("toy", seeds=2, epsilons=(8.0, math.inf)),),
        larger=(Population("toy", 3, _NO_FEDAVG, 2, (8.0, math.inf)),),
        swept="toy",
        sweep_seeds=2,
        clients=(0.5, 1.0),
        bits=(2, 8),
        participation=(0.5, 1.0),
        cohorts=6,
        attacked=(8.0, math.inf),
        canary_sizes=(5,),
        canary_trials=8,
        local_users=2,
    )


def delta_of(clients: int) -> float:
    """Delta: below one by the number of clients, whose data it lets slip."""
    return float(clients**-1.1)


def tuned(dataset: str, clients: int, multiplier: float) -> Tuned:
    """What was chosen for a dataset, by how many clients stand against how much noise.

    Args:
        clients: that train.
        multiplier: z of a single release that spends the whole budget; 0 without noise.
    """
    signal = clients / multiplier if multiplier > 0 else math.inf
    if dataset == "toy":
        return Tuned(Federated(dimensions=4, rounds=2), Cooccurrence(items=30), _TOY_FEDAVG)
    if dataset == "amazon-beauty":
        return Tuned(_beauty(signal), _beauty_cooccurrence(signal), _BEAUTY_FEDAVG)
    return Tuned(_movies(clients, signal), _movies_cooccurrence(clients, signal))


_TOY_FEDAVG = DefaultTraining(rounds=2)
_BEAUTY_FEDAVG = DefaultTraining(clip=0.3, rate=1500.0)


def _movies(clients: int, signal: float) -> Federated:
    if signal < 700:
        return Federated(dimensions=4, rounds=8, rate=30.0, popularity_share=0.2)
    if signal < 2_000:
        return Federated()
    if signal < 8_000:
        return Federated(dimensions=16, rounds=8, rate=60.0)
    if clients > 50_000:  # for speed
        return Federated(dimensions=16, rounds=8, rate=200.0, newton_steps=2)
    return Federated(dimensions=16, rounds=15, rate=200.0)


def _movies_cooccurrence(clients: int, signal: float) -> Cooccurrence:
    items = 500 if signal < 1_500 else 800 if signal < 20_000 else 1_200
    return Cooccurrence(items, ridge=10.0 * max(1.0, clients / 943))


def _beauty(signal: float) -> Federated:
    common = Federated(rounds=8, l2=0.03, popularity_share=0.3, sample=1000)
    if signal < 12_000:
        return replace(common, dimensions=4, rounds=2, rate=50.0, popularity_share=0.6)
    if signal < 25_000:
        return replace(common, dimensions=4, rate=100.0)
    if signal < 40_000:
        return replace(common, dimensions=8, rate=300.0)
    return replace(common, dimensions=16, rate=400.0)


def _beauty_cooccurrence(signal: float) -> Cooccurrence:
    items = 500 if signal < 100_000 else 2000
    return Cooccurrence(items, 0.3, threshold=2.5, popularity_weight=0.03)
