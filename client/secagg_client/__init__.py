"""The device: data, local training, and the session that contributes to a server's rounds.

`session` needs neither torch nor pandas, so that any program can join a task of its own; the
recommender (`data`, `model`, `evaluation`, `recommend`) builds on it.
"""
