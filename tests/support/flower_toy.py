"""A toy Flower app: a small torch model on data generated from the partition's number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from unittest import mock

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from secagg.context import RoundContext
from secagg.encryptor import encrypt_integers, upload_integers
from secagg.quantize import Quantized
from secagg.receipts import SigningKey
from secagg.upload import Upload
from secagg_client import embedded

__all__ = ["initial_arrays", "network", "poisoner", "toy_app"]


def network() -> torch.nn.Module:
    """A few hundred parameters, and the counter of a normalisation layer; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(8, 24),
            torch.nn.BatchNorm1d(24),
            torch.nn.ReLU(),
            torch.nn.Linear(24, 3),
        )


def initial_arrays() -> ArrayRecord:
    """The model before training."""
    return ArrayRecord(network().state_dict())


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


def toy_app(mods: Sequence[Mod], *, dropping: Iterable[int] = ()) -> ClientApp:
    """An app whose nodes train one batch.

    Args:
        dropping: partitions that raise instead of replying.
    """
    drops = frozenset(dropping)
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        partition = int(context.node_config["partition-id"])
        if partition in drops:
            raise RuntimeError("the battery is empty")
        received = message.content.array_records["arrays"].to_torch_state_dict()
        model = network()
        model.load_state_dict(received)
        data = torch.Generator().manual_seed(partition)
        inputs = torch.randn(32, 8, generator=data)
        labels = inputs[:, :3].argmax(dim=1)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        trained = model.state_dict()
        metrics = {"train_loss": loss.item(), "num-examples": 100 + partition}
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return app
