"""A server that asks again and again whether some sum would open.

Accept or refuse is one bit about noise and values, and with enough of them a server reads what was
never released: the reaction attack. Broken: a key holder that answers for any cohort of three,
without limit and without a release; bisection finds one client's number in a few queries, as the
difference of two cohorts' sums.

Ours answers two refusals an attempt at the most, a release ends the round, an upload is audited
once whatever is sent with it, attempts at a model are bounded, and no answer says how far off a
sum was. The tests count what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    key_of,
    name_of,
    named,
    read,
    signer,
    summed,
    upload_under,
)
from key_holders import durable_rounds

from secagg import ring
from secagg.context import RoundContext
from secagg.errors import ClosedError, ReleaseError, SealError
from secagg.keyholder import MAX_REFUSALS, KeyHolder
from secagg.noise_audit import dithered
from secagg.parameters import MODULUS
from secagg.planner import plan_integers
from secagg.receipts import Receipt
from secagg.sampling import Stream
from secagg.upload import Admission, Upload
from secagg_keyholder.rounds import DEFAULT_ATTEMPTS, Policy, Rounds

SIZE, CLIENTS = 50, 5
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
(LAYOUT,) = PLAN.layouts
MODEL = b"m" * 32
NAMED = 60
"""Moved by so much, no honest error is within the window any more."""


def values(client: int) -> Integers:
    return np.random.default_rng(client).integers(-100, 100, SIZE, endpoint=True)


def uploads(context: RoundContext) -> list[Upload]:
    return [
        upload_under(context, [values(i)], signer(f"{i}"), named("seed", i)) for i in range(CLIENTS)
    ]


def moved(residues: Residues, index: int, amount: int) -> Residues:
    """A sum with one coefficient moved: the server needs no key for that."""
    offset = np.zeros(residues.shape, np.int64)
    offset[0, index] = amount
    moved: Residues = (residues + ring.to_ntt(offset)) % np.uint64(MODULUS)
    return moved


# --- broken ---------------------------------------------------------------------------------------


class Oracle(Protocol):
    """Whoever says whether a sum over these clients opens."""

    def opens(self, clients: range, residues: Residues) -> bool:
        """One bit."""
        ...


class AlwaysAnswers:
    """Broken: says whether a sum over any three or more clients opens; it never releases."""

    def __init__(self, context: RoundContext) -> None:
        self._context = context
        self.answers = 0

    def opens(self, clients: range, residues: Residues) -> bool:
        assert len(clients) >= PLAN.min_clients
        self.answers += 1
        try:
            read(self._context, key_of([named("seed", i) for i in clients]), residues, len(clients))
        except ReleaseError:
            return False
        return True


def bisected(oracle: Oracle, clients: range, residues: Residues, index: int) -> int:
    """One number of a sum, from how far it can be raised before it is out of range."""
    limit = len(clients) * LAYOUT.max_abs
    low, high = 0, 2 * limit + 1  # raised by `low` it opens, by `high` it does not
    while high - low > 1:
        middle = (low + high) // 2
        if oracle.opens(clients, moved(residues, index, middle << LAYOUT.shift)):
            low = middle
        else:
            high = middle
    return limit - low


def test_bisection_finds_one_clients_number_in_a_few_queries() -> None:
    context = KeyHolder(PLAN).context
    sent, oracle = uploads(context), AlwaysAnswers(context)
    everybody, others = range(CLIENTS), range(CLIENTS - 1)
    for index in (0, 7, 49):
        whole = bisected(oracle, everybody, summed(sent), index)
        rest = bisected(oracle, others, summed(sent[:-1]), index)
        assert whole - rest == values(CLIENTS - 1)[index]
    assert oracle.answers <= 3 * 2 * 10


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return durable_rounds(tmp_path, identity=signer("key holder"))


def admitted(rounds: Rounds, attempt: int = 1) -> tuple[RoundContext, list[Upload]]:
    context = rounds.open(PLAN, "task", 1, attempt, MODEL)[0]
    sent = uploads(context)
    assert rounds.judge(context.id, [u.admission for u in sent]) == [""] * CLIENTS
    return context, sent


def asked(rounds: Rounds, context: RoundContext, manifest: Sequence[Upload], sum_: Residues) -> str:
    """Everything that an answer tells: its kind and its text."""
    try:
        rounds.release(context.id, [name_of(upload) for upload in manifest], sum_)
    except (ReleaseError, ClosedError) as error:
        return f"{error.reason}: {error}"
    return "released"


def test_ours_answers_two_refusals_an_attempt_whatever_happens_in_between(
    rounds: Rounds, tmp_path: Path
) -> None:
    context, sent = admitted(rounds)
    answers = []
    for query in range(8):
        # A restart forgets nothing, another cohort is no other oracle.
        rounds = durable_rounds(tmp_path, identity=signer("key holder"))
        cohort = sent[: CLIENTS - query % 2]
        answers.append(
            asked(rounds, context, cohort, moved(summed(cohort), query, 1000 << LAYOUT.shift))
        )
    assert MAX_REFUSALS == 2
    assert all(answer.startswith(ReleaseError.reason) for answer in answers[:2])
    # From then on one answer to everything, the honest sum included.
    answers.append(asked(rounds, context, sent, summed(sent)))
    assert len(set(answers[2:])) == 1
    assert answers[-1].startswith(ClosedError.reason)


def test_ours_has_an_end_for_every_model(rounds: Rounds) -> None:
    told = 0
    for attempt in range(1, DEFAULT_ATTEMPTS + 1):
        context, sent = admitted(rounds, attempt)
        for start in range(1, 5):
            sum_ = summed(sent[start:])
            told += asked(rounds, context, sent, sum_).startswith(ReleaseError.reason)
    # The next attempt, and the next round from the same model, are refused alike.
    for number, attempt in ((1, DEFAULT_ATTEMPTS + 1), (2, 1)):
        with pytest.raises(ClosedError, match="attempts"):
            rounds.open(PLAN, "task", number, attempt, MODEL)
    assert told == 2 * DEFAULT_ATTEMPTS
    # An attempt's sums answer with one of: open, refused once (for one of two reasons) and open,
    # refused twice; each is under fresh keys. Bisecting one number takes twenty answers on one.
    assert log2(1 + 2 + 2 * 2) < 3
    assert Policy().attempts_per_model == DEFAULT_ATTEMPTS == 10


def test_ours_never_says_how_far_off_a_sum_was(tmp_path: Path) -> None:
    step, guard = 1 << LAYOUT.shift, LAYOUT.guard
    noise = [guard + 60, step // 2, step - guard - 60, 77_777 * step + step // 2]
    beyond = [step * amount for amount in (1001, 1002, 1500, 30_000)]
    told: dict[str, set[str]] = {"noise": set(), "range": set()}
    for kind, amounts in (("noise", noise), ("range", beyond)):
        for case, amount in enumerate(amounts):
            rounds = durable_rounds(tmp_path / f"{kind}{case}")
            context, sent = admitted(rounds)
            for index in (3, SIZE - 1):
                told[kind].add(asked(rounds, context, sent, moved(summed(sent), index, amount)))
    assert len(told["noise"]) == len(told["range"]) == 1
    for text in told["noise"] | told["range"]:
        assert text.startswith(ReleaseError.reason)
        assert not any(character.isdigit() for character in text)


def test_ours_gives_one_verdict_on_an_upload_for_ever(rounds: Rounds, tmp_path: Path) -> None:
    context, _ = admitted(rounds)
    late = upload_under(context, [values(9)], signer("9"), named("seed", 9))
    receipt = late.admission.receipt
    broken = Admission(
        Receipt.sign(signer("9"), context.id, receipt.upload_digest, bytes(1168)), bytes(1168)
    )
    stolen = Admission(receipt, bytes(1168))
    first = rounds.judge(context.id, [broken])
    assert first == [SealError.reason]
    for admission in (late.admission, stolen, broken):
        assert rounds.judge(context.id, [admission]) == first
    again = durable_rounds(tmp_path)
    assert again.judge(context.id, [late.admission, broken]) == first * 2


@pytest.mark.parametrize("first_answer", [True, False])
def test_ours_audits_an_upload_once_whatever_is_sent_with_it(
    rounds: Rounds, tmp_path: Path, first_answer: bool
) -> None:
    # A server may send anything as an upload to audit: one bit an upload, never a second.
    context, sent = admitted(rounds)
    name = name_of(sent[0])
    assert asked(rounds, context, sent, summed(sent[1:])).startswith(ReleaseError.reason)
    upload = summed(sent[:1])
    changed = [upload] + [moved(upload, index, NAMED) for index in range(6)]
    probes = [dithered(PLAN, probe, Stream(bytes(32))) for probe in changed]
    if not first_answer:
        probes.reverse()
    found = [rounds.audit(context.id, name, probe) for probe in probes]
    # A restarted key holder, which is asked in the order that would have given the other answer.
    again = durable_rounds(tmp_path)
    found += [again.audit(context.id, name, probe) for probe in reversed(probes)]
    assert set(found) == {found[0]}
    assert (found[0] == "") is first_answer


def test_ours_audits_nobody_before_a_sum_was_refused_or_after_the_round(rounds: Rounds) -> None:
    context, sent = admitted(rounds)
    probe = dithered(PLAN, summed(sent[:1]), Stream(bytes(32)))
    with pytest.raises(ClosedError):
        rounds.audit(context.id, name_of(sent[0]), probe)
    for start in (1, 2):
        asked(rounds, context, sent, summed(sent[start:]))
    with pytest.raises(ClosedError):
        rounds.audit(context.id, name_of(sent[0]), probe)


class Ours:
    """The bisection's oracle, made of what ours answers."""

    def __init__(self, rounds: Rounds, context: RoundContext, sent: list[Upload]) -> None:
        self._rounds, self._context, self._sent = rounds, context, sent
        self.answers: list[str] = []

    def opens(self, clients: range, residues: Residues) -> bool:
        answer = asked(self._rounds, self._context, self._sent[: len(clients)], residues)
        if answer.startswith(ClosedError.reason):
            raise ClosedError(answer)
        self.answers.append(answer)
        return answer == "released"


def test_the_bisection_gets_at_most_two_answers_out_of_ours(rounds: Rounds) -> None:
    for attempt in range(1, 4):
        context, sent = admitted(rounds, attempt)
        oracle = Ours(rounds, context, sent)
        with pytest.raises(ClosedError):
            bisected(oracle, range(CLIENTS), summed(sent), attempt)
        assert 1 <= len(oracle.answers) <= MAX_REFUSALS
        if oracle.answers[-1] == "released":  # and with it the sum itself, as it should be
            break
    assert oracle.answers[-1] == "released"
    with pytest.raises(ClosedError):
        rounds.open(PLAN, "task", 1, attempt + 1, MODEL)
