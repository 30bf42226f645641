"""A Flower run over a key holder of this process, with the shared federation's kits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flower_grids import NodeGrid, linear_app, rounding_of, server_context, simulated
from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import FedAvg, Strategy

from secagg.flower import SecaggMod, SecureAggregation

__all__ = ["Run"]

_RUNS = itertools.count(1)


@dataclass
class Run:
    """One Flower run of its own: the key holder remembers tasks.

    Attributes:
        config: the run's configuration.
    """

    config: dict[str, Any]
    run_id: int = field(default_factory=lambda: next(_RUNS))

    @property
    def task_id(self) -> str:
        """What its training is called at the key holder."""
        return f"flower-{self.run_id}"

    @property
    def context(self) -> Context:
        """The ServerApp's."""
        return server_context(self.run_id, self.config)

    def strategy(self, inner: Strategy | None = None, **options: Any) -> SecureAggregation:  # noqa: ANN401
        """The wrapper, without a norm check unless one is asked for."""
        inner = inner or FedAvg(fraction_evaluate=0.0)
        return SecureAggregation(
            inner, self.context, **({"clip": 1.0, "norm_check": None} | options)
        )

    def grid(
        self,
        train: Callable[..., Any] | None = None,
        *,
        nodes: int = 4,
        mods: Sequence[Mod] = (SecaggMod(rounding_of),),
        state: Path | None = None,
    ) -> NodeGrid:
        """Nodes of the app without a framework."""
        app = linear_app(mods, train) if train else linear_app(mods)
        return simulated(app, self.run_id, nodes, self.config, state)
