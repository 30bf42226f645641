"""What a poisoning client makes of its update, before it is encrypted.

An attacker knows the model, its own data and what it would honestly send, and agrees with its
accomplices on a target; it knows no honest client's update. Its integers need not keep to the
plan. Read `malformed` for attackers that do not even keep to the format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from secagg.parameters import FloatSegment
from secagg.quantize import unflatten
from secagg_bench.gallery import uploads
from secagg_recommender.factorisation import ITEM_BIAS
from secagg_recommender.interactions import Split

__all__ = ["ATTACKS", "WEIGHT_ATTACKS", "Attack", "Situation", "with_flipped_labels"]

Vector = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Situation:
    """What one attacker sees in one round.

    Attributes:
        segment: what an update consists of.
        rotation: the round's public string.
        honest: what it would honestly send, float32 (parameters,), in model units.
        model: the round's model, float32 (parameters,).
        clients, attackers: how many there are, attackers among the clients.
        target: the item that somebody wants to be seen.
        rng: the attackers' own randomness.
    """

    segment: FloatSegment
    rotation: bytes
    honest: Vector
    model: Vector
    clients: int
    attackers: int
    target: int
    rng: np.random.Generator = field(repr=False)

    def integers(self, vector: Vector, weight: float = 1.0) -> Integers:
        """A vector of any norm and a weight of any size: int64 (segment.values,), not clipped.

        Args:
            vector: float32 (parameters,), in model units, multiplied by its weight already.
            weight: what it claims, where the plan has weights.
        """
        return uploads.integers(self.segment, self.rotation, vector, weight, self.rng)

    def of_norm(self, vector: Vector, bounds: float) -> Vector:
        """The vector at so many times the clip norm."""
        length = float(np.linalg.norm(vector.astype(np.float64)))
        return vector * np.float32(bounds * self.segment.clip / max(length, 1e-9))

    def on_target(self) -> Vector:
        """1 on the target's bias, 0 elsewhere."""
        parts = unflatten(self.segment, np.zeros(self.segment.parameters))
        parts[ITEM_BIAS][self.target] = 1.0
        names = [tensor.name for tensor in self.segment.tensors]
        return np.concatenate([parts[name].reshape(-1) for name in names]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Attack:
    """One way to poison.

    Attributes:
        name: for people.
        label: short, for the figure.
        within: whether it keeps to the bounds, so that the norm check does not stop it.
        integers: what an attacker sends.
        labels: ``"flipped"`` where it trains on the opposite of its data.
    """

    name: str
    label: str
    within: bool
    integers: Callable[[Situation], Integers] = field(repr=False)
    labels: Literal["own", "flipped"] = "own"


def _scaled(factor: float) -> Callable[[Situation], Integers]:
    return lambda seen: seen.integers(seen.honest * np.float32(factor))


def _flipped(bounds: float) -> Callable[[Situation], Integers]:
    return lambda seen: seen.integers(seen.of_norm(-seen.honest, bounds))


def _noise(bounds: float) -> Callable[[Situation], Integers]:
    def build(seen: Situation) -> Integers:
        drawn = seen.rng.normal(size=seen.honest.size).astype(np.float32)
        return seen.integers(seen.of_norm(drawn, bounds))

    return build


def _clipped(seen: Situation) -> Integers:
    """What an honest client does with whatever its training gave."""
    length = float(np.linalg.norm(seen.honest.astype(np.float64)))
    return seen.integers(seen.of_norm(seen.honest, min(1.0, length / seen.segment.clip)))


def _replaced(seen: Situation) -> Integers:
    """Boosted so that the mean, whatever the others send, moves the target above everything."""
    largest = 20.0  # of a bias, several times any that training gives
    wanted = seen.on_target() * np.float32(largest * seen.clients / seen.attackers)
    return seen.integers(wanted + seen.honest)


def _promoted(seen: Situation) -> Integers:
    """The whole bound on the target's bias."""
    return seen.integers(seen.of_norm(seen.on_target(), 1.0))


def _spike(seen: Situation) -> Integers:
    """Four bounds on one coefficient; five and more would be read as one of the next digit."""
    integers = seen.integers(seen.of_norm(seen.honest, 0.5))
    integers[seen.rng.integers(integers.size)] += round(4 * seen.segment.clip / seen.segment.step)
    return integers


ATTACKS: Final[tuple[Attack, ...]] = (
    Attack("update times 10", "×10", False, _scaled(10.0)),
    Attack("update times -10", "×−10", False, _scaled(-10.0)),
    Attack("noise of 10 bounds", "noise,\n10 bounds", False, _noise(10.0)),
    Attack("model replacement for one item", "promotion,\nboosted", False, _replaced),
    Attack("four bounds on one coefficient", "4 bounds on\none coefficient", False, _spike),
    Attack("sign flip at the bound", "sign flip,\n1 bound", True, _flipped(1.0)),
    Attack("noise at the bound", "noise,\n1 bound", True, _noise(1.0)),
    Attack("flipped labels", "flipped\nlabels", True, _clipped, labels="flipped"),
    Attack("promotion at the bound", "promotion,\n1 bound", True, _promoted),
)
"""Attacks under equal weights, first those that leave the bound."""


def _claimed(weight: float) -> Callable[[Situation], Integers]:
    """An honest update with another weight than it has."""
    return lambda seen: seen.integers(seen.honest * np.float32(0.5), weight)


def _minus_all_others(seen: Situation) -> Integers:
    """As much negative weight as the honest clients have, shared among the attackers."""
    honest = 0.5 * (seen.clients - seen.attackers)  # a guess: they weigh a half on average
    return seen.integers(seen.honest * np.float32(0.5), 0.2 - honest / seen.attackers)


def _flipped_at_full_weight(seen: Situation) -> Integers:
    """As much as the bounds leave: nobody can tell on how much data somebody trained."""
    return seen.integers(seen.of_norm(-seen.honest, 1.0), 1.0)


WEIGHT_ATTACKS: Final[tuple[Attack, ...]] = (
    Attack("a weight of 0", "weight 0", False, _claimed(0.0)),
    Attack("a weight of -1", "weight −1", False, _claimed(-1.0)),
    Attack("ten times the largest weight", "weight 10", False, _claimed(10.0)),
    Attack("minus the others' weights", "minus the\nothers'", False, _minus_all_others),
    Attack("sign flip, the largest weight", "sign flip,\nweight 1", True, _flipped_at_full_weight),
)
"""Forged weights, for plans that have any, first those that leave the bounds."""


def with_flipped_labels(split: Split, users: NDArray[np.int64], seed: int) -> Split:
    """The split in which these users have as many items as before, all of them others."""
    rng = np.random.default_rng(seed)
    items = split.train_items.copy()
    for user in users:
        own = np.flatnonzero(split.train_users == user)
        others = np.setdiff1d(np.arange(split.n_items), split.train_items[own])
        # Who has more than half of the catalogue keeps some.
        count = min(own.size, others.size)
        items[own[:count]] = rng.choice(others, count, replace=False)
    return Split(split.train_users, items, split.test_item, split.n_users, split.n_items)
