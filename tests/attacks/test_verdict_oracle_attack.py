"""A server, or a key holder, for which verdicts are questions.

A server sends something else than a sketch: a functional of its choice of one upload. The key
holder cannot tell, and says on which side of the bound it lies: one bit. It says so once an upload
and attempt, and signs what it was asked; the client recomputes that, and has the proof.

A key holder refuses clients as it likes, so that those are left out of the sum that it opens. With
clients of its own that can leave one client and them. That one is not stopped by a norm check but
by `min_clients`; the clients that were refused know it, and can show it.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    key_of,
    name_of,
    named,
    read,
    residues,
    signer,
    summed,
)
from sketch_views import encrypted, public

from secagg import norm_check, onetime, ring
from secagg.challenger import Challenger
from secagg.context import RoundContext
from secagg.direction import Direction
from secagg.encryptor import encrypt_quantized
from secagg.errors import ClosedError, DuplicateError, ForgedSketchError, NormError
from secagg.keyholder import KeyHolder
from secagg.norm_check import passes
from secagg.parameters import MODULUS, RING_DEGREE, FloatSegment, NormCheck
from secagg.planner import plan_tensors
from secagg.quantize import Quantized, rotated
from secagg.recheck import require_asked
from secagg.sketch_shape import norm_shapes
from secagg.sketches import Rows, Sketch, sketch
from secagg.upload import Upload
from secagg.verdicts import Verdict

PLAN = plan_tensors(RING_DEGREE, max_clients=32, clip=1.0, norm_check=NormCheck())
(LAYOUT,) = PLAN.layouts
(SHAPE,) = norm_shapes(PLAN)
SECRET = named("challenge secret")
NAMES = [f"client {number}" for number in range(24)]


def update(name: str) -> Integers:
    drawn = np.random.default_rng(list(name.encode())).normal(0, 20, RING_DEGREE)
    return np.clip(np.rint(drawn), -60, 60).astype(np.int64)


def uploads(holder: KeyHolder, challenger: Challenger, names: list[str]) -> list[Upload]:
    sent = []
    for name in names:
        who = signer(name)
        commitment = challenger.commitment(who.public)
        sent.append(encrypt_quantized(holder.context, [Quantized(update(name))], who, commitment))
        holder.admit(sent[-1].admission)
    return sent


def question(context: RoundContext, upload: Upload, coordinate: int) -> Sketch:
    """Is this coordinate positive? An update is refused if so.

    All rows show that one coefficient, many times over, and almost as much beside it as passes.
    """
    gain, margin = 64, 32
    beside = int(1.2 * LAYOUT.norm) - margin
    (ciphertext,) = ring.centre(ring.lift(ring.from_ntt(residues(upload))))
    value = (gain * int(ciphertext[coordinate]) + (beside << LAYOUT.shift)) % MODULUS
    # Rounded at random, so that the rows' errors are not the same and average out.
    mask = np.array([gain * int(each) % MODULUS for each in public(context)[0]], dtype=np.uint64)
    errors = np.random.default_rng(1).integers(
        0, 256**SHAPE.dropped, (SHAPE.rows, RING_DEGREE), dtype=np.uint64
    )
    masks = (mask + errors) % np.uint64(MODULUS) >> np.uint64(8 * SHAPE.dropped)
    shape = (SHAPE.rows, SHAPE.values)
    rows = Rows(
        SHAPE,
        np.full(shape, coordinate, dtype=np.uint16),
        np.full(shape, value, dtype=np.uint64),
        masks,
    )
    return Sketch(name_of(upload), (rows,))


class Asked:
    """A round in which the server asks about one coordinate of each client."""

    def __init__(self) -> None:
        self.holder = KeyHolder(PLAN)
        self.context = self.holder.context
        self.challenger = Challenger(self.context, SECRET)
        self.sent = uploads(self.holder, self.challenger, NAMES)
        self.coordinates = dict(zip(NAMES, range(100, 4000, 50), strict=False))
        for name, upload in zip(NAMES, self.sent, strict=True):
            self.holder.submit_sketch(question(self.context, upload, self.coordinates[name]))


def test_a_malicious_server_gets_one_bit_of_each_upload() -> None:
    """Right 24 times of 24; by chance, 6e-8."""
    round_ = Asked()
    for name, verdict in zip(NAMES, round_.holder.verdicts(), strict=True):
        assert verdict.accepted == (update(name)[round_.coordinates[name]] <= 0)


def test_it_gets_no_second_one() -> None:
    round_ = Asked()
    upload = round_.sent[0]
    for other in (question(round_.context, upload, 7), round_.challenger.sketch(upload)):
        with pytest.raises(DuplicateError):
            round_.holder.submit_sketch(other)
    round_.holder.verdicts()
    # Nor by another upload of the same client, or of another one, once it has been told anything.
    again = encrypt_quantized(
        round_.context,
        [Quantized(update("client 0"))],
        signer("newcomer"),
        round_.challenger.commitment(signer("newcomer").public),
    )
    with pytest.raises(ClosedError):
        round_.holder.admit(again.admission)


def test_nor_any_before_all_have_been_asked() -> None:
    """So that no question can be made to fit the answer to another."""
    holder = KeyHolder(PLAN)
    challenger = Challenger(holder.context, SECRET)
    first, _ = uploads(holder, challenger, NAMES[:2])
    holder.submit_sketch(challenger.sketch(first))
    with pytest.raises(ClosedError):
        holder.verdicts()


def test_the_client_finds_out_and_has_the_key_holders_signature_for_it() -> None:
    round_ = Asked()
    verdict, upload = round_.holder.verdicts()[0], round_.sent[0]
    verdict.verify(round_.context.id, [round_.holder.identity_key])
    key = round_.challenger.key(signer(NAMES[0]).public)
    with pytest.raises(ForgedSketchError):
        require_asked(verdict, round_.context, upload, key)
    # Nor is there a challenge that gives this sketch, or that the server may show in its place.
    with pytest.raises(ForgedSketchError):
        require_asked(verdict, round_.context, upload, named("another challenge"))
    assert verdict.sketch_digest == question(round_.context, upload, 100).digest


def test_an_honest_server_passes_the_same_recheck() -> None:
    holder = KeyHolder(PLAN)
    challenger = Challenger(holder.context, SECRET)
    sent = uploads(holder, challenger, NAMES[:3])
    for upload in sent:
        holder.submit_sketch(challenger.sketch(upload))
    for upload, verdict in zip(sent, holder.verdicts(), strict=True):
        key = challenger.key(upload.admission.receipt.client_key)
        require_asked(verdict, holder.context, upload, key)
        assert verdict.accepted


def test_every_verdict_takes_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that how long it takes is no second bit: which of the bounds it was, say."""
    plan = plan_tensors(
        2 * RING_DEGREE,
        max_clients=8,
        clip=1.0,
        weighting="samples",
        norm_check=NormCheck(min_cosine=0.0),
    )
    holder = KeyHolder(plan)
    (segment,), (layout,), context = plan.segments, plan.layouts, holder.context
    assert isinstance(segment, FloatSegment)
    towards = np.random.default_rng(2).normal(size=segment.parameters).astype(np.float32)
    direction = Direction.of(segment, towards, context.rotation)
    steps = rotated(segment, towards / np.linalg.norm(towards), context.rotation) / segment.step
    weight = Direction.of_weight(segment, context.rotation).signs
    honest = np.rint(0.9 * steps + weight * np.linalg.norm(steps) / sqrt(layout.values))
    cases = {
        "within all bounds": honest,
        "too long": 3 * honest,
        "without the weight for it": np.rint(0.9 * steps),
        "against the direction": honest - 2 * np.rint(0.9 * steps),
    }
    ours, looked = norm_check._masked, list[Rows]()

    def counted(rows: Rows, key: Integers) -> Residues:
        looked.append(rows)
        return ours(rows, key)

    monkeypatch.setattr(norm_check, "_masked", counted)
    verdicts = {}
    for name, values in cases.items():
        seed = named("seed", name)
        ciphertexts = encrypted(context, [values.astype(np.int64)], seed)
        shown = sketch(context, named(name), [ciphertexts], named("challenge"), direction)
        looked.clear()
        verdicts[name] = passes(plan, onetime.secret(seed), shown)
        assert len(looked) == 3  # norm, weight, direction
    assert verdicts == {name: name == "within all bounds" for name in cases}


