"""Implicit-feedback matrix factorisation, trained on one silo's own data.

score(u, i) = ⟨p_u, q_i⟩ + b_i. Item factors q and biases b are shared and learned together;
user vectors p are private: they must never be part of an update, only of :meth:`Silo.state`, which
stays on the device. Every random number of round r derives from (seed, silo, r), so a silo that
restarts reproduces its round bit for bit. Read ``evaluation`` next.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from secagg.archive import npz_of
from secagg.errors import InputError
from secagg_recommender.interactions import DataError, Split

__all__ = [
    "ITEM_BIAS",
    "ITEM_FACTORS",
    "LocalUpdate",
    "SharedTensors",
    "Silo",
    "TrainConfig",
    "derived_seed",
    "fit_user",
    "init_shared",
]

ITEM_FACTORS: Final = "item_factors"
"""Name of the shared tensor of item vectors, float32 ``(n_items, d)``."""
ITEM_BIAS: Final = "item_bias"
"""Name of the shared tensor of item biases, float32 ``(n_items,)``."""

SharedTensors = dict[str, npt.NDArray[np.float32]]
"""The shared half of the model, by tensor name; nothing about any user."""

_INIT_STD: Final = 0.1
_NEWTON_STEPS: Final = 50
_NEWTON_TOLERANCE: Final = 1e-9
# Keeps the fit of a new user unique where a configuration has no L2 term.
_MIN_FIT_L2: Final = 1e-4


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Hyperparameters of local training; all parties of one task use the same.

    ``batch_size`` counts positives; each brings ``negatives`` sampled ones along. ``l2`` is the
    weight of ½(‖p_u‖² + ‖q_i‖² + b_i²), averaged over the samples of a batch like the loss.
    ``proximal`` is FedProx's μ, the weight of ½‖w − w_t‖² over the shared tensors w, whose values
    at the start of the round are w_t (Li et al. 2020, "Federated Optimization in Heterogeneous
    Networks", equation 2); 0 is FedAvg.

    Raises:
        DataError: a value is out of range.
    """

    dimensions: int = 16
    local_epochs: int = 2
    batch_size: int = 1024
    learning_rate: float = 0.02
    l2: float = 0.01
    negatives: int = 4
    seed: int = 0
    proximal: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in ("dimensions", "local_epochs", "batch_size", "negatives"):
            value = getattr(self, name)
            if value < 1:
                raise DataError(f"expected {name} >= 1, got {name}={value}; raise it")
        # Adam moves a parameter by about the learning rate a step, so above 1 nothing can settle.
        penalties = (self.l2, self.proximal)
        if not (0 < self.learning_rate <= 1 and all(0 <= mu < math.inf for mu in penalties)):
            raise DataError(
                "expected 0 < learning_rate <= 1 and finite l2 and proximal >= 0, got "
                f"learning_rate={self.learning_rate} l2={self.l2} proximal={self.proximal}; "
                "correct them"
            )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LocalUpdate:
    """What one silo learned in one round: the only thing that may leave it, and only encrypted.

    ``update`` is new − old of every shared tensor, float32, same names and shapes. ``samples`` is
    the number of training interactions and ``loss`` the mean cross-entropy of the last local
    epoch in nats; both describe private data and stay on the device too, out of its repr as well.
    """

    update: SharedTensors
    samples: int
    loss: float


def init_shared(n_items: int, d: int, seed: int) -> SharedTensors:
    """Initial shared tensors, a function of the arguments alone: factors N(0, 0.1²), biases 0.

    Returns float32 ``item_factors`` ``(n_items, d)`` and ``item_bias`` ``(n_items,)``.

    Raises:
        DataError: ``n_items`` or ``d`` is below 1.
    """
    if n_items < 1 or d < 1:
        raise DataError(f"expected n_items >= 1 and d >= 1, got n_items={n_items} d={d}; raise it")
    rng = np.random.default_rng(derived_seed("shared", seed))
    return {
        ITEM_FACTORS: rng.normal(0.0, _INIT_STD, (n_items, d)).astype(np.float32),
        ITEM_BIAS: np.zeros(n_items, dtype=np.float32),
    }


