"""What a client makes of the verdicts on its uploads: honest ones, refusals, and servers that lie.

The servers here are real, with a real key holder; a lie is told on the way out, or in the sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import numpy as np
import pytest
import structlog
from sessions import (
    Site,
    contribute,
    exact,
    others_take_part,
    site_at,
    take_part,
    task,
    wait_for_end,
)

from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    DuplicateError,
    ForgedSketchError,
    MalformedError,
    MismatchError,
    SecaggError,
    UntrustedKeyError,
)
from secagg.parameters import FloatSegment, NormCheck, Plan, TensorSpec
from secagg.planner import make_plan
from secagg.receipts import NO_COMMITMENT, SigningKey
from secagg.residues import widen
from secagg.sketches import sketch
from secagg.verdicts import Verdict
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import round_pb2
from secagg_client import session as session_module
from secagg_client.ledger import Fate
from secagg_client.session import ClientSession, CurrentRound, Judgement
from secagg_server import ciphertexts
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

Lie = Callable[[pb.GetVerdictResponse, Site], None]


def checked_task(**changes: int) -> TaskSpec:
    return task(cohort.mixed_plan(norm_check=NormCheck()), **changes)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with site_at(tmp_path) as made:
        yield made


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def warnings(log: list[Any]) -> list[tuple[Any, ...]]:
    """Of the client: event, round, attempt and why."""
    named = ("verdict_missing", "update_refused")
    return [
        (line["event"], line["round"], line["attempt"], line["why"])
        for line in log
        if line["event"] in named and line["log_level"] == "warning"
    ]


def until_the_end(session: ClientSession, index: int = 0) -> list[Judgement]:
    """Take part in every round; what was told of the verdicts."""
    told: list[Judgement] = []
    for current in session.rounds(told.append):
        contribute(current, index)
    return told


def first_round(session: ClientSession) -> CurrentRound:
    return next(iter(session.rounds()))


def too_large(session: ClientSession, index: int, monkeypatch: pytest.MonkeyPatch) -> CurrentRound:
    """Contribute what no honest client would: each number as large as it may be."""

    def largest(plan: Plan, *_: Any, **options: Any) -> Any:  # noqa: ANN401
        honest = cohort.quantized(current.context, index)
        layout = plan.layouts[0]
        signs = np.where(np.arange(layout.values) % 2, 1, -1)
        return [replace(honest[0], values=layout.max_abs * signs), *honest[1:]]

    current = first_round(session)
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "quantize", largest)
        contribute(current, index)
    return current


# --- verdicts ------------------------------------------------------------------------------------


def test_the_verdict_is_told_when_the_round_is_over(
    site: Site, outbox: Path, log: list[Any]
) -> None:
    site.create(checked_task(rounds=2))
    told: list[Judgement] = []
    with site.session(0, outbox=outbox) as session:
        for current in session.rounds(told.append):
            assert [one.context.round_number for one in told] == list(range(1, current.number))
            others_take_part_in(site, current.number, 1, 2)
            contribute(current, 0)
            last = current
    assert [(one.context.round_number, one.accepted) for one in told] == [(1, True), (2, True)]
    assert told[1].context == last.context.id
    assert site.gate.calls["GetVerdict"] == 2
    assert not warnings(log)


def test_a_refused_update_is_told_and_not_in_the_sum(
    site: Site, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    site.create(checked_task(target_clients=4))
    others_take_part(site, 1, 2, 3)
    told: list[Judgement] = []
    with site.session(0) as session:
        current = too_large(session, 0, monkeypatch)
        assert list(session.rounds(told.append)) == []
        (entry,) = session._ledger.entries()
    assert [one.accepted for one in told] == [False]
    assert (entry.fate, entry.certain) == (Fate.REFUSED, False), "no key holder is pinned here"
    assert warnings(log) == [("update_refused", 1, 1, "NORM_REFUSED")]
    exact(site, current, [1, 2, 3])


def test_another_attempt_comes_after_the_verdict_on_the_one_before(
    site: Site, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    """Without the refused update, the first attempt has too few; it is judged all the same."""
    site.create(checked_task())
    others_take_part(site, 1, 2)
    told: list[Judgement] = []
    with site.session(0) as session:
        too_large(session, 0, monkeypatch)
        current = next(session.rounds(told.append))
        assert (current.number, current.context.id.attempt) == (1, 2)
        assert [(one.context.attempt, one.accepted) for one in told] == [(1, False)]


def test_a_task_that_has_failed_still_tells_the_verdict(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(checked_task(max_attempts=1))
    others_take_part(site, 1, 2)
    told: list[Judgement] = []
    with site.session(0) as session:
        too_large(session, 0, monkeypatch)
        with pytest.raises(SecaggError, match="it failed"):
            next(session.rounds(told.append))
    assert [one.accepted for one in told] == [False]


def test_a_verdict_can_be_waited_for_and_is_then_not_asked_for_again(site: Site) -> None:
    site.create(checked_task())
    others_take_part(site, 1, 2)
    with site.session(0) as session:
        current = take_part(session, 0)
        judgement = current.verdict()
        assert (judgement.context, judgement.accepted) == (current.context.id, True)
        asked = site.gate.calls["GetVerdict"]
        assert list(session.rounds()) == []
    assert site.gate.calls["GetVerdict"] == asked


def test_a_client_that_was_restarted_still_checks_its_verdict(site: Site, outbox: Path) -> None:
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    others_take_part(site, 1, 2)
    with site.session(0, outbox=outbox) as session:
        told = until_the_end(session)
    assert [one.accepted for one in told] == [True]


def test_a_client_that_lost_its_disk_misses_a_verdict_and_nothing_else(
    site: Site, outbox: Path, log: list[Any], tmp_path: Path
) -> None:
    """What it has kept since is not what was accepted: the verdict is on something else."""
    anew = tmp_path / "another disk"
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    with site.session(0, outbox=anew) as session, pytest.raises(DuplicateError):
        take_part(session, 0)
    others_take_part(site, 1, 2)
    with site.session(0, outbox=anew) as session:
        assert until_the_end(session) == []
    assert warnings(log) == [("verdict_missing", 1, 1, "CONTEXT_MISMATCH")]


def test_a_restart_while_the_round_is_open_asks_only_once_it_is_over(
    site: Site, outbox: Path, log: list[Any]
) -> None:
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    with site.session(0, outbox=outbox) as session:
        rounds = session.rounds()
        contribute(next(rounds), 0)
        assert site.gate.calls["GetVerdict"] == 0
        others_take_part(site, 1, 2)
        assert list(rounds) == []
    assert site.gate.calls["GetVerdict"] == 1
    assert not warnings(log)


def test_a_plan_without_a_check_has_no_verdicts(site: Site, outbox: Path) -> None:
    site.create(task())
    others_take_part(site, 1, 2)
    with site.session(0, outbox=outbox) as session:
        current = take_part(session, 0)
        with pytest.raises(ConfigurationError, match="plan with a norm check"):
            current.verdict()
        assert until_the_end(session) == []
    assert site.gate.calls["GetVerdict"] == 0


def test_a_verdict_on_an_upload_that_was_not_kept_cannot_be_checked(site: Site) -> None:
    site.create(checked_task())
    with site.session(0) as session:
        current = take_part(session, 0)
    with site.session(0) as other, pytest.raises(ConfigurationError, match="that was kept"):
        other.verdict(current.context)


# --- verdicts that do not come -------------------------------------------------------------------


@pytest.mark.parametrize("error", [ClosedError("forgotten"), MismatchError("an older key")])
def test_a_server_that_forgot_the_verdict_is_a_warning(
    error: SecaggError, site: Site, monkeypatch: pytest.MonkeyPatch, log: list[Any]
) -> None:
    def forgotten(*_: object) -> Any:  # noqa: ANN401
        raise error

    monkeypatch.setattr(VerdictDesk, "show", forgotten)
    site.create(checked_task(rounds=2))
    others_take_part(site, 1, 2)
    with site.session(0) as session:
        rounds = session.rounds(pytest.fail)
        contribute(next(rounds), 0)
        assert next(rounds).number == 2
        assert warnings(log) == [("verdict_missing", 1, 1, error.reason)]


def test_a_lost_verdict_is_asked_for_once_and_training_goes_on(site: Site, log: list[Any]) -> None:
    site.gate.lost |= {("GetVerdict", n) for n in range(1, 1000)}
    site.create(checked_task(rounds=2))
    others_take_part(site, 1, 2)
    with site.session(0) as session:
        rounds = session.rounds(pytest.fail)
        contribute(next(rounds), 0)
        assert next(rounds).number == 2
    assert site.gate.calls["GetVerdict"] == 1
    assert warnings(log) == [("verdict_missing", 1, 1, "UNAVAILABLE")]


def test_a_lost_answer_is_asked_for_again_by_whoever_waits(site: Site) -> None:
    site.gate.lost.add(("GetVerdict", 1))
    site.create(checked_task())
    others_take_part(site, 1, 2)
    with site.session(0) as session:
        assert take_part(session, 0).verdict().accepted
    assert site.gate.calls["GetVerdict"] == 2


def test_a_client_that_came_too_late_asks_for_nothing(
    site: Site, outbox: Path, log: list[Any]
) -> None:
    site.create(checked_task())
    with site.session(5, outbox=outbox) as late:
        rounds = late.rounds(pytest.fail)
        current = next(rounds)
        others_take_part(site, 0, 1, 2)
        wait_for_end(site, 0)
        with pytest.raises(ClosedError):
            contribute(current, 5)
        assert list(rounds) == []
    assert site.gate.calls["GetVerdict"] == 0
    assert not warnings(log)


def test_a_damaged_outbox_is_a_warning(site: Site, outbox: Path, log: list[Any]) -> None:
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    (file,) = outbox.glob("upload-*")
    file.write_bytes(b"damaged")
    others_take_part(site, 1, 2)
    with site.session(0, outbox=outbox) as session:
        assert until_the_end(session) == []
    assert warnings(log) == [("verdict_missing", 1, 1, "ROUND_CLOSED")]


# --- commitments ---------------------------------------------------------------------------------


def never(*_: object) -> Any:  # noqa: ANN401
    raise AssertionError("encrypted")


@pytest.mark.parametrize(
    "given",
    [b"", NO_COMMITMENT, bytes(range(31)), bytes(range(33))],
    ids=["none", "zeros", "short", "long"],
)
def test_without_a_commitment_nothing_is_encrypted(
    given: bytes, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(checked_task())

    def change(answer: Any) -> None:  # noqa: ANN401
        if isinstance(answer, pb.GetRoundResponse):
            answer.challenge_commitment = given

    site.gate.change = change
    monkeypatch.setattr(session_module, "encrypt_quantized", never)
    with site.session(0) as session, pytest.raises(ContextError, match="commitment of 32 bytes"):
        take_part(session, 0)
    assert site.gate.calls["OpenUpload"] == 0


@pytest.mark.parametrize("given", [bytes(range(32)), NO_COMMITMENT, b"x"])
def test_a_commitment_without_a_check_is_refused(
    given: bytes, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.create(task())

    def change(answer: Any) -> None:  # noqa: ANN401
        if isinstance(answer, pb.GetRoundResponse):
            answer.challenge_commitment = given

    site.gate.change = change
    monkeypatch.setattr(session_module, "encrypt_quantized", never)
    with site.session(0) as session, pytest.raises(ContextError, match="no challenge commitment"):
        take_part(session, 0)


def test_a_server_that_changes_its_commitment_gets_nothing_more(site: Site, outbox: Path) -> None:
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    (file,) = outbox.glob("upload-*")
    before, announced = file.read_bytes(), site.gate.calls["OpenUpload"]

    def change(answer: Any) -> None:  # noqa: ANN401
        if isinstance(answer, pb.GetRoundResponse):
            answer.challenge_commitment = bytes(range(32))

    site.gate.change = change
    with (
        site.session(0, outbox=outbox) as session,
        pytest.raises(ContextError, match="that this round's upload was signed with"),
    ):
        take_part(session, 0)
    assert site.gate.calls["OpenUpload"] == announced
    assert file.read_bytes() == before


def test_an_upload_signed_with_an_older_key_is_sent_and_judged_all_the_same(
    site: Site, outbox: Path
) -> None:
    site.create(checked_task())
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    with site.session(3, outbox=outbox) as rotated:
        rounds = rotated.rounds()
        contribute(current := next(rounds), 0)
        others_take_part(site, 1, 2)
        assert current.verdict().accepted


# --- servers that lie about a verdict -------------------------------------------------------------


def holder(site: Site) -> SigningKey:
    """The key holder's identity."""
    return site.key_holder.rounds._identity


