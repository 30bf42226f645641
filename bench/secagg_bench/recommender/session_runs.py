"""The session model on Amazon Beauty: federated in floats, encrypted, centralised, and stacked.

Published figures and the floor of transition counts are of models that have not seen each user's
last but one item. It is held back from training here as well, and tuned with, but belongs to the
history that is scored from. One more run trains on whole histories. Sums are of the very integers
that clients encrypt; where a run is encrypted, each round's sum is compared with that in the clear
by its SHA-256. Read `sessions` next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.optimisers import Optimiser
from secagg.parameters import MIN_COHORT, FloatSegment, Plan
from secagg.planner import plan_tensors
from secagg.quantize import flatten, unflatten
from secagg_bench.baselines import federated_average
from secagg_bench.recommender.one_round_runs import held_back
from secagg_bench.recommender.sums import Encrypting, Sent, add_in_the_clear
from secagg_recommender.content import BUCKETS, ItemContent, item_content
from secagg_recommender.datasets import Dataset, DatasetName, read_dataset
from secagg_recommender.evaluation import Evaluator, Metrics, ScoresFn
from secagg_recommender.factorisation import SharedTensors
from secagg_recommender.histories import HistoryModel, histories_of, scores_on
from secagg_recommender.interactions import NO_TEST_ITEM, Split, split_leave_one_out
from secagg_recommender.partition import partition_users
from secagg_recommender.session_model import ATTRIBUTES, SessionModel
from secagg_recommender.session_silo import (
    SessionConfig,
    SessionSilo,
    init_session,
    session_shapes,
)
from secagg_recommender.stacked import StackedModel, frequent_pairs
from secagg_recommender.trained import hold_out
from secagg_recommender.transitions import (
    DISTANCE_WEIGHTS,
    Transitions,
    popularity,
    transition_counts,
)

__all__ = ["Federation", "Progressed", "Recipe", "SessionData", "cold_run", "session_run", "stacks"]

Progressed = Callable[[str, int, int], None]
"""Told a name, and how many of how many rounds are done."""

_EVALUATION_SEED: Final = 0
_CLIP: Final = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides a run.

    Attributes:
        kind: sums of floats, of integers in the clear, of integers under encryption.
        whole: train on whole histories, the validation items too.
        silos: that users are dealt out to; ``cohort`` of them take part in a round.
        learning_rate, tau: of the server's Adam; the rate falls to nothing along a cosine.
    """

    kind: str = "float"
    whole: bool = False
    silos: int = 448
    cohort: int = 112
    rounds: int = 120
    learning_rate: float = 0.025
    tau: float = 1e-5
    seed: int = 0
    buckets: int = BUCKETS
    config: SessionConfig = field(default_factory=SessionConfig)


@dataclass(frozen=True)
class SessionData:
    """A data set with attributes, and what is measured on it."""

    data_dir: Path | None
    name: DatasetName = "amazon-beauty"

    @cached_property
    def split(self) -> Split:
        """Whole histories; each user's last item is the test item."""
        return split_leave_one_out(self._dataset.interactions)

    @cached_property
    def train(self) -> Split:
        """The same without the validation items."""
        return held_back(self.split)

    @cached_property
    def test(self) -> Evaluator:
        """Of the last items."""
        return Evaluator(self.split, _EVALUATION_SEED)

    @cached_property
    def validation(self) -> Evaluator:
        """Of the last but one items."""
        return Evaluator(hold_out(self.split), _EVALUATION_SEED)

    def content(self, buckets: int) -> ItemContent:
        """What is public of the items.

        Raises:
            DataError: the data set has no attributes.
        """
        labels = self._dataset.interactions.item_labels
        return item_content(self._dataset.attributes, labels, buckets=buckets)

    @cached_property
    def _dataset(self) -> Dataset:
        return read_dataset(self.name, self.data_dir)