class Silo:
    """One data holder: the training items of some users, and their private vectors.

    *Guarantees*: :meth:`train` is a function of (configuration, silo index, training data, user
    vectors, shared tensors, round number), bit for bit on one build of torch and one kind of
    processor, whatever else the process did before. It runs on one thread, because the order in
    which threads add floats is not fixed. It starts from the **current** user vectors: to repeat a
    round, :meth:`restore` what :meth:`state` gave before it.

    Raises:
        DataError: no user, no training interaction, an unknown user, or a user who has every item
            (there would be nothing to draw negatives from).
    """

    def __init__(
        self, index: int, split: Split, users: npt.NDArray[np.int64], config: TrainConfig
    ) -> None:
        """Take the training data of ``users`` (global ids, distinct) out of ``split``."""
        self.index = index
        self._config = config
        self._users = np.unique(users).astype(np.int64)
        self._n_items = split.n_items
        if self._users.size == 0 or self._users[0] < 0 or self._users[-1] >= split.n_users:
            raise DataError(
                f"expected users in [0, {split.n_users}), at least one, got silo={index} "
                f"users={self._users.size}; deal users out with partition_users()"
            )
        mine = np.isin(split.train_users, self._users)
        if not mine.any():
            raise DataError(
                f"expected training interactions, got samples=0 in silo={index}; "
                "use fewer silos or more data"
            )
        local = np.searchsorted(self._users, split.train_users[mine])
        self._positives = torch.from_numpy(
            np.stack([local, split.train_items[mine]], axis=1).astype(np.int64)
        )
        self._sampler = _NegativeSampler(self._positives, self._users.size, self._n_items)
        self._vectors = self._initial_vectors()

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """Global ids of this silo's users, ascending, a copy."""
        return self._users.copy()

    @property
    def user_vectors(self) -> npt.NDArray[np.float32]:
        """Private vectors in the order of :attr:`users`, float32 ``(users, d)``, a copy."""
        return self._vectors.copy()

    @property
    def samples(self) -> int:
        """Number of training interactions."""
        return int(self._positives.shape[0])

    @property
    def full_steps(self) -> int:
        """Steps of a round that nothing cuts short: batches, times local epochs."""
        return self._config.local_epochs * math.ceil(self.samples / self._config.batch_size)

    def train(
        self,
        shared: Mapping[str, npt.NDArray[np.float32]],
        round_number: int,
        *,
        steps: int | None = None,
    ) -> LocalUpdate:
        """Train one round from ``shared`` and move the private vectors along.

        Binary cross-entropy over each positive and its negatives, drawn anew every epoch from
        **all items minus the user's own training items**. The test item stays a possible negative:
        leaving it out would tell the model which item it is. Adam starts fresh every round.

        Args:
            steps: stop after so many batches, drawn uniformly; None or beyond :attr:`full_steps`
                for all. See ``devices`` for what the update must weigh then.

        Raises:
            DataError: tensors do not fit the catalogue, training diverged, or ``steps`` is below
                1; nothing changed.
        """
        old = self._checked(shared)
        steps = self.full_steps if steps is None else min(steps, self.full_steps)
        if steps < 1:
            raise DataError(f"expected steps >= 1, got steps={steps}; leave the round out instead")
        generator = torch.Generator().manual_seed(
            derived_seed("round", self._config.seed, self.index, round_number)
        )
        with one_thread():
            factors = torch.tensor(old[ITEM_FACTORS], requires_grad=True)
            bias = torch.tensor(old[ITEM_BIAS], requires_grad=True)
            vectors = torch.tensor(self._vectors, requires_grad=True)
            loss = self._run_epochs(vectors, factors, bias, generator, steps)
        update: SharedTensors = {
            ITEM_FACTORS: factors.detach().numpy() - old[ITEM_FACTORS],
            ITEM_BIAS: bias.detach().numpy() - old[ITEM_BIAS],
        }
        finite = all(np.isfinite(change).all() for change in update.values())
        if not (finite and math.isfinite(loss)):
            raise DataError(
                f"expected a finite update, got NaN or infinity in round={round_number}; "
                "training diverged: lower learning_rate, or refuse a "
                "model with such values"
            )
        self._vectors = vectors.detach().numpy().copy()
        return LocalUpdate(update=update, samples=self.samples, loss=loss)

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Items that some user of the silo has, ascending: private, like everything they have."""
        return np.unique(self._positives[:, 1].numpy())

    def score(self, shared: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """Scores of all items for this silo's users, float32 ``(users, n_items)``.

        Raises:
            DataError: tensors do not fit the catalogue.
        """
        table = self._checked(shared)
        scores = self._vectors @ table[ITEM_FACTORS].T + table[ITEM_BIAS]
        return scores.astype(np.float32, copy=False)

    def state(self) -> bytes:
        """The private user vectors as ``.npz``; keep it on the device, readable by its owner."""
        buffer = io.BytesIO()
        np.savez(buffer, silo=np.int64(self.index), users=self._users, vectors=self._vectors)
        return buffer.getvalue()

    def restore(self, state: bytes) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            DataError: not such a file, of another silo, or of another shape; nothing changed.
        """
        advice = "restore the state that this silo saved"
        try:
            saved = npz_of(state, "the state")
            silo, users, vectors = saved["silo"], saved["users"], saved["vectors"]
        except (InputError, KeyError) as error:
            raise DataError(f"expected a saved silo state, got {error}; {advice}") from error
        if silo.shape != () or int(silo) != self.index or not np.array_equal(users, self._users):
            raise DataError(
                f"expected the state of silo={self.index} with users={self._users.size}, got "
                f"silo={silo} users={users.size}; {advice}"
            )
        _check_tensor("user vectors", vectors, self._vectors.shape)
        self._vectors = vectors.copy()

    def _initial_vectors(self) -> npt.NDArray[np.float32]:
        """User vectors before the first round."""
        rng = np.random.default_rng(derived_seed("users", self._config.seed, self.index))
        shape = (self._users.size, self._config.dimensions)
        return rng.normal(0.0, _INIT_STD, shape).astype(np.float32)

    def _checked(self, shared: Mapping[str, npt.NDArray[np.float32]]) -> SharedTensors:
        """The shared tensors, if they are what this silo can train on."""
        return _checked_shared(shared, self._n_items, self._config.dimensions)

    def _run_epochs(
        self,
        vectors: torch.Tensor,
        factors: torch.Tensor,
        bias: torch.Tensor,
        generator: torch.Generator,
        steps: int,
    ) -> float:
        """Optimise the three tensors in place; mean cross-entropy of the last epoch."""
        config, shared = self._config, (factors, bias)
        start = [tensor.detach().clone() for tensor in shared]
        optimiser = torch.optim.Adam([vectors, *shared], lr=config.learning_rate)
        loss_sum, seen = 0.0, 0
        while steps > 0:
            loss_sum, seen = 0.0, 0
            # The first batches of a shuffled epoch are a uniform draw from all it could have.
            for batch in self._epoch_batches(generator, steps):
                entropy, penalty = _losses(vectors, factors, bias, *batch)
                objective = entropy + config.l2 * penalty
                if config.proximal:
                    objective += 0.5 * config.proximal * _squared_distance(shared, start)
                optimiser.zero_grad()
                objective.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                loss_sum += entropy.item() * batch[0].shape[0]
                seen += batch[0].shape[0]
                steps -= 1
        return loss_sum / seen

    def _epoch_batches(
        self, generator: torch.Generator, most: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of a freshly shuffled epoch, ``most`` at the most."""
        size = self._config.batch_size
        users, items = self._epoch_samples(generator, most * size)
        return zip(torch.split(users, size), torch.split(items, size), strict=True)

    def _epoch_samples(
        self, generator: torch.Generator, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shuffled users ``(n,)`` and items ``(n, 1 + negatives)``, positive first.

        With ``n`` all samples, or ``most`` of them.
        """
        order = torch.randperm(self.samples, generator=generator)[:most]
        users, positives = self._positives[order].unbind(dim=1)
        negatives = self._sampler.draw(users, self._config.negatives, generator)
        return users, torch.cat([positives[:, None], negatives], dim=1)


def fit_user(
    shared: Mapping[str, npt.NDArray[np.float32]],
    item_ids: npt.NDArray[np.integer],
    config: TrainConfig,
) -> npt.NDArray[np.float32]:
    """Vector of a user nobody trained on, from a few items, with the item table frozen.

    Minimises what training minimises for one user, with the sampled negatives replaced by their
    expectation over all other items. That problem is strictly convex (logistic regression), so
    Newton's method finds its one solution and nothing is random.

    *Shapes*: ``item_ids`` any integers in ``[0, n_items)``, repeats ignored; float32 ``(d,)``.

    Raises:
        DataError: no item, an item outside the catalogue, all items, or tensors that do not fit.
    """
    n_items = shared[ITEM_BIAS].shape[0] if ITEM_BIAS in shared else 0
    table = _checked_shared(shared, n_items, config.dimensions)
    own = np.unique(item_ids)
    if (
        own.dtype.kind not in "iu"
        or own.size == 0
        or own[0] < 0
        or own[-1] >= n_items
        or own.size == n_items
    ):
        raise DataError(
            f"expected between 1 and {n_items - 1} integers in [0, {n_items}), got "
            f"item_ids={own[:5].tolist()} (distinct={own.size}); pass items of the catalogue"
        )
    target = np.zeros(n_items)
    target[own] = 1.0
    # One positive weighs 1; each of its negatives 1, spread over all items not owned.
    weight = np.where(target == 1.0, 1.0 / own.size, config.negatives / (n_items - own.size))
    weight /= 1.0 + config.negatives
    factors = table[ITEM_FACTORS].astype(np.float64)
    bias = table[ITEM_BIAS].astype(np.float64)
    fitted = _fit_logistic(factors, bias, target, weight, max(config.l2, _MIN_FIT_L2))
    return fitted.astype(np.float32)


class _NegativeSampler:
    """Uniform draws from all items minus a user's own training items, without rejection.

    The k-th item that a user does not have is k + (number of own items t_j, ascending, with
    t_j − j ≤ k); one binary search over the values t_j − j of all users answers a whole batch.
    """

    def __init__(self, positives: torch.Tensor, n_users: int, n_items: int) -> None:
        pairs = torch.unique(positives, dim=0)  # Sorted by user, then item.
        users, items = pairs.unbind(dim=1)
        counts = torch.bincount(users, minlength=n_users)
        self._first = torch.cumsum(counts, dim=0) - counts
        self._free = n_items - counts
        if int(self._free.min()) < 1:
            raise DataError(
                f"expected every user to lack at least one of n_items={n_items}, got a user with "
                "all of them; drop that user, there are no negatives to learn from"
            )
        ranks = torch.arange(users.shape[0]) - self._first[users]
        # Users are n_items + 1 apart, so that searches of one never end inside another.
        self._stride = n_items + 1
        self._keys = users * self._stride + items - ranks

    def draw(self, users: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """Items of shape ``(len(users), count)``, int64."""
        uniform = torch.rand((users.shape[0], count), generator=generator, dtype=torch.float64)
        # Safe because u ≤ 1 − 2⁻⁵³, hence u·free rounds to below free for every free < 2⁵³.
        kth = (uniform * self._free[users, None]).long()
        below = torch.searchsorted(self._keys, users[:, None] * self._stride + kth, right=True)
        return kth + below - self._first[users, None]


def _losses(
    vectors: torch.Tensor,
    factors: torch.Tensor,
    bias: torch.Tensor,
    users: torch.Tensor,
    items: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy and mean penalty of a batch whose first item column is the positive."""
    user = functional.embedding(users, vectors)
    item = functional.embedding(items, factors)
    item_bias = functional.embedding(items, bias[:, None])[:, :, 0]
    logits = torch.bmm(item, user[:, :, None])[:, :, 0] + item_bias
    target = torch.zeros_like(logits)
    target[:, 0] = 1.0
    entropy = functional.binary_cross_entropy_with_logits(logits, target)
    penalty = user.square().sum(dim=1).mean() + item.square().sum(dim=2).mean()
    return entropy, 0.5 * (penalty + item_bias.square().mean())


def _squared_distance(
    tensors: Iterable[torch.Tensor], others: Iterable[torch.Tensor]
) -> torch.Tensor:
    """‖w − w_t‖² over all tensors together."""
    pairs = zip(tensors, others, strict=True)
    return torch.stack([(one - other).square().sum() for one, other in pairs]).sum()


def _fit_logistic(
    factors: npt.NDArray[np.float64],
    bias: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    l2: float,
) -> npt.NDArray[np.float64]:
    """Minimiser of Σ w·BCE(⟨p, q⟩ + b, y) + ½·l2·‖p‖² by damped Newton steps."""

    def objective(vector: npt.NDArray[np.float64]) -> float:
        logits = factors @ vector + bias
        entropy = np.logaddexp(0.0, logits) - target * logits
        return float(weight @ entropy + 0.5 * l2 * vector @ vector)

    vector = np.zeros(factors.shape[1])
    for _ in range(_NEWTON_STEPS):
        # σ(x) through tanh, which does not overflow.
        probability = 0.5 * (1.0 + np.tanh(0.5 * (factors @ vector + bias)))
        gradient = factors.T @ (weight * (probability - target)) + l2 * vector
        curvature = weight * probability * (1.0 - probability)
        hessian = (factors.T * curvature) @ factors + l2 * np.eye(vector.size)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while objective(vector - scale * step) > objective(vector) and scale > 1e-6:
            scale *= 0.5
        vector = vector - scale * step
        if np.abs(step).max() < _NEWTON_TOLERANCE:
            break
    return vector


def _checked_shared(
    shared: Mapping[str, npt.NDArray[np.float32]], n_items: int, d: int
) -> SharedTensors:
    """Refuse shared tensors with other names, types or shapes, or with non-finite values."""
    expected = {ITEM_FACTORS: (n_items, d), ITEM_BIAS: (n_items,)}
    if set(shared) != set(expected):
        raise DataError(
            f"expected shared tensors {', '.join(sorted(expected))}, got "
            f"names={', '.join(sorted(shared)) or 'none'}; start from init_shared()"
        )
    for name, shape in expected.items():
        _check_tensor(name, shared[name], shape)
    return dict(shared)


def _check_tensor(name: str, tensor: npt.NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Refuse another type or shape, or non-finite values."""
    if tensor.dtype != np.float32 or tensor.shape != shape:
        raise DataError(
            f"expected {name} as float32 of shape {shape}, got dtype={tensor.dtype} "
            f"shape={tensor.shape}; use the same catalogue and configuration everywhere"
        )
    if not np.isfinite(tensor).all():
        raise DataError(
            f"expected finite {name}, got non_finite={int((~np.isfinite(tensor)).sum())}; "
            "do not train on this model: ask for an earlier round"
        )


def derived_seed(purpose: str, *numbers: int) -> int:
    """Seed for one purpose, 63 bits of a hash: neighbouring rounds and silos share no stream."""
    text = ":".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, then give the process its setting back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
