"""Models of one exact round: their task, for the operator, and the model of what it released."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from secagg.archive import read_npz
from secagg.errors import ConfigurationError
from secagg.parameters import IntegerSegment
from secagg_client.config import ClientSettings
from secagg_client.learners import silos_of
from secagg_recommender.datasets import read_dataset
from secagg_recommender.ease import GRAM, RIDGE, Ease, ease_segment_for
from secagg_recommender.histories import HistoryModel
from secagg_recommender.interactions import DataError, Split, split_leave_one_out
from secagg_recommender.partition import Parts
from secagg_recommender.transitions import COUNTS, Transitions, transition_segments_for

__all__ = ["COUNTED", "model_from_sums", "prepare_counts"]

COUNTED: Final = ("ease", "transitions")
"""Models that need no training, by their names in the settings."""

_TASK = """\
# {model} on {dataset}, in one round; start it with
#   secagg-server task create {folder}/task.toml
# and when it is done, make the model with
#   secagg-server task sums {task} 1 --output sums.npz
#   secagg-client count-model sums.npz model.npz
task_id = "{task}"
max_clients = {clients}
rounds = 1
"""

_SEGMENT = """
[[integers]]
name = "{name}"
size = {size}
max_abs = {max_abs}
"""


def prepare_counts(settings: ClientSettings, folder: Path) -> Path:
    """Write the task of a model that is counted, for the silos of the settings.

    Returns:
        The file, ``task.toml`` in the folder.

    Raises:
        ConfigurationError: a model that is not counted.
        DataError: the data cannot be used.
    """
    dataset = read_dataset(settings.dataset, settings.data_dir)
    split = split_leave_one_out(dataset.interactions)
    parts = silos_of(settings, dataset, split)
    text = _TASK.format(
        model=settings.model,
        dataset=settings.dataset,
        folder=folder,
        task=settings.task,
        clients=settings.silos,
    )
    text += "".join(map(_written, _segments(settings.model, split, parts)))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "task.toml"
    file.write_text(text, encoding="utf-8")
    return file


def _segments(model: str, split: Split, parts: Parts) -> Sequence[IntegerSegment]:
    if model == "ease":
        return (ease_segment_for(split, parts),)
    if model == "transitions":
        return transition_segments_for(split, parts)
    raise ConfigurationError(f"expected model 'ease' or 'transitions'; got {model=}")


def _written(segment: IntegerSegment) -> str:
    text = _SEGMENT.format(name=segment.name, size=segment.size, max_abs=segment.max_abs)
    return text if segment.max_norm is None else f"{text}max_norm = {segment.max_norm!r}\n"


def model_from_sums(sums: Path, output: Path, *, ridge: float = RIDGE) -> HistoryModel:
    """Make the model of a round's sums, and write it for `secagg-client recommend`.

    Args:
        sums: what ``secagg-server task sums`` has written.
        output: ``.npz`` file to write.
        ridge: λ of EASE.

    Raises:
        InputError: no archive.
        DataError: sums of something else, or that cannot be what the clients have counted.
    """
    arrays = read_npz(sums)
    model: HistoryModel
    if GRAM in arrays:
        model = Ease.from_sums(arrays, ridge=ridge)
    elif COUNTS in arrays:
        model = Transitions.from_sums(arrays)
    else:
        raise DataError(
            f"expected sums of a segment {GRAM!r} or {COUNTS!r}; {sums} has {sorted(arrays)}; "
            "prepare the task with --model ease or --model transitions"
        )
    np.savez(output, **model.tensors())  # type: ignore[arg-type]  # names are ours
    return model
