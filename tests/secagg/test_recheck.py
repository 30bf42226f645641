"""A client that recomputes what was judged: honest servers pass, every other one is caught."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cohort
import numpy as np
import pytest

from secagg.challenger import Challenger
from secagg.challenges import commitment
from secagg.direction import Direction
from secagg.encryptor import Encryptor
from secagg.errors import ContextError, ForgedSketchError, MalformedError, ReceiptError
from secagg.keyholder import KeyHolder
from secagg.parameters import FloatSegment, NormCheck, Plan
from secagg.planner import plan_tensors
from secagg.recheck import require_asked
from secagg.sketches import Sketch, sketch
from secagg.upload import Upload
from secagg.verdicts import Verdict

SIZE = 9000
PLAN = plan_tensors(SIZE, max_clients=5, clip=1.0, norm_check=NormCheck(sketches=8))
DIRECTED = plan_tensors(
    SIZE, max_clients=5, clip=1.0, norm_check=NormCheck(sketches=8, min_cosine=-0.5)
)


@dataclass
class Round:
    """A key holder, an honest server's challenger, and one client's upload."""

    holder: KeyHolder
    challenger: Challenger
    direction: Direction | None
    upload: Upload

    @property
    def key(self) -> bytes:
        return self.challenger.key(self.upload.admission.receipt.client_key)

    def verdict(self, made: Sketch) -> Verdict:
        self.holder.admit(self.upload.admission)
        self.holder.submit_sketch(made)
        (verdict,) = self.holder.verdicts()
        verdict.verify(self.holder.context.id, [self.holder.identity_key])
        return verdict

    def require(
        self, verdict: Verdict, key: bytes, *, upload: Upload | None = None, blind: bool = False
    ) -> None:
        require_asked(
            verdict,
            self.holder.context,
            upload or self.upload,
            key,
            None if blind else self.direction,
        )


def round_of(plan: Plan = PLAN, *, secret: bytes = b"s" * 32) -> Round:
    holder = KeyHolder(plan)
    segment, drawn = plan.segments[0], np.random.default_rng(1)
    assert isinstance(segment, FloatSegment)
    direction = None
    if plan.norm_check is not None and plan.norm_check.min_cosine is not None:
        vector = drawn.standard_normal(SIZE).astype(np.float32)
        direction = Direction.of(segment, vector, holder.context.rotation)
    challenger = Challenger(holder.context, secret, direction)
    upload = encrypted(holder, challenger)
    return Round(holder, challenger, direction, upload)


def encrypted(holder: KeyHolder, challenger: Challenger, index: int = 0) -> Upload:
    identity = cohort.identity(index)
    update = np.random.default_rng(index).standard_normal(SIZE) / 200
    bound = challenger.commitment(identity.public)
    return Encryptor(holder.context, identity, commitment=bound).encrypt(update)


@pytest.mark.parametrize("plan", [PLAN, DIRECTED], ids=["norm", "direction"])
def test_an_honest_server_passes(plan: Plan) -> None:
    it = round_of(plan)
    made = it.challenger.sketch(it.upload)
    assert (made.direction is not None) == (plan is DIRECTED)
    it.require(it.verdict(made), it.key)


def test_a_refusal_is_rechecked_like_anything_else() -> None:
    it = round_of()
    verdict = it.verdict(it.challenger.sketch(it.upload))
    refused = Verdict.sign(
        it.holder._identity, verdict.receipt, verdict.sketch_digest, accepted=False
    )
    it.require(refused, it.key)


def test_another_key_than_the_one_committed_to_is_noticed() -> None:
    it = round_of()
    verdict = it.verdict(it.challenger.sketch(it.upload))
    for key in (bytes(32), b"", commitment(it.key), it.key[:-1] + bytes([it.key[-1] ^ 1])):
        with pytest.raises(ForgedSketchError, match="committed to"):
            it.require(verdict, key)


def test_a_question_chosen_after_the_upload_is_noticed_whichever_key_is_shown() -> None:
    it = round_of()
    receipt = it.upload.admission.receipt
    chosen = b"chosen to fit the upload".ljust(32)
    residues = it.upload.validate(it.holder.context)
    verdict = it.verdict(sketch(it.holder.context, receipt.upload_digest, [residues], chosen))
    with pytest.raises(ForgedSketchError, match="committed to"):
        it.require(verdict, chosen)
    with pytest.raises(ForgedSketchError, match="something else"):
        it.require(verdict, it.key)


def test_a_sketch_of_something_else_than_the_upload_is_noticed() -> None:
    it = round_of()
    receipt = it.upload.admission.receipt
    others = encrypted(it.holder, it.challenger, 1).validate(it.holder.context)
    verdict = it.verdict(sketch(it.holder.context, receipt.upload_digest, [others], it.key))
    with pytest.raises(ForgedSketchError, match="something else"):
        it.require(verdict, it.key)


@pytest.mark.parametrize("part", ["values", "masks", "positions"])
def test_one_altered_number_is_noticed(part: str) -> None:
    it = round_of()
    made = it.challenger.sketch(it.upload)
    rows = made.norms[0]
    numbers = getattr(rows, part).copy()
    numbers[-1, -1] ^= numbers.dtype.type(1)
    altered = replace(made, norms=(replace(rows, **{part: numbers}),))
    with pytest.raises(ForgedSketchError, match="something else"):
        it.require(it.verdict(altered), it.key)


def test_a_direction_left_out_or_replaced_is_noticed() -> None:
    for lie in ("left out", "replaced"):
        it = round_of(DIRECTED)
        made = it.challenger.sketch(it.upload)
        assert it.direction is not None
        other = None if lie == "left out" else Direction(-it.direction.signs)
        receipt = it.upload.admission.receipt
        residues = it.upload.validate(it.holder.context)
        forged = sketch(it.holder.context, receipt.upload_digest, [residues], it.key, other)
        assert forged.norms[0].to_bytes() == made.norms[0].to_bytes()
        with pytest.raises(ForgedSketchError, match="something else"):
            it.require(it.verdict(forged), it.key)


def test_a_direction_that_was_never_asked_for_is_noticed() -> None:
    it = round_of(DIRECTED)
    verdict = it.verdict(it.challenger.sketch(it.upload))
    with pytest.raises(ForgedSketchError):
        it.require(verdict, it.key, blind=True)


def test_a_verdict_on_another_upload_is_not_about_this_one() -> None:
    it = round_of()
    verdict = it.verdict(it.challenger.sketch(it.upload))
    other = encrypted(it.holder, it.challenger, 1)
    with pytest.raises(ContextError, match="upload that was sent"):
        it.require(verdict, it.key, upload=other)
    again = encrypted(it.holder, it.challenger, 0)  # the same client, encrypted once more
    with pytest.raises(ContextError, match="upload that was sent"):
        it.require(verdict, it.key, upload=again)


def test_an_upload_that_was_damaged_since_is_not_held_against_the_server() -> None:
    it = round_of()
    verdict = it.verdict(it.challenger.sketch(it.upload))
    damaged = replace(it.upload, payload=bytes(len(it.upload.payload)))
    with pytest.raises(MalformedError):
        it.require(verdict, it.key, upload=damaged)


def test_a_verdict_without_a_commitment_never_gets_that_far() -> None:
    it = round_of()
    receipt = replace(it.upload.admission.receipt, challenge_commitment=bytes(32))
    with pytest.raises(ReceiptError):
        it.holder.admit(replace(it.upload.admission, receipt=receipt))
