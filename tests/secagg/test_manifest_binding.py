"""The cipher binds a sum to its manifest: these uploads, each once, of this round, or nothing."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from round_support import raw_upload, resigned

from secagg import encryptor, ring
from secagg.aggregator import Aggregate, Aggregator
from secagg.context import NO_MODEL, RoundContext
from secagg.encryptor import Encryptor
from secagg.errors import (
    ClosedError,
    ContextError,
    DuplicateError,
    MalformedError,
    QuorumError,
    ReceiptError,
    ReleaseError,
    SealError,
    SecaggError,
    UploadError,
)
from secagg.keyholder import KeyHolder
from secagg.parameters import MODULUS, Plan
from secagg.planner import plan_integers, plan_tensors
from secagg.quantize import quantize
from secagg.receipts import Receipt, SigningKey
from secagg.residues import ResidueSum, narrow, widen
from secagg.sampling import Stream
from secagg.sealing import seal, seal_info
from secagg.upload import Admission, Upload

SIZE = 200
PLAN = plan_integers(SIZE, max_clients=8, max_abs=100, min_clients=3)
IDENTITIES = [SigningKey.from_bytes(bytes([i]) * 32) for i in range(1, 9)]


def values_of(client: int) -> NDArray[np.int64]:
    return np.full(SIZE, client + 1)


@pytest.fixture
def holder() -> KeyHolder:
    return KeyHolder(PLAN)


@pytest.fixture
def uploads(holder: KeyHolder) -> list[Upload]:
    return [
        raw_upload(holder.context, [values_of(client)], identity)
        for client, identity in enumerate(IDENTITIES[:5])
    ]


def total(context: RoundContext, uploads: list[Upload]) -> NDArray[np.uint64]:
    running = ResidueSum(context.plan.blocks)
    for upload in uploads:
        running.add(widen(upload.payload, context.plan.blocks))
    return running.value()


def forged(holder: KeyHolder, named: list[Upload], summed: list[Upload]) -> Aggregate:
    """What a malicious server submits: a manifest of some uploads and the sum of others."""
    manifest = tuple(upload.admission for upload in named)
    return Aggregate(manifest, total(holder.context, summed))


def refused(holder: KeyHolder, aggregate: Aggregate, error: type[SecaggError]) -> None:
    with pytest.raises(error):
        holder.release(aggregate)
    # Refusals are limited; the limit has a test of its own.
    holder.refusals = 0


def test_a_second_sum_that_does_not_open_closes_the_round_for_good(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    # Each refusal tells the server one bit about noise: there must be no more than two.
    good, bad = forged(holder, uploads, uploads), forged(holder, uploads, uploads[1:])
    for sums in (bad, forged(holder, uploads, uploads[:-1])):
        with pytest.raises(ReleaseError):
            holder.release(sums)
    with pytest.raises(ClosedError):
        holder.release(good)


def test_a_refusal_whose_answer_was_lost_counts_once(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    good, bad = forged(holder, uploads, uploads), forged(holder, uploads, uploads[1:])
    for _ in range(5):
        with pytest.raises(ReleaseError):
            holder.release(bad)
    assert holder.refusals == 1
    assert holder.release(good).contributors == len(uploads)


def test_after_one_sum_that_does_not_open_the_right_one_still_does(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    with pytest.raises(ReleaseError):
        holder.release(forged(holder, uploads, uploads[1:]))
    assert holder.release(forged(holder, uploads, uploads)).contributors == len(uploads)


# --- the sum and its manifest ---------------------------------------------------------------------


def test_the_honest_sum_opens(holder: KeyHolder, uploads: list[Upload]) -> None:
    release = holder.release(forged(holder, uploads, uploads))
    assert (release.sums[0] == 15).all()
    assert release.contributors == 5


def test_every_proper_subset_and_only_the_whole_opens() -> None:
    holder = KeyHolder(PLAN)
    uploads = [
        raw_upload(holder.context, [values_of(client)], identity)
        for client, identity in enumerate(IDENTITIES[:5])
    ]
    for size in range(1, 5):
        for summed in itertools.combinations(uploads, size):
            refused(holder, forged(holder, uploads, list(summed)), ReleaseError)
    for named in itertools.combinations(uploads, 4):
        refused(holder, forged(holder, list(named), uploads), ReleaseError)
    assert holder.release(forged(holder, uploads, uploads)).contributors == 5


def test_a_client_counted_twice_is_refused(holder: KeyHolder, uploads: list[Upload]) -> None:
    refused(holder, forged(holder, uploads, [*uploads, uploads[0]]), ReleaseError)
    twice = [*uploads, uploads[0]]
    refused(holder, forged(holder, twice, twice), DuplicateError)
    refused(holder, forged(holder, twice, uploads), DuplicateError)


def test_one_client_in_the_place_of_another_is_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    refused(holder, forged(holder, uploads[:4], uploads[1:]), ReleaseError)


def test_one_client_alone_under_the_names_of_three_is_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    for summed in ([uploads[0]], [uploads[0]] * 3):
        refused(holder, forged(holder, uploads[:3], summed), ReleaseError)


def test_an_upload_without_a_name_in_the_manifest_is_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    refused(holder, forged(holder, uploads[:4], uploads), ReleaseError)


def test_chosen_residues_instead_of_a_sum_are_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    # (0, 2**s) would decrypt to 2**s times the key where the server chooses both parts.
    shape = (PLAN.blocks, 4096)
    step = 1 << PLAN.layouts[0].shift
    manifest = tuple(upload.admission for upload in uploads)
    for residues in (
        np.zeros(shape, np.uint64),
        np.full(shape, step, np.uint64),
        np.full(shape, MODULUS - 1, np.uint64),
        holder.context.public_polynomials(),
        total(holder.context, uploads) * np.uint64(2) % np.uint64(MODULUS),
    ):
        refused(holder, Aggregate(manifest, residues), ReleaseError)


@pytest.mark.parametrize("position", [0, 1, 2048, 4095])
@pytest.mark.parametrize("change", [1, MODULUS - 1, 1 << 30])
def test_one_changed_residue_is_refused(
    holder: KeyHolder, uploads: list[Upload], position: int, change: int
) -> None:
    # One evaluation moves every coefficient by a multiple of a root of unity: never on the grid.
    aggregate = forged(holder, uploads, uploads)
    residues = aggregate.residues.copy()
    residues[0, position] = (int(residues[0, position]) + change) % MODULUS
    refused(holder, replace(aggregate, residues=residues), ReleaseError)


def test_half_a_step_on_one_coefficient_is_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    off = np.zeros((PLAN.blocks, 4096), np.int64)
    off[0, 9] = 1 << (PLAN.layouts[0].shift - 1)
    aggregate = forged(holder, uploads, uploads)
    residues = (aggregate.residues + ring.to_ntt(off)) % np.uint64(MODULUS)
    refused(holder, replace(aggregate, residues=residues), ReleaseError)


@pytest.mark.parametrize("shape", [(0, 4096), (2, 4096), (1, 4095), (4096,), (1, 1, 4096)])
def test_sums_of_another_shape_are_refused(
    holder: KeyHolder, uploads: list[Upload], shape: tuple[int, ...]
) -> None:
    assert PLAN.blocks == 1
    manifest = tuple(upload.admission for upload in uploads)
    refused(holder, Aggregate(manifest, np.zeros(shape, np.uint64)), ReleaseError)


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 64) - 1])
def test_residues_of_q_or_more_are_refused(
    holder: KeyHolder, uploads: list[Upload], value: int
) -> None:
    aggregate = forged(holder, uploads, uploads)
    residues = aggregate.residues.copy()
    residues[0, 4095] = value
    refused(holder, replace(aggregate, residues=residues), ReleaseError)


def test_residues_of_a_signed_type_are_refused(holder: KeyHolder, uploads: list[Upload]) -> None:
    aggregate = forged(holder, uploads, uploads)
    negative = -aggregate.residues.astype(np.int64) - 1
    refused(holder, replace(aggregate, residues=negative), ReleaseError)  # type: ignore[arg-type]


# --- contexts -------------------------------------------------------------------------------------


def foreign_context(holder: KeyHolder, field: str) -> RoundContext:
    mine = holder.context
    changes: dict[str, object] = {
        "task_id": "other",
        "round_number": 2,
        "attempt": 2,
        "model_digest": b"m" * 32,
    }
    arguments: dict[str, object] = {
        "task_id": mine.id.task_id,
        "round_number": mine.id.round_number,
        "attempt": mine.id.attempt,
        "model_digest": mine.id.model_digest,
    }
    plan, key = mine.plan, mine.round_key
    if field == "plan_digest":
        plan = plan_integers(SIZE, max_clients=9, max_abs=100)
    elif field == "round_key_id":
        key = KeyHolder(PLAN).context.round_key
    else:
        arguments[field] = changes[field]
    return RoundContext.create(plan, key, **arguments)  # type: ignore[arg-type]


FIELDS = ["task_id", "round_number", "attempt", "plan_digest", "model_digest", "round_key_id"]


@pytest.mark.parametrize("field", FIELDS)
def test_an_upload_of_another_context_is_refused_by_everybody(
    holder: KeyHolder, uploads: list[Upload], field: str
) -> None:
    stranger = raw_upload(foreign_context(holder, field), [values_of(5)], IDENTITIES[5])
    with pytest.raises(ContextError, match=field):
        Aggregator(holder.context).add(stranger)
    with pytest.raises(ContextError, match=field):
        holder.admit(stranger.admission)
    refused(holder, forged(holder, [*uploads, stranger], [*uploads, stranger]), ContextError)


@pytest.mark.parametrize("field", FIELDS)
def test_an_upload_of_another_context_under_a_receipt_of_this_one_does_not_open(
    holder: KeyHolder, uploads: list[Upload], field: str
) -> None:
    # The client itself signs again for this context, and seals its seed to this round's key, but
    # the ciphertext was made with other public polynomials.
    identity, context = IDENTITIES[5], foreign_context(holder, field)
    seeds = seeds_of(lambda: raw_upload(context, [values_of(5)], identity))
    payload, seed = seeds[0].payload, seeds[1]
    digest = hashlib.sha256(payload).digest()
    info = seal_info(holder.context.id.digest, identity.public, digest)
    sealed = seal(seed, holder.context.round_key, info)
    receipt = Receipt.sign(identity, holder.context.id, digest, sealed)
    stranger = Upload(Admission(receipt, sealed), payload)
    Aggregator(holder.context).add(stranger)
    refused(holder, forged(holder, [*uploads, stranger], [*uploads, stranger]), ReleaseError)


def seeds_of(make: Callable[[], Upload]) -> tuple[Upload, bytes]:
    """An upload together with its seed, as only its own client knows it."""
    seeds: list[bytes] = []
    genuine = encryptor.fresh_seed

    def spy(*arguments: object) -> bytes:
        seeds.append(genuine(*arguments))  # type: ignore[arg-type]
        return seeds[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryptor, "fresh_seed", spy)
        upload = make()
    return upload, seeds[0]


# --- seeds --------------------------------------------------------------------------------


def test_seeds_swapped_between_clients_are_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    first, second = uploads[0].admission, uploads[1].admission
    swapped = (
        Admission(first.receipt, second.sealed_seed),
        Admission(second.receipt, first.sealed_seed),
        *(upload.admission for upload in uploads[2:]),
    )
    refused(holder, Aggregate(swapped, total(holder.context, uploads)), ReceiptError)


def test_a_client_cannot_adopt_the_sealed_seed_of_another(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    # It signs the victim's payload and sealed seed as its own; the seal names the victim's key.
    thief = resigned(uploads[0], IDENTITIES[5])
    with pytest.raises(SealError):
        holder.admit(thief.admission)
    refused(holder, forged(holder, [*uploads[1:], thief], uploads), SealError)


def test_a_client_cannot_put_its_seed_under_another_upload(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    mine = raw_upload(holder.context, [values_of(5)], IDENTITIES[5])
    other = replace(mine, payload=uploads[0].payload)
    with pytest.raises(MalformedError, match="SHA-256"):
        Aggregator(holder.context).add(other)
    digest = uploads[0].admission.receipt.upload_digest
    receipt = Receipt.sign(IDENTITIES[5], holder.context.id, digest, mine.admission.sealed_seed)
    with pytest.raises(SealError):
        holder.admit(Admission(receipt, mine.admission.sealed_seed))


def test_two_uploads_under_one_seed_are_refused(holder: KeyHolder) -> None:
    upload, seed = seeds_of(lambda: raw_upload(holder.context, [values_of(0)], IDENTITIES[0]))
    digest = hashlib.sha256(b"another ciphertext under the same seed").digest()
    info = seal_info(holder.context.id.digest, IDENTITIES[1].public, digest)
    sealed = seal(seed, holder.context.round_key, info)
    receipt = Receipt.sign(IDENTITIES[1], holder.context.id, digest, sealed)
    holder.admit(upload.admission)
    with pytest.raises(SealError, match="taken"):
        holder.admit(Admission(receipt, sealed))


def test_the_same_upload_of_two_clients_is_refused(holder: KeyHolder) -> None:
    # Two colluding clients that share a seed, so that both receipts and both seals are valid.
    upload, seed = seeds_of(lambda: raw_upload(holder.context, [values_of(0)], IDENTITIES[0]))
    digest = upload.admission.receipt.upload_digest
    info = seal_info(holder.context.id.digest, IDENTITIES[1].public, digest)
    twin = resigned(upload, IDENTITIES[1], seal(seed, holder.context.round_key, info))
    holder.admit(upload.admission)
    with pytest.raises(DuplicateError):
        holder.admit(twin.admission)


def test_only_admitted_uploads_are_opened(holder: KeyHolder, uploads: list[Upload]) -> None:
    for upload in uploads[:4]:
        holder.admit(upload.admission)
    digests = [upload.admission.receipt.upload_digest for upload in uploads]
    with pytest.raises(SealError, match="admitted"):
        holder.release_admitted(digests, total(holder.context, uploads))
    with pytest.raises(DuplicateError):
        holder.release_admitted([*digests[:3], digests[0]], total(holder.context, uploads))
    with pytest.raises(QuorumError):
        holder.release_admitted(digests[:2], total(holder.context, uploads[:2]))
    with pytest.raises(ReleaseError):
        holder.release_admitted(digests[:3], total(holder.context, uploads[:4]))
    release = holder.release_admitted(digests[:4], total(holder.context, uploads[:4]))
    assert (release.sums[0] == 10).all()


@pytest.mark.parametrize("patched", ["seed only", "seed and hash", "own signature"])
def test_a_server_that_reseals_its_own_seeds_does_not_single_out_its_victim(
    holder: KeyHolder, uploads: list[Upload], patched: str
) -> None:
    # The attack: known seeds for all clients but one, and ciphertexts of zero under them; whatever
    # opens is then the victim's update alone.
    victim, *others = uploads
    fakes = []
    for upload in others:
        key = upload.admission.receipt.client_key
        made, seed = seeds_of(lambda: raw_upload(holder.context, [np.zeros(SIZE, np.int64)]))
        digest = made.admission.receipt.upload_digest
        sealed = seal(
            seed, holder.context.round_key, seal_info(holder.context.id.digest, key, digest)
        )
        changes: dict[str, object] = {"upload_digest": digest}
        if patched != "seed only":
            changes["sealed_seed_sha256"] = hashlib.sha256(sealed).digest()
        if patched == "own signature":
            own = Receipt.sign(SigningKey.generate(), holder.context.id, digest, sealed)
            changes["signature"] = own.signature
        receipt = replace(upload.admission.receipt, **changes)  # type: ignore[arg-type]
        fakes.append(Upload(Admission(receipt, sealed), made.payload))
    for fake in fakes:
        with pytest.raises(ReceiptError):
            holder.admit(fake.admission)
    refused(holder, forged(holder, [victim, *fakes], [victim, *fakes]), ReceiptError)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_signed_seed_of_another_size_is_refused(holder: KeyHolder, size: int) -> None:
    upload = raw_upload(holder.context, [values_of(0)], IDENTITIES[0])
    digest = upload.admission.receipt.upload_digest
    info = seal_info(holder.context.id.digest, IDENTITIES[0].public, digest)
    odd = resigned(upload, IDENTITIES[0], seal(bytes(size), holder.context.round_key, info))
    with pytest.raises(SealError):
        holder.admit(odd.admission)


def test_a_refused_admission_leaves_room_for_the_right_one(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    damaged = resigned(uploads[0], IDENTITIES[0], bytes(len(uploads[0].admission.sealed_seed)))
    with pytest.raises(SealError):
        holder.admit(damaged.admission)
    holder.admit(uploads[0].admission)


# --- one release ----------------------------------------------------------------------------------


def test_the_same_manifest_gets_the_same_bytes_in_any_order(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    aggregate = forged(holder, uploads, uploads)
    first = holder.release(aggregate)
    again = holder.release(replace(aggregate, manifest=aggregate.manifest[::-1]))
    assert [part.tobytes() for part in again.sums] == [part.tobytes() for part in first.sums]
    assert again.sha256 == first.sha256
    assert again.contributors == first.contributors


def test_another_manifest_is_refused_after_a_release(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    holder.release(forged(holder, uploads, uploads))
    # One client fewer: the difference of the two releases would be that client's update.
    refused(holder, forged(holder, uploads[:4], uploads[:4]), ClosedError)
    refused(holder, forged(holder, uploads, uploads[:4]), ClosedError)
    late = raw_upload(holder.context, [values_of(5)], IDENTITIES[5])
    refused(holder, forged(holder, [*uploads, late], [*uploads, late]), ClosedError)
    with pytest.raises(ClosedError):
        holder.admit(late.admission)


def test_a_refused_release_does_not_end_the_round(holder: KeyHolder, uploads: list[Upload]) -> None:
    refused(holder, forged(holder, uploads, uploads[1:]), ReleaseError)
    assert (holder.release(forged(holder, uploads, uploads)).sums[0] == 15).all()


def test_a_caller_cannot_change_what_is_read_again(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    aggregate = forged(holder, uploads, uploads)
    first = holder.release(aggregate)
    before = first.sha256
    with contextlib.suppress(ValueError):
        first.sums[0][:] = 0
    assert holder.release(aggregate).sha256 == before


def test_fewer_than_min_clients_are_refused_by_server_and_key_holder(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    server = Aggregator(holder.context)
    for count in range(3):
        assert server.contributors == count
        with pytest.raises(QuorumError, match=f"got {count}"):
            server.aggregate()
        refused(holder, forged(holder, uploads[:count], uploads[:count]), QuorumError)
        server.add(uploads[count])
    assert len(server.aggregate().manifest) == 3


def test_more_than_max_clients_are_refused_by_server_and_key_holder() -> None:
    plan = plan_integers(5, max_clients=4, max_abs=1)
    holder = KeyHolder(plan)
    uploads = [raw_upload(holder.context, [np.ones(5, np.int64)]) for _ in range(5)]
    server = Aggregator(holder.context)
    for upload in uploads[:4]:
        server.add(upload)
    with pytest.raises(ClosedError, match="max_clients"):
        server.add(uploads[4])
    assert server.add(uploads[0]) is False
    refused(holder, forged(holder, uploads, uploads), ClosedError)
    assert (holder.release(server.aggregate()).sums[0] == 4).all()


def test_an_abandoned_round_releases_nothing(holder: KeyHolder, uploads: list[Upload]) -> None:
    for upload in uploads:
        holder.admit(upload.admission)
    holder.close()
    holder.close()
    refused(holder, forged(holder, uploads, uploads), ClosedError)
    with pytest.raises(ClosedError):
        holder.admit(uploads[0].admission)


# --- the server's bookkeeping ---------------------------------------------------------------------


def test_a_retry_changes_nothing_and_a_second_upload_is_refused(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    server = Aggregator(holder.context)
    for upload in uploads:
        assert server.add(upload) is True
    before = server.aggregate()
    assert server.add(uploads[0]) is False
    second = raw_upload(holder.context, [values_of(9)], IDENTITIES[0])
    with pytest.raises(DuplicateError):
        server.add(second)
    holder.admit(uploads[0].admission)
    holder.admit(uploads[0].admission)
    with pytest.raises(DuplicateError):
        holder.admit(second.admission)
    after = server.aggregate()
    assert np.array_equal(before.residues, after.residues)
    assert before.manifest == after.manifest


def broken(uploads: list[Upload]) -> Iterator[tuple[Upload, type[UploadError]]]:
    upload, other = uploads[0], uploads[1]
    payload = upload.payload
    yield replace(upload, payload=b""), MalformedError
    yield replace(upload, payload=payload[:-1]), MalformedError
    yield replace(upload, payload=payload + b"\0"), MalformedError
    yield replace(upload, payload=payload[:-1] + bytes([payload[-1] ^ 1])), MalformedError
    yield replace(upload, payload=other.payload), MalformedError
    yield replace(upload, admission=other.admission), MalformedError
    seed = upload.admission.sealed_seed
    yield (
        replace(upload, admission=replace(upload.admission, sealed_seed=seed[:-1])),
        ReceiptError,
    )
    receipt = replace(upload.admission.receipt, client_key=IDENTITIES[7].public)
    yield replace(upload, admission=Admission(receipt, seed)), ReceiptError


def test_a_refused_upload_leaves_no_trace(holder: KeyHolder, uploads: list[Upload]) -> None:
    server = Aggregator(holder.context)
    for upload in uploads[1:]:
        server.add(upload)
    before = server.aggregate()
    for upload, error in broken(uploads):
        with pytest.raises(error):
            server.add(upload)
        assert server.contributors == 4
    after = server.aggregate()
    assert np.array_equal(before.residues, after.residues)
    assert before.manifest == after.manifest
    server.add(uploads[0])
    assert (holder.release(server.aggregate()).sums[0] == 15).all()


@pytest.mark.parametrize("value", [MODULUS, MODULUS + 1, (1 << 56) - 1])
def test_a_signed_upload_with_a_residue_of_q_or_more_is_refused(
    holder: KeyHolder, uploads: list[Upload], value: int
) -> None:
    residues = widen(uploads[0].payload, PLAN.blocks).copy()
    residues[0, 77] = value
    payload = narrow(residues)
    identity = IDENTITIES[6]
    sealed = uploads[0].admission.sealed_seed
    digest = hashlib.sha256(payload).digest()
    receipt = Receipt.sign(identity, holder.context.id, digest, sealed)
    server = Aggregator(holder.context)
    with pytest.raises(MalformedError, match="position=77"):
        server.add(Upload(Admission(receipt, sealed), payload))
    assert server.contributors == 0


def test_the_size_is_checked_before_anything_dearer(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    # Both the size and the receipt are wrong: no signature is verified for bytes of another size.
    stranger = replace(uploads[0].admission, sealed_seed=b"")
    with pytest.raises(MalformedError, match="ciphertexts"):
        Aggregator(holder.context).add(Upload(stranger, b"short"))


def test_an_aggregate_does_not_change_when_the_server_goes_on(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    server = Aggregator(holder.context)
    for upload in uploads[:3]:
        server.add(upload)
    early = server.aggregate()
    server.add(uploads[3])
    assert len(early.manifest) == 3
    assert (holder.release(early).sums[0] == 6).all()


# --- secrets --------------------------------------------------------------------------------------


def reachable(root: object) -> Iterator[object]:
    """Everything that an object of ours still refers to."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        yield item
        if not callable(item):
            waiting.extend(gc.get_referents(item))


