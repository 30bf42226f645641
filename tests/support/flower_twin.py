"""The same Flower app aggregated in the clear: the same quantiser, no cipher, no key holder.

Compared with an encrypted run by the SHA-256 of every round's sums. Must never import the cipher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flower_grids import server_context, simulated
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from secagg.context import rotation_string
from secagg.parameters import FloatSegment, IntegerSegment, Plan
from secagg.quantize import quantize
from secagg.release import Release
from secagg.sampling import Stream

__all__ = ["ClearStrategy", "clear_mod", "clear_run"]

_CLEAR = "clear"

Rounding = Callable[[int, int], Stream]
"""The stream of the stochastic rounding, by partition and round number."""


def clear_mod(
    plan: Plan, task_id: str, rounding: Rounding, bounds: dict[str, float], weight_cap: int
) -> Mod:
    """A mod that quantises a training reply and sends the integers as they are."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if _CLEAR not in message.content:
            return call_next(message, context)
        number = int(message.content.config_records[_CLEAR]["number"])  # type: ignore[arg-type]
        del message.content[_CLEAR]
        (received,) = message.content.array_records.values()
        reply = call_next(message, context).content
        (trained,) = reply.array_records.values()
        (metrics,) = reply.metric_records.values()
        (update,) = (part for part in plan.segments if isinstance(part, FloatSegment))
        given: dict[str, Any] = {
            update.name: {
                tensor.name: trained[tensor.name].numpy().astype(float)
                - received[tensor.name].numpy().astype(float)
                for tensor in update.tensors
            }
        }
        samples = int(metrics["num-examples"])  # type: ignore[arg-type]
        share = min(samples, weight_cap) / weight_cap
        for segment in plan.segments:
            if isinstance(segment, IntegerSegment):
                parts = [
                    min(max(float(metrics[name]) / bounds[name], -1), 1) * share  # type: ignore[arg-type]
                    for name in sorted(bounds)
                ]
                scaled = np.rint(np.array([*parts, share]) * segment.max_abs)
                given[segment.name] = scaled.astype(np.int64)
        quantized = quantize(
            plan,
            given,
            samples=samples,
            rotation=rotation_string(task_id, number, plan),
            randomness=rounding(int(context.node_config["partition-id"]), number),
        )
        integers = ArrayRecord([part.summand for part in quantized])
        return Message(RecordDict({_CLEAR: integers}), reply_to=message)

    return mod


@dataclass
class ClearStrategy(Strategy):
    """Adds the integers of some nodes, and has the inner strategy go on with the mean.

    Attributes:
        sums: SHA-256 of every round's sums, by round.
        left_out: partitions that the encrypted run had no update of.
    """

    inner: Strategy
    plan: Plan
    task_id: str
    left_out: frozenset[int]

    def __post_init__(self) -> None:
        self.sums: dict[int, str] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages to those who are not left out."""
        self._arrays = arrays
        number = ConfigRecord({"number": server_round})
        asked = []
        for message in self.inner.configure_train(server_round, arrays, config, grid):
            if message.metadata.dst_node_id - 1000 not in self.left_out:
                message.content = RecordDict({**message.content, _CLEAR: number})
                asked.append(message)
        return asked

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add, hash, and apply the mean."""
        replies = list(replies)
        uploads = [reply.content.array_records[_CLEAR].to_numpy_ndarrays() for reply in replies]
        sums = tuple(sum(parts[1:], start=parts[0]) for parts in zip(*uploads, strict=True))
        rotation = rotation_string(self.task_id, server_round, self.plan)
        release = Release(self.plan, rotation, len(uploads), sums)
        self.sums[server_round] = release.sha256
        mean = release.mean()
        moved = {
            key: Array(
                (array.numpy().astype(float) + mean[key]).astype(array.dtype)
                if key in mean
                else array.numpy()
            )
            for key, array in self._arrays.items()
        }
        content = RecordDict(
            {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 1.0})}
        )
        return self.inner.aggregate_train(server_round, [Message(content, reply_to=replies[0])])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No evaluation."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """No evaluation."""
        return None

    def summary(self) -> None:
        """Nothing to say."""


def clear_run(
    app: Callable[[Mod], ClientApp],
    inner: Strategy,
    arrays: ArrayRecord,
    *,
    rounds: int,
    nodes: int,
    plan: Plan,
    task_id: str,
    rounding: Rounding,
    left_out: Iterable[int] = (),
    bounds: dict[str, float] | None = None,
    weight_cap: int = 1000,
) -> tuple[dict[int, str], ArrayRecord]:
    """A run of an app in the clear: the SHA-256 of every round's sums, and the model at the end.

    Args:
        app: makes the ClientApp with a mod.
        inner: a fresh strategy, as the encrypted run had it.
        arrays: what it began with.
        plan, task_id, bounds, weight_cap: of the encrypted run.
        rounding: what the encrypted run's `SecaggMod` had.
        left_out: partitions that dropped out or were refused.
    """
    server_context(7, {})
    mod = clear_mod(plan, task_id, rounding, bounds or {}, weight_cap)
    strategy = ClearStrategy(inner, plan, task_id, frozenset(left_out))
    result = strategy.start(simulated(app(mod), 7, nodes, {}), arrays, rounds)
    return strategy.sums, result.arrays
