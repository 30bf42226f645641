"""A silo of users in a task: train, contribute, remember; and recommend afterwards.

What stays on the device: interactions, user vectors, sample counts, losses. What leaves it: an
encrypted, weighted update of the shared item table. The private state is kept per round, so that
another attempt at a round trains from the same start and gives the same update.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import ClosedError, ConfigurationError, DuplicateError, PausedError
from secagg.parameters import IntegerSegment, Plan
from secagg.private_files import write
from secagg.quantize import Contribution
from secagg.receipts import SigningKey
from secagg.sampling import Stream
from secagg_client.config import ClientSettings, identity_in
from secagg_client.repeatable import repeatable_rounding
from secagg_client.session import ClientSession, CurrentRound, Judgement
from secagg_recommender.datasets import load_dataset
from secagg_recommender.factorisation import Silo, TrainConfig
from secagg_recommender.interactions import DataError, Interactions, Split, split_leave_one_out
from secagg_recommender.partition import partition_users

__all__ = [
    "Participation",
    "RoundReport",
    "StateDir",
    "load_silo",
    "participate",
    "train_config",
]

_LOG = structlog.get_logger(__name__)
_KEPT_STATES = 2


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What a round cost this client, in seconds and bytes; says nothing about its data.

    Attributes:
        accepted: what the norm check found; None without a check, or without its verdict.
    """

    round_number: int
    train_s: float
    quantize_s: float
    encrypt_s: float
    upload_s: float
    upload_bytes: int
    accepted: bool | None = None


@dataclass(frozen=True, slots=True)
class Participation:
    """What came of taking part.

    Attributes:
        contributed: rounds contributed to.
        judged: contributions whose verdict has been seen, one of an earlier run perhaps among them.
        refused: those of them that the norm check has refused.
    """

    contributed: int
    judged: int
    refused: int