@pytest.mark.parametrize("end", ["release", "close"])
def test_secrets_are_gone_when_the_round_is_over(end: str) -> None:
    holder = KeyHolder(PLAN)
    made = [
        seeds_of(lambda client=client: raw_upload(holder.context, [values_of(client)]))
        for client in range(3)
    ]
    uploads, seeds = [upload for upload, _ in made], {seed for _, seed in made}
    pair = weakref.ref(holder._pair)
    for upload in uploads:
        holder.admit(upload.admission)
    held = {item for item in reachable(holder) if isinstance(item, bytes)}
    assert seeds <= held
    if end == "release":
        holder.release(forged(holder, uploads, uploads))
    else:
        holder.close()
    gc.collect()
    assert pair() is None
    held = {item for item in reachable(holder) if isinstance(item, bytes)}
    assert not seeds & held


def test_no_repr_shows_a_secret() -> None:
    plan = plan_tensors({"w": (5,)}, max_clients=4, clip=1.0)
    holder = KeyHolder(plan)
    update = np.array([0.515625, -0.515625, 0.015625, 0.1, 0.2], np.float32)
    quantized = quantize(
        plan,
        {"update": update},
        samples=1,
        rotation=holder.context.rotation,
        randomness=Stream(bytes(32)),
    )
    private = [identity.to_bytes() for identity in IDENTITIES]
    made = [
        seeds_of(
            lambda identity=identity: encryptor.encrypt_quantized(
                holder.context, quantized, identity
            )
        )
        for identity in IDENTITIES[:3]
    ]
    uploads = [upload for upload, _ in made]
    for upload in uploads:
        holder.admit(upload.admission)
    server = Aggregator(holder.context)
    for upload in uploads:
        server.add(upload)
    aggregate = server.aggregate()
    objects: list[object] = [
        holder,
        holder._pair,
        server,
        Encryptor(holder.context, IDENTITIES[0], Stream(bytes(32))),
        quantized,
        aggregate,
        *uploads,
        *(upload.admission for upload in uploads),
        *(upload.admission.receipt for upload in uploads),
        *IDENTITIES,
        holder.context,
        holder.release(aggregate),
    ]
    secrets = [seed for _, seed in made] + private
    secrets += [upload.admission.sealed_seed[-16:] for upload in uploads]
    secrets += [upload.payload[:16] for upload in uploads]
    secrets += [identity.public for identity in IDENTITIES]
    numbers = [str(value) for value in quantized[0].values if abs(value) > 9]
    for item in objects:
        for text in (repr(item), str(item), f"{item}"):
            assert_clean(text, secrets)
            assert not any(f" {n}," in text or f"[{n}" in text for n in numbers)


