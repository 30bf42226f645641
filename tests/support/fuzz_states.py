"""Fuzz target: files that programs keep for themselves, cut off or damaged as disks leave them."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import cohort
import numpy as np
from fuzz_inputs import Choices, Target, refusable
from fuzz_wire import PLANS
from key_holders import AUDIT_KEY, PASSPHRASE, SALT, durable_rounds
from numpy.lib import format as npy

from secagg.archive import read_npz
from secagg.context import RoundContext
from secagg.errors import (
    ClosedError,
    ConfigurationError,
    ContextError,
    InputError,
    MalformedError,
    PlanError,
    PrivacyError,
    UnavailableError,
)
from secagg.optimisers import Optimiser
from secagg_client.ledger import Ledger, Limits
from secagg_client.outbox import Kept, Outbox
from secagg_client.state_dir import StateDir
from secagg_client.switch import Switch
from secagg_keyholder.backup import restore_ledger
from secagg_keyholder.ledger import Ledger as HolderLedger
from secagg_keyholder.vault import RoundKeys
from secagg_recommender.index import ExactIndex
from secagg_recommender.index_files import open_index, save_index

__all__ = ["STATES"]

_ITEMS, _DIMENSIONS = 12, 3


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _contexts() -> tuple[RoundContext, RoundContext]:
    private = PLANS()["private"]
    return (
        cohort.round_context(cohort.counts_plan(), task_id="task"),
        cohort.round_context(private, task_id="task"),
    )


@cache
def _kept() -> bytes:
    context, _ = _contexts()
    return Kept(context, bytes(32), cohort.noise_upload(context, 0)).to_bytes()


@cache
def _lines() -> bytes:
    folder = _folder() / "counted"
    ledger = Ledger(folder)
    for context in _contexts():
        ledger.sent(context, bytes(32))
    return (folder / "ledger.jsonl").read_bytes()


@cache
def _index() -> Path:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(_ITEMS, _DIMENSIONS)).astype(np.float32)
    save_index(ExactIndex(vectors, np.zeros(_ITEMS, np.float32)), _folder() / "index")
    return _folder() / "index"


@cache
def _backup() -> bytes:
    folder = _folder() / "holder"
    rounds = durable_rounds(folder, identity=cohort.identity(90))
    context, _ = rounds.open(cohort.counts_plan(), "task", 1, 1, bytes(32))
    uploads = [cohort.noise_upload(context, index).admission for index in range(3)]
    rounds.judge(context.id, uploads)
    target = _folder() / "backup"
    rounds._ledger.backup(target)
    rounds._ledger.close()
    return target.read_bytes()


@cache
def _round_keys() -> RoundKeys:
    folder = _folder() / "keys"
    folder.mkdir(mode=0o700)
    (folder / "salt").write_bytes(SALT)
    keys = RoundKeys(folder, PASSPHRASE)
    keys.put(bytes(32), bytes(range(96)))
    return keys


def _upload(choices: Choices) -> None:
    whole = choices.flip()
    kept = choices.altered(_kept())
    if whole:
        kept = hashlib.sha256(kept[32:]).digest() + kept[32:]
    with refusable(MalformedError, ContextError, PlanError):
        assert Kept.from_bytes(kept).to_bytes()
    folder = _emptied("outbox")
    (folder / "upload-task.1.1").write_bytes(kept)
    with refusable(ClosedError):
        Outbox(folder, "task").latest()


def _ledger(choices: Choices) -> None:
    """The client's ledger, changed in one of its lines or as a whole."""
    folder = _emptied("ledger")
    data = choices.altered(_lines())
    if choices.flip():
        data += choices.rest() + b"\n"
    (folder / "ledger.jsonl").write_bytes(data)
    ledger = Ledger(folder)
    with refusable(ConfigurationError):
        assert all(account.at_most >= 0 for account in ledger.accounts())
    for context in _contexts():
        with refusable(ConfigurationError, PrivacyError):
            ledger.require(context, Limits(max_epsilon=9.0))
        with refusable(ConfigurationError, ClosedError):
            ledger.sent(context, bytes(32))


def _tensors(choices: Choices) -> None:
    """Arrays in an archive, which is changed, or whose members are."""
    arrays = {"users": np.arange(4), "vectors": np.ones((4, 2), np.float32)}
    inside = choices.flip()
    buffer = io.BytesIO()
    if inside:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in arrays.items():
                member = io.BytesIO()
                npy.write_array(member, array)
                archive.writestr(f"{name}.npy", _header(choices, member.getvalue()))
    else:
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # names are ours
    data = buffer.getvalue() if inside else choices.altered(buffer.getvalue())
    folder = _emptied("vectors")
    for name in ("vectors-task.1.npz", "left-over-task.1.npz"):
        (folder / name).write_bytes(data)
    state = StateDir(folder, "task")
    with refusable(InputError):
        state.before(2)
    with refusable(InputError):
        state.user_vector(2)
    with refusable(InputError):
        read_npz(folder / "vectors-task.1.npz")