class Federation:
    """Silos, and the model on its way through the rounds.

    Args:
        split: what is trained on.
    """

    def __init__(self, recipe: Recipe, split: Split, content: ItemContent) -> None:
        self.recipe = recipe
        parts = partition_users(split.n_users, recipe.silos, recipe.seed)
        config = replace(recipe.config, seed=recipe.seed)
        self.silos = [SessionSilo(i, split, part, content, config) for i, part in enumerate(parts)]
        self.shared = init_session(content, config)
        self.plan = session_plan(content, config, recipe.cohort)
        self.encrypting = Encrypting() if recipe.kind == "encrypted" else None
        self.train_s: list[float] = []
        (segment,) = self.plan.segments
        assert isinstance(segment, FloatSegment)  # noqa: S101
        self._segment = segment
        self._state = self._optimiser(1).initial(segment.parameters)
        self._rng = np.random.default_rng([recipe.seed, 1])
        self._deck: list[int] = []

    @property
    def floats(self) -> int:
        """Shared numbers."""
        return self._segment.parameters

    def run(self, progress: Callable[[int], None]) -> SharedTensors:
        """All rounds."""
        for number in range(1, self.recipe.rounds + 1):
            self._round(number)
            progress(number)
        return self.shared

    def _round(self, number: int) -> None:
        sent = [self._contribution(silo, number) for silo in self._drawn()]
        model, self._state = self._optimiser(number).step(
            flatten(self._segment, self.shared), self._mean(number, sent), self._state
        )
        tensors = unflatten(self._segment, model.astype(np.float64))
        self.shared = {name: value.astype(np.float32) for name, value in tensors.items()}

    def _drawn(self) -> list[int]:
        """As from a deck of cards, so that all take part equally often."""
        if len(self._deck) < self.recipe.cohort:
            self._deck = self._rng.permutation(self.recipe.silos).tolist()
        drawn, self._deck = self._deck[: self.recipe.cohort], self._deck[self.recipe.cohort :]
        return drawn

    def _contribution(self, silo: int, number: int) -> Sent:
        started = time.process_time()
        trained = self.silos[silo].train(self.shared, number)
        self.train_s.append(time.process_time() - started)
        return Sent(silo, trained.update, trained.samples)

    def _mean(self, number: int, sent: list[Sent]) -> npt.NDArray[np.float64]:
        if self.recipe.kind == "float":
            mean = federated_average([s.update for s in sent], [1.0] * len(sent))
            return flatten(self._segment, mean).astype(np.float64)
        add = self.encrypting or add_in_the_clear
        return add(self.plan, number, sent, self.recipe.seed).flat_mean()

    def _optimiser(self, number: int) -> Optimiser:
        """Warmed up for eight rounds, then cooled down along a cosine."""
        done = number / self.recipe.rounds
        factor = min(1.0, number / 8) * (0.02 + 0.49 * (1 + np.cos(np.pi * done)))
        return Optimiser(
            "adam", learning_rate=self.recipe.learning_rate * factor, tau=self.recipe.tau
        )


def session_plan(content: ItemContent, config: SessionConfig, clients: int) -> Plan:
    """8 bits a number. Equal weights: silos are alike, and a weight would cost resolution."""
    return plan_tensors(
        session_shapes(content, config), max_clients=max(clients, MIN_COHORT), clip=_CLIP
    )


def session_run(
    recipe: Recipe, data: SessionData, progressed: Progressed
) -> tuple[SharedTensors, dict[str, Any]]:
    """Train; measure by the validation items, where these are held back, and by the test items."""
    content = data.content(recipe.buckets)
    federation = Federation(recipe, data.split if recipe.whole else data.train, content)
    name = f"{recipe.kind}{', whole histories' if recipe.whole else ''}, seed {recipe.seed}"
    started = time.process_time()
    shared = federation.run(lambda done: progressed(name, done, recipe.rounds))
    model = SessionModel.of(shared, content)
    found: dict[str, Any] = {
        "recipe": asdict(recipe),
        "floats": federation.floats,
        "upload_bytes": federation.plan.payload_bytes,
        "train_s": median(federation.train_s),
        "processor_s": time.process_time() - started,
        "test": measured(data.test, model, data.split),
    }
    if not recipe.whole:
        found["validation"] = measured(data.validation, model, data.train)
    if federation.encrypting is not None:
        seconds = federation.encrypting.seconds
        found["identical_rounds"] = federation.encrypting.rounds
        found |= {f"{step}_s": median(times) for step, times in seconds.items()}
    return shared, found


def measured(evaluator: Evaluator, model: HistoryModel, split: Split) -> dict[str, float]:
    """Metrics of a model that scores from a split's training items."""
    found: Metrics = evaluator.evaluate(scores_on(model, split))
    return asdict(found)


# --- on top of counts -----------------------------------------------------------------------------

_WEIGHTS: Final = (1.0, 2.0, 4.0, 8.0)
_GAINS: Final = (10.0, 100.0, 1000.0)
_TUNED_ON: Final = 3_000
"""Users that weight and gain are chosen with, by their validation items."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Which counts a session model is stacked on.

    Attributes:
        distances: what a pair counts by distance.
        least: users that have a pair at one of these distances, for it to count.
        damping: of `Transitions`.
        weight, gain: of `StackedModel`, for where there is no validation item left to tune with.
    """

    name: str
    distances: tuple[int, ...]
    least: int
    damping: float
    weight: float = 8.0
    gain: float = 10.0


_COUNTS: Final = (
    _Counts("neighbours that two or more users have", (1,), 2, 1.0),
    _Counts("pairs that two or more users have", DISTANCE_WEIGHTS, 2, 1.0),
    _Counts("all pairs", DISTANCE_WEIGHTS, 1, 0.5),
)


