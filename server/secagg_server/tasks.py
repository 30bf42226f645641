"""What a task is: a plan, how many rounds, and how long each may take; from TOML or the wire."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from secagg.context import check_task_id
from secagg.errors import ConfigurationError
from secagg.parameters import (
    MIN_COHORT,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Segment,
    TensorSpec,
)
from secagg.planner import make_plan
from secagg.settings import read_toml, validated
from secagg.wire.codec import MODEL_VALUE_BYTES, plan_from_wire, plan_to_wire
from secagg.wire.v1 import operator_service_pb2 as pb

__all__ = ["MAX_ATTEMPTS", "TaskSpec", "read_task"]

MAX_ATTEMPTS = 100
MAX_ROUNDS = 1_000_000
MIN_DEADLINE_MS = 100
MAX_DEADLINE_MS = 31 * 24 * 3600 * 1000  # a month; fits into the wire's 32 bits
_USUAL = NormCheck()


@dataclass(frozen=True)
class TaskSpec:
    """A task.

    Attributes:
        task_id: 1 to 64 letters, digits, '_', '.' or '-'.
        plan: what every round computes on; at most one float segment, which is the model.
        rounds: how many.
        round_deadline_ms: time a round collects for, in milliseconds.
        max_attempts: attempts at one round before the task fails.
        target_clients: uploads after which a round closes before its deadline.
        selected_clients: enrolled clients drawn at random for each attempt, target_clients or more
            so that some may drop out; 0 lets everybody in.
    """

    task_id: str
    plan: Plan
    rounds: int
    round_deadline_ms: int
    max_attempts: int
    target_clients: int
    selected_clients: int = 0

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

    @property
    def model(self) -> FloatSegment | None:
        """The segment that updates the task's model; None for pure analytics."""
        floats = [s for s in self.plan.segments if isinstance(s, FloatSegment)]
        return floats[0] if floats else None

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
        )


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Tensor(_Section):
    name: str
    shape: list[int] = Field(default_factory=list)


class _Update(_Section):
    name: str = "update"
    tensors: list[_Tensor]
    clip: float
    bits: int = 8
    weighting: Literal["equal", "samples"] = "equal"
    weight_cap: int = 1

    def segment(self) -> FloatSegment:
        tensors = tuple(TensorSpec(tensor.name, tuple(tensor.shape)) for tensor in self.tensors)
        return FloatSegment(
            self.name, tensors, self.clip, self.bits, self.weighting, self.weight_cap
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

    def check(self) -> NormCheck | None:
        if not self.enabled:
            return None
        return NormCheck(self.margin, self.sketches, self.tolerated, self.min_cosine)


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


def read_task(file: Path) -> TaskSpec:
    """A task from its TOML file (see docs/samples/task.toml).

    A file that says nothing of a norm check has one, if there is a norm that can be checked.

    Raises:
        ConfigurationError: unreadable, an unknown key, or a value out of its range.
        PlanError: no exact plan exists; the message says what would work.
    """
    literal = validated(_TaskFile, read_toml(file))
    segments: list[Segment] = [literal.update.segment()] if literal.update else []
    segments += [integers.segment() for integers in literal.integers]
    if literal.norm_check is not None:
        norm_check = literal.norm_check.check()
    else:
        norm_check = _USUAL if any(segment.norm_bound for segment in segments) else None
    plan = make_plan(
        segments,
        min_clients=literal.min_clients,
        max_clients=literal.max_clients,
        norm_check=norm_check,
    )
    return TaskSpec(
        literal.task_id,
        plan,
        literal.rounds,
        round(literal.round_deadline_s * 1000),
        literal.max_attempts,
        literal.max_clients if literal.target_clients is None else literal.target_clients,
        literal.selected_clients,
    )
