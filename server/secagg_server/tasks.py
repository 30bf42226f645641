"""What a task is: a plan, how many rounds, and how long each may take; from TOML or the wire."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from secagg.accounting import Budget, noise_multiplier_for
from secagg.context import check_task_id
from secagg.errors import ConfigurationError
from secagg.parameters import (
    MIN_COHORT,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    Segment,
    TensorSpec,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.privacy import release_rho
from secagg.settings import read_toml, validated
from secagg.wire.codec import MODEL_VALUE_BYTES, plan_from_wire, plan_to_wire
from secagg.wire.v1 import operator_service_pb2 as pb

__all__ = ["MAX_ATTEMPTS", "AdaptiveClip", "TaskSpec", "read_task"]

MAX_ATTEMPTS = 100
MAX_ROUNDS = 1_000_000
MIN_DEADLINE_MS = 100
MAX_DEADLINE_MS = 31 * 24 * 3600 * 1000  # a month; fits into the wire's 32 bits
# How far a clip norm may go from where it began: updates do not shrink more while a model learns,
# and a cohort that lies cannot take it further. From these, it never leaves what a plan can have.
_CLIP_REACH = 1000.0
_FIRST_CLIPS = (1e-16, 1e16)
_USUAL = NormCheck()
_USUAL_INTEGER_SHARE = 0.1  # as in `Privacy`
_LEAST_NOISE = 0.01  # that a plan can have


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
    """

    task_id: str
    plan: Plan
    rounds: int
    round_deadline_ms: int
    max_attempts: int
    target_clients: int
    selected_clients: int = 0
    adaptive_clip: AdaptiveClip | None = None

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
        if self.selected_clients and self.selected_clients < self.target_clients:
            raise ConfigurationError(
                f"expected selected_clients of at least target_clients={self.target_clients}, or 0 "
                f"for everybody; got selected_clients={self.selected_clients}"
            )
        if len([s for s in self.plan.segments if isinstance(s, FloatSegment)]) > 1:
            raise ConfigurationError("expected at most one segment of floats in a task: its model")
        if self.adaptive_clip is not None:
            self._check_adaptive()

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
        )


_USUAL_CLIP = AdaptiveClip()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Tensor(_Section):
    name: str
    shape: list[int] = Field(default_factory=list)


class _AdaptiveClip(_Section):
    quantile: float = _USUAL_CLIP.quantile
    rate: float = _USUAL_CLIP.rate


class _Update(_Section):
    name: str = "update"
    tensors: list[_Tensor]
    clip: float
    bits: int = 8
    weighting: Literal["equal", "samples"] = "equal"
    weight_cap: int = 1
    rows: int = 0
    adaptive_clip: _AdaptiveClip | None = None

    def segment(self) -> FloatSegment:
        tensors = tuple(TensorSpec(tensor.name, tuple(tensor.shape)) for tensor in self.tensors)
        return FloatSegment(
            self.name,
            tensors,
            self.clip,
            self.bits,
            self.weighting,
            self.weight_cap,
            self.rows,
            clip_bit=self.adaptive_clip is not None,
        )


class _Integers(_Section):
    name: str
    size: int
    max_abs: int
    max_norm: float | None = None

    def segment(self) -> IntegerSegment:
        return IntegerSegment(self.name, self.size, self.max_abs, self.max_norm)


class _NormCheck(_Section):
    enabled: bool = True
    margin: float = _USUAL.margin
    sketches: int = _USUAL.sketches
    tolerated: int = _USUAL.tolerated
    min_cosine: float | None = _USUAL.min_cosine

    def check(self, *, private: bool) -> NormCheck | None:
        if not self.enabled:
            return None
        wide = private and "margin" not in self.model_fields_set
        margin = PRIVATE_MARGIN if wide else self.margin
        return NormCheck(margin, self.sketches, self.tolerated, self.min_cosine)


