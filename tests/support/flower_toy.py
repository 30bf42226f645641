"""A toy Flower app: a small torch model on data generated from the partition's number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

__all__ = ["initial_arrays", "network", "toy_app"]


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
