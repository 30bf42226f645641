"""One task's encrypted rounds as a strategy goes through them: open, offer, collect, conclude."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from numpy.typing import ArrayLike

from secagg.errors import ClosedError, ReleaseError, SecaggError
from secagg.flower.envelopes import ciphertext_of, reason_of
from secagg.parameters import Plan
from secagg.release import Release
from secagg_server.embedded import EmbeddedRound, EmbeddedServer

__all__ = ["NO_REPLY", "Outcome", "TaskRounds"]

NO_REPLY = "NO_REPLY"
"""Counts nodes that were asked and did not answer in time."""


@dataclass(frozen=True)
class Outcome:
    """What came of a round.

    Attributes:
        found: the opened sum, or why there is none.
        refused: nodes that were asked and are not in the sum, by reason.
        round: it, over; gives notices.
        senders: nodes whose upload was taken.
        strangers: nodes whose upload was not, because of what it is.
    """

    found: Release | SecaggError
    refused: Mapping[str, int]
    round: EmbeddedRound = field(repr=False)
    senders: tuple[int, ...] = field(repr=False)
    strangers: tuple[int, ...] = field(repr=False)

    def opened(self) -> Release:
        """The opened sum.

        Raises:
            SecaggError: why there is none.
        """
        if isinstance(self.found, SecaggError):
            raise self.found
        return self.found


class TaskRounds:
    """Rounds of one task at the key holder, one at a time.

    A round that failed before its sum was handed over is tried again as another attempt of the
    same number: with privacy, a number that is passed over counts as spent.

    Args:
        task_id: one that the key holder has not seen.
    """

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self._number, self._attempt = 1, 1
        self._round: EmbeddedRound | None = None
        self._asked = 0
        self._refused: Counter[str] = Counter()

    def open(
        self, server: EmbeddedServer, plan: Plan, model: Mapping[str, ArrayLike] | None
    ) -> EmbeddedRound:
        """The next attempt.

        Raises:
            SecaggError: see `EmbeddedServer.open`.
        """
        self.abandon()
        try:
            opened = self._open(server, plan, model)
        except ClosedError:
            if model is not None:
                raise  # attempts are used up on this model, whatever the number
            self._next_number()
            opened = self._open(server, plan, model)
        self._round = opened
        return opened

    def _open(
        self, server: EmbeddedServer, plan: Plan, model: Mapping[str, ArrayLike] | None
    ) -> EmbeddedRound:
        return server.open(
            plan,
            task_id=self.task_id,
            round_number=self._number,
            attempt=self._attempt,
            model=model,
        )

    @property
    def begun(self) -> bool:
        """Whether a number has been gone through: a sum was handed over, or attempts used up."""
        return self._number > 1

    def asked(self, nodes: int, refused: Mapping[str, int]) -> None:
        """Note how many nodes have an offer, and who has none, by reason."""
        self._asked, self._refused = nodes, Counter(refused)

    def conclude(self, replies: Iterable[Message]) -> Outcome | None:
        """Take the replies and have their sum opened; None where no round is open."""
        if (current := self._round) is None:
            return None
        self._round = None
        senders, strangers = [], []
        unanswered = self._asked
        for reply in replies:
            unanswered -= 1
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._refused[reason_of(reply)] += 1
                continue
            try:
                current.add(ciphertext_of(reply))
                senders.append(node)
            except SecaggError as error:
                self._refused[error.reason] += 1
                strangers.append(node)
        if unanswered > 0:
            self._refused[NO_REPLY] += unanswered
        found = self._release(current)
        return Outcome(found, dict(self._refused), current, tuple(senders), tuple(strangers))

    def _release(self, current: EmbeddedRound) -> Release | SecaggError:
        try:
            release = current.conclude().release
        except ReleaseError as error:
            # The key holder may have seen the sum: never a second one of this number.
            self._next_number()
            return error
        except SecaggError as error:
            self._attempt += 1
            return error
        finally:
            self._refused.update(current.refused.values())
        self._next_number()
        return release

    def _next_number(self) -> None:
        self._number, self._attempt = self._number + 1, 1

    def abandon(self) -> None:
        """Give up the round that is open, if one is."""
        if self._round is not None:
            self._round.abandon()
            self._round = None
            self._attempt += 1
