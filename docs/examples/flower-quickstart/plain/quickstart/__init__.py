"""A Flower app that trains a small PyTorch model."""
