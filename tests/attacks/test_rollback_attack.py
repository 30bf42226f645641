"""A key holder that forgets what it released, or remembers what it should have forgotten.

Two sums of the same uploads over cohorts that differ by one client give that client's update as
their difference. A key holder that releases once must therefore still know so after a crash, and
after a restore from a backup it must be unable to open what it may have opened before.

Broken: a key that outlives its release, as in a backup or snapshot of the round keys' folder (which
docs/operations.md forbids), and a "released" that lives in memory. Ours: the release is on the disk
before it leaves, the key's file is erased, a backup holds neither keys nor seals, and a restored
ledger abandons every round it believes to be open.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from attacker import Integers, name_of, named, signer, summed, upload_under
from key_holders import AUDIT_KEY, PASSPHRASE, durable_rounds

from secagg.aggregator import Aggregate
from secagg.context import NO_MODEL, RoundContext
from secagg.errors import ClosedError, ConfigurationError, SealError, UnavailableError
from secagg.keyholder import KeyHolder
from secagg.planner import plan_integers
from secagg.sealing import RoundKeyPair
from secagg.upload import Upload
from secagg.wire.codec import sums_from_bytes
from secagg_keyholder.backup import restore_ledger
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.vault import RoundKeys

SIZE, CLIENTS = 50, 5
PLAN = plan_integers(SIZE, max_clients=6, max_abs=100)
IDENTITY = signer("key holder")


def values(client: int) -> list[Integers]:
    return [np.random.default_rng(client).integers(-100, 100, SIZE, endpoint=True)]


def uploads(context: RoundContext) -> list[Upload]:
    return [
        upload_under(context, values(i), signer(f"{i}"), named("seed", i)) for i in range(CLIENTS)
    ]


def total(clients: int) -> Integers:
    return np.sum([values(client)[0] for client in range(clients)], axis=0)


class Site:
    """A key holder's machine: state that can be lost, copied and put back."""

    def __init__(self, folder: Path) -> None:
        self.state, self.ledger = folder / "state", folder / "state" / "ledger.sqlite3"
        self.rounds = self.start()

    def start(self) -> Rounds:
        """What a new process knows."""
        self.rounds = durable_rounds(self.state, identity=IDENTITY)
        return self.rounds

    def keys(self) -> RoundKeys:
        return RoundKeys(self.state / "round-keys", PASSPHRASE)

    def lose_ledger(self) -> None:
        for file in self.state.glob("ledger.sqlite3*"):
            file.unlink()

    def judge(self, context: RoundContext, sent: list[Upload]) -> None:
        assert self.rounds.judge(context.id, [u.admission for u in sent]) == [""] * len(sent)

    def release(self, context: RoundContext, sent: list[Upload]) -> Integers:
        answer = self.rounds.release(context.id, [name_of(u) for u in sent], summed(sent))
        return sums_from_bytes(answer.sums, PLAN)[0]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def context(site: Site) -> RoundContext:
    return site.rounds.open(PLAN, "task", 1, 1, NO_MODEL)[0]


def opens_nothing(site: Site, context: RoundContext, sent: list[Upload]) -> None:
    """Neither the smaller cohort nor anything else gives the server a second sum."""
    with contextlib.suppress(ClosedError):
        site.rounds.judge(context.id, [upload.admission for upload in sent])
    with pytest.raises((ClosedError, SealError)):
        site.release(context, sent[:-1])


# --- broken ---------------------------------------------------------------------------------------


class KeyInTheBackup:
    """Broken: what a restart or restore brings back is the key, and not that it was used."""

    def __init__(self, pair: RoundKeyPair) -> None:
        self._pair, self.holder = pair, KeyHolder(PLAN, pair=pair)

    def restored(self) -> KeyInTheBackup:
        return KeyInTheBackup(RoundKeyPair.from_bytes(self._pair.to_bytes()))


def test_a_key_in_the_backup_opens_the_same_uploads_over_one_client_fewer() -> None:
    scheme = KeyInTheBackup(RoundKeyPair())
    sent = uploads(scheme.holder.context)
    manifest = tuple(upload.admission for upload in sent)
    first = scheme.holder.release(Aggregate(manifest, summed(sent)))
    second = scheme.restored().holder.release(Aggregate(manifest[:-1], summed(sent[:-1])))
    assert np.array_equal(first.sums[0] - second.sums[0], values(CLIENTS - 1)[0])


def test_a_snapshot_of_the_round_keys_is_such_a_backup_of_ours(
    site: Site, context: RoundContext, tmp_path: Path
) -> None:
    # The rule in docs/operations.md, shown from the other side: no software can tell a disk that
    # was put back from the disk it was.
    sent = uploads(context)
    site.judge(context, sent)
    shutil.copytree(site.state, tmp_path / "snapshot")
    first = site.release(context, sent)
    shutil.rmtree(site.state)
    shutil.copytree(tmp_path / "snapshot", site.state)
    site.start()
    assert np.array_equal(first - site.release(context, sent[:-1]), values(CLIENTS - 1)[0])


