"""What ours does not stop, each shown once, so that nobody has to find it out.

Not one of these is a fault of the cipher: a sum is what was agreed to be told, and sums tell. They
are for whoever decides on cohorts, on the number of rounds, and on whom to enrol. Two more are with
their attacks: snapshots of the round keys (`test_rollback_attack`) and what an audit hints at where
a plan fills its coefficients (`test_wrap_leak_attack`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    enrolment,
    name_of,
    named,
    residues,
    signer,
    summed,
    upload_under,
)
from key_holders import AUDIT_KEY, durable_rounds

from secagg.context import RoundContext
from secagg.errors import ClosedError, ReleaseError
from secagg.noise_audit import dithered
from secagg.planner import plan_integers
from secagg.upload import Upload
from secagg.wire.codec import sums_from_bytes
from secagg_keyholder.backup import restore_ledger
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Policy, Rounds

SIZE = 50
NAMES = ["victim", "alice", "bob", "carol"]
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
MODEL = b"m" * 32
ROSTER = enrolment({name: [signer(name)] for name in NAMES})


def values(name: str) -> Integers:
    drawn = np.random.default_rng(list(name.encode()))
    return drawn.integers(-100, 100, SIZE, endpoint=True)


def uploads(context: RoundContext, names: list[str]) -> list[Upload]:
    """What the same clients send whenever they start from the same model and the same data."""
    number = f"{context.id.round_number}.{context.id.attempt}"
    return [
        upload_under(context, [values(name)], signer(name), named("seed", name, number))
        for name in names
    ]


def released(rounds: Rounds, context: RoundContext, sent: list[Upload]) -> Integers:
    assert rounds.judge(context.id, [each.admission for each in sent]) == [""] * len(sent)
    answer = rounds.release(context.id, [name_of(each) for each in sent], summed(sent))
    return sums_from_bytes(answer.sums, PLAN)[0]


def started(folder: Path) -> Rounds:
    return durable_rounds(folder, roster=ROSTER, identity=signer("key holder"))


def test_two_rounds_from_one_model_tell_what_the_client_between_them_sent(tmp_path: Path) -> None:
    # Two sums that were both agreed to. A model that changes in between blurs the difference; a
    # server that starts two rounds from one model, or a task without a model, has it exactly.
    rounds = started(tmp_path)
    sums = []
    for number, names in ((1, NAMES), (2, NAMES[1:])):
        context = rounds.open(PLAN, "task", number, 1, MODEL)[0]
        sums.append(released(rounds, context, uploads(context, names)))
    assert np.array_equal(sums[0] - sums[1], values("victim"))


def test_what_bounds_it_is_the_number_of_attempts_at_one_model(tmp_path: Path) -> None:
    policy = Policy(attempts_per_model=1)
    rounds = durable_rounds(tmp_path, roster=ROSTER, policy=policy)
    context = rounds.open(PLAN, "task", 1, 1, MODEL)[0]
    released(rounds, context, uploads(context, NAMES))
    with pytest.raises(ClosedError, match="attempts"):
        rounds.open(PLAN, "task", 2, 1, MODEL)


def test_a_restored_key_holder_opens_a_round_anew_that_was_released_since_the_backup(
    tmp_path: Path,
) -> None:
    # It opens none of the old uploads, but clients that are asked again send new ones.
    state = tmp_path / "state"
    rounds = started(state)
    context = rounds.open(PLAN, "task", 1, 1, MODEL)[0]
    ledger = Ledger(state / "ledger.sqlite3", AUDIT_KEY)
    ledger.backup(tmp_path / "backup")
    ledger.close()
    first = released(rounds, context, uploads(context, NAMES))
    for file in state.glob("ledger.sqlite3*"):
        file.unlink()
    restore_ledger(tmp_path / "backup", state)
    rounds = started(state)
    again = rounds.open(PLAN, "task", 1, 2, MODEL)[0]
    second = released(rounds, again, uploads(again, NAMES[1:]))
    assert np.array_equal(first - second, values("victim"))


def test_everybody_but_the_victim_conspiring_know_what_the_victim_sent(tmp_path: Path) -> None:
    rounds = started(tmp_path)
    context = rounds.open(PLAN, "task", 1, 1, MODEL)[0]
    total = released(rounds, context, uploads(context, NAMES))
    assert np.array_equal(total - sum(values(name) for name in NAMES[1:]), values("victim"))


@pytest.mark.parametrize("where", ["beyond the range", "in the padding"])
def test_a_value_out_of_range_stops_rounds_unnamed_and_never_bends_a_sum(
    tmp_path: Path, where: str
) -> None:
    # On the grid: the audit sees noise only. It costs the client its place in every round.
    (layout,) = PLAN.layouts
    beyond = np.zeros((PLAN.blocks, 4096), np.int64)
    beyond[0, 0 if where == "beyond the range" else SIZE] = 1000 << layout.shift
    rounds = started(tmp_path)
    context = rounds.open(PLAN, "task", 1, 1, MODEL)[0]
    sent = uploads(context, NAMES[1:])
    sent.append(upload_under(context, [values("victim")], signer("victim"), named("seed"), beyond))
    assert rounds.judge(context.id, [each.admission for each in sent]) == [""] * 4
    names = [name_of(each) for each in sent]
    with pytest.raises(ReleaseError):
        rounds.release(context.id, names, summed(sent))
    verdicts = [
        rounds.audit(context.id, name, dithered(PLAN, residues(each)))
        for name, each in zip(names, sent, strict=True)
    ]
    assert verdicts == [""] * 4
    # Whoever suspects the right client can still finish without it, once.
    total = rounds.release(context.id, names[:-1], summed(sent[:-1]))
    expected = sum(values(name) for name in NAMES[1:])
    assert np.array_equal(sums_from_bytes(total.sums, PLAN)[0], expected)


def test_a_client_may_give_away_what_the_others_leave_of_the_range(tmp_path: Path) -> None:
    # A sum is checked against what so many clients can reach together, not each client alone.
    (layout,) = PLAN.layouts
    rounds = started(tmp_path)
    context = rounds.open(PLAN, "task", 1, 1, MODEL)[0]
    sent = uploads(context, NAMES[1:])
    total = sum(values(name) for name in NAMES[1:])
    room = 4 * layout.max_abs - int(np.abs(total).max())
    assert room > layout.max_abs
    greedy = np.full(SIZE, room)
    offset = np.zeros((1, 4096), np.int64)
    offset[0, :SIZE] = greedy << layout.shift
    zeros = [np.zeros(SIZE, np.int64)]
    sent.append(upload_under(context, zeros, signer("victim"), named("seed"), offset))
    assert np.array_equal(released(rounds, context, sent), total + greedy)
