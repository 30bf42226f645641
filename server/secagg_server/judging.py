"""Has the key holder judge sketches, and believes nothing but its signature on these very ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from secagg.context import RoundContext
from secagg.errors import MalformedError, QuorumError
from secagg.failpoints import failpoint
from secagg.receipts import Receipt
from secagg.sketches import Sketch
from secagg.upload import Admission
from secagg.verdicts import Verdict
from secagg_server.key_holder import KeyHolderStub, patiently

__all__ = ["check_quorum", "judge_norms"]

_T = TypeVar("_T")


def check_quorum(context: RoundContext, uploads: int) -> None:
    """Refuse to go on with fewer uploads than the plan's minimum.

    Raises:
        QuorumError: there are fewer.
    """
    if uploads < context.plan.min_clients:
        raise QuorumError(
            f"expected at least min_clients={context.plan.min_clients} accepted uploads at the "
            f"deadline; got {uploads}; a longer deadline or more clients would help"
        )


async def judge_norms(
    key_holder: KeyHolderStub,
    context: RoundContext,
    identity: bytes,
    admissions: Sequence[Admission],
    sketch: Callable[[Receipt], Sketch],
    at_once: int,
) -> list[Verdict]:
    """The verdicts on all uploads of an attempt.

    Args:
        identity: of the key holder that endorsed the attempt, 32 bytes.
        admissions: every upload that it has admitted.
        sketch: makes an upload's sketch; called in threads.
        at_once: uploads that are sketched at the same time.

    Raises:
        UnavailableError: the key holder cannot be reached, or the calculation not be done.
        MalformedError, UntrustedKeyError: its verdicts are not on these very sketches, or not its
            own.
        SecaggError: what else it answered.
    """
    asked: dict[Receipt, bytes] = {}

    async def ask(admission: Admission) -> None:
        receipt = admission.receipt
        made = await asyncio.to_thread(sketch, receipt)
        await patiently(lambda: key_holder.submit_sketch(context, made))
        asked[receipt] = made.digest
        failpoint("sketch-submitted")

    await _few_at_a_time(ask, admissions, at_once)
    verdicts = await patiently(lambda: key_holder.verdicts(context))
    await asyncio.to_thread(_require_answers, context, identity, asked, verdicts)
    return verdicts


def _require_answers(
    context: RoundContext, identity: bytes, asked: Mapping[Receipt, bytes], verdicts: list[Verdict]
) -> None:
    """Refuse verdicts unless they are on exactly what was asked, by whoever endorsed the round."""
    if sorted(v.receipt.upload_digest for v in verdicts) != sorted(
        receipt.upload_digest for receipt in asked
    ):
        raise MalformedError(
            "expected one verdict on each upload of the round; the key holder gave others; look at "
            "the key holder"
        )
    for verdict in verdicts:
        if asked.get(verdict.receipt) != verdict.sketch_digest:
            raise MalformedError(
                "expected verdicts on the sketches that were sent; one is on another; look at the "
                "key holder"
            )
        verdict.verify(context.id, [identity])


async def _few_at_a_time(
    work: Callable[[_T], Awaitable[None]], items: Iterable[_T], at_once: int
) -> None:
    """Do some work on each item; the first error ends all of it."""
    waiting = iter(items)

    async def lane() -> None:
        for item in waiting:
            await work(item)

    lanes = [asyncio.create_task(lane()) for _ in range(at_once)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for each in lanes:
            each.cancel()
        await asyncio.wait(lanes)