# --- ours: restarts -------------------------------------------------------------------------------


def test_ours_remembers_a_release_over_a_restart(site: Site, context: RoundContext) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    first = site.release(context, sent)
    assert np.array_equal(first, total(CLIENTS))
    assert site.keys().names() == set()
    for _ in range(2):
        site.start()
        assert np.array_equal(site.release(context, sent), first)
        opens_nothing(site, context, sent)
        with pytest.raises(ClosedError):
            site.rounds.open(PLAN, "task", 1, 2, NO_MODEL)


def test_ours_opens_one_of_two_manifests_after_a_restart(site: Site, context: RoundContext) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    site.start()
    assert np.array_equal(site.release(context, sent[:-1]), total(CLIENTS - 1))
    site.start()
    with pytest.raises(ClosedError):
        site.release(context, sent)


def test_ours_lets_nothing_out_that_it_could_not_record(
    site: Site, context: RoundContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The disk fails between the opening and the answer: the sum is known to the process alone.
    sent = uploads(context)
    site.judge(context, sent)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record_release", _full)
        with pytest.raises(UnavailableError):
            site.release(context, sent)
        with pytest.raises(ClosedError):
            site.release(context, sent[:-1])
    site.start()
    assert np.array_equal(site.release(context, sent[:-1]), total(CLIENTS - 1))
    with pytest.raises(ClosedError):
        site.release(context, sent)


def test_ours_erases_the_key_that_a_crash_left_behind(
    site: Site, context: RoundContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    with monkeypatch.context() as patch:
        patch.setattr(RoundKeys, "erase", _full)
        with pytest.raises(UnavailableError):
            site.release(context, sent)
    assert site.keys().names() == {context.id.round_key_id}
    opens_nothing(site, context, sent)
    site.start()
    assert site.keys().names() == set()
    opens_nothing(site, context, sent)
    assert np.array_equal(site.release(context, sent), total(CLIENTS))


def _full(*_: object) -> None:
    raise UnavailableError("expected room on the disk; it is full")


# --- ours: backups --------------------------------------------------------------------------------


def test_a_backup_of_ours_holds_neither_key_nor_seal_nor_sum(
    site: Site, context: RoundContext, tmp_path: Path
) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    private = site.keys().get(context.id.round_key_id)
    assert private is not None
    ledger = Ledger(site.ledger, AUDIT_KEY)
    ledger.backup(tmp_path / "while open")
    first = site.release(context, sent)
    ledger.backup(tmp_path / "after the release")
    ledger.close()
    secrets = [private[:32], private[-32:], *(u.admission.sealed_seed[-32:] for u in sent)]
    # What is looked for lies in the ledger itself, or this would find nothing anywhere.
    assert first.astype("<i8").tobytes()[:64] in site_bytes(site)
    secrets.append(first.astype("<i8").tobytes()[:64])
    for backup in ("while open", "after the release"):
        assert not any(secret in (tmp_path / backup).read_bytes() for secret in secrets)


def site_bytes(site: Site) -> bytes:
    return b"".join(file.read_bytes() for file in site.state.glob("ledger.sqlite3*"))


@pytest.mark.parametrize("released", [False, True])
def test_ours_abandons_every_open_round_when_it_is_restored(
    site: Site, context: RoundContext, tmp_path: Path, released: bool
) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    ledger = Ledger(site.ledger, AUDIT_KEY)
    ledger.backup(tmp_path / "backup")
    ledger.close()
    if released:
        site.release(context, sent)
    # The round's key may have survived the fire; the backup says that the round is open.
    site.lose_ledger()
    restore_ledger(tmp_path / "backup", site.state)
    site.start()
    assert site.keys().names() == set()
    opens_nothing(site, context, sent)
    with pytest.raises(ClosedError):
        site.rounds.open(PLAN, "task", 1, 1, NO_MODEL)
    # What comes next has a key of its own, which opens none of the old uploads.
    later = site.rounds.open(PLAN, "task", 1, 2, NO_MODEL)[0]
    opens_nothing(site, later, sent)


def test_ours_opens_nothing_from_a_ledger_that_was_copied_and_put_back(
    site: Site, context: RoundContext, tmp_path: Path
) -> None:
    sent = uploads(context)
    site.judge(context, sent)
    shutil.copytree(site.state, tmp_path / "copy", ignore=shutil.ignore_patterns("round-keys"))
    site.release(context, sent)
    site.lose_ledger()
    with pytest.raises(ConfigurationError, match="copied some other way"):
        restore_ledger(tmp_path / "copy" / "ledger.sqlite3", site.state)
    # Past the command: the file itself, and its journal.
    for file in (tmp_path / "copy").glob("ledger.sqlite3*"):
        shutil.copy(file, site.state)
    site.start()
    opens_nothing(site, context, sent)
