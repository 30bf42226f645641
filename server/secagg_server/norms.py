"""The norm check as the server runs it: sketches go out to the key holder, signed verdicts come in.

Between the judgement of receipts and seals and the manifest. Whatever is summed has been judged: a
key holder that is away delays an attempt or ends it, and nobody is let through unseen. Sketches
are the same whenever they are computed, so that after a restart all of it is simply done again;
once the verdicts are recorded, they stand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.errors import NormError
from secagg.failpoints import failpoint
from secagg.parameters import Plan
from secagg.receipts import Receipt
from secagg.sketches import Sketch
from secagg.upload import Admission
from secagg.wire.codec import model_from_bytes
from secagg_server.blobs import BlobStore
from secagg_server.ciphertexts import Ciphertexts
from secagg_server.judging import judge_norms
from secagg_server.key_holder import KeyHolderStub
from secagg_server.store import RoundRow, Store
from secagg_server.tasks import TaskSpec

__all__ = ["NormJudge", "compares"]

_REFUSED = (
    f"{NormError.reason}: the encrypted check found an update beyond what the plan allows; it is "
    "left out of the sum"
)
_LOG = structlog.get_logger(__name__)


def compares(plan: Plan, model_version: int) -> bool:
    """Whether uploads that start from a model version are compared with the step before it."""
    check = plan.norm_check
    return check is not None and check.min_cosine is not None and model_version > 0


class NormJudge:
    """Has the uploads of an attempt judged by what the key holder can see of their norm.

    Args:
        secret: 32 bytes that outlive the process; all challenges follow from it.
        at_once: uploads that are sketched at the same time.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        ciphertexts: Ciphertexts,
        key_holder: KeyHolderStub,
        secret: bytes,
        at_once: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._ciphertexts = ciphertexts
        self._key_holder = key_holder
        self._secret = secret
        self._at_once = at_once

    def challenger(self, spec: TaskSpec, context: RoundContext) -> Challenger | None:
        """What the uploads of an open attempt will be asked; None without a norm check."""
        if context.plan.norm_check is None:
            return None
        return Challenger(context, self._secret, self._direction(spec, context))

    def _direction(self, spec: TaskSpec, context: RoundContext) -> Direction | None:
        version = self._store.task(spec.task_id).model_version
        if spec.model is None or not compares(context.plan, version):
            return None
        new, old = (
            model_from_bytes(self._blobs.model(spec.task_id, each), spec.model.parameters)
            for each in (version, version - 1)
        )
        # The direction does not depend on the clip norm, in which the round's plan may differ.
        return Direction.of(spec.model, new - old, context.rotation)

    async def accepted(
        self, spec: TaskSpec, row: RoundRow, context: RoundContext, admissions: Sequence[Admission]
    ) -> list[Admission]:
        """Those of an attempt's uploads that pass; the others are refused, for good.

        Args:
            admissions: every upload that the key holder has admitted.

        Raises:
            UnavailableError: the key holder cannot be reached, or the calculation not be done.
            MalformedError, UntrustedKeyError: its verdicts are not on these very sketches, or not
                its own; none is recorded.
            SecaggError: what else it answered.
        """
        if await asyncio.to_thread(self._store.norms_judged, row.key):
            return list(admissions)  # before a restart; the refused ones are not among them
        challenger = await asyncio.to_thread(self.challenger, spec, context)
        if challenger is None:
            return list(admissions)
        seconds: list[float] = []

        def sketch(receipt: Receipt) -> Sketch:
            started = time.perf_counter()
            made = self._ciphertexts.sketch(challenger, context.plan, receipt)
            seconds.append(time.perf_counter() - started)
            return made

        verdicts = await judge_norms(
            self._key_holder, context, row.round_key_identity, admissions, sketch, self._at_once
        )
        await asyncio.to_thread(self._store.record_verdicts, row.key, verdicts, _REFUSED)
        failpoint("verdicts-recorded")
        passed = {verdict.receipt for verdict in verdicts if verdict.accepted}
        _LOG.info(
            "norms_judged",
            round=row.round_number,
            attempt=row.attempt,
            accepted=len(passed),
            refused=len(verdicts) - len(passed),
            sketch_s=round(sum(seconds), 3),
        )
        return [admission for admission in admissions if admission.receipt in passed]
