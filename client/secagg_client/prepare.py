"""The recommender's task for a data set: its TOML file and its initial model, for the operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from secagg.archive import read_npz
from secagg.optimisers import Optimiser
from secagg.parameters import Compression, LowRank, Privacy
from secagg_client.config import ClientSettings
from secagg_recommender.datasets import load_dataset
from secagg_recommender.factorisation import ITEM_BIAS, ITEM_FACTORS, init_shared
from secagg_recommender.interactions import Interactions
from secagg_recommender.warm_start import LABELS, warm_start

__all__ = ["Prepared", "Wishes", "prepare"]

# Clips one update in twenty of a run on MovieLens 100K in eight silos, all in its first rounds.
_CLIP = 40.0
_WEIGHT_CAP = 20_000
# Rows that stay apart have to be quantised more finely.
_BITS, _BITS_OF_ROWS = 8, 13
_AVERAGE = Optimiser()


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a task shall be like.

    Attributes:
        rounds: of training, at most.
        privacy: who adds noise, and what it may cost; None for exact sums. Its noise multiplier is
            left to the server, which finds the smallest that the rounds allow.
        least: clients that must have an item for its row to be released; None releases all.
        optimiser: of the server.
        compression: how updates travel; None in full.
        bits: of a quantised value; None for as many as are usual.
        weight_cap: samples beyond which a silo weighs no more.
        patience: rounds without progress after which the task ends; None for never.
        least_gain: progress is a rise of the held-out hit rate above its best by this much.
        least_change: the task ends too where the model changes by less, relative to its length.
        pretrained: model to start from; None for a random one.
    """

    rounds: int = 25
    privacy: Privacy | None = None
    least: int | None = None
    optimiser: Optimiser = _AVERAGE
    compression: Compression | None = None
    bits: int | None = None
    weight_cap: int = _WEIGHT_CAP
    patience: int | None = None
    least_gain: float = 0.0
    least_change: float = 0.0
    pretrained: Path | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where the files are, and of how many items the initial model knows something already."""

    task: Path
    model: Path
    items: int
    known: int


def prepare(settings: ClientSettings, folder: Path, wishes: Wishes) -> Prepared:
    """Write ``task.toml`` and ``initial.npz`` into a folder.

    The model's file names the items beside the model, so that another task can start from it.

    Raises:
        DataError: the data cannot be used, or the pretrained model does not fit.
        InputError: the pretrained model cannot be read.
    """
    interactions = load_dataset(settings.dataset, settings.data_dir)
    shared, known = init_shared(interactions.n_items, settings.dimensions, settings.seed), 0
    if wishes.pretrained is not None:
        shared, known = warm_start(read_npz(wishes.pretrained), interactions.item_labels, shared)
    folder.mkdir(parents=True, exist_ok=True)
    made = Prepared(folder / "task.toml", folder / "initial.npz", interactions.n_items, known)
    text = "".join(_sections(settings, folder, interactions, wishes))
    made.task.write_text(text, encoding="utf-8")
    labels = np.array(interactions.item_labels)
    np.savez(made.model, **shared, **{LABELS: labels})  # type: ignore[arg-type]  # names are ours
    return made


def _sections(
    settings: ClientSettings, folder: Path, interactions: Interactions, wishes: Wishes
) -> Iterator[str]:
    yield f"""\
# The recommender's task for {settings.dataset}; start it with
#   secagg-server task create {folder}/task.toml --model {folder}/initial.npz
task_id = "{settings.task}"
max_clients = {settings.silos}
rounds = {wishes.rounds}
"""
    yield from _update(interactions.n_items, settings.dimensions, wishes)
    if wishes.optimiser != _AVERAGE:
        yield f'\n[optimiser]\nname = "{wishes.optimiser.name}"\n'
        yield f"learning_rate = {wishes.optimiser.rate!r}\n"
    if wishes.patience is not None:
        # The largest silo, wherever the users go.
        yield f"\n[stop]\npatience = {wishes.patience}\nmost_users = {interactions.n_users}\n"
        yield f"least_gain = {wishes.least_gain!r}\nleast_change = {wishes.least_change!r}\n"
    if wishes.least:
        yield f"\n[threshold]\nleast = {wishes.least}\n"
    if privacy := wishes.privacy:
        yield f'\n[privacy]\nmode = "{privacy.mode}"\n'
        yield f"epsilon = {privacy.epsilon!r}\ndelta = {privacy.delta!r}\n"


def _update(items: int, dimensions: int, wishes: Wishes) -> Iterator[str]:
    bits = wishes.bits or (_BITS_OF_ROWS if wishes.least else _BITS)
    yield f"\n[update]\nclip = {_CLIP}\nbits = {bits}\n"
    if wishes.privacy or wishes.least:
        # With privacy, how many samples a client has is private too; and rows that stay apart
        # leave no room for a weight.
        yield 'weighting = "equal"\n'
    else:
        yield f'weighting = "samples"\nweight_cap = {wishes.weight_cap}\n'
    if wishes.least:
        yield f"rows = {items}\n"
    for name, shape in ((ITEM_BIAS, [items]), (ITEM_FACTORS, [items, dimensions])):
        yield f'\n[[update.tensors]]\nname = "{name}"\nshape = {shape}\n'
    if isinstance(wishes.compression, LowRank):
        yield f"\n[update.compression]\nrank = {wishes.compression.rank}\n"
    elif wishes.compression is not None:
        yield f"\n[update.compression]\nfraction = {wishes.compression.fraction!r}\n"
