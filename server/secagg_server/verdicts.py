"""What a client is told of its own upload: the key holder's verdict, and the key to check it by.

The challenge key is shown once the verdict is recorded, and never before: whoever knew it while
uploads are made could make one that the question overlooks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from secagg.challenges import challenge_key
from secagg.context import ContextId
from secagg.enrolment import Roster
from secagg.errors import ClosedError, ConfigurationError, NotReadyError
from secagg.verdicts import Verdict
from secagg_server.intake import client_of_caller
from secagg_server.norms import compares
from secagg_server.states import RoundState
from secagg_server.store import Store

__all__ = ["Shown", "VerdictDesk"]

_BEFORE = (RoundState.CREATED, RoundState.COLLECTING, RoundState.CHECKING)


@dataclass(frozen=True, slots=True)
class Shown:
    """A verdict, and what its sketch was made of.

    Attributes:
        verdict: as the key holder signed it.
        challenge_key: 32 bytes, of which the client's receipt holds the commitment.
        direction: whether the upload was compared with the newest step of the model.
        model_version: what the round started from.
    """

    verdict: Verdict
    challenge_key: bytes = field(repr=False)
    direction: bool
    model_version: int


class VerdictDesk:
    """Hands verdicts out to those whom they are about.

    Args:
        secret: what the challenges of the rounds follow from; see `NormJudge`.
    """

    def __init__(self, store: Store, roster: Roster, secret: bytes) -> None:
        self._store = store
        self._roster = roster
        self._secret = secret

    def show(self, context: ContextId, client_key: bytes, caller: str | None = None) -> Shown:
        """The verdict on a client's upload to an attempt.

        Args:
            caller: see `Intake`.

        Raises:
            NotEnrolledError, RevokedError, MismatchError: not the caller's own signing key.
            ConfigurationError: no such task, or its plan has no norm check.
            NotReadyError: the verdicts have not been given yet.
            ClosedError: there will be none on an upload of this client, or it has been forgotten.
            ContextError: the upload was made for something else.
        """
        client = client_of_caller(self._roster, caller, client_key)
        plan = self._store.task(context.task_id).task_spec().plan
        if plan.norm_check is None:
            raise ConfigurationError(
                "expected a task whose plan has a norm check; this one has none, and no verdicts"
            )
        found = self._store.verdict(context, client)
        if found is None:
            raise ClosedError("expected an upload of this client to this attempt; there is none")
        state, verdict = found
        if verdict is None and state in _BEFORE:
            raise NotReadyError("expected a verdict; the round is not that far; ask again")
        if verdict is None:
            raise ClosedError(
                "expected a verdict; the attempt ended without one on this upload, or it has been "
                "forgotten"
            )
        receipt = verdict.receipt
        context.require(receipt.context)
        version = self._store.started_from(context)
        # The receipt's own key: the client may have got another one since.
        key = challenge_key(self._secret, receipt.context.digest, receipt.client_key)
        return Shown(verdict, key, compares(plan, version), version)
