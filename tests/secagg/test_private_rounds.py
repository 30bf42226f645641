"""Rounds with differential privacy: the cipher changes nothing, and noise is what was planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from secagg import quantize as quantizer
from secagg import ring
from secagg.aggregator import Aggregate, Aggregator
from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.encryptor import encrypt_integers, encrypt_quantized, upload_integers
from secagg.errors import InputError, MalformedError, NormError, ReleaseError, SchemaError
from secagg.keyholder import KeyHolder
from secagg.noise_audit import dithered
from secagg.packing import pack
from secagg.parameters import (
    MODULUS,
    FloatSegment,
    IntegerSegment,
    NormCheck,
    Plan,
    Privacy,
    RowThreshold,
    TensorSpec,
)
from secagg.planner import make_plan, plan_tensors
from secagg.publication import published
from secagg.quantize import Quantized, quantize
from secagg.receipts import SigningKey
from secagg.residues import ResidueSum, folded, widen
from secagg.sampling import Stream
from secagg.upload import Upload

MODES = ["release", "distributed", "local"]
CLIENTS, ROWS, WIDTH = 7, 40, 5
NOISE_KEY = b"key of the tests' release noise."


def planned(mode: str, *, clip_bit: bool = True, threshold: bool = False) -> Plan:
    update = FloatSegment(
        "update",
        (TensorSpec("bias", (ROWS,)), TensorSpec("factors", (ROWS, WIDTH))),
        1.0,
        12 if threshold else 8,
        rows=ROWS if threshold else 0,
        clip_bit=clip_bit,
    )
    return make_plan(
        [update, IntegerSegment("contributors", ROWS, 1, max_norm=5.0)],
        max_clients=20,
        min_clients=4,
        norm_check=NormCheck(0.3),
        privacy=Privacy(mode, 0.5, epsilon=8.0, delta=1e-5),
        threshold=RowThreshold("contributors", 3) if threshold else None,
    )


def contribution(index: int) -> dict[str, object]:
    drawn = np.random.default_rng(index)
    touched = drawn.choice(ROWS, 20, replace=False)
    factors = np.zeros((ROWS, WIDTH))
    factors[touched] = drawn.normal(size=(20, WIDTH)) * 0.04 * (index + 1)
    counts = np.zeros(ROWS, dtype=np.int64)
    counts[touched] = 1
    return {"update": {"bias": factors[:, 0], "factors": factors}, "contributors": counts}


def quantized(context: RoundContext, index: int) -> list[Quantized]:
    return quantize(
        context.plan,
        contribution(index),  # type: ignore[arg-type]
        samples=1,
        rotation=context.rotation,
        randomness=Stream.derive("test rounding and noise", context.id.round_number, index),
    )


class Round:
    """All parties of one round, with seeds of their own where there is randomness in the result."""

    def __init__(self, plan: Plan, number: int = 1) -> None:
        self.holder = KeyHolder(plan, round_number=number, noise_key=NOISE_KEY)
        self.context, self.plan = self.holder.context, plan
        self.challenger = Challenger(self.context)
        self.server = Aggregator(self.context)
        self.uploads: dict[bytes, Upload] = {}

    def identity(self) -> tuple[SigningKey, bytes]:
        identity = SigningKey.generate()
        return identity, self.challenger.commitment(identity.public)

    def send(self, upload: Upload) -> None:
        self.uploads[upload.admission.receipt.upload_digest] = upload
        self.holder.admit(upload.admission)
        self.holder.submit_sketch(self.challenger.sketch(upload))

    def aggregate(self) -> Aggregate:
        for verdict in self.holder.verdicts():
            if verdict.accepted:
                self.server.add(self.uploads[verdict.receipt.upload_digest])
        return self.server.aggregate()


def in_the_clear(context: RoundContext, indexes: Sequence[int]) -> tuple[NDArray[np.int64], ...]:
    """What is released, without any cipher."""
    parts = [[part.summand for part in quantized(context, index)] for index in indexes]
    sums = tuple(np.sum(np.stack(column), axis=0) for column in zip(*parts, strict=True))
    return published(context.plan, context.rotation, sums, Stream(NOISE_KEY))


@pytest.mark.parametrize("threshold", [False, True], ids=["all rows", "threshold"])
@pytest.mark.parametrize("mode", MODES)
def test_encrypted_and_plaintext_runs_from_the_same_seeds_are_bit_identical(
    mode: str, threshold: bool
) -> None:
    plan = planned(mode, threshold=threshold)
    for number in (1, 2, 3):
        run = Round(plan, number)
        for index in range(CLIENTS):
            upload = encrypt_quantized(run.context, quantized(run.context, index), *run.identity())
            assert len(upload.payload) == plan.payload_bytes
            run.send(upload)
        release = run.holder.release(run.aggregate())
        assert release.contributors == CLIENTS
        expected = in_the_clear(run.context, range(CLIENTS))
        for ours, clear in zip(release.sums, expected, strict=True):
            assert np.array_equal(ours, clear)


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_of_a_release_is_the_one_that_was_planned(mode: str) -> None:
    """Against the sum of the values alone, in units of what the plan says; over both segments."""
    plan = planned(mode)
    shares = 1 if mode == "release" else CLIENTS
    seen: list[list[float]] = [[], []]
    for number in range(1, 8):
        context = KeyHolder(plan, round_number=number).context
        values = [[part.values for part in quantized(context, i)] for i in range(CLIENTS)]
        exact = [np.sum(np.stack(column), axis=0) for column in zip(*values, strict=True)]
        parts = [[part.summand for part in quantized(context, i)] for i in range(CLIENTS)]
        sums = tuple(np.sum(np.stack(column), axis=0) for column in zip(*parts, strict=True))
        released = published(plan, context.rotation, sums, Stream.derive("test", number))
        for place, std in enumerate(plan.noise_stds):
            noise = (released[place] - exact[place]) / (std * math.sqrt(shares))
            seen[place] += noise.tolist()
    for noises, std in zip(seen, plan.noise_stds, strict=True):
        assert std > 3  # so that steps do not show in the comparison with a continuous law
        # Half a step of continuity error, 0.4 / std / 2, is far below the test's resolution.
        assert stats.kstest(noises, "norm").pvalue > 1e-4
        assert np.std(noises) == pytest.approx(1.0, abs=5 / math.sqrt(2 * len(noises)))


def test_with_other_randomness_the_noise_is_another() -> None:
    plan = planned("release")
    sums = tuple(np.zeros(segment.values, dtype=np.int64) for segment in plan.segments)
    first, second = (published(plan, bytes(32), sums, Stream.from_os()) for _ in range(2))
    assert not np.array_equal(first[0], second[0])
    # Segments do not share it, either: one would tell the other's.
    one = published(plan, bytes(32), sums, Stream(NOISE_KEY))
    scaled = [part[:ROWS] / std for part, std in zip(one, plan.noise_stds, strict=True)]
    assert abs(np.corrcoef(*scaled)[0, 1]) < 0.7


def test_a_key_holder_draws_noise_of_its_own_unless_a_test_gives_it_a_key() -> None:
    plan = replace_check(planned("release"))
    sums = []
    for _ in range(2):
        holder = KeyHolder(plan)
        server = Aggregator(holder.context)
        for _ in range(4):
            zeros = [Quantized(np.zeros(each.values, dtype=np.int64)) for each in plan.segments]
            server.add(encrypt_quantized(holder.context, zeros, SigningKey.generate()))
        sums.append(holder.release(server.aggregate()).sums[0])
    assert np.count_nonzero(sums[0])
    assert not np.array_equal(*sums)


def replace_check(plan: Plan) -> Plan:
    """The same plan without a norm check, for rounds that need none."""
    return make_plan(
        plan.segments,
        max_clients=plan.max_clients,
        min_clients=plan.min_clients,
        privacy=plan.privacy and replace(plan.privacy, honest_clients=0),
        threshold=plan.threshold,
    )


# --- what a server, or a client, could try -------------------------------------------------------


@pytest.mark.parametrize("forged", ["update", "noise", "noise taken off"])
def test_an_update_cannot_be_opened_without_its_noise(forged: str) -> None:
    """A server that leaves the noise out gets nothing opened; it had its chance then, once."""
    plan = replace_check(planned("distributed"))
    holder = KeyHolder(plan)
    uploads = [
        encrypt_quantized(holder.context, quantized(holder.context, i), SigningKey.generate())
        for i in range(4)
    ]
    total = ResidueSum(plan.blocks)
    for upload in uploads:
        holder.admit(upload.admission)
        total.add(widen(upload.payload, plan.blocks))
    names = [upload.admission.receipt.upload_digest for upload in uploads]
    both = total.value()
    updates, noises = both[: plan.sum_blocks], both[plan.sum_blocks :]
    sent = {"update": updates, "noise": noises, "noise taken off": updates + MODULUS - noises}
    residues = sent[forged] % np.uint64(MODULUS)
    with pytest.raises(ReleaseError, match="noise"):
        holder.check(names, dithered(plan, residues))
    with pytest.raises(ReleaseError, match="expected"):
        holder.release_admitted(names, residues)


@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_with_its_noise_it_opens(mode: str) -> None:
    plan = replace_check(planned(mode))
    holder = KeyHolder(plan)
    uploads = [
        encrypt_quantized(holder.context, quantized(holder.context, i), SigningKey.generate())
        for i in range(4)
    ]
    total = ResidueSum(plan.blocks)
    for upload in uploads:
        holder.admit(upload.admission)
        total.add(widen(upload.payload, plan.blocks))
    names, both = [u.admission.receipt.upload_digest for u in uploads], total.value()
    holder.check(names, dithered(plan, folded(both, plan.sum_blocks)))
    assert holder.release_admitted(names, folded(both, plan.sum_blocks)).contributors == 4


def test_a_sum_that_was_not_folded_is_refused_for_its_size() -> None:
    plan = replace_check(planned("distributed"))
    holder = KeyHolder(plan)
    server = Aggregator(holder.context)
    for index in range(4):
        server.add(
            encrypt_quantized(
                holder.context, quantized(holder.context, index), SigningKey.generate()
            )
        )
    aggregate = server.aggregate()
    twice = np.concatenate([aggregate.residues, aggregate.residues])
    with pytest.raises(ReleaseError, match=f"expected {plan.sum_blocks} summed"):
        holder.release(replace(aggregate, residues=twice))
    names = [admission.receipt.upload_digest for admission in aggregate.manifest]
    with pytest.raises(InputError):
        holder.check(names, np.zeros((plan.blocks, 4096), dtype=np.uint32))


def test_noise_is_for_plans_with_noise_only() -> None:
    plain, *others = (KeyHolder(replace_check(planned(mode))).context for mode in MODES)
    for noised in others:
        with pytest.raises(InputError, match="noise"):
            encrypt_quantized(noised, quantized(plain, 0), SigningKey.generate())
        with pytest.raises(InputError, match="noise"):
            encrypt_quantized(plain, quantized(noised, 0), SigningKey.generate())


def test_more_than_an_honest_clients_integers_are_not_encrypted_by_mistake() -> None:
    for mode in MODES:
        context = KeyHolder(replace_check(planned(mode))).context
        parts = quantized(context, 0)
        (most, *_) = context.plan.upload_abs
        parts[0].values[5] = most + (parts[0].noise is not None) * 10 * context.plan.noise_stds[0]
        parts[0].values[5] += 1
        with pytest.raises(InputError, match=f"magnitude up to {most}"):
            encrypt_quantized(context, parts, SigningKey.generate())


def test_an_upload_without_its_noise_is_too_short() -> None:
    context = KeyHolder(replace_check(planned("distributed"))).context
    upload = encrypt_quantized(context, quantized(context, 0), SigningKey.generate())
    short = replace(upload, payload=upload.payload[: len(upload.payload) // 2])
    with pytest.raises(MalformedError, match="expected an upload of"):
        short.validate(context)


@pytest.mark.parametrize(
    ("mode", "place", "factor"),
    [
        ("release", "update", 8),
        ("distributed", "update", 8),
        ("distributed", "noise", 2),
        ("local", "update", 200),
    ],
)
def test_the_norm_check_still_refuses(mode: str, place: str, factor: int) -> None:
    """An update beyond its norm, and a noise beyond its: each by its own bound."""
    run = Round(planned(mode, clip_bit=False))
    for index in range(CLIENTS):
        parts = quantized(run.context, index)
        if index == 2 and place == "noise":
            parts[0] = replace(parts[0], noise=parts[0].noise * factor)  # type: ignore[operator]
        elif index == 2:
            parts[0] = replace(parts[0], values=parts[0].values * factor)
        run.send(encrypt_integers(run.context, upload_integers(run.plan, parts), *run.identity()))
    aggregate = run.aggregate()
    assert len(aggregate.manifest) == CLIENTS - 1
    release = run.holder.release(aggregate)
    honest = in_the_clear(run.context, [i for i in range(CLIENTS) if i != 2])
    assert all(np.array_equal(a, b) for a, b in zip(release.sums, honest, strict=True))


def test_what_was_refused_cannot_be_summed_all_the_same() -> None:
    run = Round(planned("distributed"))
    for index in range(5):
        parts = quantized(run.context, index)
        if index == 2:
            parts[0] = replace(parts[0], values=parts[0].values * 9)
        upload = encrypt_integers(run.context, upload_integers(run.plan, parts), *run.identity())
        run.send(upload)
        run.server.add(upload)
    run.holder.verdicts()
    with pytest.raises(NormError):
        run.holder.release(run.server.aggregate())


def test_a_client_off_the_grid_in_its_noise_is_named_by_the_audit() -> None:
    plan = replace_check(planned("distributed"))
    holder = KeyHolder(plan)
    uploads = [
        encrypt_quantized(holder.context, quantized(holder.context, i), SigningKey.generate())
        for i in range(5)
    ]
    # Half a step on a coefficient of the noise.
    bad = uploads[3]
    residues = widen(bad.payload, plan.blocks).copy()
    shift = np.zeros((1, 4096), dtype=np.int64)
    shift[0, 7] = 1 << (plan.noise_layouts[0].shift - 1)
    residues[plan.sum_blocks] = ring_sum(residues[plan.sum_blocks], shift)
    total = ResidueSum(plan.blocks)
    for index, upload in enumerate(uploads):
        holder.admit(upload.admission)
        total.add(residues if index == 3 else widen(upload.payload, plan.blocks))
    names = [upload.admission.receipt.upload_digest for upload in uploads]
    summed = folded(total.value(), plan.sum_blocks)
    with pytest.raises(ReleaseError):
        holder.check(names, dithered(plan, summed))
    found = [
        holder.audit(
            name,
            dithered(plan, residues if index == 3 else widen(upload.payload, plan.blocks)),
        )
        for index, (name, upload) in enumerate(zip(names, uploads, strict=True))
    ]
    assert found == [False, False, False, True, False]


def ring_sum(block: NDArray[np.uint64], shift: NDArray[np.int64]) -> NDArray[np.uint64]:
    return (block + ring.to_ntt(shift)[0]) % np.uint64(MODULUS)


# --- what the release says ------------------------------------------------------------------------


def test_the_share_of_unclipped_clients_comes_with_the_update() -> None:
    """Exact but for rounding where there is no noise; the update is as good as without it."""
    specs = {"w": (3000,)}
    plan = make_plan(
        [FloatSegment("update", (TensorSpec("w", (3000,)),), 1.0, clip_bit=True)], max_clients=10
    )
    plain = plan_tensors(specs, max_clients=10, clip=1.0)
    drawn = np.random.default_rng(5)
    vectors = drawn.normal(size=(10, 3000))
    lengths = np.array([0.2, 0.4, 0.5, 0.6, 0.9, 0.95, 1.1, 1.5, 2.0, 9.0])
    vectors *= (lengths / np.linalg.norm(vectors, axis=1))[:, None]
    errors = []
    for which in (plan, plain):
        holder = KeyHolder(which)
        server = Aggregator(holder.context)
        for index, vector in enumerate(vectors):
            parts = quantize(
                which,
                {"update": {"w": vector}},
                samples=1,
                rotation=holder.context.rotation,
                randomness=Stream.derive("test", index),
            )
            server.add(encrypt_quantized(holder.context, parts, SigningKey.generate()))
        release = holder.release(server.aggregate())
        if which is plan:
            assert release.clip_fraction() == pytest.approx(0.6, abs=0.02)
        else:
            with pytest.raises(SchemaError, match="clip bit"):
                release.clip_fraction()
        clipped = vectors / np.maximum(lengths, 1.0)[:, None]
        errors.append(np.linalg.norm(release.mean()["w"] - clipped.mean(axis=0)))
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("clipped", [True, False])
def test_a_clip_bit_does_not_change_the_norm(clipped: bool) -> None:
    """Neither the key holder nor anybody else can tell it from how long an update is."""
    plan = planned("release")
    (update, _), lengths = plan.segments, []
    vector = np.random.default_rng(3).normal(size=(ROWS, WIDTH))
    vector *= (1.0001 if clipped else 0.9999) / np.linalg.norm(vector)
    for index in range(30):
        (part, _) = quantize(
            plan,
            {
                "update": {"bias": np.zeros(ROWS), "factors": vector},
                "contributors": np.zeros(ROWS, dtype=np.int64),
            },
            samples=1,
            rotation=bytes([index]) * 32,
            randomness=Stream.derive("test", index),
        )
        assert part.clipped == clipped
        lengths.append(np.linalg.norm(part.values))
    assert isinstance(update, FloatSegment)
    assert np.mean(lengths) * update.step == pytest.approx(update.norm_bound, rel=0.01)


def test_no_rounding_is_longer_than_what_privacy_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound that one rounding in two is beyond, what is sent is within it, always."""
    plan = plan_tensors(2000, max_clients=5, clip=1.0, bits=2, privacy=Privacy("local", 1, 8, 1e-5))
    vector = np.random.default_rng(1).normal(size=2000)
    vector /= np.linalg.norm(vector)

    def norms(count: int) -> list[float]:
        drawn = []
        for index in range(count):
            (part,) = quantize(
                plan,
                {"update": {"vector": vector}},
                samples=1,
                rotation=bytes(32),
                randomness=Stream.derive("test", index),
            )
            drawn.append(float(np.linalg.norm(part.values)))
        return drawn

    typical = int(np.median(norms(50)))
    assert max(norms(50)) > typical
    monkeypatch.setattr(quantizer, "honest_norm", lambda _segment: typical)
    assert max(norms(50)) <= typical
    monkeypatch.setattr(quantizer, "honest_norm", lambda _segment: 1)
    with pytest.raises(RuntimeError, match="no rounding"):
        norms(1)


def test_noise_of_clients_is_packed_like_what_it_hides() -> None:
    """Digit by digit: the sum of both ciphertexts holds the sum of both integers."""
    plan = planned("distributed")
    context = KeyHolder(plan).context
    for part, layout, noise in zip(
        quantized(context, 1), plan.layouts, plan.noise_layouts, strict=True
    ):
        assert part.noise is not None
        together = pack(layout, part.values) + pack(noise, part.noise)
        assert np.array_equal(together, pack(layout, part.summand))
