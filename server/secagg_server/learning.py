"""From what a round released to the next model, and to what the round tells of it.

Everything here follows from the release and from what is stored of the version before, which stays
as it is: after a crash it is done again, to the same bits. Nobody reads a version before the store
names it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secagg.failpoints import failpoint
from secagg.optimisers import OptimiserState
from secagg.release import Release
from secagg.wire.codec import model_from_bytes, model_to_bytes
from secagg_server.blobs import BlobStore
from secagg_server.tasks import TaskSpec

__all__ = ["figure", "following_clip", "move_model"]


def move_model(blobs: BlobStore, spec: TaskSpec, version: int, release: Release) -> float | None:
    """Store the model that follows a version, and what the optimiser remembers with it.

    Returns:
        Length of the step over that of the model; None from a model of zeros.

    Raises:
        ReleaseError: the mean cannot be used; nothing was stored.
    """
    mean = release.flat_mean()
    model = model_from_bytes(blobs.model(spec.task_id, version), mean.size)
    state = _remembered(blobs, spec, version, mean.size)
    moved, state = spec.optimiser.step(model, mean, state)
    if spec.optimiser.remembers:
        blobs.put_optimiser(spec.task_id, version + 1, spec.optimiser.state_to_bytes(state))
    failpoint("optimiser-stored")
    blobs.put_model(spec.task_id, version + 1, model_to_bytes(moved))
    failpoint("model-stored")
    return _relative_change(model, moved)


def _remembered(blobs: BlobStore, spec: TaskSpec, version: int, size: int) -> OptimiserState:
    if version == 0 or not spec.optimiser.remembers:
        return spec.optimiser.initial(size)
    return spec.optimiser.state_from_bytes(blobs.optimiser(spec.task_id, version), size)


def _relative_change(model: NDArray[np.float32], moved: NDArray[np.float32]) -> float | None:
    length = float(np.linalg.norm(model.astype(np.float64)))
    return float(np.linalg.norm(moved.astype(np.float64) - model)) / length if length else None


def figure(spec: TaskSpec, release: Release) -> float | None:
    """The share of hits by which a task may stop; None where the clients' counts are none."""
    if spec.stop is None or not spec.stop.figure:
        return None
    hits, users = release.total(spec.stop.figure).tolist()
    return hits / users if 0 <= hits <= users and users else None


def following_clip(spec: TaskSpec, clip: float | None, release: Release) -> float | None:
    """Clip norm of the rounds after one; None for the plan's in every round.

    Args:
        clip: the round's own, where that is another than the plan's.
    """
    if spec.adaptive_clip is None or spec.model is None:
        return None
    used = spec.model.clip if clip is None else clip
    return spec.adaptive_clip.following(used, release.clip_fraction(), spec.model.clip)