def assert_clean(text: str, secrets: list[bytes]) -> None:
    for secret in secrets:
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text
        assert str(list(secret))[1:-1] not in text


def test_no_error_shows_a_secret_a_value_or_a_client(
    holder: KeyHolder, uploads: list[Upload]
) -> None:
    value = 7654321
    small = Encryptor(holder.context, IDENTITIES[0])
    other = raw_upload(KeyHolder(PLAN, task_id="t").context, [values_of(0)], IDENTITIES[0])
    second = raw_upload(holder.context, [values_of(1)], IDENTITIES[0])
    thief = resigned(uploads[0], IDENTITIES[5])
    server = Aggregator(holder.context)
    server.add(uploads[0])
    holder.admit(uploads[0].admission)
    attempts: list[Callable[[], object]] = [
        lambda: small.encrypt(np.full(SIZE, value)),
        lambda: small.encrypt(np.full(SIZE + 1, value)),
        lambda: small.encrypt(np.full(SIZE, float(value))),
        lambda: server.add(other),
        lambda: server.add(second),
        lambda: server.add(thief),
        lambda: server.aggregate(),
        lambda: holder.admit(other.admission),
        lambda: holder.admit(second.admission),
        lambda: holder.admit(thief.admission),
        lambda: holder.release(forged(holder, uploads, uploads[1:])),
        lambda: holder.release(forged(holder, uploads[:2], uploads[:2])),
        lambda: holder.release(forged(holder, [uploads[0]] * 3, uploads)),
        lambda: SigningKey.from_bytes(IDENTITIES[0].to_bytes()[:-1]),
        *(lambda upload=upload: server.add(upload) for upload, _ in broken(uploads)),
    ]
    secrets = [identity.public for identity in IDENTITIES]
    secrets += [identity.to_bytes()[:-1] for identity in IDENTITIES]
    secrets += [upload.admission.sealed_seed[-16:] for upload in [*uploads, other, second]]
    secrets += [upload.payload[:16] for upload in [*uploads, other, second]]
    raised = 0
    for attempt in attempts:
        try:
            attempt()
        except SecaggError as error:
            raised += 1
            shown: BaseException | None = error
            while shown is not None:
                assert str(value) not in str(shown)
                assert_clean(f"{shown} {shown!r}", secrets)
                shown = shown.__cause__ or (
                    None if shown.__suppress_context__ else shown.__context__
                )
    # Thief's upload is the victim's ciphertext under a valid receipt: only the key holder can tell.
    assert raised == len(attempts) - 1


def test_the_model_digest_is_part_of_the_round(holder: KeyHolder) -> None:
    assert holder.context.id.model_digest == NO_MODEL
    plan: Plan = holder.context.plan
    assert KeyHolder(plan, model_digest=b"x" * 32).context.id.digest != holder.context.id.digest
