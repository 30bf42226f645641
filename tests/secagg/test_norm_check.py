"""Who passes the norm check and who does not, and the key holder that lets only the former in.

Plaintexts of chosen form are sketched under the zero key, where a ciphertext is its plaintext: the
same code, the same integers, no cipher. Whole rounds are further below.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import cohort
import numpy as np
import pytest
from numpy.typing import NDArray

from secagg import ring
from secagg.aggregator import Aggregator
from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.encryptor import Encryptor, encrypt_quantized
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    DuplicateError,
    NormError,
    ReceiptError,
    SealError,
)
from secagg.keyholder import Finding, KeyHolder
from secagg.norm_check import _digits, _energy, passes
from secagg.packing import pack
from secagg.parameters import MODULUS, FloatSegment, IntegerSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan, plan_integers, plan_tensors
from secagg.quantize import Quantized, quantize
from secagg.sampling import Stream, uniform_polynomials
from secagg.sketches import Sketch, sketch
from secagg.upload import Upload
from secagg.verdicts import Verdict

CHECK = NormCheck()
NO_KEY = np.zeros(4096, dtype=np.int64)

Values = NDArray[np.int64]


@functools.cache
def context_of(plan: Plan) -> RoundContext:
    return KeyHolder(plan).context


def judged(plan: Plan, coefficients: Values, number: int) -> Sketch:
    """The sketch of these plaintexts, int64 (blocks, 4096), under the zero key."""
    return sketched(plan, ring.to_ntt(coefficients), number)


def sketched(plan: Plan, residues: NDArray[np.uint64], number: int) -> Sketch:
    key = Stream.derive("test challenge", number).read(32)
    return sketch(context_of(plan), key[::-1], [residues], key)


def packed(plan: Plan, parts: Sequence[Values]) -> Values:
    return np.concatenate([pack(lay, p) for lay, p in zip(plan.layouts, parts, strict=True)])


def update(plan: Plan, number: int, norm: float = 1.0, samples: int = 1) -> list[Values]:
    """A dense update, integers past the quantiser; a norm beyond the clip is not clipped."""
    (segment,) = plan.segments
    assert isinstance(segment, FloatSegment)
    drawn = np.random.default_rng(number).standard_normal(segment.parameters)
    drawn *= segment.clip / np.linalg.norm(drawn)
    parts = quantize(
        plan,
        {segment.name: drawn},
        samples=samples,
        rotation=context_of(plan).rotation,
        randomness=Stream.derive("test rounding", number),
    )
    if norm == 1.0:
        return [part.values for part in parts]
    return [np.rint(norm * part.values).astype(np.int64) for part in parts]


ONE_BLOCK = plan_tensors(3000, max_clients=8, clip=1.0, norm_check=CHECK)
SOME_BLOCKS = plan_tensors(40_000, max_clients=8, clip=1.0, norm_check=CHECK)
COARSE = plan_tensors(3000, max_clients=8, clip=1.0, bits=2, norm_check=CHECK)
FINE = plan_tensors(3000, max_clients=8, clip=1.0, bits=16, norm_check=CHECK)
WEIGHTED = plan_tensors(
    3000, max_clients=8, clip=1.0, weighting="samples", weight_cap=10, norm_check=CHECK
)
VOTES = plan_integers(5000, max_clients=100, max_abs=1, max_norm=1, norm_check=CHECK)


# --- honest ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [ONE_BLOCK, SOME_BLOCKS, COARSE, FINE, WEIGHTED],
    ids=["one block", "some blocks", "2 bits", "16 bits", "weighted"],
)
def test_updates_at_the_clip_bound_are_never_refused(plan: Plan) -> None:
    # 5e-6 each at the most, by the law of chi-square with 256 degrees of freedom.
    for number in range(40):
        made = judged(plan, packed(plan, update(plan, number, samples=10)), number)
        assert passes(plan, NO_KEY, made)


def test_sparse_updates_at_the_clip_bound_are_never_refused() -> None:
    (segment,) = ONE_BLOCK.segments
    for number in range(40):
        spike = np.zeros(3000)
        spike[37 * number] = -1.0
        row = np.zeros((60, 50))
        row[number] = 1.0 / 50**0.5
        for vector in (spike, row.reshape(-1)):
            parts = quantize(
                ONE_BLOCK,
                {segment.name: vector},
                samples=1,
                rotation=context_of(ONE_BLOCK).rotation,
                randomness=Stream.derive("test rounding", number),
            )
            made = judged(ONE_BLOCK, packed(ONE_BLOCK, [parts[0].values]), number)
            assert passes(ONE_BLOCK, NO_KEY, made)


def test_one_vote_passes_and_two_votes_do_not() -> None:
    # Two have a norm of 1.41, and are refused nearly always: by 4.5 standard deviations.
    for number in range(30):
        for votes, allowed in ((0, True), (1, True), (2, False), (4, False)):
            values = np.zeros(5000, dtype=np.int64)
            values[number * 79 + np.arange(votes) * 5] = 1
            made = judged(VOTES, packed(VOTES, [values]), number)
            assert passes(VOTES, NO_KEY, made) == allowed


def test_the_estimate_is_that_of_the_squared_norm() -> None:
    # Of the bound's size: without a key there is no noise, but its mean is taken off.
    for plan, count in ((ONE_BLOCK, 3072), (SOME_BLOCKS, 40_960), (VOTES, 1)):
        layout = plan.layouts[0]
        size = max(1, round(layout.norm / count**0.5))
        estimates = []
        for number in range(80):
            values = np.zeros(layout.values, dtype=np.int64)
            drawn = np.random.default_rng(number)
            values[drawn.permutation(layout.values)[:count]] = size * drawn.choice([-1, 1], count)
            made = judged(plan, packed(plan, [values]), number)
            estimates.append(_energy(layout, made.norms[0], NO_KEY) / (count * size**2))
        # A standard deviation of 9 % at most, averaged over 80: six of those.
        assert abs(np.mean(estimates) - 1) < 6 * 0.09 / 80**0.5
        assert 0.03 < np.std(estimates) < 0.11


def test_an_update_of_zeros_passes() -> None:
    for plan in (ONE_BLOCK, VOTES):
        zeros = np.zeros((plan.blocks, 4096), dtype=np.uint64)
        assert passes(plan, NO_KEY, sketched(plan, zeros, 1))


# --- weights --------------------------------------------------------------------------------------


def weighted(update_share: float, weight: float, number: int) -> Values:
    """Integers of an update of this norm, in clip norms, with a weight of this size."""
    plan, layout = WEIGHTED, WEIGHTED.layouts[0]
    segment = plan.segments[0]
    assert isinstance(segment, FloatSegment)
    flat = Direction.of_weight(segment, context_of(plan).rotation).signs / layout.values**0.5
    other = np.random.default_rng(number).standard_normal(layout.values)
    other -= flat * (other @ flat)
    other *= update_share / np.linalg.norm(other)
    return np.rint((other + weight * flat) * segment.clip / segment.step).astype(np.int64)


@pytest.mark.parametrize("samples", [1, 2, 5, 10])
def test_honest_clients_of_any_weight_are_never_refused(samples: int) -> None:
    for number in range(25):
        parts = update(WEIGHTED, number, samples=samples)
        assert passes(WEIGHTED, NO_KEY, judged(WEIGHTED, packed(WEIGHTED, parts), number))


@pytest.mark.parametrize(
    ("update_share", "weight"),
    [
        (1.0, 0.0),  # an update without a weight: a vote that is not counted
        (1.0, 0.1),
        (1.0, -1.0),
        (0.3, -0.3),
        (0.0, -1.0),  # nothing but a weight to be taken off everybody's
        (0.0, -1.5),
        (0.0, 2.2),
        (1.6, 1.0),
    ],
)
def test_updates_that_their_weight_does_not_allow_are_refused(
    update_share: float, weight: float
) -> None:
    for number in range(12):
        values = weighted(update_share, weight, number)
        assert not passes(WEIGHTED, NO_KEY, judged(WEIGHTED, packed(WEIGHTED, [values]), number))


@pytest.mark.parametrize("weight", [0.05, 0.5, 1.0])
def test_updates_as_long_as_their_weight_allows_are_accepted(weight: float) -> None:
    for number in range(12):
        values = weighted(weight, weight, number)
        assert passes(WEIGHTED, NO_KEY, judged(WEIGHTED, packed(WEIGHTED, [values]), number))


# --- those that are too large ---------------------------------------------------------------------


@pytest.mark.parametrize("plan", [ONE_BLOCK, SOME_BLOCKS], ids=["one block", "some blocks"])
@pytest.mark.parametrize("norm", [1.5, 2.0, 10.0])
def test_dense_updates_beyond_the_bound_are_refused(plan: Plan, norm: float) -> None:
    for number in range(30):
        made = judged(plan, packed(plan, update(plan, number, norm)), number)
        assert not passes(plan, NO_KEY, made)


def test_the_threshold_is_the_margin_above_the_bound() -> None:
    """Half of the updates of (1 + margin) times the bound pass, whatever the margin."""
    for margin in (0.15, 1.0):
        plan = plan_tensors(3000, max_clients=8, clip=1.0, norm_check=replace(CHECK, margin=margin))
        shares = []
        for factor in (0.85, 1.0, 1.15):
            found = [
                passes(plan, NO_KEY, judged(plan, packed(plan, parts), number))
                for number in range(30)
                for parts in [update(plan, number, factor * (1 + margin))]
            ]
            shares.append(np.mean(found))
        # Three standard deviations of 4.4 % below and above.
        assert shares[0] > 0.9
        assert 0.15 < shares[1] < 0.85
        assert shares[2] < 0.1


def sinusoid(plan: Plan, norm: float, root: int, blocks: Sequence[int], digits: int = 1) -> Values:
    """All energy at one root, in phase in these blocks, and in so many digits."""
    layout = plan.layouts[0]
    wave = np.cos(np.pi * (2 * root + 1) * np.arange(4096) / 4096)
    wave *= norm * layout.norm / np.linalg.norm(wave) / (len(blocks) * digits) ** 0.5
    slots = np.zeros((layout.blocks, layout.digits, 4096), dtype=np.int64)
    for block in blocks:
        slots[block, :digits] = np.rint(wave)
    powers = layout.base ** np.arange(layout.digits)
    return np.einsum("bdk,d->bk", slots, powers) << layout.shift


@pytest.mark.parametrize("norm", [5.0, 10.0])
@pytest.mark.parametrize("root", [0, 1000])
def test_concentrated_spectra_of_five_times_the_bound_are_refused(norm: float, root: int) -> None:
    everywhere = range(SOME_BLOCKS.blocks)
    for number in range(15):
        for blocks in ([0], everywhere):
            made = judged(SOME_BLOCKS, sinusoid(SOME_BLOCKS, norm, root, blocks), number)
            assert not passes(SOME_BLOCKS, NO_KEY, made)


def test_equal_and_opposite_blocks_are_seen() -> None:
    layout = SOME_BLOCKS.layouts[0]
    drawn = np.random.default_rng(1).standard_normal(4096)
    one = np.rint(drawn * 3 * layout.norm / np.linalg.norm(drawn) / 2**0.5).astype(np.int64)
    for number in range(25):
        for sign in (1, -1):
            coefficients = np.zeros((SOME_BLOCKS.blocks, 4096), dtype=np.int64)
            coefficients[0], coefficients[1] = one << layout.shift, sign * one << layout.shift
            assert not passes(SOME_BLOCKS, NO_KEY, judged(SOME_BLOCKS, coefficients, number))


# --- those that are no updates --------------------------------------------------------------------


def malformed(plan: Plan) -> dict[str, Values]:
    layout = plan.layouts[0]
    shape = (plan.blocks, 4096)
    forms = {}
    for name, part in (("half", 2), ("third", 3), ("quarter", 4)):
        step = (layout.base // part) << layout.shift
        forms[f"{name} a base on one coefficient"] = np.zeros(shape, dtype=np.int64)
        forms[f"{name} a base on one coefficient"][0, 77] = step
        forms[f"{name} a base on every 64th"] = np.zeros(shape, dtype=np.int64)
        forms[f"{name} a base on every 64th"][0, ::64] = step
    forms["a third of a base everywhere"] = np.full(shape, (layout.base // 3) << layout.shift)
    forms["one huge coefficient"] = np.zeros(shape, dtype=np.int64)
    forms["one huge coefficient"][0, 5] = MODULUS // 3
    forms["a third of q everywhere"] = np.full(shape, MODULUS // 3)
    # Squares that add up to a multiple of q, which a check that squares would read as nothing.
    roots = (pow(each, (MODULUS - 1) // 4, MODULUS) for each in range(2, 50))
    root = next(each for each in roots if each not in (1, MODULUS - 1))
    assert (root * root + 1) % MODULUS == 0
    forms["squares that fold to zero"] = np.zeros(shape, dtype=np.int64)
    forms["squares that fold to zero"][0, :2] = (1, root)
    return forms


@pytest.mark.parametrize("form", malformed(ONE_BLOCK))
def test_plaintexts_that_are_no_updates_are_refused(form: str) -> None:
    plan = SOME_BLOCKS if "everywhere" in form else ONE_BLOCK
    transformed = ring.to_ntt(malformed(plan)[form])
    for number in range(40):
        assert not passes(plan, NO_KEY, sketched(plan, transformed, number))


def test_uniformly_random_residues_are_refused() -> None:
    for number in range(40):
        noise = uniform_polynomials(Stream.derive("test noise", number), ONE_BLOCK.blocks)
        assert not passes(ONE_BLOCK, NO_KEY, sketched(ONE_BLOCK, noise, number))


@pytest.mark.parametrize("plan", [ONE_BLOCK, SOME_BLOCKS], ids=["one block", "some blocks"])
def test_half_a_base_on_every_coefficient_shows_in_half_of_the_rows(plan: Plan) -> None:
    layout = plan.layouts[0]
    half = np.full((plan.blocks, 4096), (layout.base // 2) << layout.shift)
    transformed = ring.to_ntt(half)
    seen, trials, passed = 0, 60, 0
    for number in range(trials):
        made = sketched(plan, transformed, number)
        digits = _digits(layout, made.norms[0], NO_KEY)[:, 0]
        loud = np.abs(digits) > layout.base // 4
        # A row sees it in all of its values, or in none.
        assert (loud.all(axis=1) | ~loud.any(axis=1)).all()
        seen += int(loud[:, 0].sum())
        passed += passes(plan, NO_KEY, made)
    rows = 16 * trials
    assert abs(seen - rows / 2) < 6 * (rows / 4) ** 0.5  # false alarm 2e-9
    assert passed == 0


def test_the_margin_of_a_digit_holds_what_may_pass() -> None:
    layout = ONE_BLOCK.layouts[0]
    assert layout.base >= 9 * 1.2 * layout.norm


# --- several segments -----------------------------------------------------------------------------


MIXED = make_plan(
    [
        FloatSegment("update", (TensorSpec("w", (3000,)),), 1.0),
        IntegerSegment("votes", 500, 3, 6.0),
        IntegerSegment("free", 100, 1000),
    ],
    max_clients=8,
    norm_check=CHECK,
)


def mixed_parts(number: int) -> list[Values]:
    drawn = np.random.default_rng(number)
    dense = drawn.standard_normal(MIXED.layouts[0].values)
    dense *= 0.9 * MIXED.layouts[0].norm / np.linalg.norm(dense)
    votes = np.zeros(500, dtype=np.int64)
    votes[drawn.integers(0, 500, 4)] = 2
    return [np.rint(dense).astype(np.int64), votes, drawn.integers(-1000, 1001, 100)]


def test_each_checked_segment_is_held_to_its_own_bound() -> None:
    for number in range(12):
        parts = mixed_parts(number)
        assert passes(MIXED, NO_KEY, judged(MIXED, packed(MIXED, parts), number))
        for segment in (0, 1):
            larger = [part * (3 if at == segment else 1) for at, part in enumerate(parts)]
            assert not passes(MIXED, NO_KEY, judged(MIXED, packed(MIXED, larger), number))
        # Nobody asked about the third one.
        free = [parts[0], parts[1], parts[2] * 3]
        assert passes(MIXED, NO_KEY, judged(MIXED, packed(MIXED, free), number))


def test_a_segment_within_its_bound_does_not_make_up_for_another_one() -> None:
    parts = [part * 0 for part in mixed_parts(1)]
    parts[1][:40] = 3  # three times the norm of the votes, next to nothing beside the update
    assert not passes(MIXED, NO_KEY, judged(MIXED, packed(MIXED, parts), 1))


def test_a_plan_without_a_check_judges_nothing() -> None:
    made = sketched(ONE_BLOCK, np.zeros((ONE_BLOCK.blocks, 4096), dtype=np.uint64), 1)
    with pytest.raises(ValueError, match="norm check"):
        passes(replace(ONE_BLOCK, norm_check=None), NO_KEY, made)


# --- the key holder -------------------------------------------------------------------------------


class Round:
    """A key holder and a server; clients 0 to 3 follow the plan, client 4 sends ten times more."""

    def __init__(self, plan: Plan = VOTES) -> None:
        self.holder = KeyHolder(plan)
        self.context = self.holder.context
        self.challenger = Challenger(self.context, b"s" * 32)
        self.uploads = [self.upload(index, 1) for index in range(4)]
        self.bad = self.upload(4, 60)

    def upload(self, index: int, votes: int) -> Upload:
        identity = cohort.identity(index)
        values = np.zeros(5000, dtype=np.int64)
        values[index : index + votes] = 1
        commitment = self.challenger.commitment(identity.public)
        encryptor = Encryptor(self.context, identity, commitment=commitment)
        if votes == 1:
            return encryptor.encrypt(values)
        return encrypt_quantized(self.context, [Quantized(values)], identity, commitment)

    def admitted(self) -> Round:
        for upload in (*self.uploads, self.bad):
            self.holder.admit(upload.admission)
        return self

    def sketch(self, upload: Upload) -> Sketch:
        return self.challenger.sketch(upload)

    def judged(self) -> list[Verdict]:
        self.admitted()
        for upload in (*self.uploads, self.bad):
            self.holder.submit_sketch(self.sketch(upload))
        return self.holder.verdicts()


def name_of(upload: Upload) -> bytes:
    return upload.admission.receipt.upload_digest


def total(context: RoundContext, uploads: Sequence[Upload]) -> Aggregator:
    server = Aggregator(context)
    for upload in uploads:
        server.add(upload)
    return server


def test_a_round_with_its_check_refuses_the_attacker_and_sums_up_the_others() -> None:
    it = Round()
    verdicts = {verdict.receipt.upload_digest: verdict for verdict in it.judged()}
    assert {name: verdict.accepted for name, verdict in verdicts.items()} == {
        **{name_of(upload): True for upload in it.uploads},
        name_of(it.bad): False,
    }
    for verdict in verdicts.values():
        verdict.verify(it.context.id, [it.holder.identity_key])
    release = it.holder.release(total(it.context, it.uploads).aggregate())
    assert release.contributors == 4


def test_a_manifest_with_a_refused_upload_is_never_opened() -> None:
    it = Round()
    it.judged()
    everybody = total(it.context, [*it.uploads, it.bad]).aggregate()
    with pytest.raises(NormError, match="accepted"):
        it.holder.release(everybody)
    digests = [name_of(upload) for upload in (*it.uploads, it.bad)]
    with pytest.raises(NormError):
        it.holder.check(digests, np.zeros((it.context.plan.blocks, 4096), dtype=np.uint32))
    assert it.holder.refusals == 0
    assert it.holder.release(total(it.context, it.uploads).aggregate()).contributors == 4


def test_nothing_is_opened_before_the_verdicts() -> None:
    it = Round().admitted()
    for upload in (*it.uploads, it.bad):
        assert it.holder.submit_sketch(it.sketch(upload)).passed == (upload is not it.bad)
    good = total(it.context, it.uploads).aggregate()
    with pytest.raises(NormError):
        it.holder.release(good)
    it.holder.verdicts()
    it.holder.release(good)


def test_verdicts_wait_for_every_sketch() -> None:
    it = Round().admitted()
    with pytest.raises(ClosedError, match="sketch of every admitted upload"):
        it.holder.verdicts()
    for upload in it.uploads:
        it.holder.submit_sketch(it.sketch(upload))
    with pytest.raises(ClosedError, match="sketch of every admitted upload"):
        it.holder.verdicts()
    it.holder.submit_sketch(it.sketch(it.bad))
    assert len(it.holder.verdicts()) == 5


def test_a_round_in_which_nothing_was_admitted_gives_no_verdicts() -> None:
    it = Round()
    with pytest.raises(ClosedError, match="sketch"):
        it.holder.verdicts()
    # And is not closed to uploads by having been asked.
    it.holder.admit(it.uploads[0].admission)


def test_verdicts_are_given_once_and_for_all() -> None:
    it = Round()
    first = it.judged()
    assert it.holder.verdicts() == first
    late = it.upload(9, 1)
    with pytest.raises(ClosedError, match="verdicts"):
        it.holder.admit(late.admission)
    # Those that were admitted still are.
    assert it.holder.admit(it.uploads[0].admission)
    assert it.holder.verdicts() == first


def test_the_same_sketch_again_changes_nothing_and_another_one_is_refused() -> None:
    it = Round().admitted()
    made = it.sketch(it.bad)
    first = it.holder.submit_sketch(made)
    assert it.holder.submit_sketch(made) == first == Finding(made.digest, False)
    # One that would pass: of nothing at all, in the name of the same upload.
    zeros = np.zeros((it.context.plan.blocks, 4096), dtype=np.uint64)
    better = sketch(it.context, name_of(it.bad), [zeros], bytes(32))
    with pytest.raises(DuplicateError, match="first one"):
        it.holder.submit_sketch(better)
    assert it.holder.submit_sketch(made) == first


def test_a_sketch_of_an_upload_that_was_not_admitted_is_refused() -> None:
    it = Round()
    with pytest.raises(SealError, match="admitted"):
        it.holder.submit_sketch(it.sketch(it.bad))


def test_a_round_that_is_over_judges_nothing() -> None:
    it = Round()
    it.judged()
    made = it.sketch(it.bad)
    it.holder.close()
    for late in (lambda: it.holder.submit_sketch(made), it.holder.verdicts):
        with pytest.raises(ClosedError):
            late()


def test_a_plan_without_a_check_takes_no_sketch_and_gives_no_verdict() -> None:
    holder = KeyHolder(plan_integers(10, max_clients=5, max_abs=1))
    made = sketched(VOTES, np.zeros((VOTES.blocks, 4096), dtype=np.uint64), 1)
    for refused in (lambda: holder.submit_sketch(made), holder.verdicts):
        with pytest.raises(ConfigurationError, match="norm check"):
            refused()


def test_a_receipt_commits_exactly_where_the_plan_has_a_check() -> None:
    it = Round()
    unchecked = KeyHolder(plan_integers(5000, max_clients=100, max_abs=1)).context
    without = Encryptor(unchecked, cohort.identity(0)).encrypt(np.zeros(5000, dtype=np.int64))
    bare = replace(
        it.uploads[0].admission,
        receipt=cohort.Receipt.sign(
            cohort.identity(0),
            it.context.id,
            name_of(it.uploads[0]),
            it.uploads[0].admission.sealed_seed,
        ),
    )
    with pytest.raises(ReceiptError, match="commitment"):
        it.holder.admit(bare)
    committed = replace(
        without.admission,
        receipt=cohort.Receipt.sign(
            cohort.identity(0),
            unchecked.id,
            name_of(without),
            without.admission.sealed_seed,
            b"c" * 32,
        ),
    )
    with pytest.raises(ReceiptError, match="commitment"):
        committed.verify(unchecked)


def test_what_was_found_is_kept_where_another_process_goes_on() -> None:
    it = Round().admitted()
    findings = {
        name_of(upload): it.holder.submit_sketch(it.sketch(upload))
        for upload in (*it.uploads, it.bad)
    }
    first = it.holder.verdicts()
    pair, identity = it.holder._pair, it.holder._identity
    again = KeyHolder(VOTES, pair=pair, identity=identity)
    assert again.context.id == it.context.id
    for upload in (*it.uploads, it.bad):
        again.admit(upload.admission)
    again.resume(0, {}, findings, judged=True)
    assert again.verdicts() == first
    with pytest.raises(ClosedError):
        again.admit(it.upload(9, 1).admission)
    with pytest.raises(NormError):
        again.release(total(it.context, [*it.uploads, it.bad]).aggregate())
    assert again.release(total(it.context, it.uploads).aggregate()).contributors == 4


def test_findings_alone_open_nothing_until_the_verdicts_are_given() -> None:
    it = Round().admitted()
    findings = {
        name_of(upload): it.holder.submit_sketch(it.sketch(upload)) for upload in it.uploads
    }
    again = KeyHolder(VOTES, pair=it.holder._pair)
    for upload in (*it.uploads, it.bad):
        again.admit(upload.admission)
    again.resume(0, {}, findings)
    good = total(it.context, it.uploads).aggregate()
    with pytest.raises(NormError):
        again.release(good)
    with pytest.raises(ClosedError, match="sketch"):
        again.verdicts()
    assert again.submit_sketch(it.sketch(it.uploads[0])) == findings[name_of(it.uploads[0])]
    again.submit_sketch(it.sketch(it.bad))
    again.verdicts()
    assert again.release(good).contributors == 4


def test_neither_estimates_nor_findings_are_shown() -> None:
    it = Round()
    it.judged()
    assert "Finding" not in repr(it.holder)
    assert repr(it.holder) == "KeyHolder('task', round 1)"
