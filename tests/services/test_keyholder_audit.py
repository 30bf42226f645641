"""The noise audit at the key holder: when it answers, what stands, and what it opens after."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cohort
import numpy as np
import pytest
from key_holders import LocalKeyHolder
from numpy.typing import NDArray

from secagg.context import RoundContext
from secagg.errors import ClosedError, InputError, ReleaseError, SealError
from secagg.noise_audit import dithered
from secagg.parameters import MODULUS
from secagg.residues import widen
from secagg.upload import Upload
from secagg_keyholder.rounds import Rounds

Lie = Callable[[RoundContext, int], Upload]


class Desk:
    """One open round at the key holder: uploads judged, nothing released."""

    def __init__(self, *liars: int, lie: Lie = cohort.off_grid) -> None:
        self.key_holder = LocalKeyHolder()
        self.context, _ = self.rounds.open(cohort.mixed_plan(), "task", 1, 1, bytes(32))
        self.liars = liars
        uploads = {i: cohort.encrypted(self.context, i) for i in range(6) if i not in liars}
        self.uploads = uploads | {index: lie(self.context, index) for index in liars}
        admissions = [upload.admission for upload in self.uploads.values()]
        assert self.rounds.judge(self.context.id, admissions) == [""] * 6

    @property
    def rounds(self) -> Rounds:
        return self.key_holder.rounds

    def name(self, index: int) -> bytes:
        return self.uploads[index].admission.receipt.upload_digest

    def residues(self, index: int) -> NDArray[np.uint64]:
        return widen(self.uploads[index].payload, self.context.plan.blocks)

    def low(self, index: int) -> NDArray[np.uint32]:
        return dithered(self.context.plan, self.residues(index))

    def release(self, indexes: Iterable[int]) -> int:
        names = [self.name(index) for index in indexes]
        total = sum((self.residues(i) for i in indexes), start=np.uint64(0)) % np.uint64(MODULUS)
        return self.rounds.release(self.context.id, names, total).contributors

    def audit(self, index: int) -> str:
        return self.rounds.audit(self.context.id, self.name(index), self.low(index))


def test_nothing_is_audited_before_a_sum_was_refused() -> None:
    desk = Desk(1)
    for _ in range(2):
        with pytest.raises(ClosedError, match="refused"):
            desk.audit(1)
        desk.key_holder.restart()
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    assert [desk.audit(index) for index in range(6)] == ["", "OFF_GRID", "", "", "", ""]


def test_nothing_is_audited_after_the_release() -> None:
    desk = Desk()
    assert desk.release(range(6)) == 6
    with pytest.raises(ClosedError):
        desk.audit(0)


def test_an_upload_that_was_not_admitted_is_not_audited() -> None:
    desk = Desk(1)
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    with pytest.raises(SealError):
        desk.rounds.audit(desk.context.id, bytes(32), desk.low(0))


@pytest.mark.parametrize("change", ["shape", "type"])
def test_what_are_no_low_bits_of_an_upload_is_not_audited(change: str) -> None:
    desk = Desk(1)
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    low = desk.low(1)
    wrong = low[:1] if change == "shape" else low.astype(np.uint64)
    with pytest.raises(InputError):
        desk.rounds.audit(desk.context.id, desk.name(1), wrong)
    assert desk.audit(1) == "OFF_GRID"


@pytest.mark.parametrize("restarts", [False, True])
def test_the_first_finding_on_an_upload_stands_whatever_is_sent_with_it(restarts: bool) -> None:
    desk = Desk(1)
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    assert [desk.audit(1), desk.audit(2)] == ["OFF_GRID", ""]
    if restarts:
        desk.key_holder.restart()
    clean, dirty = (desk.low(index) for index in (2, 1))
    assert desk.rounds.audit(desk.context.id, desk.name(1), clean) == "OFF_GRID"
    assert desk.rounds.audit(desk.context.id, desk.name(2), dirty) == ""


@pytest.mark.parametrize("restarts", [False, True])
def test_after_the_audit_only_uploads_that_passed_are_opened(restarts: bool) -> None:
    desk = Desk(1)
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    for index in (0, 1, 2, 3):
        desk.audit(index)
    if restarts:
        desk.key_holder.restart()
    for manifest in ([0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 3, 4, 5], range(6)):
        with pytest.raises(SealError, match="passed the audit"):
            desk.release(manifest)
    assert desk.release([0, 2, 3]) == 3


@pytest.mark.parametrize("restarts", [False, True])
def test_a_second_refusal_closes_the_round_for_good(restarts: bool) -> None:
    desk = Desk(1, 4)
    for manifest in (range(6), range(5)):
        with pytest.raises(ReleaseError):
            desk.release(manifest)
        if restarts:
            desk.key_holder.restart()
    for again in (lambda: desk.release([0, 2, 3]), lambda: desk.audit(1)):
        with pytest.raises(ClosedError):
            again()


def test_a_sum_that_stays_shut_after_the_audit_is_the_last_one() -> None:
    desk = Desk(4, lie=cohort.out_of_range)
    with pytest.raises(ReleaseError):
        desk.release(range(6))
    assert {desk.audit(index) for index in range(6)} == {""}
    with pytest.raises(ReleaseError):
        desk.release(range(5))
    with pytest.raises(ClosedError):
        desk.release([0, 1, 2])