def _header(choices: Choices, member: bytes) -> bytes:
    """An array's file whose header is another text of any length, or that is changed anywhere."""
    if choices.flip():
        return choices.altered(member)
    text = choices.taken(choices.number(200))
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def _index_folder(choices: Choices) -> None:
    """An index of which one file is changed, its fingerprint too perhaps."""
    folder = _folder() / "an index"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_index(), folder)
    name = choices.pick(("index.json", "vectors.npy", "bias.npy"))
    data = choices.altered((folder / name).read_bytes())
    (folder / name).write_bytes(data)
    if choices.flip() and name != "index.json":
        about = json.loads((folder / "index.json").read_bytes())
        about["files"][name] = hashlib.sha256(data).hexdigest()
        (folder / "index.json").write_text(json.dumps(about), "utf-8")
    with refusable(InputError):
        assert open_index(folder).n_items == _ITEMS


def _round_key(choices: Choices) -> None:
    keys = _round_keys()
    file = _folder() / "keys" / f"{bytes(32).hex()}.key"
    kept = file.read_bytes()
    file.write_bytes(choices.altered(kept))
    try:
        with refusable(ConfigurationError):
            assert keys.get(bytes(32)) == bytes(range(96))
    finally:
        file.write_bytes(kept)


def _restored(choices: Choices) -> None:
    state = _emptied("state")
    file = _folder() / "changed"
    file.write_bytes(choices.altered(_backup()))
    with refusable(ConfigurationError, UnavailableError, ClosedError):
        restore_ledger(file, state)
        with closing(HolderLedger(state / "ledger.sqlite3", AUDIT_KEY)) as ledger:
            for row in ledger.open_rounds():
                ledger.verdicts(row.id)
                ledger.account(row.id.task_id)


def _optimiser(choices: Choices) -> None:
    optimiser = Optimiser(choices.pick(("average", "momentum", "adagrad", "adam", "yogi")), 0.1)
    data = choices.rest()
    with refusable(MalformedError):
        state = optimiser.state_from_bytes(data, 3)
        assert optimiser.state_to_bytes(state) == data


def _paused(choices: Choices) -> None:
    folder = _emptied("switch")
    (folder / "paused").write_bytes(choices.rest())
    assert isinstance(Switch(folder).since(), str | None)


def _emptied(name: str) -> Path:
    folder = _folder() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


# Inputs that are kept count on these places: new ones go to the end.
_KINDS: tuple[Callable[[Choices], None], ...] = (
    *(_upload, _ledger, _tensors, _index_folder, _round_key, _restored, _optimiser, _paused),
)
_PLACE = {kind: index for index, kind in enumerate(_KINDS)}


def _one(data: bytes) -> None:
    choices = Choices(data)
    choices.pick(_KINDS)(choices)


def _seeds() -> dict[str, bytes]:
    def seed(kind: Callable[..., None], *decisions: int, rest: bytes = b"") -> bytes:
        return bytes([_PLACE[kind], *decisions]) + rest

    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"
    ended = b'{"task":"task","round":1,"attempt":1,"fate":"accepted","at":"x","certain":false}'
    text = bytes([len(header)]) + header
    return {
        "an upload": seed(_upload),
        "an upload changed": seed(_upload, 1, 1, 40, 0, 3, 1, 7),
        "a ledger": seed(_ledger),
        "a ledger cut": seed(_ledger, 1, 90, 0, 0),
        "a ledger with an end": seed(_ledger, 0, 1, rest=ended),
        "an archive": seed(_tensors),
        "an archive changed": seed(_tensors, 0, 1, 90, 0, 3, 0, 9),
        "a header": seed(_tensors, 1, 0, rest=text + b"\0" + text),
        "an array": seed(_tensors, 1, 1, 1, 20, 0, 3, 0, 9),
        "an index": seed(_index_folder),
        "an index's vectors": seed(_index_folder, 1, 1, 90, 0, 3, 0, 9, 1),
        "an index's bias": seed(_index_folder, 2, 1, 90, 0, 3, 0, 9, 1),
        "a round key": seed(_round_key),
        "a backup": seed(_restored),
        "a backup changed": seed(_restored, 1, 0, 32, 0, 3, 1, 9),
        "an optimiser": seed(_optimiser, 3, rest=bytes(48)),
        "paused": seed(_paused, rest=b"2030-01-01T00:00:00+00:00"),
    }


def _prepare() -> None:
    _kept()
    _lines()
    _index()
    _backup()
    _round_keys()


STATES = Target(
    "states",
    "kept uploads, client ledgers, archives of arrays, indexes, round keys, backups, optimisers",
    ("Kept.from_bytes", "Ledger", "read_npz", "open_index", "RoundKeys.get", "restore_ledger"),
    _one,
    _seeds,
    prepare=_prepare,
)
