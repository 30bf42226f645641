"""Training a session model on one silo's sessions: softmax against sampled items.

One gradient a round by default: the server sums the gradients of many silos, and its optimiser
takes the step, as if all sessions lay in one place (FedSGD, McMahan et al. 2017, arXiv 1602.05629).
Most attributes and codes occur in few sessions; an adaptive optimiser gives them steps as long as
those of frequent ones, and it can only do so where gradients come together. No part of the model is
private; sessions never leave the device. Every random number of a round derives from seed, silo
and round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from secagg_recommender.content import CODES, ItemContent
from secagg_recommender.factorisation import LocalUpdate, SharedTensors, derived_seed, one_thread
from secagg_recommender.interactions import DataError, Split
from secagg_recommender.learner import Assignment, Work
from secagg_recommender.session_model import (
    ATTRIBUTES,
    CODE_VECTORS,
    DECAYS,
    ITEM_BIAS,
    LONGEST,
    MIX,
)
from secagg_recommender.trained import UPDATE

__all__ = ["SessionConfig", "SessionSilo", "init_session", "session_shapes"]

_INIT_STD: Final = 0.1


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Hyperparameters; all parties of one task use the same.

    Attributes:
        dimensions: d, of a vector.
        negatives: items drawn for a batch; a user's own training items do not count among them.
        dropout: part of the numbers of item and session vectors that a step leaves out, in [0, 1).
        steps: of gradient descent in a round, each over an equal share of the silo's users. With
            one, an update is a gradient, and the server's optimiser does all the rest.
        learning_rate: of these steps; with one step, a mere scale, which adaptive optimisers undo.
        seed: of what is random in training, and of the initial model.

    Raises:
        DataError: a value is out of range.
    """

    dimensions: int = 32
    negatives: int = 512
    dropout: float = 0.2
    steps: int = 1
    learning_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in ("dimensions", "negatives", "steps"):
            if getattr(self, name) < 1:
                raise DataError(f"expected {name} >= 1, got {name}={getattr(self, name)}; raise it")
        if not (0.0 <= self.dropout < 1.0 and 0.0 < self.learning_rate <= 1e3):
            raise DataError(
                "expected dropout in [0, 1) and learning_rate in (0, 1000], got "
                f"dropout={self.dropout} learning_rate={self.learning_rate}; correct them"
            )


