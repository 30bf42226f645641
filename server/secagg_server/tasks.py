"""What a task is: a plan, how many rounds, how long each may take, and what comes of their means.

`task_files` reads one from TOML.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from secagg.accounting import Budget
from secagg.context import check_task_id
from secagg.errors import ConfigurationError
from secagg.optimisers import Optimiser
from secagg.parameters import MAX_COHORT, FloatSegment, IntegerSegment, Plan
from secagg.planner import make_plan
from secagg.privacy import release_rho
from secagg.wire.codec import (
    MODEL_VALUE_BYTES,
    optimiser_from_wire,
    optimiser_to_wire,
    plan_from_wire,
    plan_to_wire,
)
from secagg.wire.v1 import operator_service_pb2 as pb
from secagg_server.stopping import Stop

__all__ = ["MAX_ATTEMPTS", "AdaptiveClip", "TaskSpec"]

MAX_ATTEMPTS = 100
MAX_ROUNDS = 1_000_000
MIN_DEADLINE_MS = 100
MAX_DEADLINE_MS = 31 * 24 * 3600 * 1000  # a month; fits into the wire's 32 bits
# How far a clip norm may go from where it began: updates do not shrink more while a model learns,
# and a cohort that lies cannot take it further. From these, it never leaves what a plan can have.
_CLIP_REACH = 1000.0
_FIRST_CLIPS = (1e-16, 1e16)
_AVERAGE = Optimiser()


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """How the clip norm follows the updates: Andrew et al. 2021, "Differentially Private Learning
    with Adaptive Clipping", algorithm 1.

    It looks at released sums only, whose noise the share of clipped updates has had too: it costs
    no privacy of its own.

    Attributes:
        quantile: share of updates that shall be within the clip norm, 0.01 to 0.99.
        rate: how fast it follows; above 0, up to 1.
    """

    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        if not (0.01 <= self.quantile <= 0.99 and 0.0 < self.rate <= 1.0):
            raise ConfigurationError(
                "expected an adaptive clip norm with a quantile from 0.01 to 0.99 and a rate above "
                f"0, up to 1; got quantile={self.quantile}, rate={self.rate}; 0.5 and 0.2 are usual"
            )

    def following(self, clip: float, within: float, first: float) -> float:
        """The clip norm after a round with ``clip``, of whose updates the share ``within`` was.

        Never more than a factor of 1000 from the ``first`` round's.
        """
        moved = clip * math.exp(-self.rate * (within - self.quantile))
        return min(max(moved, first / _CLIP_REACH), first * _CLIP_REACH)


@dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
        task_id: 1 to 64 letters, digits, '_', '.' or '-'.
        plan: what every round computes on; at most one float segment, which is the model. With an
            adaptive clip norm, it is the first round's: see `plan_at`.
        rounds: how many.
        round_deadline_ms: time a round collects for, in milliseconds.
        max_attempts: attempts at one round before the task fails.
        target_clients: uploads after which a round closes before its deadline.
        selected_clients: enrolled clients drawn at random for each attempt, target_clients or more
            so that some may drop out; 0 lets everybody in.
        adaptive_clip: how the clip norm follows the updates; None for the plan's in every round.
        optimiser: what a round's mean update is to the model.
        stop: when to end before all rounds are done; None for never.
    """

    task_id: str
    plan: Plan
    rounds: int
    round_deadline_ms: int
    max_attempts: int
    target_clients: int
    selected_clients: int = 0
    adaptive_clip: AdaptiveClip | None = None
    optimiser: Optimiser = _AVERAGE
    stop: Stop | None = None

    def __post_init__(self) -> None:
        check_task_id(self.task_id)
        if not (
            1 <= self.rounds <= MAX_ROUNDS
            and MIN_DEADLINE_MS <= self.round_deadline_ms <= MAX_DEADLINE_MS
        ):
            raise ConfigurationError(
                f"expected 1 to {MAX_ROUNDS} rounds of {MIN_DEADLINE_MS} to {MAX_DEADLINE_MS} ms; "
                f"got rounds={self.rounds}, round_deadline_ms={self.round_deadline_ms}"
            )
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ConfigurationError(
                f"expected 1 to {MAX_ATTEMPTS} attempts; got max_attempts={self.max_attempts}"
            )
        if not self.plan.min_clients <= self.target_clients <= self.plan.max_clients:
            raise ConfigurationError(
                f"expected target_clients from {self.plan.min_clients} to "
                f"{self.plan.max_clients}; got target_clients={self.target_clients}"
            )
        drawn = self.selected_clients
        if drawn and not self.target_clients <= drawn <= MAX_COHORT:
            raise ConfigurationError(
                f"expected selected_clients from target_clients={self.target_clients} to "
                f"{MAX_COHORT}, or 0 for everybody; got selected_clients={drawn}"
            )
        if len([s for s in self.plan.segments if isinstance(s, FloatSegment)]) > 1:
            raise ConfigurationError("expected at most one segment of floats in a task: its model")
        if self.adaptive_clip is not None:
            self._check_adaptive()
        if self.optimiser != _AVERAGE and self.model is None:
            raise ConfigurationError(
                f"expected a model for the optimiser {self.optimiser.name!r} to move; the task has "
                "no segment of floats; leave the optimiser out"
            )
        if self.stop is not None:
            self._check_stop(self.stop)

    def _check_adaptive(self) -> None:
        if self.model is None or not self.model.clip_bit:
            raise ConfigurationError(
                "expected a model with a clip bit, which an adaptive clip norm follows; there is "
                "none; set clip_bit, or leave adaptive_clip out"
            )
        if not _FIRST_CLIPS[0] <= self.model.clip <= _FIRST_CLIPS[1]:
            raise ConfigurationError(
                f"expected an adaptive clip norm that begins from {_FIRST_CLIPS[0]:g} to "
                f"{_FIRST_CLIPS[1]:g}; got clip={self.model.clip:g}; rescale the model"
            )

    def _check_stop(self, stop: Stop) -> None:
        if stop.least_change and self.model is None:
            raise ConfigurationError(
                "expected a model, whose change least_change is about; the task has no segment of "
                "floats; leave least_change out"
            )
        if not stop.figure:
            return
        sizes = {s.name: s.size for s in self.plan.segments if isinstance(s, IntegerSegment)}
        if sizes.get(stop.figure) != 2:
            raise ConfigurationError(
                f"expected a segment of two integers {stop.figure!r}, hits and users, which the "
                f"figure is made of; the plan's segments of integers have sizes {sizes}; add it, "
                "or say most_users in [stop]"
            )
        if self.plan.threshold is not None and self.plan.threshold.counts == stop.figure:
            raise ConfigurationError(
                f"expected a figure that is released; {stop.figure!r} counts contributors for the "
                "threshold; name another segment"
            )

    @property
    def model(self) -> FloatSegment | None:
        """The segment that updates the task's model; None for pure analytics."""
        floats = [s for s in self.plan.segments if isinstance(s, FloatSegment)]
        return floats[0] if floats else None

    def plan_at(self, clip: float | None) -> Plan:
        """The plan of a round.

        Args:
            clip: its clip norm, where that is another than the plan's.
        """
        if clip is None or self.model is None or clip == self.model.clip:
            return self.plan
        # Counted in steps of the quantiser, nothing depends on the clip norm: the layout stays.
        return make_plan(
            [replace(s, clip=clip) if s is self.model else s for s in self.plan.segments],
            min_clients=self.plan.min_clients,
            max_clients=self.plan.max_clients,
            norm_check=self.plan.norm_check,
            privacy=self.plan.privacy,
            threshold=self.plan.threshold,
        )

    def check_budget(self) -> int | None:
        """Refuse a privacy budget without room for a single release.

        Returns:
            How many releases it has room for; None without privacy.

        Raises:
            ConfigurationError: none; the message says which numbers would do.
        """
        privacy = self.plan.privacy
        if privacy is None:
            return None
        budget, rho = Budget(privacy.epsilon, privacy.delta), release_rho(self.plan)
        budget.check(rho)
        return budget.left(0.0, rho)

    @property
    def model_bytes(self) -> int:
        """Exact size of one model version."""
        return self.model.parameters * MODEL_VALUE_BYTES if self.model else 0

    def to_wire(self) -> pb.TaskSpec:
        """The specification as a message."""
        return pb.TaskSpec(
            task_id=self.task_id,
            plan=plan_to_wire(self.plan),
            rounds=self.rounds,
            round_deadline_ms=self.round_deadline_ms,
            max_attempts=self.max_attempts,
            target_clients=self.target_clients,
            selected_clients=self.selected_clients,
            adaptive_clip=pb.AdaptiveClip(
                quantile=self.adaptive_clip.quantile, rate=self.adaptive_clip.rate
            )
            if self.adaptive_clip
            else None,
            optimiser=None if self.optimiser == _AVERAGE else optimiser_to_wire(self.optimiser),
            stop=self.stop.to_wire() if self.stop else None,
        )

    @classmethod
    def from_wire(cls, message: pb.TaskSpec) -> TaskSpec:
        """The specification from a message.

        Raises:
            MalformedError, PlanError, ConfigurationError: a field out of its range.
        """
        return cls(
            message.task_id,
            plan_from_wire(message.plan),
            message.rounds,
            message.round_deadline_ms,
            message.max_attempts,
            message.target_clients,
            message.selected_clients,
            AdaptiveClip(message.adaptive_clip.quantile, message.adaptive_clip.rate)
            if message.HasField("adaptive_clip")
            else None,
            optimiser_from_wire(message.optimiser) if message.HasField("optimiser") else _AVERAGE,
            Stop.from_wire(message.stop) if message.HasField("stop") else None,
        )
