"""Flower without its programs: nodes in this process, messages over Flower's serialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from secagg.context import RoundContext
from secagg.encryptor import encrypt_integers, upload_integers
from secagg.quantize import Quantized
from secagg.receipts import SigningKey
from secagg.sampling import Stream
from secagg.upload import Upload
from secagg_client import embedded
from secagg_client.repeatable import repeatable_rounding

__all__ = [
    "BOUNDS",
    "NodeGrid",
    "array_record",
    "evaluated",
    "linear_app",
    "node_context",
    "poisoner",
    "rounding",
    "rounding_of",
    "server_context",
    "simulated",
    "trained",
]

BOUNDS = {"train_loss": 4.0}
"""Of the metric that `trained` replies with and that is asked for."""

Config = Mapping[str, Any]


def _identify(run_id: int) -> None:
    """What Flower tells a process about the task it runs; messages cannot be made without."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1


def server_context(run_id: int, config: Config) -> Context:
    """A ServerApp's context, in this process."""
    _identify(run_id)
    return Context(run_id, 1, {}, RecordDict(), dict(config))


def node_context(run_id: int, partition: int, run: Config, node: Config) -> Context:
    """The context of a node's ClientApp."""
    own = {"partition-id": partition, "num-partitions": 1000} | dict(node)
    return Context(run_id, 1000 + partition, own, RecordDict(), dict(run))


class NodeGrid(Grid):
    """Runs a ClientApp for each node, one after the other.

    Args:
        app: the ClientApp of all nodes.
        contexts: one for each node; what Flower keeps of a run on a node is in them.

    Attributes:
        silent: partitions that never answer.
        change: what becomes of a reply on its way, by partition.
        asked: every message that was sent.
        replies: every reply as it travelled, serialised.
    """

    def __init__(self, app: ClientApp, contexts: Sequence[Context]) -> None:
        self.app = app
        self.contexts = {context.node_id: context for context in contexts}
        self.silent: set[int] = set()
        self.change: Callable[[int, Message], Message] = lambda _partition, reply: reply
        self.asked: list[Message] = []
        self.replies: list[bytes] = []

    def set_run(self, run: Run) -> None:
        """See `Grid`."""

    @property
    def run(self) -> Run:
        """See `Grid`."""
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:  # noqa: ANN401 - as in Flower
        """See `Grid`."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid`; replies come in the order of the messages."""
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(message)
            if node - 1000 not in self.silent:
                replies.append(self._reply(node, message))
        return replies

    def _reply(self, node: int, message: Message) -> Message:
        arrived = _over_the_wire(message)
        context = self.contexts[node]
        try:
            reply = self.app(arrived, context)
        except Exception as error:  # as the SuperNode does
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=arrived)
        reply = self.change(node - 1000, reply)
        self.replies.append(message_to_proto(reply).SerializeToString())
        return _over_the_wire(reply)


def _over_the_wire(message: Message) -> Message:
    data = message_to_proto(message).SerializeToString()
    return message_from_proto(ProtoMessage.FromString(data))


def simulated(
    app: ClientApp, run_id: int, nodes: int, run: Config, state: Path | None = None
) -> NodeGrid:
    """Nodes that share a run's configuration, each with a state folder if ``state`` is given."""
    return NodeGrid(
        app,
        [
            node_context(
                run_id, index, run, {"secagg-state": str(state / str(index))} if state else {}
            )
            for index in range(nodes)
        ],
    )


def array_record(dtype: str = "float32") -> ArrayRecord:
    """A small model: two arrays of floats, a counter, and one that is empty."""
    arrays = {
        "layer.weight": np.linspace(-1, 1, 40).reshape(8, 5).astype(dtype),
        "layer.bias": np.zeros(5, dtype=dtype),
        "norm.batches": np.array(7),
        "norm.empty": np.zeros((0, 3), dtype=dtype),
    }
    return ArrayRecord({key: Array(array) for key, array in arrays.items()})


def trained(partition: int, received: ArrayRecord) -> RecordDict:
    """What a node's training replies with; every node moves elsewhere."""
    arrays = {}
    for key, array in received.items():
        old = array.numpy()
        step = 0.01 * (partition + 1) * np.cos(np.arange(old.size) + partition).reshape(old.shape)
        new = old + 1 if old.dtype.kind == "i" else (old + step).astype(old.dtype)
        arrays[key] = Array(np.asarray(new))
    loss = {"train_loss": 1.5 + partition / 8, "private": 0.123, "num-examples": 100 + partition}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(loss)})


def evaluated(partition: int) -> RecordDict:
    """What a node's evaluation replies with."""
    metrics = {"accuracy": partition / 10, "num-examples": 10 * (partition + 1)}
    return RecordDict({"metrics": MetricRecord(metrics)})


def linear_app(
    mods: Sequence[Mod], train: Callable[[int, ArrayRecord], RecordDict] = trained
) -> ClientApp:
    """An app without a framework.

    Args:
        train: what a partition replies to a model.
    """
    app = ClientApp(mods=list(mods))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        (received,) = message.content.array_records.values()
        assert len(message.content.config_records) == 1, "the app sees its own records alone"
        reply = train(int(context.node_config["partition-id"]), received)
        return Message(reply, reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        assert len(message.content.config_records) == 1, "the app sees its own records alone"
        return Message(evaluated(int(context.node_config["partition-id"])), reply_to=message)

    return app


def rounding(partition: int, number: int) -> Stream:
    """A node's repeatable rounding in a round."""
    return repeatable_rounding(5, partition, number)


def rounding_of(context: Context, joined: RoundContext) -> Stream:
    """The same, as `SecaggMod` wants it."""
    return rounding(int(context.node_config["partition-id"]), joined.id.round_number)


def poisoner(partitions: Iterable[int]) -> Mod:
    """A mod for the outside of `SecaggMod`: these nodes encrypt -10 times what they should.

    An app cannot do that: what it replies is scaled down to the clip norm.
    """
    poisons = frozenset(partitions)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if context.node_config["partition-id"] not in poisons:
            return call_next(message, context)
        with mock.patch.object(embedded, "encrypt_quantized", _multiplied):
            return call_next(message, context)

    return mod


def _multiplied(
    context: RoundContext, quantized: Sequence[Quantized], identity: SigningKey, commitment: bytes
) -> Upload:
    parts = upload_integers(context.plan, quantized)
    parts[0] = -10 * parts[0]
    return encrypt_integers(context, parts, identity, commitment)
