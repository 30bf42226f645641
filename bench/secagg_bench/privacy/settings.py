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
        populations: of the curves of utility against epsilon.
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
        Population("amazon-beauty", seeds=3),
        Population("ml-100k", 10, _NO_FEDAVG, 3),
        Population("ml-100k", 100, _NO_FEDAVG, 3, (1.0, 2.0, 4.0, 8.0, math.inf)),
    )
    swept: str = "ml-100k"
    sweep_epsilons: tuple[float, ...] = (8.0, math.inf)
    sweep_seeds: int = 3
    clients: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 10.0)
    bits: tuple[int, ...] = (2, 4, 8, 16)
    participation: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    keep: float = 0.8
    cohorts: int = 32
    attacked: tuple[float, ...] = (1.0, 8.0, math.inf)
    canary_sizes: tuple[int, ...] = (10, 30)
    canary_trials: int = 300
    local_users: int = 200


def quick() -> Sizes:
    """A toy run of seconds, on generated data."""
    return Sizes(
        populations=(
            Population("toy", seeds=2, epsilons=(8.0, math.inf)),
            Population("toy", 3, _NO_FEDAVG, 2, (8.0, math.inf)),
        ),
        swept="toy",
        sweep_seeds=2,
        clients=(0.5, 1.0),
        bits=(2, 8),
        participation=(0.5, 1.0),
        cohorts=6,
        attacked=(8.0, math.inf),
        canary_sizes=(5,),
        canary_trials=8,
        local_users=5,
    )


def delta_of(clients: int) -> float:
    """Delta: below one by the number of clients, whose data it lets slip."""
    return clients**-1.1


def tuned(dataset: str, clients: int, epsilon: float) -> Tuned:
    """What was chosen for a dataset, at a budget."""
    if dataset == "toy":
        return Tuned(Federated(dimensions=4, rounds=2), Cooccurrence(items=30), _TOY_FEDAVG)
    return _ml_100k(clients, epsilon)


_TOY_FEDAVG = DefaultTraining(rounds=2)


def _ml_100k(clients: int, epsilon: float) -> Tuned:
    if math.isinf(epsilon):
        chosen = Federated(dimensions=16, rounds=30, rate=100.0)
    elif epsilon <= 2 and clients < 5000:
        chosen = Federated(dimensions=4, rounds=8, rate=30.0, popularity_share=0.2)
    else:
        chosen = Federated()
    if clients > 50_000:
        chosen = replace(chosen, sample=400, newton_steps=3)
    return Tuned(chosen, Cooccurrence())
