"""The client's side of the norm check: was I asked what the server had committed to?

Once its verdict has been given, a client is shown the challenge key and recomputes the sketch. A
server that had something else judged is caught, with the key holder's signature for proof.
"""

from __future__ import annotations

from secagg.challenges import commitment
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.errors import ContextError, ForgedSketchError
from secagg.sketches import sketch
from secagg.upload import Upload
from secagg.verdicts import Verdict

__all__ = ["require_asked"]


def require_asked(
    verdict: Verdict,
    context: RoundContext,
    upload: Upload,
    key: bytes,
    direction: Direction | None = None,
) -> None:
    """Check that what was judged is the sketch that the server had committed to.

    Args:
        verdict: verified, see `Verdict.verify`.
        context: the attempt.
        upload: the client's own.
        key: the challenge key that the server shows now.
        direction: what the upload was compared with, by the models that everybody has.

    Raises:
        ContextError: the verdict is on another upload.
        ForgedSketchError: the key is not the one committed to, or gives another sketch.
    """
    receipt = upload.admission.receipt
    if verdict.receipt != receipt:
        raise ContextError("expected a verdict on the upload that was sent; it is on another")
    if commitment(key) != receipt.challenge_commitment:
        raise ForgedSketchError(
            "expected the challenge key that the server committed to; it shows another one; the "
            "server has something to hide: keep the verdict and report it"
        )
    residues = upload.validate(context)
    if sketch(context, receipt.upload_digest, [residues], key, direction).digest != (
        verdict.sketch_digest
    ):
        raise ForgedSketchError(
            "expected a verdict on the sketch that the challenge gives; the key holder signed one "
            "on something else that the server sent about this update; keep the verdict and "
            "report it"
        )
