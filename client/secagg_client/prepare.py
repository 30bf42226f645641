"""The recommender's task for a data set: its TOML file and its initial model, for the operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from secagg.parameters import Privacy
from secagg_client.config import ClientSettings
from secagg_recommender.datasets import load_dataset
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, init_shared

__all__ = ["prepare"]

# Clips one update in twenty of a run on MovieLens 100K in eight silos, all in its first rounds.
_CLIP = 40.0
_WEIGHT_CAP = 20_000

_TASK = """\
# The recommender's task for {dataset}; start it with
#   secagg-server task create {folder}/task.toml --model {folder}/initial.npz
task_id = "{task}"
max_clients = {clients}
rounds = {rounds}

[update]
clip = {clip}
{weighting}{rows}
[[update.tensors]]
name = "{bias}"
shape = [{items}]

[[update.tensors]]
name = "{factors}"
shape = [{items}, {dimensions}]
"""

_BY_SAMPLES = """\
weighting = "samples"
weight_cap = {weight_cap}
"""

# With privacy, how many samples a client has is private too.
_EQUALLY = """\
weighting = "equal"
"""

# Rows that stay apart have to be quantised more finely.
_ROWS = """\
rows = {items}
bits = 13
"""

_THRESHOLD = """
[threshold]
least = {least}
"""

_PRIVACY = """
[privacy]
mode = "{mode}"
epsilon = {epsilon!r}
delta = {delta!r}
"""


def prepare(
    settings: ClientSettings,
    folder: Path,
    *,
    rounds: int,
    privacy: Privacy | None = None,
    least: int | None = None,
) -> None:
    """Write ``task.toml`` and ``initial.npz`` into a folder.

    Args:
        privacy: who adds noise, and what it may cost; None for exact sums. Its noise multiplier is
            left to the server, which finds the smallest that the rounds allow.
        least: clients that must have an item for its row to be released; None releases all.

    Raises:
        DataError: the data cannot be used.
    """
    items = load_dataset(settings.dataset, settings.data_dir).n_items
    folder.mkdir(parents=True, exist_ok=True)
    text = _TASK.format(
        dataset=settings.dataset,
        folder=folder,
        task=settings.task,
        clients=settings.silos,
        rounds=rounds,
        clip=_CLIP,
        # Rows that stay apart leave no room for a weight.
        weighting=_EQUALLY if privacy or least else _BY_SAMPLES.format(weight_cap=_WEIGHT_CAP),
        rows=_ROWS.format(items=items) if least else "",
        bias=ITEM_BIAS,
        factors=ITEM_FACTORS,
        items=items,
        dimensions=settings.dimensions,
    )
    if least:
        text += _THRESHOLD.format(least=least)
    if privacy:
        text += _PRIVACY.format(mode=privacy.mode, epsilon=privacy.epsilon, delta=privacy.delta)
    (folder / "task.toml").write_text(text, encoding="utf-8")
    shared = init_shared(items, settings.dimensions, settings.seed)
    np.savez(folder / "initial.npz", **shared)  # type: ignore[arg-type]  # names are ours
