"""Tasks as their operators write them, in TOML (see docs/samples/task.toml)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from secagg.accounting import noise_multiplier_for
from secagg.errors import ConfigurationError
from secagg.optimisers import Optimiser
from secagg.parameters import (
    MIN_COHORT,
    Compression,
    FloatSegment,
    IntegerSegment,
    LowRank,
    NormCheck,
    Privacy,
    RandomSubset,
    RowThreshold,
    Segment,
    TensorSpec,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.settings import read_toml, validated
from secagg_server.stopping import Stop
from secagg_server.tasks import AdaptiveClip, TaskSpec

__all__ = ["read_task"]

_USUAL = NormCheck()
_USUAL_CLIP = AdaptiveClip()
_USUAL_OPTIMISER = Optimiser()
_USUAL_INTEGER_SHARE = 0.1  # as in `Privacy`
_LEAST_NOISE = 0.01  # that a plan can have
_USUAL_FIGURE = "validation"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Tensor(_Section):
    name: str
    shape: list[int] = Field(default_factory=list)


class _AdaptiveClip(_Section):
    quantile: float = _USUAL_CLIP.quantile
    rate: float = _USUAL_CLIP.rate


class _Compression(_Section):
    rank: int | None = None
    fraction: float | None = None

    def compression(self) -> Compression:
        if self.rank is not None and self.fraction is None:
            return LowRank(self.rank)
        if self.fraction is not None and self.rank is None:
            return RandomSubset(self.fraction)
        raise ConfigurationError(
            "expected either a rank or a fraction in [update.compression]; got "
            f"rank={self.rank}, fraction={self.fraction}; give one of the two"
        )


class _Update(_Section):
    name: str = "update"
    tensors: list[_Tensor]
    clip: float
    bits: int = 8
    weighting: Literal["equal", "samples"] = "equal"
    weight_cap: int = 1
    rows: int = 0
    adaptive_clip: _AdaptiveClip | None = None
    compression: _Compression | None = None

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
            compression=self.compression.compression() if self.compression else None,
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


class _Optimiser(_Section):
    name: str = _USUAL_OPTIMISER.name
    learning_rate: float | None = None
    beta1: float = _USUAL_OPTIMISER.beta1
    beta2: float = _USUAL_OPTIMISER.beta2
    tau: float = _USUAL_OPTIMISER.tau

    def optimiser(self) -> Optimiser:
        return Optimiser(self.name, self.learning_rate, self.beta1, self.beta2, self.tau)


class _Stop(_Section):
    patience: int
    least_change: float = 0.0
    figure: str | None = None
    least_gain: float = 0.0
    most_users: int | None = None

    def stop(self) -> Stop:
        usual = "" if self.most_users is None else _USUAL_FIGURE
        figure = usual if self.figure is None else self.figure
        return Stop(self.patience, self.least_change, figure, self.least_gain)

    def segment(self) -> IntegerSegment | None:
        """What the figure is made of, in a file that does not have it among its integers."""
        if self.most_users is None:
            return None
        return IntegerSegment(self.stop().figure, 2, self.most_users)


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
    optimiser: _Optimiser = Field(default_factory=_Optimiser)
    stop: _Stop | None = None

    def segments(self) -> list[Segment]:
        segments: list[Segment] = [self.update.segment()] if self.update else []
        segments += [integers.segment() for integers in self.integers]
        if self.stop and (figure := self.stop.segment()):
            if figure.name in [segment.name for segment in segments]:
                raise ConfigurationError(
                    f"expected the bound of the figure once: most_users in [stop], or a segment "
                    f"{figure.name!r} in [[integers]]; got both; drop one of the two"
                )
            segments.append(figure)
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
        literal.optimiser.optimiser(),
        literal.stop.stop() if literal.stop else None,
    )
    spec.check_budget()
    return spec
