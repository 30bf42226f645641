"""Experiments with the recommender: uneven data, weak devices, one round, sessions, serving."""
