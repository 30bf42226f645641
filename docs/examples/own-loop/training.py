"""What is trained: a small network on data of five silos that look at the world differently."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

torch.set_num_threads(1)
torch.manual_seed(0)
teacher = torch.randn(20, 4)


def silo(size, shift):
    x = torch.randn(size, 20) + shift * torch.randn(20)
    return x, (x @ teacher).argmax(1)


silos = [silo(size, 0.5) for size in (60, 80, 100, 120, 140)]
held_out = silo(2000, 0.0)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))


def weights():
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def load(tensors):
    model.load_state_dict({name: torch.as_tensor(value) for name, value in tensors.items()})


def train(start, data, epochs=5):
    """What training on this data changes about the weights."""
    load(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(epochs):
        for x, y in zip(data[0].split(40), data[1].split(40), strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return {name: value - start[name] for name, value in weights().items()}


def accuracy():
    x, y = held_out
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def norm(update):
    return float(np.sqrt(sum((value**2).sum() for value in update.values())))
