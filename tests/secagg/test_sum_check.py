"""A sum's noise is looked at before the sum: honest ones pass, any other one is refused."""

from __future__ import annotations

from collections.abc import Callable

import cohort
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secagg.errors import (
    ClosedError,
    DuplicateError,
    InputError,
    QuorumError,
    ReleaseError,
    SealError,
)
from secagg.keyholder import KeyHolder
from secagg.noise_audit import dithered
from secagg.parameters import MODULUS, Plan
from secagg.residues import ResidueSum, widen
from secagg.sampling import Stream, uniform_polynomials
from secagg.upload import Upload

Plans = Callable[[], Plan]


class Round:
    """A key holder that has admitted some clients, and their uploads."""

    def __init__(self, plan: Plan, clients: int) -> None:
        self.plan = plan
        self.holder = KeyHolder(plan)
        self.uploads = [cohort.encrypted(self.holder.context, index) for index in range(clients)]
        for upload in self.uploads:
            self.holder.admit(upload.admission)

    def names(self, uploads: list[Upload]) -> list[bytes]:
        return [upload.admission.receipt.upload_digest for upload in uploads]

    def sum(self, uploads: list[Upload]) -> NDArray[np.uint64]:
        total = ResidueSum(self.plan.blocks)
        for upload in uploads:
            total.add(widen(upload.payload, self.plan.blocks))
        return total.value()

    def check(self, named: list[Upload], residues: NDArray[np.uint64], dither: int = 0) -> None:
        low = dithered(self.plan, residues, Stream.derive("test dither", dither))
        self.holder.check(self.names(named), low)


@pytest.fixture
def four() -> Round:
    return Round(cohort.mixed_plan(), 4)


@pytest.mark.parametrize("plan", [cohort.mixed_plan, cohort.counts_plan, cohort.long_plan])
@pytest.mark.parametrize("clients", [3, 6])
def test_an_honest_sum_passes_under_any_dither(plan: Plans, clients: int) -> None:
    made = Round(plan(), clients)
    for dither in range(5):
        made.check(made.uploads, made.sum(made.uploads), dither)
    assert made.holder.refusals == 0
    release = made.holder.release_admitted(made.names(made.uploads), made.sum(made.uploads))
    assert release.contributors == clients


@pytest.mark.parametrize(
    "summed",
    [
        pytest.param(lambda u: u[1:], id="one is missing"),
        pytest.param(lambda u: [*u, u[0]], id="one is twice"),
        pytest.param(lambda u: u[:1], id="one alone"),
        pytest.param(lambda u: [], id="nothing"),
    ],
)
def test_a_sum_of_others_than_the_manifest_names_is_refused(
    four: Round, summed: Callable[[list[Upload]], list[Upload]]
) -> None:
    with pytest.raises(ReleaseError, match="noise"):
        four.check(four.uploads, four.sum(summed(four.uploads)))
    assert four.holder.refusals == 1


@settings(max_examples=20, deadline=None)
@given(block=st.integers(0, 1), position=st.integers(0, 4095), step=st.integers(1, MODULUS - 1))
def test_one_changed_residue_is_refused(block: int, position: int, step: int) -> None:
    made = Round(cohort.mixed_plan(), 3)
    residues = made.sum(made.uploads)
    residues[block, position] = (int(residues[block, position]) + step) % MODULUS
    with pytest.raises(ReleaseError):
        made.check(made.uploads, residues)


def test_somebody_off_the_grid_is_seen_in_the_sum() -> None:
    made = Round(cohort.mixed_plan(), 3)
    made.uploads.append(cohort.off_grid(made.holder.context, 4))
    made.holder.admit(made.uploads[-1].admission)
    with pytest.raises(ReleaseError):
        made.check(made.uploads, made.sum(made.uploads))
    honest = made.uploads[:3]
    made.check(honest, made.sum(honest))


def test_random_residues_are_refused(four: Round) -> None:
    residues = uniform_polynomials(Stream(bytes(32)), four.plan.blocks)
    with pytest.raises(ReleaseError):
        four.check(four.uploads, residues)


def test_a_second_different_refusal_closes_the_round_and_the_same_one_does_not(four: Round) -> None:
    for _ in range(3):
        with pytest.raises(ReleaseError):
            four.check(four.uploads, four.sum(four.uploads[1:]))
    assert four.holder.refusals == 1
    with pytest.raises(ReleaseError):
        four.check(four.uploads, four.sum(four.uploads[2:]))
    with pytest.raises(ClosedError):
        four.check(four.uploads, four.sum(four.uploads))


def test_the_manifest_is_held_to_the_rules_of_a_release(four: Round) -> None:
    good = four.sum(four.uploads)
    with pytest.raises(QuorumError):
        four.check(four.uploads[:2], good)
    with pytest.raises(DuplicateError):
        four.check([*four.uploads, four.uploads[0]], good)
    stranger = cohort.encrypted(four.holder.context, 5)
    with pytest.raises(SealError):
        four.check([*four.uploads, stranger], good)
    assert four.holder.refusals == 0


def test_low_bits_of_another_shape_or_type_are_refused_and_count_for_nothing(four: Round) -> None:
    names = four.names(four.uploads)
    for low in (np.zeros((1, 4096), np.uint32), np.zeros((four.plan.blocks, 4096), np.uint64)):
        with pytest.raises(InputError):
            four.holder.check(names, low)  # type: ignore[arg-type]
    assert four.holder.refusals == 0


def test_there_is_nothing_to_say_about_a_round_that_is_released(four: Round) -> None:
    names, residues = four.names(four.uploads), four.sum(four.uploads)
    released = four.holder.release_admitted(names, residues)
    four.check(four.uploads[1:], four.sum(four.uploads[2:]))
    assert four.holder.release_admitted(names, residues) is released
