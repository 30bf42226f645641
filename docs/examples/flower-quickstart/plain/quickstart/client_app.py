"""What runs on every node."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_model
from quickstart.task import train as train_model

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on this node's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    batches, _ = load_data(context.node_config["partition-id"], context.run_config["batch-size"])

    epochs, lr = context.run_config["local-epochs"], msg.content["config"]["lr"]
    loss = train_model(model, batches, epochs, lr)

    metrics = MetricRecord({"train_loss": loss, "num-examples": len(batches.dataset)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Test the received model on this node's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, batches = load_data(context.node_config["partition-id"], context.run_config["batch-size"])

    loss, accuracy = test_model(model, batches)

    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(batches.dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
