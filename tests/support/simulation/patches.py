"""Where the simulation takes the place of the machine: threads, time, disk, network, randomness."""

# ruff: noqa: ANN401 - stands in for functions of any kind

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from key_holders import _Remembered

from secagg import challenger, failpoints, recheck
from secagg.sealing import RoundKeyPair
from secagg_client import session
from secagg_keyholder import database as ledger_database
from secagg_keyholder import rounds, vault
from secagg_server import audit_log, blobs, key_holder, store, transactions
from simulation.loop import in_thread, threaded, waits

if TYPE_CHECKING:
    from simulation.world import World

__all__ = ["patched"]


class _Armed:
    """Stands for the name of the failpoint to die at; asked at each one that is passed."""

    def __init__(self, passed: Callable[[str], None]) -> None:
        self._passed = passed

    def __eq__(self, name: object) -> bool:
        self._passed(str(name))
        return False

    __hash__ = None  # type: ignore[assignment]


class _RepeatablePair(RoundKeyPair):
    """A round key from `os.urandom`, so that a run is the same each time."""

    def __init__(self) -> None:
        seed, private = os.urandom(64), os.urandom(32)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(seed)
        self._take(mlkem, X25519PrivateKey.from_private_bytes(private))


@contextlib.contextmanager
def patched(world: World) -> Iterator[None]:
    """The machine is the world's, until the context ends."""

    def pause() -> None:
        if in_thread():
            waits(asyncio.sleep(world.pause_s()))

    def sleep(seconds: float) -> None:
        if in_thread():
            waits(asyncio.sleep(seconds))

    def passed(name: str) -> None:
        pause()
        world.passed(name)

    def writing(what: str, write: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            pause()
            if what in world.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*arguments)

        return wrapped

    def paused(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            pause()
            return method(*arguments, **options)

        return wrapped

    def limited(self: Any) -> Any:
        pages = 1 if "ledger" in world.full else 1 << 30
        pause()
        self._connection.execute(f"PRAGMA max_page_count={pages}").close()
        return transaction(self)

    transaction = ledger_database.Database.transaction
    now = SimpleNamespace(now=lambda _zone: world.utc())
    entropy = random.Random(f"entropy {world.run.seed}")
    state = random.getstate()
    random.seed(world.run.seed)
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        put(asyncio, "to_thread", threaded)
        put(failpoints, "_armed", _Armed(passed))
        # Power never fails here.
        put(os, "fsync", lambda _descriptor: None)
        put(os, "urandom", entropy.randbytes)
        put(rounds, "RoundKeyPair", _RepeatablePair)
        put(vault, "Scrypt", _Remembered)
        put(blobs, "write", writing("blobs", blobs.write))
        put(vault, "write", writing("round keys", vault.write))
        for method in ("chunk", "missing_chunks", "drop_upload", "drop_uploads"):
            put(blobs.BlobStore, method, paused(getattr(blobs.BlobStore, method)))
        put(transactions.Database, "_run", paused(transactions.Database._run))
        put(transactions, "LOCK_WAIT_MS", 0)
        put(transactions, "time", SimpleNamespace(sleep=sleep))
        put(ledger_database.Database, "transaction", limited)
        put(ledger_database, "_BUSY_SECONDS", 0.0)
        put(ledger_database, "datetime", now)
        put(audit_log, "datetime", SimpleNamespace(datetime=now, UTC=datetime.UTC))
        put(store, "_now", world.utc)
        put(key_holder, "aio_channel", world.server_channel)
        put(key_holder, "why_unreachable", lambda *_: None)
        put(session, "channel", world.client_channel)
        put(session, "why_unreachable", lambda *_: None)
        put(challenger, "sketch", world.sketch)
        put(recheck, "sketch", world.sketch)
        try:
            yield
        finally:
            random.setstate(state)
