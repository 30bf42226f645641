"""The recommender's task for a data set: its TOML file and its initial model, for the operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from secagg_client.config import ClientSettings
from secagg_client.data import load_dataset
from secagg_client.model import ITEM_BIAS, ITEM_FACTORS, init_shared

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
weighting = "samples"
weight_cap = {weight_cap}

[[update.tensors]]
name = "{bias}"
shape = [{items}]

[[update.tensors]]
name = "{factors}"
shape = [{items}, {dimensions}]
"""


def prepare(settings: ClientSettings, folder: Path, *, rounds: int) -> None:
    """Write ``task.toml`` and ``initial.npz`` into a folder.

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
        weight_cap=_WEIGHT_CAP,
        bias=ITEM_BIAS,
        factors=ITEM_FACTORS,
        items=items,
        dimensions=settings.dimensions,
    )
    (folder / "task.toml").write_text(text, encoding="utf-8")
    shared = init_shared(items, settings.dimensions, settings.seed)
    np.savez(folder / "initial.npz", **shared)  # type: ignore[arg-type]  # names are ours