class _Privacy(_Section):
    mode: Literal["release", "distributed", "local"]
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    honest_clients: int = 0
    integer_share: float = _USUAL_INTEGER_SHARE

    def privacy(self, rounds: int) -> Privacy:
        epsilon, delta = self.epsilon, self.delta
        if epsilon is None or delta is None:
            raise ConfigurationError(
                f"expected a budget in [privacy]: epsilon and delta; got {epsilon=}, {delta=}; "
                "give both, such as epsilon = 8.0 and a delta well below 1 over the number of "
                "clients"
            )
        noise = self.noise_multiplier
        if noise is None:
            noise = max(noise_multiplier_for(epsilon, delta, rounds), _LEAST_NOISE)
        return Privacy(
            self.mode,
            noise,
            epsilon,
            delta,
            self.honest_clients,
            self.integer_share,
        )


class _Threshold(_Section):
    counts: str = "contributors"
    least: int
    most_items: int | None = None

    def segment(self, rows: int) -> IntegerSegment:
        """What counts the contributors, in a file that does not have it among its integers."""
        most = rows if self.most_items is None else self.most_items
        if not 1 <= most <= rows:
            raise ConfigurationError(
                f"expected most_items in [threshold] from 1 to the table's rows={rows}: the most "
                f"rows that one client has something positive of; got most_items={most}"
            )
        return IntegerSegment(self.counts, rows, 1, math.sqrt(most))


class _TaskFile(_Section):
    task_id: str
    min_clients: int = MIN_COHORT
    max_clients: int
    target_clients: int | None = None
    selected_clients: int = 0
    rounds: int = 1
    round_deadline_s: float = Field(600.0, allow_inf_nan=False)
    max_attempts: int = 3
    update: _Update | None = None
    integers: list[_Integers] = Field(default_factory=list)
    norm_check: _NormCheck | None = None
    privacy: _Privacy | None = None
    threshold: _Threshold | None = None

    def segments(self) -> list[Segment]:
        segments: list[Segment] = [self.update.segment()] if self.update else []
        segments += [integers.segment() for integers in self.integers]
        if self.threshold is None:
            return segments
        if self.update is None or not self.update.rows:
            raise ConfigurationError(
                "expected rows in [update], which a [threshold] is about; got none; set rows to "
                "the first side of every tensor, or leave [threshold] out"
            )
        if self.threshold.counts not in [segment.name for segment in segments]:
            segments.append(self.threshold.segment(self.update.rows))
        elif self.threshold.most_items is not None:
            raise ConfigurationError(
                "expected the bound of the counts once: most_items in [threshold], or max_norm in "
                f"[[integers]] {self.threshold.counts!r}; got both; drop one of the two"
            )
        return segments


def read_task(file: Path) -> TaskSpec:
    """A task from its TOML file (see docs/samples/task.toml).

    A file that says nothing of a norm check has one, if there is a norm that can be checked; with
    privacy, its margin is wide enough for that unless the file says otherwise. One
    with a privacy budget and without a noise multiplier has the smallest with which all rounds fit.

    Raises:
        ConfigurationError: unreadable, an unknown key, or a value out of its range; a privacy
            budget without room for a single release.
        PlanError: no exact plan exists; the message says what would work.
    """
    literal = validated(_TaskFile, read_toml(file))
    segments = literal.segments()
    wanted = literal.norm_check
    if wanted is None and any(segment.norm_bound for segment in segments):
        wanted = _NormCheck()
    private = literal.privacy is not None
    norm_check = wanted.check(private=private) if wanted else None
    plan = make_plan(
        segments,
        min_clients=literal.min_clients,
        max_clients=literal.max_clients,
        norm_check=norm_check,
        privacy=literal.privacy.privacy(literal.rounds) if literal.privacy else None,
        threshold=RowThreshold(literal.threshold.counts, literal.threshold.least)
        if literal.threshold
        else None,
    )
    adaptive = literal.update.adaptive_clip if literal.update else None
    spec = TaskSpec(
        literal.task_id,
        plan,
        literal.rounds,
        round(literal.round_deadline_s * 1000),
        literal.max_attempts,
        literal.max_clients if literal.target_clients is None else literal.target_clients,
        literal.selected_clients,
        AdaptiveClip(adaptive.quantile, adaptive.rate) if adaptive else None,
    )
    spec.check_budget()
    return spec