class StateDir:
    """A client's private files, readable by their owner only."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def identity(self) -> SigningKey:
        """The client's signing key, made at the first call."""
        return identity_in(self._root)

    def save_vectors(self, round_number: int, state: bytes) -> None:
        """Keep the user vectors as they are after a round, and those of the round before."""
        write(self._root / f"vectors-{round_number}.npz", state)
        for old in self._rounds()[:-_KEPT_STATES]:
            (self._root / f"vectors-{old}.npz").unlink()

    def vectors_before(self, round_number: int) -> bytes | None:
        """The user vectors that a round starts from; None before the first one."""
        earlier = [number for number in self._rounds() if number < round_number]
        return self._vectors(earlier[-1]) if earlier else None

    def latest_vectors(self) -> bytes | None:
        """The newest user vectors; None before the first round."""
        rounds = self._rounds()
        return self._vectors(rounds[-1]) if rounds else None

    def report(self, report: RoundReport) -> None:
        """Append a line to the client's own record of costs."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._root / "costs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report)) + "\n")

    def _vectors(self, round_number: int) -> bytes:
        return (self._root / f"vectors-{round_number}.npz").read_bytes()

    def _rounds(self) -> list[int]:
        names = (path.stem.removeprefix("vectors-") for path in self._root.glob("vectors-*.npz"))
        return sorted(int(name) for name in names)


def train_config(settings: ClientSettings) -> TrainConfig:
    """How this client trains."""
    return TrainConfig(
        dimensions=settings.dimensions, local_epochs=settings.local_epochs, seed=settings.seed
    )


def load_silo(settings: ClientSettings) -> tuple[Interactions, Silo]:
    """The dataset and this client's part of it.

    Raises:
        DataError: the data cannot be used, or there is no such silo.
        ConfigurationError: see `PrivateSilo`.
    """
    interactions = load_dataset(settings.dataset, settings.data_dir)
    split = split_leave_one_out(interactions)
    parts = partition_users(split.n_users, settings.silos, settings.seed)
    if settings.silo >= len(parts):
        raise DataError(f"expected a silo below {len(parts)}; got silo={settings.silo}")
    users, config = parts[settings.silo], train_config(settings)
    if settings.example_epsilon is None:
        return interactions, Silo(settings.silo, split, users, config)
    return interactions, _private_silo(settings, split, users, config, settings.example_epsilon)


def _private_silo(
    settings: ClientSettings,
    split: Split,
    users: NDArray[np.int64],
    config: TrainConfig,
    epsilon: float,
) -> Silo:
    # opacus takes seconds to load, and is an extra.
    from secagg_recommender.example_privacy import ExamplePrivacy, PrivateSilo

    privacy = ExamplePrivacy.for_rounds(
        settings.example_rounds,
        epsilon=epsilon,
        delta=settings.example_delta,
        sampling_rate=settings.example_rate,
        steps=settings.example_steps,
        nominal_samples=settings.example_samples,
    )
    ledger = settings.state_dir / "example-privacy.npz"
    return PrivateSilo(settings.silo, split, users, config, privacy, ledger=ledger)


class _Record:
    """Reports every contribution once: when its verdict has come, or will not come any more."""

    def __init__(self, state: StateDir, on_round: Callable[[RoundReport, int], None]) -> None:
        self._state = state
        self._on_round = on_round
        self._waiting: tuple[RoundReport, int] | None = None
        self._contributed = self._judged = self._refused = 0

    def add(self, report: RoundReport, rounds_total: int) -> None:
        self._contributed += 1
        self._waiting = (report, rounds_total)

    def judged(self, judgement: Judgement) -> None:
        self._judged += 1
        self._refused += not judgement.accepted
        self.settle(judgement.accepted)

    def settle(self, accepted: bool | None = None) -> None:
        if self._waiting is not None:
            (report, rounds_total), self._waiting = self._waiting, None
            report = replace(report, accepted=accepted)
            self._state.report(report)
            self._on_round(report, rounds_total)

    def summary(self) -> Participation:
        return Participation(self._contributed, self._judged, self._refused)


def participate(
    settings: ClientSettings, on_round: Callable[[RoundReport, int], None]
) -> Participation:
    """Take part in every round of the task until it ends, but those for which it is paused.

    Args:
        on_round: called once for each contribution with its cost and the number of rounds in all;
            where the plan has a norm check, when the round is over and its verdict known.

    Raises:
        ForgedSketchError: the server had something else judged than it had committed to.
        PrivacyError: another contribution would cost more privacy than allowed.
        SecaggError: the data cannot be used, or the task has failed or cannot be reached.
    """
    _, silo = load_silo(settings)
    state = StateDir(settings.state_dir)
    record = _Record(state, on_round)
    with ClientSession(
        settings.server,
        settings.task,
        settings.credentials(state.identity),
        insecure=settings.insecure,
        rounding=_rounding(settings),
        outbox=settings.state_dir,
        limits=settings.limits(),
    ) as session:
        try:
            for current in session.rounds(record.judged):
                record.settle()
                report = _take_part(current, silo, state)
                if report is not None:
                    record.add(report, current.rounds_total)
                if current.context.plan.norm_check is None:
                    record.settle()
        finally:
            record.settle()
    return record.summary()


def _rounding(settings: ClientSettings) -> Callable[[RoundContext], Stream] | None:
    seed = settings.repeatable_seed
    if seed is None:
        return None

    def repeatable(context: RoundContext) -> Stream:
        privacy = context.plan.privacy
        if privacy is not None and privacy.by_clients:
            raise ConfigurationError(
                "expected no repeatable_seed in a task to which clients add noise: whoever knows "
                "the seed takes the noise off again; leave it out"
            )
        return repeatable_rounding(seed, settings.silo, context.id.round_number)

    return repeatable


def _counts(plan: Plan, silo: Silo) -> dict[str, NDArray[np.int64]]:
    """One for each row that this silo has an item for, where the plan withholds rows of too few.

    Where the plan lets a client count fewer than it has, they are drawn anew in each round.
    """
    if plan.threshold is None:
        return {}
    name = plan.threshold.counts
    (counted,) = (s for s in plan.segments if s.name == name and isinstance(s, IntegerSegment))
    # A norm of m ones is sqrt(m); a little more for its rounding, less than one more would need.
    most = counted.size if counted.max_norm is None else int(counted.max_norm**2 + 1e-6)
    items = silo.items.tolist()
    counts = np.zeros(counted.size, dtype=np.int64)
    counts[random.SystemRandom().sample(items, min(most, len(items)))] = 1
    return {name: counts}


def _take_part(current: CurrentRound, silo: Silo, state: StateDir) -> RoundReport | None:
    """Train and contribute; None when the round went on without this client."""
    before = state.vectors_before(current.number)
    if before is not None:
        silo.restore(before)
    started = time.perf_counter()
    trained = silo.train(current.model.tensors, current.number)
    train_s = time.perf_counter() - started
    try:
        made: dict[str, Contribution] = {"update": trained.update}
        made |= _counts(current.context.plan, silo)
        cost = current.contribute(made, samples=trained.samples)
    except (ClosedError, DuplicateError, PausedError) as error:
        _LOG.warning("round_missed", round=current.number, why=error.reason)
        return None
    state.save_vectors(current.number, silo.state())
    return RoundReport(
        current.number,
        train_s,
        cost.quantize_s,
        cost.encrypt_s,
        cost.upload_s,
        cost.upload_bytes,
    )