# --- a key holder that lies -----------------------------------------------------------------------


def test_false_verdicts_choose_who_is_in_the_sum() -> None:
    """Known limit: with min_clients - 1 clients of its own, the sum it opens is one update.

    As it is where a server chooses the cohort. What is chosen here is on record: each client that
    was left out holds a signed verdict that its own key and the challenge show to be false.
    """
    holder = KeyHolder(PLAN)
    challenger = Challenger(holder.context, SECRET)
    names = ["victim", "puppet", "other puppet", "honest", "other honest"]
    sent = dict(zip(names, uploads(holder, challenger, names), strict=True))
    identity = signer("key holder")
    kept = [sent[name] for name in names[: PLAN.min_clients]]
    opened = {name: holder._seeds[name_of(upload)] for name, upload in sent.items()}
    key = key_of([opened[name] for name in names[: PLAN.min_clients]])
    (total,) = read(holder.context, key, summed(kept), clients=PLAN.min_clients)
    assert np.array_equal(total - update("puppet") - update("other puppet"), update("victim"))

    left_out = sent["honest"]
    asked = challenger.sketch(left_out)
    receipt = left_out.admission.receipt
    false = Verdict.sign(identity, receipt, asked.digest, accepted=False)
    false.verify(holder.context.id, [identity.public])
    require_asked(false, holder.context, left_out, challenger.key(receipt.client_key))
    assert passes(PLAN, onetime.secret(opened["honest"]), asked) != false.accepted


def test_a_false_yes_is_no_way_around_an_honest_key_holder() -> None:
    """What the server says of a verdict does not count: the key holder opens what it accepted."""
    holder = KeyHolder(PLAN)
    challenger = Challenger(holder.context, SECRET)
    sent = uploads(holder, challenger, NAMES[:4])
    for number, upload in enumerate(sent):
        sketch = challenger.sketch(upload)
        if number == 0:  # one that does not pass
            (rows,) = sketch.norms
            sketch = replace(sketch, norms=(replace(rows, values=rows.values[::-1].copy()),))
        holder.submit_sketch(sketch)
    assert [each.accepted for each in holder.verdicts()] == [False, True, True, True]
    with pytest.raises(NormError):
        holder.release_admitted([name_of(each) for each in sent], summed(sent))
    rest = sent[1:]
    release = holder.release_admitted([name_of(each) for each in rest], summed(rest))
    assert np.array_equal(release.sums[0], sum(update(name) for name in NAMES[1:4]))