def stacks(
    shared: Mapping[str, npt.NDArray[np.float32]], recipe: Recipe, data: SessionData
) -> list[dict[str, Any]]:
    """The session model on top of each kind of counts, and these alone.

    Weight and gain are those that rank validation items best among all items.
    """
    session = SessionModel.of(shared, data.content(recipe.buckets))
    return [_stack(session, counts, data, whole=recipe.whole) for counts in _COUNTS]


def _stack(
    session: SessionModel, counts: _Counts, data: SessionData, *, whole: bool
) -> dict[str, Any]:
    tuning, _ = _transitions(data.train, counts)
    weight, gain = (counts.weight, counts.gain) if whole else _tuned(session, tuning, data)
    pairs, numbers = _transitions(data.split if whole else data.train, counts)
    stacked = StackedModel(session, pairs, weight, gain)
    return {
        "counts": counts.name,
        "pairs": numbers,
        "weight": weight,
        "gain": gain,
        "whole": whole,
        "alone": measured(data.test, pairs, data.split),
        "test": measured(data.test, stacked, data.split),
    }


def _transitions(split: Split, counts: _Counts) -> tuple[Transitions, int]:
    """The model of counts, and how many numbers it is made of."""
    histories = histories_of(split, range(split.n_users))
    pairs = transition_counts(histories, split.n_items, counts.distances)
    having = transition_counts(histories, split.n_items, (1,) * len(counts.distances))
    pairs = frequent_pairs(pairs, having, counts.least)
    users = popularity(histories, split.n_items)
    model = Transitions.of(pairs, users, backward=0.0, damping=counts.damping)
    return model, int(pairs.keys.size)


def _tuned(session: SessionModel, pairs: Transitions, data: SessionData) -> tuple[float, float]:
    users = np.random.default_rng(0).permutation(data.split.n_users)[:_TUNED_ON]
    tuned_on = hold_out(data.split)
    test_item = np.full_like(tuned_on.test_item, NO_TEST_ITEM)
    test_item[users] = tuned_on.test_item[users]
    evaluator = Evaluator(replace(tuned_on, test_item=test_item), _EVALUATION_SEED)
    models = [scores_on(model, data.train) for model in (session, pairs)]
    kept: dict[bytes, list[npt.NDArray[np.float32]]] = {}

    def stacked(weight: float, gain: float) -> ScoresFn:
        def scores(asked: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            key = asked.tobytes()
            if key not in kept:
                kept[key] = [score(asked).astype(np.float32) for score in models]
            own, votes = kept[key]
            return np.asarray(own + weight * np.log1p(gain * votes))

        return scores

    grid = list(product(_WEIGHTS, _GAINS))
    found = [evaluator.evaluate(stacked(*choice)).full_ndcg10 for choice in grid]
    return grid[int(np.argmax(found))]


# --- new items ------------------------------------------------------------------------------------


def cold_run(
    recipe: Recipe, data: SessionData, progressed: Progressed, *, share: float = 0.05
) -> dict[str, Any]:
    """Items that nobody has had in training, as the next item of those who take them last."""
    content, split = data.content(recipe.buckets), data.split
    rng = np.random.default_rng([recipe.seed, 2])
    new = np.sort(rng.permutation(split.n_items)[: round(share * split.n_items)])
    train = _without(data.train, new)
    federation = Federation(recipe, train, content)
    shared = federation.run(lambda done: progressed("new items", done, recipe.rounds))
    target = np.where(np.isin(split.test_item, new), split.test_item, NO_TEST_ITEM)
    asked = replace(split, test_item=target.astype(np.int32))
    evaluator = Evaluator(asked, _EVALUATION_SEED)
    model = SessionModel.of(shared, content)
    return {
        "items": int(new.size),
        "users": int((target != NO_TEST_ITEM).sum()),
        "rows": [
            {"vector": name, "test": measured(evaluator, replaced, split)}
            for name, replaced in _with_vectors(model, content, shared, new)
        ],
    }


def _with_vectors(
    model: SessionModel,
    content: ItemContent,
    shared: Mapping[str, npt.NDArray[np.float32]],
    new: npt.NDArray[np.int64],
) -> Iterable[tuple[str, SessionModel]]:
    """The model with vectors of attributes for new items, and with none; bias the median one."""
    bias = model.bias.copy()
    bias[new] = np.median(np.delete(model.bias, new))
    for name in ("of its attributes", "none"):
        vectors = model.vectors.copy()
        vectors[new] = 0.0
        if name != "none":
            own = [content.indices[content.indptr[i] : content.indptr[i + 1]] for i in new]
            vectors[new] = [content.new_vector(shared[ATTRIBUTES], of) for of in own]
        yield name, SessionModel(vectors, bias, model.mix)


def _without(split: Split, items: npt.NDArray[np.int64]) -> Split:
    kept = ~np.isin(split.train_items, items)
    return replace(split, train_users=split.train_users[kept], train_items=split.train_items[kept])
