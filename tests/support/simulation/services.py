"""Server and key holder as their programs wire them, over folders that outlive them."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from key_holders import PASSPHRASE, SALT
from sqlalchemy import event
from stores import migrated

from secagg.audit import client_hash
from secagg.certificates import Role
from secagg.private_files import write
from secagg.receipts import SigningKey
from secagg.rpc.gatekeeper import Gatekeeper
from secagg.wire.v1 import (
    aggregation_service_pb2_grpc,
    key_holder_service_pb2_grpc,
    operator_service_pb2_grpc,
)
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.policy import Policy
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.service import KeyHolderService
from secagg_keyholder.vault import RoundKeys, load_identity
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.key_holder import KeyHolderClient
from secagg_server.retention import keep_tidy
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService, OperatorService
from secagg_server.store import Store
from secagg_server.verdicts import VerdictDesk
from simulation.faults import KEY_HOLDER, SERVER
from simulation.loop import Owner, begin, within
from simulation.network import Listener

if TYPE_CHECKING:
    import datetime

    from simulation.world import World

__all__ = ["AGGREGATION", "HOLDING", "OPERATING", "KeyHolderProcess", "Process", "ServerProcess"]

AGGREGATION = "secagg.wire.v1.AggregationService"
OPERATING = "secagg.wire.v1.OperatorService"
HOLDING = "secagg.wire.v1.KeyHolderService"

AUDIT_KEY = b"a secret that outlives a server."
_ALL_PAGES = 1 << 30
_KEPT_DAYS = 10_000.0


class Process(Owner):
    """A program that runs; it ends at once, or as it should.

    Attributes:
        role: what it is.
        dead: whether it has ended.
    """

    role = ""
    services: tuple[str, ...] = ()

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.dead = False

    def listen(self, allowed: dict[str, set[Role]]) -> Listener:
        """Its services' gate; nobody gets through before :meth:`open`."""
        gatekeeper = Gatekeeper(
            allowed,
            self.world.rosters[self.role],
            encrypted=True,
            hashed=lambda name: client_hash(AUDIT_KEY, name),
        )
        return Listener(self, gatekeeper)

    def open(self, listener: Listener) -> None:
        """Let calls in."""
        for service in self.services:
            self.world.network.listeners[service] = listener

    def vanish(self) -> None:
        """End on the spot; nothing of it runs any more, and what it had not written is lost."""
        self.dead = True
        for service in self.services:
            self.world.network.listeners.pop(service, None)

    async def gone(self) -> None:
        """Returns once nothing of it is left."""
        while ended := list(self.cancel()):
            await asyncio.wait(ended)
        self.close()

    async def stop(self) -> None:
        """End as a program that is told to."""
        self.vanish()

    def close(self) -> None:
        """Let go of its files."""


class _Clock(SystemClock):
    """The machine's clock: its time of day can be wrong."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> float:
        return self._world.loop.time()

    def utc(self) -> datetime.datetime:
        return self._world.utc()


class ServerProcess(Process):
    """The server: aggregation and operator services, coordinator, store and blobs.

    Raises:
        SecaggError, OSError: it does not start.
    """

    role = SERVER
    services = (AGGREGATION, OPERATING)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        folder, roster = world.folder / "server", world.rosters[SERVER]
        folder.mkdir(exist_ok=True)
        self.store = Store(migrated(folder / "store.sqlite3"), AUDIT_KEY)
        event.listen(self.store.database.engine, "checkout", self._limit)
        self.blobs = BlobStore(folder)
        rounds = OpenRounds(clock := _Clock(world))
        self.key_holder = KeyHolderClient(world.addresses[KEY_HOLDER], world.kit("server"))
        self.coordinator = Coordinator(
            *(self.store, self.blobs, rounds, self.key_holder, clock, roster), secret=AUDIT_KEY
        )
        intake = Intake(self.store, self.blobs, rounds, roster)
        verdicts = VerdictDesk(self.store, roster, AUDIT_KEY)
        self.gate = self.listen({AGGREGATION: {Role.CLIENT}, OPERATING: {Role.OPERATOR}})
        target = cast(Any, self.gate)
        aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(
            AggregationService(self.store, self.blobs, rounds, intake, verdicts), target
        )
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(
            OperatorService(self.store, self.blobs, self.coordinator, roster), target
        )
        try:
            within(self, self.coordinator.resume)
            begin(keep_tidy(self.store, self.blobs, clock, _KEPT_DAYS), self)
        except BaseException:
            self.close()
            raise
        self.open(self.gate)

    def _limit(self, connection: sqlite3.Connection, *_: object) -> None:
        # Never below what there is: SQLite then refuses to grow.
        pages = 1 if "store" in self.world.full else _ALL_PAGES
        connection.execute(f"PRAGMA max_page_count={pages}").close()

    async def stop(self) -> None:
        """See `Process`."""
        await super().stop()
        await self.coordinator.stop()
        await self.key_holder.close()

    def close(self) -> None:
        """See `Process`."""
        self.store.close()


@functools.cache
def _identity(folder: Path, passphrase: str) -> SigningKey:
    return load_identity(folder / "identity.key", passphrase)


class KeyHolderProcess(Process):
    """The key holder: its service, rounds, ledger and round keys.

    Raises:
        SecaggError: it does not start.
    """

    role = KEY_HOLDER
    services = (HOLDING,)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        folder = world.folder / "keyholder"
        folder.mkdir(exist_ok=True)
        self.ledger = Ledger(folder / "ledger.sqlite3", AUDIT_KEY)
        try:
            # The salt of all runs, so that the passphrase is stretched only once.
            if not (salt := folder / "round-keys" / "salt").exists():
                write(salt, SALT)
            keys = RoundKeys(salt.parent, PASSPHRASE)
            identity = _identity(world.kits / "keyholder", world.passphrase)
            rounds = Rounds(self.ledger, keys, identity, world.rosters[KEY_HOLDER], Policy())
            rounds.recover()
        except BaseException:
            self.close()
            raise
        self.gate = self.listen({HOLDING: {Role.SERVER}})
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
            KeyHolderService(rounds), cast(Any, self.gate)
        )
        self.open(self.gate)

    def close(self) -> None:
        """See `Process`."""
        self.ledger.close()
