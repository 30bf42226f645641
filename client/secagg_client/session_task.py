"""The task of a session model, for the operator, and the model that devices serve of it.

Item vectors are built from public attributes. The shared tensors, which are what a task's model
consists of, say nothing of items by themselves: `session_model_of` puts the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from secagg.optimisers import Optimiser
from secagg_client.config import ClientSettings
from secagg_recommender.content import ItemContent, item_content
from secagg_recommender.datasets import Dataset, read_dataset
from secagg_recommender.session_model import SessionModel

if TYPE_CHECKING:
    from secagg_recommender.session_silo import SessionConfig

__all__ = ["OPTIMISER", "content_and_config", "prepare_session", "session_model_of"]

OPTIMISER: Final = Optimiser("adam", learning_rate=0.02, tau=1e-5)
"""What turns gradients into steps, unless the operator asks for another one."""

# Gradients of fifty shoppers have norms of 0.4 in the first rounds, 0.9 to 1.6 in the last. What is
# cut keeps its direction, which is what Adam goes by; and a smaller range is resolved finer.
_CLIP: Final = 1.0

_TASK = """\
# A session model on {dataset}; start it with
#   secagg-server task create {folder}/task.toml --model {folder}/initial.npz
task_id = "{task}"
max_clients = {clients}
rounds = {rounds}

[optimiser]
name = "{optimiser}"
learning_rate = {rate!r}
tau = {tau!r}

[update]
clip = {clip}
"""

_TENSOR = """
[[update.tensors]]
name = "{name}"
shape = {shape}
"""


def content_and_config(
    settings: ClientSettings, dataset: Dataset
) -> tuple[ItemContent, SessionConfig]:
    """What is public of the items, and how all clients of a task train.

    Raises:
        DataError: the data set has no attributes.
    """
    from secagg_recommender.session_silo import SessionConfig

    content = item_content(dataset.attributes, dataset.interactions.item_labels)
    return content, SessionConfig(dimensions=settings.dimensions, seed=settings.seed)


def prepare_session(
    settings: ClientSettings, folder: Path, *, rounds: int, optimiser: Optimiser = OPTIMISER
) -> tuple[Path, Path]:
    """Write ``task.toml`` and ``initial.npz`` into a folder.

    Returns:
        Both files.

    Raises:
        DataError: the data cannot be used, or has no attributes.
    """
    from secagg_recommender.session_silo import init_session

    dataset = read_dataset(settings.dataset, settings.data_dir)
    shared = init_session(*content_and_config(settings, dataset))
    text = _TASK.format(
        dataset=settings.dataset,
        folder=folder,
        task=settings.task,
        clients=settings.silos,
        rounds=rounds,
        optimiser=optimiser.name,
        rate=optimiser.rate,
        tau=optimiser.tau,
        clip=_CLIP,
    )
    text += "".join(
        _TENSOR.format(name=name, shape=list(tensor.shape)) for name, tensor in shared.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    task, model = folder / "task.toml", folder / "initial.npz"
    task.write_text(text, encoding="utf-8")
    np.savez(model, **shared)  # type: ignore[arg-type]  # names are ours
    return task, model


def session_model_of(tensors: Mapping[str, NDArray[Any]], dataset: Dataset) -> SessionModel:
    """Put a task's model and a catalogue together.

    Raises:
        DataError: tensors of another kind of model, or of another catalogue.
    """
    content = item_content(dataset.attributes, dataset.interactions.item_labels)
    return SessionModel.of(tensors, content)
