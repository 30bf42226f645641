"""When a task has learned what it will: criteria on what the server is allowed to see.

That is what was released: the model and its changes, and a figure that clients contribute to as two
encrypted integers, such as how many of how many users would have been recommended what they chose
next. What comes of it is computed from the record of the rounds alone, so that a restart changes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secagg.errors import ConfigurationError
from secagg.wire.v1 import operator_service_pb2 as pb

__all__ = ["Outcome", "Stop"]

MAX_PATIENCE = 1_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished round tells.

    Attributes:
        round_number: which.
        figure: of the model that the round started from, 0 to 1; None where nobody could tell.
        change: length of the model's step over the length of the model; None without a model, or
            from a model of zeros.
    """

    round_number: int
    figure: float | None = None
    change: float | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Criteria, of which one suffices; each has to be met in so many rounds on end.

    Attributes:
        patience: 1 or more rounds.
        least_change: a relative change of the model below this is none; 0 for no such criterion.
        figure: name of the segment of integers [hits, users], whose quotient shall rise; empty for
            no such criterion.
        least_gain: a figure that is not above the best one by this much has not risen.
    """

    patience: int
    least_change: float = 0.0
    figure: str = ""
    least_gain: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.patience <= MAX_PATIENCE:
            raise ConfigurationError(
                f"expected a patience of 1 to {MAX_PATIENCE} rounds; got patience={self.patience}"
            )
        if not (0.0 <= self.least_change < 1.0 and 0.0 <= self.least_gain < 1.0):
            raise ConfigurationError(
                "expected least_change and least_gain from 0, below 1; got "
                f"least_change={self.least_change}, least_gain={self.least_gain}"
            )
        if not (self.least_change or self.figure):
            raise ConfigurationError(
                "expected something to stop by: least_change, or a figure; got neither; give one, "
                "or leave the stop criteria out"
            )
        if self.least_gain and not self.figure:
            raise ConfigurationError(
                f"expected a figure, whose least gain is {self.least_gain}; got none; name the "
                "segment of hits and users, or leave least_gain out"
            )

    @property
    def described(self) -> str:
        """When it is, in words."""
        criteria = []
        if self.least_change:
            criteria.append(f"the model has changed by less than {self.least_change:g}")
        if self.figure:
            gain = f" by {self.least_gain:g}" if self.least_gain else ""
            criteria.append(f"{self.figure} has not risen{gain}")
        return f"when {' or '.join(criteria)} in {self.patience} rounds"

    def reason(self, outcomes: Sequence[Outcome]) -> str:
        """Why no other round is needed; empty if one is.

        Args:
            outcomes: of the rounds that are done, in order.
        """
        return self._settled(outcomes) or self._levelled(outcomes)

    def _settled(self, outcomes: Sequence[Outcome]) -> str:
        last = [outcome.change for outcome in outcomes[-self.patience :]]
        if len(last) < self.patience:
            return ""
        if not all(change is not None and change < self.least_change for change in last):
            return ""
        return f"the model changed by less than {self.least_change:g} in {self.patience} rounds"

    def _levelled(self, outcomes: Sequence[Outcome]) -> str:
        if not self.figure:
            return ""
        best, best_round, waited = -1.0, 0, 0
        for outcome in outcomes:
            if outcome.figure is None:
                continue
            if outcome.figure > best and outcome.figure - best >= self.least_gain:
                best, best_round, waited = outcome.figure, outcome.round_number, 0
            else:
                waited += 1
        if waited < self.patience:
            return ""
        return (
            f"{self.figure} did not rise in {waited} rounds above {best:.4f}, that of the model "
            f"that round {best_round} started from"
        )

    def to_wire(self) -> pb.Stop:
        """The criteria as a message."""
        return pb.Stop(
            patience=self.patience,
            least_change=self.least_change,
            figure=self.figure,
            least_gain=self.least_gain,
        )

    @classmethod
    def from_wire(cls, message: pb.Stop) -> Stop:
        """The criteria from a message.

        Raises:
            ConfigurationError: a field out of its range.
        """
        return cls(message.patience, message.least_change, message.figure, message.least_gain)
