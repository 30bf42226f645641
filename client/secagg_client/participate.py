"""A device's part in a task: do a round's work, contribute it, remember.

What stays on the device: interactions, what a `Learner` remembers, sample counts, losses, and what
compression has left out. What leaves it: encrypted sums. The private state is kept per round, so
that another attempt at a round starts from the same and gives the same contribution.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from secagg.compression import left_over
from secagg.context import RoundContext
from secagg.errors import ClosedError, ConfigurationError, DuplicateError, PausedError
from secagg.parameters import FloatSegment, IntegerSegment, Plan
from secagg.sampling import Stream
from secagg_client.config import ClientSettings
from secagg_client.learners import Part, load_learner
from secagg_client.repeatable import repeatable_rounding
from secagg_client.session import ClientSession, CurrentRound, Judgement
from secagg_client.state_dir import StateDir
from secagg_recommender.interactions import DataError
from secagg_recommender.learner import Assignment, Learner, Work

__all__ = ["Device", "Participation", "RoundReport", "participate"]

_LOG = structlog.get_logger(__name__)

_Tensors = Mapping[str, NDArray[np.float32]]


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
            self._state.note_cost(json.dumps(asdict(report)))
            self._on_round(report, rounds_total)

    def summary(self) -> Participation:
        return Participation(self._contributed, self._judged, self._refused)


class Device:
    """A learner, and what it remembers from round to round.

    Args:
        learner: in the state that it has before its first round.
        feedback: whether what compression leaves out of an update goes into the next one.
    """

    def __init__(self, learner: Learner, state: StateDir, *, feedback: bool = True) -> None:
        self._learner = learner
        self._feedback = feedback
        self._state = state
        self._start = learner.state()

    def take_part(self, current: CurrentRound) -> RoundReport | None:
        """Work and contribute; None when the round went on without this client.

        Raises:
            DataError: the round's work cannot be done.
            SecaggError: see `CurrentRound.contribute`.
        """
        before, rest = self._state.before(current.number)
        self._learner.restore(self._start if before is None else before)
        started = time.perf_counter()
        work = self._learner.work(_assignment(current))
        train_s = time.perf_counter() - started
        if work is None:
            _LOG.info("round_sat_out", round=current.number)
            return None
        made, left = (
            _with_rest(current, work, rest) if self._feedback else (dict(work.arrays), None)
        )
        made |= _counts(current.context.plan, self._learner)
        try:
            cost = current.contribute(made, samples=work.samples)
        except (ClosedError, DuplicateError, PausedError) as error:
            _LOG.warning("round_missed", round=current.number, why=error.reason)
            return None
        self._state.save(current.number, self._learner.state(), left)
        return RoundReport(
            current.number,
            train_s,
            cost.quantize_s,
            cost.encrypt_s,
            cost.upload_s,
            cost.upload_bytes,
        )


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
    part = Part.of(settings)
    state = StateDir(settings.state_dir, settings.task)
    device: Device | None = None
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
                if device is None:
                    segments = [segment.name for segment in current.context.plan.segments]
                    learner = load_learner(part, segments)
                    device = Device(learner, state, feedback=settings.error_feedback)
                report = device.take_part(current)
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


def _counts(plan: Plan, learner: Learner) -> dict[str, NDArray[np.int64]]:
    """One for each row that this device has an item for, where the plan withholds rows of too few.

    Where the plan lets a client count fewer than it has, they are drawn anew in each round.
    """
    if plan.threshold is None:
        return {}
    name = plan.threshold.counts
    (counted,) = (s for s in plan.segments if s.name == name and isinstance(s, IntegerSegment))
    # A norm of m ones is sqrt(m); a little more for its rounding, less than one more would need.
    most = counted.size if counted.max_norm is None else int(counted.max_norm**2 + 1e-6)
    items = learner.items.tolist()
    counts = np.zeros(counted.size, dtype=np.int64)
    counts[random.SystemRandom().sample(items, min(most, len(items)))] = 1
    return {name: counts}


def _assignment(current: CurrentRound) -> Assignment:
    plan = current.context.plan
    segments = {segment.name: segment for segment in plan.segments}
    rounds = current.rounds_total
    return Assignment(current.number, current.model.tensors, segments, rounds, plan.payload_bytes)


def _with_rest(
    current: CurrentRound, work: Work, rest: _Tensors
) -> tuple[dict[str, Any], _Tensors | None]:
    """What to contribute, with what earlier rounds left out; and what this one leaves out."""
    made: dict[str, Any] = dict(work.arrays)
    for segment in current.context.plan.segments:
        if isinstance(segment, FloatSegment) and segment.compression is not None:
            update = made[segment.name] = _sum(made[segment.name], rest)
            return made, left_over(segment, update, current.context.rotation)
    return made, None


def _sum(update: _Tensors, rest: _Tensors) -> dict[str, NDArray[np.float32]]:
    shapes = {name: value.shape for name, value in rest.items()}
    if rest and shapes != {name: value.shape for name, value in update.items()}:
        raise DataError(
            "expected left-overs of the tensors that this round trains, got those of another task "
            "of this name in the state directory; use a directory of its own for each federation"
        )
    return {name: value + rest[name] if rest else value for name, value in update.items()}
