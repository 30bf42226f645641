"""What a run's rounds compute on: the wrapper's options, made into plans for a model's shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from secagg.flower.metrics import Metrics
from secagg.parameters import (
    FloatSegment,
    NormCheck,
    Plan,
    Privacy,
    Segment,
    TensorSpec,
    Weighting,
)
from secagg.planner import PRIVATE_MARGIN, make_plan
from secagg.quantize import Update

__all__ = ["UPDATE", "Terms"]

UPDATE = "update"
"""Name of the segment that the difference to the model travels in."""


@dataclass(frozen=True)
class Terms:
    """On what terms nodes take part; see `SecureAggregation`.

    Attributes:
        metrics: the training's; evaluation's have a plan of their own.
    """

    clip: float
    bits: int
    min_clients: int
    max_clients: int
    weighting: Weighting
    weight_cap: int
    norm_check: NormCheck | Literal["auto"] | None
    privacy: Privacy | None
    metrics: Metrics
    _made: dict[tuple[TensorSpec, ...], Plan] = field(default_factory=dict, repr=False)

    def training(self, model: Update) -> Plan:
        """A training round's plan, the same one for the same shapes.

        Raises:
            PlanError: no exact plan exists.
        """
        specs = tuple(TensorSpec(name, np.shape(value)) for name, value in model.items())
        if specs not in self._made:
            self._made[specs] = self._training(specs)
        return self._made[specs]

    def evaluation(self, metrics: Metrics, privacy: Privacy | None) -> Plan:
        """An evaluation round's plan: metrics alone.

        Raises:
            PlanError: no exact plan exists.
        """
        return make_plan(
            [metrics.segment(self.max_clients)],
            max_clients=self.max_clients,
            min_clients=self.min_clients,
            privacy=privacy,
        )

    def _training(self, specs: tuple[TensorSpec, ...]) -> Plan:
        segments: list[Segment] = [
            FloatSegment(UPDATE, specs, self.clip, self.bits, self.weighting, self.weight_cap)
        ]
        if self.metrics.bounds:
            segments.append(self.metrics.segment(self.max_clients))
        return make_plan(
            segments,
            max_clients=self.max_clients,
            min_clients=self.min_clients,
            norm_check=self._check(),
            privacy=self.privacy,
        )

    def _check(self) -> NormCheck | None:
        if self.norm_check != "auto":
            return self.norm_check
        # Noise that is in the update itself already covers what a refusal could tell.
        wide = self.privacy is not None and self.privacy.mode != "local"
        return NormCheck(margin=PRIVATE_MARGIN) if wide else NormCheck()
