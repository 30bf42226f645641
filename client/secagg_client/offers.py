"""A server's offer of a round, and what a client checks before it believes any of it."""

from __future__ import annotations

from collections.abc import Collection

from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.errors import ContextError
from secagg.receipts import NO_COMMITMENT
from secagg.transcript import DIGEST_BYTES
from secagg.wire.codec import round_context_from_wire
from secagg.wire.v1 import aggregation_service_pb2 as pb

__all__ = ["commitment_of", "offered_round"]


def offered_round(
    answer: pb.GetRoundResponse,
    task_id: str,
    *,
    after: tuple[int, int],
    newest: tuple[int, int],
    pins: Collection[bytes] | None,
) -> RoundContext:
    """The round of an offer, if it is a later one, of this task, and endorsed.

    Args:
        after: round and attempt that it must be later than.
        newest: round and attempt that it must not be earlier than.
        pins: key holders that are trusted; None believes anybody, in plaintext.

    Raises:
        MalformedError, PlanError: no such round can be.
        ContextError: an earlier round, or one of another task.
        UntrustedKeyError: not endorsed by a pinned key holder.
    """
    context = round_context_from_wire(answer.context, answer.plan, answer.round_key)
    number = (context.id.round_number, context.id.attempt)
    if context.id.task_id != task_id or number <= after or number < newest:
        raise ContextError(
            "expected a later round of the task joined; got another one: this server "
            "repeats itself, goes back, or mixes tasks up"
        )
    if pins is not None:
        signed = Endorsement(answer.key_holder_identity, answer.round_key_signature)
        signed.verify(context.id, pins)
    return context


def commitment_of(context: RoundContext, answer: pb.GetRoundResponse) -> bytes:
    """The server's commitment to its challenge, exactly where the plan has a norm check.

    Raises:
        ContextError: there is none, or one that the plan does not ask for.
    """
    given = answer.challenge_commitment
    if context.plan.norm_check is None:
        if given:
            raise ContextError(
                "expected no challenge commitment in a round without a norm check; got one; "
                "contribute nothing: server and plan do not agree"
            )
        return NO_COMMITMENT
    if len(given) != DIGEST_BYTES or given == NO_COMMITMENT:
        raise ContextError(
            f"expected a challenge commitment of {DIGEST_BYTES} bytes, not all zero, as the plan "
            f"has a norm check; got bytes={len(given)}; contribute nothing: this server could "
            "choose what it asks about an update after it has seen it"
        )
    return given
