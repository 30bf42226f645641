"""One voice that is counted as several, and old or foreign bytes that are counted anew.

A cohort is only as large as the number of people in it. Broken: counting signing keys (a client
with two keys and its victim make a cohort of three, and the client subtracts what it sent); seals
that are not bound to their upload's client (copies of a victim's bytes under other names make a
cohort of one); seals that are not bound to their round (old uploads are summed again today).

Ours counts names of the enrolment, and each seal opens for one client, one upload, one round.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from attacker import (
    Integers,
    Residues,
    enrolment,
    key_of,
    name_of,
    named,
    read,
    residues,
    signer,
    summed,
    upload_under,
)
from key_holders import durable_rounds
from round_support import resigned

from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.errors import (
    ContextError,
    DuplicateError,
    QuorumError,
    ReceiptError,
    ReleaseError,
    SealError,
)
from secagg.keyholder import KeyHolder
from secagg.planner import plan_integers
from secagg.receipts import Receipt, SigningKey
from secagg.sealing import RoundKeyPair, seal
from secagg.upload import Admission, Upload
from secagg_keyholder.rounds import Rounds

SIZE = 50
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
OLD, NEW = signer("mallory's old key"), signer("mallory's new key")
ROSTER = enrolment(
    {
        "mallory": [NEW, OLD],
        "victim": [signer("victim")],
        "alice": [signer("alice")],
        "bob": [signer("bob")],
    }
)


def values(name: str) -> Integers:
    drawn = np.random.default_rng(list(name.encode()))
    return drawn.integers(-100, 100, SIZE, endpoint=True)


def upload(context: RoundContext, name: str, identity: SigningKey | None = None) -> Upload:
    key = identity or signer(name)
    seed = named("seed", name, key.public.hex(), context.id.round_number)
    return upload_under(context, [values(name)], key, seed)


def aggregate(uploads: list[Upload]) -> Aggregate:
    return Aggregate(tuple(each.admission for each in uploads), summed(uploads))


# --- broken ---------------------------------------------------------------------------------------


def test_counting_keys_makes_two_people_a_cohort_of_three() -> None:
    # The open enrolment, where a key is a name: for plaintext on loopback.
    holder = KeyHolder(PLAN)
    own = [upload(holder.context, "mallory", key) for key in (OLD, NEW)]
    released = holder.release(aggregate([upload(holder.context, "victim"), *own]))
    assert np.array_equal(released.sums[0] - 2 * values("mallory"), values("victim"))


class UnboundSeals:
    """Broken: a seal says neither whose it is, nor for which upload or round; one key for ever."""

    def __init__(self) -> None:
        self._pair = RoundKeyPair()
        # What binds ours to a round, frozen: every round has the same polynomials.
        self.context = KeyHolder(PLAN, pair=self._pair).context

    def sealed(self, name: str) -> tuple[bytes, Upload]:
        seed = named("seed", name, signer(name).public.hex(), 1)
        return seal(seed, self.context.round_key, b""), upload(self.context, name)

    def release(self, manifest: dict[str, bytes], sum_: Residues) -> Integers:
        assert len(manifest) >= PLAN.min_clients
        seeds = [self._pair.open(sealed, b"") for sealed in manifest.values()]
        return read(self.context, key_of(seeds), sum_, len(seeds))[0]


def test_copies_under_other_names_make_a_cohort_of_one() -> None:
    scheme = UnboundSeals()
    sealed, stolen = scheme.sealed("victim")
    manifest = {"victim": sealed, "mallory": sealed, "a friend": sealed}
    opened = scheme.release(manifest, summed([stolen] * 3))
    assert np.array_equal(opened, 3 * values("victim"))


def test_yesterdays_uploads_are_summed_again_today() -> None:
    scheme = UnboundSeals()
    stored = {name: scheme.sealed(name) for name in ("alice", "bob", "victim")}
    yesterday = scheme.release({n: s for n, (s, _) in stored.items()}, summed_of(stored))
    # The next day only the victim is there; the others' old bytes make up the quorum.
    today = scheme.release({n: s for n, (s, _) in stored.items()}, summed_of(stored))
    assert np.array_equal(yesterday, today)
    others = values("alice") + values("bob")
    assert np.array_equal(today - others, values("victim"))


def summed_of(stored: dict[str, tuple[bytes, Upload]]) -> Residues:
    return summed([each for _, each in stored.values()])


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    return durable_rounds(tmp_path, roster=ROSTER, identity=signer("key holder"))


@pytest.fixture
def context(rounds: Rounds) -> RoundContext:
    return rounds.open(PLAN, "task", 1, 1, NO_MODEL)[0]


def verdicts(rounds: Rounds, context: RoundContext, *uploads: Upload) -> list[str]:
    return rounds.judge(context.id, [each.admission for each in uploads])


def test_ours_counts_a_client_with_two_enrolled_keys_once(
    rounds: Rounds, context: RoundContext
) -> None:
    first, second = (upload(context, "mallory", key) for key in (OLD, NEW))
    victim = upload(context, "victim")
    assert verdicts(rounds, context, first, second, victim) == ["", DuplicateError.reason, ""]
    for cohort in ([first, victim], [first, first, victim]):
        with pytest.raises((QuorumError, DuplicateError)):
            rounds.release(context.id, [name_of(each) for each in cohort], summed(cohort))
    cohort = [first, second, victim]
    with pytest.raises(SealError):
        rounds.release(context.id, [name_of(each) for each in cohort], summed(cohort))


def test_ours_counts_a_client_once_over_a_restart(
    rounds: Rounds, context: RoundContext, tmp_path: Path
) -> None:
    assert verdicts(rounds, context, upload(context, "mallory", OLD)) == [""]
    again = durable_rounds(tmp_path, roster=ROSTER, identity=signer("key holder"))
    assert verdicts(again, context, upload(context, "mallory", NEW)) == [DuplicateError.reason]


def test_ours_takes_one_upload_of_a_client_and_the_first_one_stands(
    rounds: Rounds, context: RoundContext
) -> None:
    first = upload(context, "mallory", NEW)
    other = upload_under(context, [values("other")], NEW, named("another seed"))
    assert verdicts(rounds, context, first, other, first) == ["", DuplicateError.reason, ""]
    cohort = [other, upload(context, "alice"), upload(context, "bob")]
    assert verdicts(rounds, context, *cohort[1:]) == ["", ""]
    with pytest.raises(SealError):
        rounds.release(context.id, [name_of(each) for each in cohort], summed(cohort))


def test_ours_admits_no_copy_of_another_clients_bytes() -> None:
    holder = KeyHolder(PLAN, roster=ROSTER)
    victim = upload(holder.context, "victim")
    spoiled = replace(victim.admission.receipt, client_key=NEW.public)
    with pytest.raises(ReceiptError):
        holder.admit(Admission(spoiled, victim.admission.sealed_seed))
    # Signed by the thief as its own upload: the seal inside is the victim's.
    thief = resigned(victim, NEW)
    with pytest.raises(SealError):
        holder.admit(thief.admission)
    holder.admit(victim.admission)
    with pytest.raises(DuplicateError):
        holder.admit(thief.admission)
    with pytest.raises((QuorumError, DuplicateError)):
        holder.release(aggregate([victim] * 3))


@pytest.mark.parametrize("thief_first", [False, True])
def test_ours_gives_one_verdict_on_the_same_bytes_whoever_brings_them(
    rounds: Rounds, context: RoundContext, thief_first: bool
) -> None:
    victim = upload(context, "victim")
    pair = [victim, resigned(victim, NEW)]
    if thief_first:
        pair.reverse()
    expected = SealError.reason if thief_first else ""
    assert verdicts(rounds, context, *pair, *pair) == [expected] * 4
    assert verdicts(rounds, context, *pair[::-1]) == [expected] * 2


def test_ours_admits_one_seed_once(rounds: Rounds, context: RoundContext) -> None:
    # Two that share a seed are one voice, even where each has signed for itself.
    twins = [
        upload_under(context, [values(name)], signer(name), named("shared seed"))
        for name in ("alice", "bob")
    ]
    assert verdicts(rounds, context, *twins) == ["", SealError.reason]


def test_ours_admits_no_bytes_of_an_earlier_round(rounds: Rounds, context: RoundContext) -> None:
    old = {name: upload(context, name) for name in ("alice", "bob", "victim")}
    assert verdicts(rounds, context, *old.values()) == [""] * 3
    cohort = list(old.values())
    rounds.release(context.id, [name_of(each) for each in cohort], summed(cohort))

    later = rounds.open(PLAN, "task", 2, 1, NO_MODEL)[0]
    assert verdicts(rounds, later, *cohort) == [ContextError.reason] * 3
    # Neither under a new receipt of the very client: the seal is for the old round and its key.
    for name, upload_ in old.items():
        sealed = upload_.admission.sealed_seed
        fresh = Receipt.sign(signer(name), later.id, named("another digest", name), sealed)
        assert rounds.judge(later.id, [Admission(fresh, sealed)]) == [SealError.reason]
    # Nor unnamed, added to the sum of the new ones.
    new = [upload(later, name) for name in ("alice", "bob", "victim")]
    assert verdicts(rounds, later, *new) == [""] * 3
    assert not np.array_equal(residues(new[0]), residues(cohort[0]))
    with pytest.raises(ReleaseError):
        rounds.release(later.id, [name_of(each) for each in new], summed([*new, cohort[0]]))
    with pytest.raises(ContextError):
        rounds.judge(context.id, [cohort[0].admission])
