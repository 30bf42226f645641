"""A silo whose every interaction is protected from all who see its updates, the key holder too.

Example-level differential privacy: with or without any one interaction (user, item) of the silo,
whatever anybody sees of **all** its updates together is almost as likely, up to (epsilon, delta).
Who its users are and what the catalogue holds is not hidden, and all the interactions of one user
together are not: that takes noise for a whole contribution (see ``secagg.privacy``).

Why it holds, step by step:

* **Every look at the data is a noisy step** (``example_gradients``), over user vectors and shared
  tensors alike. User vectors live on from round to round as outputs of earlier steps, so rounds
  compose, whatever models a server makes up in between. Never restore vectors trained otherwise.
* **Batches are Poisson samples**: each interaction is in with the same probability, by itself, by
  secret cryptographic coins. The number of steps and every divisor are settings, never counts.
* **Negatives are drawn from the whole catalogue.** Drawn from what a user does not have, they would
  depend on the user's other interactions: one interaction would move many gradients.
* **Steps are counted on disk before the data is looked at**, and an update is kept before it is
  handed out: asked again, the silo gives the same one. A crash can waste steps, not forget them.

Weights count interactions, so this silo claims a number that is a setting; losses are not
measured. How long training takes still hints at the size of the silo. Read
``example_gradients`` next.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from secagg.accounting import example_level, example_level_noise
from secagg.archive import npz_of
from secagg.errors import ConfigurationError, InputError
from secagg.private_files import locked, make_folder, write
from secagg.sampling import Stream
from secagg_recommender.factorisation import (
    ITEM_BIAS,
    ITEM_FACTORS,
    LocalUpdate,
    SharedTensors,
    Silo,
    TrainConfig,
    fit_user,
    one_thread,
)
from secagg_recommender.interactions import DataError, Split

if TYPE_CHECKING:
    from secagg_recommender.example_gradients import Examples

__all__ = ["ExamplePrivacy", "PrivateSilo"]

_WORD: Final = 1 << 64
# How finely a calibrated noise multiplier and a proposed budget are given; both are rounded up.
_FINENESS: Final = 1000


@dataclass(frozen=True, slots=True)
class ExamplePrivacy:
    """Budget and mechanism of a private silo; nothing here may be computed from its data.

    Attributes:
        epsilon, delta: what all rounds together may cost; neighbours differ in one interaction
            more or less. Replacing one by another counts twice.
        noise_multiplier: standard deviation of a step's noise over ``max_grad_norm``.
        sampling_rate: probability of an interaction to be in a batch.
        steps: batches in a round.
        nominal_samples: a public guess of the number of interactions; sets the divisor of a batch,
            ``sampling_rate * nominal_samples``, and the weight in a task that weighs by samples.
        max_grad_norm: L2 norm to which an interaction's gradient over all parameters is cut.
        learning_rate: of plain gradient descent on mean gradients.

    Raises:
        ConfigurationError: a value is out of range.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    nominal_samples: int
    max_grad_norm: float = 0.2
    learning_rate: float = 100.0

    def __post_init__(self) -> None:
        """Refuse what cannot be a mechanism."""
        for name in ("epsilon", "noise_multiplier", "max_grad_norm", "learning_rate"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ConfigurationError(
                    f"expected a finite {name} > 0; got {name}={value}; correct it"
                )
        if not (0.0 < self.delta < 1.0 and 0.0 < self.sampling_rate <= 1.0):
            raise ConfigurationError(
                "expected 0 < delta < 1 and 0 < sampling_rate <= 1; got "
                f"delta={self.delta} sampling_rate={self.sampling_rate}; correct them"
            )
        if self.steps < 1 or self.nominal_samples < 1:
            raise ConfigurationError(
                "expected steps >= 1 and nominal_samples >= 1; got "
                f"steps={self.steps} nominal_samples={self.nominal_samples}; raise them"
            )

    @classmethod
    def for_rounds(
        cls,
        rounds: int,
        *,
        epsilon: float,
        delta: float,
        sampling_rate: float,
        steps: int,
        nominal_samples: int,
    ) -> ExamplePrivacy:
        """The least noise, in thousandths, with which ``rounds`` rounds stay within a budget.

        Raises:
            ConfigurationError: a value is out of range, or no noise is enough.
        """
        draft = cls(epsilon, delta, 1.0, sampling_rate, steps, nominal_samples)
        noise = example_level_noise(epsilon, delta, sampling_rate, steps * rounds)
        return replace(draft, noise_multiplier=_rounded_up(noise))


@dataclass(frozen=True, slots=True, repr=False)
class _Spent:
    """What all steps so far amount to, as if each had been taken with the weakest settings."""

    steps: int = 0
    noise_multiplier: float = math.inf
    sampling_rate: float = 0.0

    def plus(self, privacy: ExamplePrivacy) -> _Spent:
        """After another round."""
        return _Spent(
            self.steps + privacy.steps,
            min(self.noise_multiplier, privacy.noise_multiplier),
            max(self.sampling_rate, privacy.sampling_rate),
        )

    def joined(self, other: _Spent) -> _Spent:
        """The more of two counts of the same steps."""
        return _Spent(
            max(self.steps, other.steps),
            min(self.noise_multiplier, other.noise_multiplier),
            max(self.sampling_rate, other.sampling_rate),
        )

    def epsilon(self, delta: float) -> float:
        """What was spent; more noise or rarer sampling never costs more, so this is a bound."""
        if self.steps == 0:
            return 0.0
        return float(example_level(self.noise_multiplier, self.sampling_rate, self.steps, delta))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Outcome:
    """A round that was trained: what to give again to whoever asks again."""

    question: bytes
    update: SharedTensors
    vectors: npt.NDArray[np.float32]


class PrivateSilo(Silo):
    """A :class:`~secagg_recommender.factorisation.Silo` that learns by noisy steps and counts them.

    *Guarantees*: all that :meth:`train` ever returned, and the user vectors, are
    (epsilon, delta)-differentially private with regard to one interaction, as long as the ledger
    is neither deleted nor put back to an earlier one. Unlike its base, two trainings of a round
    from another model differ: the noise is fresh.

    Args:
        index, split, users, config: as of the base; of the configuration only ``dimensions``,
            ``negatives``, ``l2`` and ``seed`` count here.
        privacy: budget and mechanism.
        ledger: private file that remembers steps and the newest update; begun if it is missing.
            None remembers as long as the process lives: for measurements.
        randomness: makes the secret stream of a training; anything but the operating system's is
            for tests.

    Raises:
        ConfigurationError: opacus is missing, or the ledger cannot be used.
        DataError: as of the base, or the ledger is of another silo.
    """

    def __init__(
        self,
        index: int,
        split: Split,
        users: npt.NDArray[np.int64],
        config: TrainConfig,
        privacy: ExamplePrivacy,
        *,
        ledger: Path | None,
        randomness: Callable[[], Stream] = Stream.from_os,
    ) -> None:
        """Take the training data, and up from where the ledger ends."""
        _require_opacus()
        super().__init__(index, split, users, config)
        self._privacy = privacy
        self._ledger = ledger
        self._randomness = randomness
        self._spent = _Spent()
        self._outcome: _Outcome | None = None
        if ledger is not None and ledger.exists():
            self.restore(_read(ledger))

    @property
    def steps(self) -> int:
        """Noisy steps taken so far, those of updates that never left included."""
        return self._spent.steps

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Not told: which items a silo has is what its noise hides.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            "expected a task without a threshold: a silo with example_epsilon cannot tell which "
            "items it has; leave one of them out"
        )

    @property
    def epsilon(self) -> float:
        """Epsilon spent so far, at the budget's delta."""
        return self._spent.epsilon(self._privacy.delta)

    def train(
        self,
        shared: Mapping[str, npt.NDArray[np.float32]],
        round_number: int,
        *,
        steps: int | None = None,
    ) -> LocalUpdate:
        """Train one round from ``shared``, or give again what this round's training gave.

        The update's ``samples`` is the nominal number, its ``loss`` NaN.

        Args:
            steps: None; how many there are is what the privacy of a round was worked out for.

        Raises:
            ConfigurationError: the budget does not allow another round, the ledger cannot be
                written, or ``steps`` is given; the data was not looked at.
            DataError: tensors do not fit the catalogue, or training diverged.
        """
        if steps is not None:
            raise ConfigurationError(
                f"expected no budget of steps beside example_epsilon; got steps={steps}; "
                "lower example_steps instead, equally for all silos"
            )
        old = self._checked(shared)
        question = _question(old, round_number)
        if self._outcome is None or self._outcome.question != question:
            self._spend()
            self._outcome = self._trained(old, question)
            self._keep(self._outcome.vectors)
        self._vectors = self._outcome.vectors.copy()
        update = {name: change.copy() for name, change in self._outcome.update.items()}
        return LocalUpdate(update, self._privacy.nominal_samples, math.nan)

    def personal_vectors(
        self, shared: Mapping[str, npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """Vectors fitted to each user's own items, without noise, float32 ``(users, d)``.

        For recommending to that very user on the device, which tells a user nothing about anybody
        else. They must not be restored, trained on or shown to others. Users without interactions
        keep their vector.

        Raises:
            DataError: tensors do not fit the catalogue, or a user has all items.
        """
        table = self._checked(shared)
        vectors = self.user_vectors
        users, items = self._positives.numpy().T
        for user in np.unique(users):
            vectors[user] = fit_user(table, items[users == user], self._config)
        return vectors

    def state(self) -> bytes:
        """User vectors, steps taken and the newest update, as ``.npz``; keep it on the device."""
        return self._packed(self._vectors)

    def restore(self, state: bytes) -> None:
        """Take back user vectors that :meth:`state` returned; never takes back a step.

        Raises:
            DataError: not the state of a private silo, of another one, or of another shape;
                nothing changed.
        """
        spent, outcome = self._unpacked(state)
        super().restore(state)
        if outcome is not None and spent.steps >= self._spent.steps:
            self._outcome = outcome
        self._spent = self._spent.joined(spent)

    def _spend(self) -> None:
        """Count a round's steps, on disk if there is one, unless the budget forbids them."""
        with nullcontext() if self._ledger is None else _alone(self._ledger):
            if self._ledger is not None and self._ledger.exists():
                # Another process of this silo may have trained since.
                self._spent = self._spent.joined(self._unpacked(_read(self._ledger))[0])
            after = self._spent.plus(self._privacy)
            self._check_budget(after)
            self._spent = after
            self._keep(self._vectors)

    def _check_budget(self, after: _Spent) -> None:
        privacy = self._privacy
        needed = after.epsilon(privacy.delta)
        if not needed <= privacy.epsilon:
            raise ConfigurationError(
                f"expected to stay within epsilon={privacy.epsilon} at delta={privacy.delta} for "
                f"one interaction; got {needed:.4g} after {after.steps} steps, with another round; "
                f"stop here, or agree on epsilon={_rounded_up(needed)}, which allows this round"
            )

    def _trained(self, old: SharedTensors, question: bytes) -> _Outcome:
        from secagg_recommender.example_gradients import GridOptimizer, Recommender

        privacy, stream = self._privacy, self._randomness()
        with one_thread():
            model = Recommender(self._vectors, old[ITEM_FACTORS], old[ITEM_BIAS])
            optimiser = GridOptimizer(
                model,
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                expected_batch_size=privacy.sampling_rate * privacy.nominal_samples,
                learning_rate=privacy.learning_rate,
                stream=stream,
            )
            for _ in range(privacy.steps):
                optimiser.descend(self._batch(stream), self._config.l2)
        vectors, factors, bias = (
            table.weight.detach().numpy().astype(np.float32)
            for table in (model.vectors, model.factors, model.bias)
        )
        update: SharedTensors = {
            ITEM_FACTORS: factors - old[ITEM_FACTORS],
            ITEM_BIAS: bias[:, 0] - old[ITEM_BIAS],
        }
        if not all(np.isfinite(values).all() for values in (vectors, *update.values())):
            raise DataError(
                "expected a finite update, got NaN or infinity; training diverged and its steps "
                "are spent: lower learning_rate, or refuse a model with such values"
            )
        return _Outcome(question, update, vectors)

    def _batch(self, stream: Stream) -> Examples:
        """A Poisson sample of the interactions, each with negatives of its own."""
        from secagg_recommender.example_gradients import Examples

        included = _coins(stream, self.samples, self._privacy.sampling_rate)
        users, positives = self._positives.numpy()[included].T
        negatives = _uniform(stream, (users.size, self._config.negatives), self._n_items)
        return Examples(users, np.concatenate([positives[:, None], negatives], axis=1))

    def _keep(self, vectors: npt.NDArray[np.float32]) -> None:
        if self._ledger is None:
            return
        try:
            write(self._ledger, self._packed(vectors))
        except OSError as error:
            raise ConfigurationError(
                f"expected a writable ledger; {self._ledger}: {error.strerror}; an update must not "
                "leave before its steps are on disk: repair the disk and start again"
            ) from None

    def _packed(self, vectors: npt.NDArray[np.float32]) -> bytes:
        spent, outcome = self._spent, self._outcome
        kept: dict[str, npt.NDArray[np.generic]] = {}
        if outcome is not None:
            question = np.frombuffer(outcome.question, np.uint8)
            kept = dict(outcome.update, question=question, outcome_vectors=outcome.vectors)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            silo=np.int64(self.index),
            users=self._users,
            vectors=vectors,
            steps=np.int64(spent.steps),
            weakest=np.array([spent.noise_multiplier, spent.sampling_rate]),
            **kept,  # type: ignore[arg-type]  # names are ours
        )
        return buffer.getvalue()

    def _unpacked(self, state: bytes) -> tuple[_Spent, _Outcome | None]:
        """Steps and newest update of a state of this silo."""
        try:
            arrays = npz_of(state, "the state")
            steps, weakest = int(arrays["steps"]), arrays["weakest"].astype(np.float64)
            spent = _Spent(steps, float(weakest[0]), float(weakest[1]))
            outcome = None
            if "question" in arrays:
                update = self._checked({name: arrays[name] for name in (ITEM_FACTORS, ITEM_BIAS)})
                vectors = arrays["outcome_vectors"].reshape(self._vectors.shape)
                outcome = _Outcome(arrays["question"].tobytes(), update, vectors)
        except (InputError, KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                "expected the state of a private silo, got something else; vectors trained "
                "without noise would undo the protection: restore what this silo saved"
            ) from error
        if steps < 0 or (steps > 0 and not (spent.noise_multiplier > 0 < spent.sampling_rate <= 1)):
            raise DataError(
                "expected the count of a private silo, got steps or settings out of range; "
                "restore what this silo saved"
            )
        return spent, outcome


def _require_opacus() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "expected opacus for example-level privacy; got a Python without it; "
            "pip install 'secagg[example-privacy]'"
        ) from None


