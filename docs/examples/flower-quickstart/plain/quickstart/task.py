"""The model, its data, and how it is trained and tested. Knows nothing of Flower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 16, 4

Batches = DataLoader[tuple[Tensor, ...]]


class Net(nn.Module):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 32)
        self.output = nn.Linear(32, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of shape (batch, CLASSES)."""
        scores: Tensor = self.output(torch.relu(self.hidden(features)))
        return scores


def load_data(partition_id: int, batch_size: int) -> tuple[Batches, Batches]:
    """One node's samples, made up on the spot: four clouds that overlap a little.

    Nodes hold different samples, and different numbers of them. The same node always gets the
    same ones, in the same order, so that runs can be compared.
    """
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(1 + partition_id)
    size = 400 + 200 * (partition_id % 3)
    labels = torch.randint(CLASSES, (size,), generator=own)
    features = centres[labels] + 1.5 * torch.randn(size, FEATURES, generator=own)
    split = size * 4 // 5
    train = TensorDataset(features[:split], labels[:split])
    validation = TensorDataset(features[split:], labels[split:])
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, generator=own),
        DataLoader(validation, batch_size=batch_size),
    )


def train(model: nn.Module, batches: Batches, epochs: int, lr: float) -> float:
    """Train in place; the mean loss over all batches."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _ in range(epochs):
        for features, labels in batches:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(features), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy."""
    loss = correct = samples = 0.0
    for features, labels in batches:
        scores = model(features)
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
        correct += (scores.argmax(1) == labels).sum().item()
        samples += len(labels)
    return loss / samples, correct / samples