def session_shapes(content: ItemContent, config: SessionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the shared tensors by name: what a task's plan has to list."""
    d = config.dimensions
    return {
        ATTRIBUTES: (content.n_attributes, d),
        CODE_VECTORS: (CODES * content.buckets, d),
        MIX: (len(DECAYS), d, d),
        ITEM_BIAS: (content.n_items,),
    }


def init_session(content: ItemContent, config: SessionConfig) -> SharedTensors:
    """Initial shared tensors, a function of shapes and seed alone.

    Vectors are N(0, 0.1²), matrices half the identity: to begin with, like is followed by like.
    """
    rng = np.random.default_rng(derived_seed("session", config.seed))
    shapes = session_shapes(content, config)
    return {
        ATTRIBUTES: rng.normal(0.0, _INIT_STD, shapes[ATTRIBUTES]).astype(np.float32),
        CODE_VECTORS: rng.normal(0.0, _INIT_STD, shapes[CODE_VECTORS]).astype(np.float32),
        MIX: np.tile(0.5 * np.eye(config.dimensions, dtype=np.float32), (len(DECAYS), 1, 1)),
        ITEM_BIAS: np.zeros(shapes[ITEM_BIAS], dtype=np.float32),
    }


class SessionSilo:
    """One data holder: sessions of some users, to be learned from. A `Learner`.

    *Guarantees*: :meth:`train` is a function of configuration, silo, training data, shared tensors
    and round, bit for bit on one build of torch and one kind of processor; it runs on one thread.

    Raises:
        DataError: unknown users, or nobody with two training items, hence nothing to learn from.
    """

    def __init__(
        self,
        index: int,
        split: Split,
        users: npt.NDArray[np.int64],
        content: ItemContent,
        config: SessionConfig,
    ) -> None:
        """Take the training sessions of ``users`` (global ids, distinct) out of ``split``."""
        self.index = index
        self._config, self._content = config, content
        self._users = np.unique(users).astype(np.int64)
        if split.n_items != content.n_items:
            raise DataError(
                f"expected content of the split's {split.n_items} items, got that of "
                f"{content.n_items}; build it from the same data set"
            )
        if self._users.size == 0 or self._users[0] < 0 or self._users[-1] >= split.n_users:
            raise DataError(
                f"expected users in [0, {split.n_users}), at least one, got silo={index} "
                f"users={self._users.size}; deal users out with partition()"
            )
        histories = [split.items_of(int(user)).astype(np.int64) for user in self._users]
        self._items = np.unique(np.concatenate(histories))
        self._sessions = [items for items in histories if items.size >= 2]
        if not self._sessions:
            raise DataError(
                f"expected somebody with two training items or more, got none in silo={index}; "
                "use fewer silos or more data"
            )
        self._table = _Table(content)

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """Global ids of this silo's users, ascending, a copy."""
        return self._users.copy()

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Items that some user of the silo trains on, ascending."""
        return self._items.copy()

    @property
    def samples(self) -> int:
        """Number of items that followed another one: what an update weighs."""
        return sum(items[-LONGEST - 1 :].size - 1 for items in self._sessions)

    def work(self, assignment: Assignment) -> Work:
        """An update of the round's model.

        Raises:
            DataError: tensors do not fit, training diverged, or a round of something else.
        """
        if set(assignment.segments) != {UPDATE}:
            raise DataError(
                f"expected a round with the one segment {UPDATE!r}, got "
                f"{sorted(assignment.segments)}; join with the kind of model that the task is for"
            )
        trained = self.train(assignment.model, assignment.number)
        return Work({UPDATE: trained.update}, trained.samples)

    def state(self) -> bytes:
        """Nothing is kept: no part of the model is private."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing was kept.

        Raises:
            DataError: something was.
        """
        if state:
            raise DataError(
                f"expected no private state of a session model, got bytes={len(state)}; use the "
                "state directory of this task"
            )

    def train(
        self, shared: Mapping[str, npt.NDArray[np.float32]], round_number: int
    ) -> LocalUpdate:
        """Train one round from ``shared``.

        Cross-entropy of each item given those before it, against items drawn uniformly from all
        **but the user's own training items**; the test item stays a possible negative.

        Raises:
            DataError: tensors do not fit the catalogue, or training diverged.
        """
        old = _checked(shared, session_shapes(self._content, self._config))
        seed = derived_seed("session round", self._config.seed, self.index, round_number)
        generator = torch.Generator().manual_seed(seed)
        with one_thread():
            tensors = {name: torch.tensor(old[name], requires_grad=True) for name in old}
            loss = self._descend(tensors, generator)
        update = {name: tensors[name].detach().numpy() - old[name] for name in old}
        if not (math.isfinite(loss) and all(np.isfinite(u).all() for u in update.values())):
            raise DataError(
                f"expected a finite update, got NaN or infinity in round={round_number}; training "
                "diverged: lower learning_rate, or refuse a model with such values"
            )
        return LocalUpdate(update=update, samples=self.samples, loss=loss)

    def _descend(self, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> float:
        """Change the tensors in place; mean loss over the round."""
        order = torch.randperm(len(self._sessions), generator=generator).tolist()
        steps = min(self._config.steps, len(order))
        total = 0.0
        for step in range(steps):
            batch = [self._sessions[place] for place in order[step::steps]]
            losses = self._losses(tensors, _padded(batch), generator)
            names = list(tensors)
            gradients = torch.autograd.grad(losses.mean(), [tensors[name] for name in names])
            with torch.no_grad():
                for name, gradient in zip(names, gradients, strict=True):
                    tensors[name] -= self._config.learning_rate * gradient
            total += float(losses.detach().sum())
        return total / self.samples

    def _losses(
        self,
        tensors: Mapping[str, torch.Tensor],
        sessions: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Cross-entropy of each item that followed another, ``(targets,)``."""
        config, n_items = self._config, self._content.n_items
        count = min(config.negatives, n_items)
        drawn = torch.randperm(n_items, generator=generator)[:count]
        asked, owner, target = _asked(sessions)
        table = self._table.vectors(tensors)
        inputs = functional.embedding(sessions[:, :-1].clamp(min=0), table)
        inputs = _dropped(inputs, config.dropout, generator) * (sessions[:, :-1] >= 0)[:, :, None]
        queries = _dropped(_queries(inputs, tensors[MIX])[asked], config.dropout, generator)
        bias = tensors[ITEM_BIAS]
        own = (queries * functional.embedding(target, table)).sum(dim=1) + bias[target]
        others = queries @ functional.embedding(drawn, table).T + bias[drawn]
        # Each drawn item stands for many that were not.
        others = others + math.log(max(n_items - 1, 1) / count)
        others = others.masked_fill(_owned(sessions, drawn, n_items)[owner], -math.inf)
        return torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own


class _Table:
    """All items' vectors, in a form that torch can take gradients of."""

    def __init__(self, content: ItemContent) -> None:
        self._starts = torch.from_numpy(content.indptr[:-1])
        self._attributes = torch.from_numpy(content.indices)
        self._weights = torch.from_numpy(content.weights)
        self._codes = torch.from_numpy(content.codes)

    def vectors(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Float32 ``(n_items, d)``."""
        built = functional.embedding_bag(
            self._attributes,
            tensors[ATTRIBUTES],
            self._starts,
            mode="sum",
            per_sample_weights=self._weights,
        )
        return built + functional.embedding(self._codes, tensors[CODE_VECTORS]).sum(dim=1)


def _queries(inputs: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """What each beginning of a session asks for: ``(sessions, length, d)`` in and out."""
    length = inputs.shape[1]
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    found = torch.zeros_like(inputs)
    for decay, turn in zip(DECAYS, mix, strict=True):
        fading = torch.where(age >= 0, torch.tensor(decay) ** age.clamp(min=0), 0.0)
        found = found + torch.matmul(fading, inputs) @ turn
    return found


def _padded(sessions: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
    """Latest items of each, ``(sessions, length)``, −1 behind the end."""
    recent = [items[-LONGEST - 1 :] for items in sessions]
    padded = np.full((len(recent), max(map(len, recent))), -1, dtype=np.int64)
    for row, items in enumerate(recent):
        padded[row, : items.size] = items
    return torch.from_numpy(padded)


def _asked(sessions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where an item follows: a mask; and of each such place its session and its item."""
    following = sessions[:, 1:]
    asked = following >= 0
    return asked, asked.nonzero()[:, 0], following[asked]


def _owned(sessions: torch.Tensor, drawn: torch.Tensor, n_items: int) -> torch.Tensor:
    """Whether each session has each drawn item: ``(sessions, drawn)``."""
    marks = torch.zeros((len(sessions), n_items + 1), dtype=torch.bool)
    marks.scatter_(1, torch.where(sessions < 0, n_items, sessions), value=True)
    return marks[:, drawn]


def _dropped(values: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Dropout (Srivastava et al. 2014) from a generator of our own, so that rounds repeat."""
    if rate == 0.0:
        return values
    kept = torch.rand(values.shape, generator=generator) >= rate
    return values * kept / (1.0 - rate)


def _checked(
    shared: Mapping[str, npt.NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]
) -> SharedTensors:
    """Refuse shared tensors with other names, types or shapes, or with non-finite values."""
    found = {name: tensor.shape for name, tensor in shared.items()}
    if found != dict(shapes) or any(tensor.dtype != np.float32 for tensor in shared.values()):
        raise DataError(
            f"expected float32 tensors of shapes {dict(shapes)}, got {found}; use the same "
            "catalogue and configuration everywhere"
        )
    if not all(np.isfinite(tensor).all() for tensor in shared.values()):
        raise DataError(
            "expected a finite model, got NaN or infinity; do not train on it: ask for an earlier "
            "round"
        )
    return {name: shared[name] for name in shapes}
