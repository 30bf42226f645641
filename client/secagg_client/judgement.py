"""What the key holder found of this client's upload, and whether it was asked what it should be.

Nothing is believed: the verdict has the key holder's signature, and the sketch that it is about is
computed again from the upload that was kept, with the challenge that the receipt commits to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from secagg.challenges import CHALLENGE_KEY_BYTES
from secagg.context import ContextId, RoundContext
from secagg.direction import Direction
from secagg.errors import ContextError, ForgedSketchError, MalformedError
from secagg.parameters import FloatSegment
from secagg.recheck import require_asked
from secagg.sketch_shape import direction_shape
from secagg.wire.codec import exact, model_digest, model_from_bytes, verdict_from_wire
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg_client.outbox import Kept

__all__ = ["Judgement", "judged"]

ModelSource = Callable[[FloatSegment, int], bytes]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of one contribution in the norm check, checked.

    Attributes:
        context: the attempt that it was made for.
        accepted: whether it may be in the sum. A refused one is not; the round went on without it.
    """

    context: ContextId
    accepted: bool


def judged(
    answer: pb.GetVerdictResponse, kept: Kept, pins: Collection[bytes], model: ModelSource
) -> Judgement:
    """Check an answer about an upload; 35 ms per million parameters.

    Args:
        answer: the server's.
        kept: the upload that was sent.
        pins: key holders that are trusted, 32 bytes each.
        model: the bytes of a model version, for the direction check.

    Raises:
        MalformedError: no verdict, or a field of the wrong size.
        ContextError: on another upload, or for another attempt; or the direction is not that of
            the round's model.
        UntrustedKeyError: not signed by a key holder that is pinned.
        ForgedSketchError: on something that the server had not committed to.
    """
    verdict = verdict_from_wire(answer.verdict)
    key = exact("challenge_key", answer.challenge_key, CHALLENGE_KEY_BYTES)
    verdict.verify(kept.context.id, pins)
    direction = _direction(kept.context, answer, model) if answer.direction else None
    require_asked(verdict, kept.context, kept.upload, key, direction)
    return Judgement(kept.context.id, verdict.accepted)


def _direction(
    context: RoundContext, answer: pb.GetVerdictResponse, model: ModelSource
) -> Direction | None:
    """What the update was compared with, by the models that everybody has."""
    shape = direction_shape(context.plan)
    segment = context.plan.segments[shape.segment] if shape else None
    if not isinstance(segment, FloatSegment):
        raise ForgedSketchError(
            "expected no direction in a round whose plan has no min_cosine; the server says that "
            "it had this update compared with one; keep the verdict and report it"
        )
    if answer.model_version < 1:
        raise MalformedError("expected a direction from a model version of 1 or more; got 0")
    before = model(segment, answer.model_version - 1)
    after = model(segment, answer.model_version)
    if model_digest(after) != context.id.model_digest:
        raise ContextError("expected a direction up to the model that the round names; it differs")
    size = segment.parameters
    change = model_from_bytes(after, size) - model_from_bytes(before, size)
    return Direction.of(segment, change, context.rotation)