def _question(shared: SharedTensors, round_number: int) -> bytes:
    """What a training is an answer to: SHA-256 of round and model."""
    sha256 = hashlib.sha256(round_number.to_bytes(8, "little"))
    for name in (ITEM_FACTORS, ITEM_BIAS):
        sha256.update(np.ascontiguousarray(shared[name]).tobytes())
    return sha256.digest()


def _coins(stream: Stream, count: int, rate: float) -> npt.NDArray[np.bool_]:
    """``count`` independent coins that show True with probability floor(rate · 2⁶⁴) / 2⁶⁴."""
    limit = int(rate * _WORD)  # A float times a power of two is exact.
    if limit == _WORD:
        return np.ones(count, dtype=np.bool_)
    return stream.uint64(count) < np.uint64(limit)


def _uniform(stream: Stream, shape: tuple[int, int], bound: int) -> npt.NDArray[np.int64]:
    """Integers in [0, bound), int64; biased by less than bound · 2⁻³², which touches no privacy."""
    words = stream.uint32(math.prod(shape)).astype(np.uint64).reshape(shape)
    return (words * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def _rounded_up(value: float) -> float:
    return math.ceil(value * _FINENESS) / _FINENESS


def _read(ledger: Path) -> bytes:
    try:
        return ledger.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"expected a readable ledger; {ledger}: {error.strerror}; restore it, or stop: without "
            "it nobody knows what was spent"
        ) from None


def _alone(ledger: Path) -> AbstractContextManager[None]:
    """Keep other processes of this silo from counting at the same time."""
    make_folder(ledger.parent)
    return locked(ledger.parent)
