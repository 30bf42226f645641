"""Clients that are one user each: how their updates lie to the aggregate of the round before.

What the direction check would see where every device is a client. All in the clear.
"""

from __future__ import annotations

import numpy as np

from secagg.parameters import FloatSegment
from secagg.quantize import flatten, unflatten
from secagg_bench.gallery.federation import Setting
from secagg_recommender.factorisation import Silo, TrainConfig, init_shared
from secagg_recommender.interactions import Split

__all__ = ["single_user_cosines"]


def single_user_cosines(split: Split, setting: Setting, clients: int) -> list[list[float]]:
    """Cosines of so many users' updates a round, from the second round on: (rounds - 1, clients).

    Every round has users of its own, drawn at random, as far as there are enough.
    """
    (segment,) = setting.plan(split.n_items, "none").segments
    assert isinstance(segment, FloatSegment)  # noqa: S101 - for the type checker
    config = TrainConfig(dimensions=setting.dimensions, seed=setting.seed)
    shared = init_shared(split.n_items, setting.dimensions, setting.seed)
    order = np.random.default_rng([setting.seed, 11]).permutation(split.n_users)
    rows: list[list[float]] = []
    last = None
    for number in range(1, setting.rounds + 1):
        start = (number - 1) * clients
        chosen = order[np.arange(start, start + clients) % order.size]
        updates = []
        for user in chosen:
            silo = Silo(int(user), split, np.array([user]), config)
            updates.append(flatten(segment, silo.train(shared, number).update))
        if last is not None:
            lengths = np.linalg.norm(updates, axis=1) * np.linalg.norm(last)
            rows.append([float(c) for c in np.stack(updates) @ last / lengths])
        last = np.mean(updates, axis=0)
        moved = unflatten(segment, last.astype(np.float64))
        shared = {name: tensor + moved[name].astype(np.float32) for name, tensor in shared.items()}
    return rows