def signed(answer: pb.GetVerdictResponse, key: SigningKey, **changes: Any) -> None:  # noqa: ANN401
    """Have somebody sign the verdict, with changes."""
    verdict = codec.verdict_from_wire(answer.verdict)
    parts = {
        "receipt": verdict.receipt,
        "sketch_digest": verdict.sketch_digest,
        "accepted": verdict.accepted,
    }
    made = Verdict.sign(key, **parts | changes)
    answer.verdict.CopyFrom(codec.verdict_to_wire(made))


def another_key(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.challenge_key = bytes(range(32))


def a_short_key(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.challenge_key = answer.challenge_key[:31]


def no_key(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.ClearField("challenge_key")


def no_verdict(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.ClearField("verdict")


def no_state(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.verdict.state = round_pb2.VERDICT_STATE_UNSPECIFIED


def flipped(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.verdict.state = round_pb2.VERDICT_STATE_REJECTED


def own_signature(answer: pb.GetVerdictResponse, _: Site) -> None:
    """Another identity under another signature, consistent in itself."""
    signed(answer, SigningKey.generate(), accepted=False)


def on_another_sketch(answer: pb.GetVerdictResponse, site: Site) -> None:
    signed(answer, holder(site), sketch_digest=bytes(range(32)))


def on_anothers_upload(answer: pb.GetVerdictResponse, site: Site) -> None:
    other = cohort.encrypted(
        site.key_holder.contexts[0], 1, answer.verdict.receipt.challenge_commitment
    )
    signed(answer, holder(site), receipt=other.admission.receipt)


def on_another_upload_of_ours(answer: pb.GetVerdictResponse, site: Site) -> None:
    """What a cloned client might have sent."""
    other = cohort.encrypted(
        site.key_holder.contexts[0], 0, answer.verdict.receipt.challenge_commitment
    )
    signed(answer, holder(site), receipt=other.admission.receipt)


def of_another_attempt(answer: pb.GetVerdictResponse, site: Site) -> None:
    receipt = codec.receipt_from_wire(answer.verdict.receipt)
    signed(
        answer, holder(site), receipt=replace(receipt, context=replace(receipt.context, attempt=2))
    )


def with_a_direction(answer: pb.GetVerdictResponse, _: Site) -> None:
    answer.direction = True


LIES: list[tuple[Lie, type[SecaggError], str]] = [
    (another_key, ForgedSketchError, "the server committed to"),
    (a_short_key, MalformedError, "challenge_key of 32 bytes; got bytes=31"),
    (no_key, MalformedError, "challenge_key of 32 bytes; got bytes=0"),
    (no_verdict, MalformedError, "verdict that accepts or rejects"),
    (no_state, MalformedError, "verdict that accepts or rejects"),
    (flipped, UntrustedKeyError, "verdict signed by the key holder"),
    (own_signature, UntrustedKeyError, "verdict signed by the key holder"),
    (on_another_sketch, ForgedSketchError, "sketch that the challenge gives"),
    (on_anothers_upload, ContextError, "upload that was sent"),
    (on_another_upload_of_ours, ContextError, "upload that was sent"),
    (of_another_attempt, ContextError, "attempt differ"),
    (with_a_direction, ForgedSketchError, "no direction in a round"),
]


@pytest.mark.parametrize(("lie", "kind", "text"), LIES, ids=[lie[0].__name__ for lie in LIES])
def test_a_lie_about_a_verdict_ends_the_task_for_this_client(
    lie: Lie, kind: type[SecaggError], text: str, site: Site, outbox: Path
) -> None:
    answers: list[bytes] = []

    def change(answer: Any) -> None:  # noqa: ANN401
        if isinstance(answer, pb.GetVerdictResponse):
            lie(answer, site)
            answers.append(answer.SerializeToString())

    site.gate.change = change
    site.create(checked_task(rounds=2))
    with site.session(0, outbox=outbox) as session:
        rounds = session.rounds(pytest.fail)
        contribute(next(rounds), 0)
        others_take_part(site, 1, 2)
        with pytest.raises(kind, match=text) as caught:
            next(rounds)
    names = {path.name for path in outbox.iterdir()} - {"ledger.jsonl"}
    if kind is not ForgedSketchError:
        assert names == {"upload-task.1.1"}
        return
    assert names == {"upload-task.1.1", "evidence-task.1.1.pb"}
    assert [(outbox / "evidence-task.1.1.pb").read_bytes()] == answers
    assert str(outbox / "evidence-task.1.1.pb") in str(caught.value)


@pytest.fixture
def forged(site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A server that had another sketch judged than the one it had committed to."""

    def forging(_challenger: Any, blobs: Any, plan: Plan, receipt: Any) -> Any:  # noqa: ANN401
        (context,) = (one for one in site.key_holder.contexts if one.id == receipt.context)
        data = blobs.chunk(receipt.context, receipt.upload_digest, 0)
        # A challenge that it made up when it had seen the upload.
        key = bytes(range(32))
        return sketch(context, receipt.upload_digest, [widen(data, plan.blocks)], key)

    monkeypatch.setattr(ciphertexts, "_sketch", forging)
    site.create(checked_task(rounds=2))
    with site.session(0, outbox=outbox) as session:
        take_part(session, 0)
    others_take_part(site, 1, 2)
    return site


def test_a_sketch_by_another_challenge_is_found_out_with_proof(forged: Site, outbox: Path) -> None:
    with (
        forged.session(0, outbox=outbox) as session,
        pytest.raises(ForgedSketchError, match=r"sketch that the challenge gives.*evidence-task"),
    ):
        list(session.rounds(pytest.fail))
    answer = codec.parse(pb.GetVerdictResponse, (outbox / "evidence-task.1.1.pb").read_bytes())
    verdict = codec.verdict_from_wire(answer.verdict)
    verdict.verify(verdict.receipt.context, [holder(forged).public])


def test_whoever_has_evidence_takes_no_part_until_it_is_moved_away(
    forged: Site, outbox: Path
) -> None:
    for _ in range(2):
        with forged.session(0, outbox=outbox) as session, pytest.raises(ForgedSketchError):
            next(session.rounds())
    assert forged.gate.calls["GetVerdict"] == 1
    evidence = outbox / "evidence-task.1.1.pb"
    with (
        forged.session(0, outbox=outbox) as session,
        pytest.raises(ForgedSketchError, match="move it away to take part again"),
    ):
        next(session.rounds())
    evidence.rename(outbox / "reported.pb")
    (outbox / "upload-task.1.1").rename(outbox / "reported.upload")
    with forged.session(0, outbox=outbox) as session:
        assert next(session.rounds()).number == 2


def test_without_an_outbox_a_forgery_is_told_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VerdictDesk, "show", lying_about_the_key(VerdictDesk.show))
    site.create(checked_task())
    others_take_part(site, 1, 2)
    with site.session(0) as session, pytest.raises(ForgedSketchError, match="nothing was kept"):
        take_part(session, 0).verdict()


def lying_about_the_key(show: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: replace(show(*arguments), challenge_key=bytes(range(32)))


def test_a_disk_that_is_full_hides_no_forgery(
    site: Site, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VerdictDesk, "show", lying_about_the_key(VerdictDesk.show))
    site.create(checked_task())
    others_take_part(site, 1, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with site.session(0, outbox=outbox) as session:
        current = take_part(session, 0)
        monkeypatch.setattr("secagg_client.outbox.write", full)
        with pytest.raises(ForgedSketchError, match="could not be kept: No space left"):
            current.verdict()


# --- directions ----------------------------------------------------------------------------------


def second_round(site: Site, session: ClientSession) -> CurrentRound:
    """Everybody has contributed to both rounds of a task with a direction check."""
    segment = FloatSegment("update", (TensorSpec("w", (9000,)),), 2.0)
    plan = make_plan([segment], max_clients=6, norm_check=NormCheck(min_cosine=-0.9))
    site.create(task(plan, rounds=2))
    for number in (1, 2):
        others_take_part_in(site, number, 1, 2)
        current = take_part_in(session, number, 0)
    return current


def take_part_in(session: ClientSession, number: int, index: int) -> CurrentRound:
    for current in session.rounds():
        if current.number == number:
            contribute(current, index)
            return current
    raise AssertionError("the task ended early")


def others_take_part_in(site: Site, number: int, *indexes: int) -> None:
    for index in indexes:
        with site.session(index) as session:
            take_part_in(session, number, index)


def test_a_direction_is_computed_again_from_the_models(site: Site) -> None:
    answers: list[tuple[bool, int]] = []

    def note(answer: Any) -> None:  # noqa: ANN401
        if isinstance(answer, pb.GetVerdictResponse):
            answers.append((answer.direction, answer.model_version))

    site.gate.change = note
    with site.session(0) as session:
        assert second_round(site, session).verdict().accepted
    assert answers == [(False, 0), (True, 1)]


def no_direction(answer: Any) -> None:  # noqa: ANN401
    if isinstance(answer, pb.GetVerdictResponse):
        answer.direction = False


def no_version_before(answer: Any) -> None:  # noqa: ANN401
    if isinstance(answer, pb.GetVerdictResponse):
        answer.model_version = 0


def a_later_version(answer: Any) -> None:  # noqa: ANN401
    if isinstance(answer, pb.GetVerdictResponse):
        answer.model_version = 2


def another_start(answer: Any) -> None:  # noqa: ANN401
    """Another model in the place of version 0, consistent in itself."""
    if isinstance(answer, pb.GetModelResponse) and answer.version == 0:
        answer.data = np.ones(len(answer.data) // 4, dtype="<f4").tobytes()
        answer.model_digest = codec.model_digest(answer.data)


@pytest.mark.parametrize(
    ("lie", "kind", "text"),
    [
        (no_direction, ForgedSketchError, "sketch that the challenge gives"),
        (no_version_before, MalformedError, "a model version of 1 or more"),
        (a_later_version, ContextError, "the model that the round names"),
        (another_start, ContextError, "version 0 to be the one that its round named"),
    ],
)
def test_a_lie_about_the_direction_is_found_out(
    lie: Callable[[Any], None], kind: type[SecaggError], text: str, site: Site
) -> None:
    with site.session(0) as session:
        current = second_round(site, session)
        wait_for_end(site, 1)
        site.gate.change = lie
        with pytest.raises(kind, match=text):
            current.verdict()


def test_another_start_is_no_proof_against_a_client_that_never_saw_it(
    site: Site, outbox: Path
) -> None:
    """Only the round's own model is named by what the key holder signs."""
    with site.session(0, outbox=outbox) as session:
        current = second_round(site, session)
    wait_for_end(site, 1)
    site.gate.change = another_start
    with site.session(0, outbox=outbox) as session, pytest.raises(ForgedSketchError):
        session.verdict(current.context)
