"""What a round asks of a device, and what the device has to say: the same for every kind of model.

A model that is trained sends an update and moves its private state along; one that is counted
sends integers once. Whoever takes part in a task (`secagg_client.participate`) knows neither: it
hands the round over as an `Assignment`, encrypts the arrays of the `Work` that comes back, and
keeps the private state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from secagg.parameters import Segment

__all__ = ["Assignment", "Learner", "Work"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A round, as far as a device's computation is concerned.

    Attributes:
        number: the round's, from 1. Attempts at a round have one number, and get the same work.
        model: float32 tensors to start from, by name; none in a task without a model.
        segments: what the upload consists of, by name.
        rounds: of the task.
        upload_bytes: of one upload.
    """

    number: int
    model: Mapping[str, npt.NDArray[np.float32]]
    segments: Mapping[str, Segment]
    rounds: int = 1
    upload_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Work:
    """What leaves a device, encrypted; its repr shows nothing.

    Attributes:
        arrays: by segment name: float32 tensors by name, or a vector of integers.
        samples: that weigh the update, where the plan has weights.
    """

    arrays: Mapping[str, Mapping[str, npt.NDArray[np.float32]] | npt.NDArray[Any]]
    samples: int = 1


class Learner(Protocol):
    """A device's part of a model."""

    def work(self, assignment: Assignment) -> Work | None:
        """What to contribute to a round; None to sit it out.

        A function of the assignment and the private state, bit for bit: it may be asked for again.

        Raises:
            DataError: the round asks for something that this kind of model does not have.
        """
        ...

    @property
    def items(self) -> npt.NDArray[np.integer]:
        """Items that somebody on the device has, ascending."""
        ...

    def state(self) -> bytes:
        """What the device has to remember from round to round; empty for nothing."""
        ...

    def restore(self, state: bytes) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            DataError: it is something else.
        """
        ...
