"""A silo that trains, as a `Learner`: its updates, its figure, and what it may spend.

The figure is what a task may stop by: of how many users one more held-out item, which is neither
trained on nor tested by, is among the ten that the shared model would recommend them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from secagg.parameters import FloatSegment
from secagg.private_files import write
from secagg_recommender.devices import Budget, Workload, seconds_per_step
from secagg_recommender.evaluation import CUTOFF
from secagg_recommender.factorisation import LocalUpdate, Silo
from secagg_recommender.interactions import NO_TEST_ITEM, DataError, Split
from secagg_recommender.learner import Assignment, Work

__all__ = ["UPDATE", "VALIDATION", "Trained", "WithinBudget", "hold_out"]

UPDATE: Final = "update"
"""Name of the segment of floats."""

VALIDATION: Final = "validation"
"""Name of the segment of two integers: hits, and the users that were asked about."""


class WithinBudget:
    """A weak device's part: which rounds, and how many steps of each.

    Args:
        budget: what the device may spend.
        seed: of the task; with the silo's index it says which rounds those are.
        file: keeps what was worked out in the first round, so that a restart changes nothing.
    """

    def __init__(self, budget: Budget, seed: int, file: Path) -> None:
        self._budget, self._seed, self._file = budget, seed, file
        self._workload: Workload | None = None

    def workload(self, silo: Silo, assignment: Assignment) -> Workload:
        """What the device does of a task, worked out once.

        Raises:
            DataError: the budget is too small, or the file is damaged.
        """
        if self._workload is None:
            self._workload = self._kept() or self._worked_out(silo, assignment)
        return self._workload

    def _worked_out(self, silo: Silo, assignment: Assignment) -> Workload:
        found = self._budget.workload(
            full_steps=silo.full_steps,
            step_s=seconds_per_step(silo, assignment.model),
            rounds=assignment.rounds,
            round_bytes=assignment.upload_bytes,
            seed=self._seed,
            device=silo.index,
        )
        write(self._file, json.dumps(asdict(found)).encode())
        return found

    def _kept(self) -> Workload | None:
        try:
            return Workload(**json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(
                f"expected a workload in {self._file}, got {type(error).__name__}; remove the file "
                "to have it worked out anew"
            ) from None


class Trained:
    """A silo's part of a model that is trained.

    Args:
        silo: trains; on the users' items without the held-out ones, where there are any.
        held_out: see `hold_out`; None where no figure is asked for.
        within: what the device may spend; None for all that it takes.
    """

    def __init__(
        self, silo: Silo, held_out: Split | None = None, within: WithinBudget | None = None
    ) -> None:
        self._silo, self._held_out, self._within = silo, held_out, within

    def work(self, assignment: Assignment) -> Work | None:
        """An update, and the figure of the model that it starts from, where that is asked for.

        None in a round that the budget has no room for.

        Raises:
            DataError: tensors do not fit, training diverged, a budget that equal weights cannot
                make up for, or a segment that is neither.
        """
        segment = assignment.segments.get(UPDATE)
        if not isinstance(segment, FloatSegment):
            raise DataError(
                f"expected a round with a segment of floats {UPDATE!r} to train for, got "
                f"{sorted(assignment.segments)}; join with the kind of model that the task is for"
            )
        if self._within is None:
            figure = self._figure(assignment)
            trained = self._silo.train(assignment.model, assignment.number)
            return Work({UPDATE: trained.update, **figure}, trained.samples)
        workload = self._within.workload(self._silo, assignment)
        if not workload.takes_part(assignment.number):
            return None
        figure = self._figure(assignment)
        trained = self._silo.train(assignment.model, assignment.number, steps=workload.steps)
        return Work({UPDATE: trained.update, **figure}, _weight(segment, workload, trained))

    @property
    def items(self) -> npt.NDArray[np.int64]:
        """Items that some user of the silo trains on, ascending."""
        return self._silo.items

    def state(self) -> bytes:
        """The private user vectors."""
        return self._silo.state()

    def restore(self, state: bytes) -> None:
        """Take back what :meth:`state` returned.

        Raises:
            DataError: see the silo's own.
        """
        self._silo.restore(state)

    def _figure(self, assignment: Assignment) -> dict[str, npt.NDArray[Any]]:
        if VALIDATION not in assignment.segments:
            return {}
        if self._held_out is None:
            return {VALIDATION: np.zeros(2, dtype=np.int64)}
        return {VALIDATION: _hits(self._silo, self._held_out, assignment)}


def hold_out(split: Split) -> Split:
    """A split whose test items are each user's last training items, which are no longer trained on.

    Users with a single training item keep it.
    """
    users, items = split.train_users, split.train_items
    counts = np.bincount(users, minlength=split.n_users)
    held = np.append(users[1:] != users[:-1], True) & (counts[users] >= 2)
    item = np.full(split.n_users, NO_TEST_ITEM, dtype=np.int32)
    item[users[held]] = items[held]
    return Split(users[~held], items[~held], item, split.n_users, split.n_items)


def _hits(silo: Silo, held_out: Split, assignment: Assignment) -> npt.NDArray[np.int64]:
    """Users whose held-out item is among the best, and users that have one: int64 ``(2,)``.

    Of all items that a user does not train on; of equal scores, others come first.
    """
    wanted = held_out.test_item[silo.users]
    asked = np.flatnonzero(wanted != NO_TEST_ITEM)
    scores = silo.score(assignment.model)
    own = scores[asked, wanted[asked]]
    for row, user in enumerate(silo.users):
        scores[row, held_out.items_of(int(user))] = -np.inf
    ahead = np.count_nonzero(scores[asked] >= own[:, None], axis=1) - 1
    return np.array([np.count_nonzero(ahead < CUTOFF), asked.size], dtype=np.int64)


def _weight(segment: FloatSegment, workload: Workload, trained: LocalUpdate) -> int:
    """Samples to report, more for a device that does less, so that the sum does not lean."""
    if segment.weighted:
        return workload.weight(trained.samples, segment.weight_cap)
    if workload.correction != 1.0:
        raise DataError(
            "expected a task that weighs updates by samples, which a device with a budget needs "
            f"to count for all it has left out, got equal weights and a correction of "
            f"{workload.correction:.3g}; raise the budget, or stay out of the task"
        )
    return trained.samples
