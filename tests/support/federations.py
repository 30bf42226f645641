"""A small federation for tests, forged certificates, and all services of it behind mutual TLS."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc.aio
from key_holders import durable_rounds
from serving import LoopThread, serving
from stores import migrated

from secagg.authority import Authority
from secagg.certificates import Kit, Role, identity_of
from secagg.enrolment import EnrolmentFile
from secagg.provision import Federation
from secagg.receipts import SigningKey
from secagg.rpc.gatekeeper import Gatekeeper
from secagg.rpc.lifecycle import add_health
from secagg.wire import codec
from secagg.wire.v1 import (
    aggregation_service_pb2_grpc,
    key_holder_service_pb2_grpc,
    operator_service_pb2_grpc,
)
from secagg_client.session import ClientKit
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.service import KeyHolderService
from secagg_keyholder.vault import load_identity
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.key_holder import KeyHolderClient
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService, OperatorService
from secagg_server.store import Store
from secagg_server.tasks import TaskSpec
from secagg_server.verdicts import VerdictDesk

__all__ = [
    "AGGREGATION",
    "CLIENTS",
    "KEY_HOLDING",
    "OPERATING",
    "Site",
    "authority_of",
    "client_kit",
    "expired",
    "forged",
    "from_the_future",
    "gatekeeper",
    "key_holder_identity",
    "kit",
    "new_federation",
    "shared",
    "shared_other",
    "site",
    "swap_in",
]

CLIENTS = ("alice", "bob", "carol", "dave")
PASSPHRASE = "of the tests"  # noqa: S105
HOSTS = ("127.0.0.1", "localhost")
SECRET = b"a secret that outlives a server."

AGGREGATION = "secagg.wire.v1.AggregationService"
OPERATING = "secagg.wire.v1.OperatorService"
KEY_HOLDING = "secagg.wire.v1.KeyHolderService"
ALLOWED = {
    AGGREGATION: {Role.CLIENT},
    OPERATING: {Role.OPERATOR},
    KEY_HOLDING: {Role.SERVER},
}


def new_federation(folder: Path, clients: Sequence[str] = CLIENTS) -> Federation:
    """A federation that a test may change."""
    return Federation.create(
        folder,
        server_hosts=HOSTS,
        key_holder_hosts=HOSTS,
        clients=clients,
        passphrase=PASSPHRASE,
    )


def _of_the_session(prefix: str) -> Federation:
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return new_federation(folder / "federation")


@functools.cache
def shared() -> Federation:
    """One federation for all tests that change nothing of it."""
    return _of_the_session("federation-")


@functools.cache
def shared_other() -> Federation:
    """Another authority's federation, with parties of the same names."""
    return _of_the_session("other-federation-")


def kit(federation: Federation, name: str) -> Kit:
    """A party's kit: ``server``, ``key-holder``, ``admin``, or a client's name."""
    return Kit.load(federation.kit(name))


def client_kit(federation: Federation, name: str) -> ClientKit:
    """A client's kit."""
    return ClientKit.load(federation.kit(name))


def authority_of(federation: Federation) -> Authority:
    """The authority with its private key."""
    home = federation.folder / "authority"
    return Authority.from_pem((home / "ca.pem").read_bytes(), (home / "ca.key").read_bytes())


def forged(
    federation: Federation,
    role: Role,
    name: str,
    *,
    hosts: Sequence[str] = HOSTS,
    days: int = 365,
    now: datetime | None = None,
    trusting: Federation | None = None,
) -> Kit:
    """A kit that nobody checked when it was made, with a certificate of a real authority.

    Args:
        federation: whose authority issues it.
        trusting: whose ``ca.pem`` it comes with; that of the same one when omitted.
    """
    issued = authority_of(federation).issue(role, name, hosts=hosts, days=days, now=now)
    ca = authority_of(trusting or federation).ca_pem
    identity = identity_of(issued.certificate)
    return Kit(federation.folder / "nowhere", identity, ca, issued.certificate, issued.private_key)


def expired(federation: Federation, role: Role, name: str) -> Kit:
    """A kit whose time is over."""
    return forged(federation, role, name, days=1, now=datetime.now(UTC) - timedelta(days=3))


def from_the_future(federation: Federation, role: Role, name: str) -> Kit:
    """A kit whose time has not come."""
    return forged(federation, role, name, days=9, now=datetime.now(UTC) + timedelta(days=3))


def as_folder(made: Kit, source: Path, folder: Path) -> Path:
    """The folder of a kit, with other certificate files in it."""
    shutil.copytree(source, folder)
    for name, data in (
        ("ca.pem", made.ca),
        ("certificate.pem", made.certificate),
        ("private.key", made.private_key),
    ):
        swap_in(folder / name, data)
    return folder


def swap_in(path: Path, data: bytes) -> None:
    """Replace a file in one step, as those do who rotate it."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(data)
    draft.chmod(0o600)
    draft.replace(path)


def key_holder_identity(federation: Federation, passphrase: str = PASSPHRASE) -> SigningKey:
    """The key that endorses rounds."""
    return load_identity(federation.kit("key-holder") / "identity.key", passphrase)


def gatekeeper(roster: Any, **changes: Any) -> Gatekeeper:  # noqa: ANN401
    """A gatekeeper that lets every role to its own service."""
    return Gatekeeper(ALLOWED, roster, **{"encrypted": True} | changes)


@dataclass
class Site:
    """The services of a federation in this process, each on a listener of its own."""

    thread: LoopThread
    folder: Path
    federation: Federation
    server: str
    admin: str
    key_holder: str
    store: Store
    blobs: BlobStore
    coordinator: Coordinator
    held: Rounds
    dialling: KeyHolderClient
    faces: AggregationService

    def create(self, spec: TaskSpec) -> None:
        """Record a task and run it."""
        data = bytes(spec.model_bytes)
        if spec.model:
            self.blobs.put_model(spec.task_id, 0, data)
        self.store.create_task(spec, codec.model_digest(data))
        self.thread.run(self._start(spec))

    async def _start(self, spec: TaskSpec) -> None:
        self.coordinator.start(spec)

    def left_behind(self) -> dict[str, int]:
        """What others have brought to be stored here; empty where nothing was accepted."""
        with contextlib.closing(sqlite3.connect(self.folder / "store.sqlite3")) as database:
            counts = {
                table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608
                for table in ("uploads", "tasks", "rounds")
            }
        with contextlib.closing(
            sqlite3.connect(self.folder / "keyholder" / "ledger.sqlite3")
        ) as database:
            counts["opened"] = database.execute("SELECT count(*) FROM rounds").fetchone()[0]
        counts["chunks"] = sum(path.is_file() for path in (self.folder / "b").rglob("uploads/*/*"))
        return {name: count for name, count in counts.items() if count}


@contextlib.contextmanager
def site(
    thread: LoopThread,
    folder: Path,
    federation: Federation,
    *,
    server_kit: Kit | None = None,
    key_holder_kit: Kit | None = None,
    identity: SigningKey | None = None,
    service: type[AggregationService] = AggregationService,
    in_flight: int = 64,
) -> Iterator[Site]:
    """Every service of a federation, as the programs wire them.

    Args:
        server_kit, key_holder_kit: what the listeners show; their own kits when omitted.
        identity: endorses rounds; the key holder's own when omitted.
        service: faces the clients.
    """
    own, holding = kit(federation, "server"), kit(federation, "key-holder")
    folder.mkdir(parents=True, exist_ok=True)
    roster = EnrolmentFile(own.file("enrolment.json"), own.ca)
    held_roster = EnrolmentFile(holding.file("enrolment.json"), holding.ca)
    held = durable_rounds(
        folder / "keyholder",
        roster=held_roster,
        identity=identity or key_holder_identity(federation),
    )
    store, blobs = Store(migrated(folder / "store.sqlite3"), bytes(32)), BlobStore(folder / "b")
    clock = SystemClock()
    rounds = OpenRounds(clock)

    def add_key_holder(target: grpc.aio.Server) -> None:
        key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
            KeyHolderService(held), target
        )
        add_health(target)

    async def dial(address: str) -> KeyHolderClient:
        return KeyHolderClient(address, own)

    def keeper() -> list[Gatekeeper]:
        return [gatekeeper(roster, in_flight=in_flight)]

    with contextlib.ExitStack() as stack:
        held_at = stack.enter_context(
            serving(thread, add_key_holder, key_holder_kit or holding, [gatekeeper(held_roster)])
        )
        client = thread.run(dial(held_at))
        stack.callback(lambda: thread.run(client.close()))
        coordinator = Coordinator(store, blobs, rounds, client, clock, roster, secret=SECRET)
        stack.callback(store.close)
        stack.callback(lambda: thread.run(coordinator.stop()))
        intake, verdicts = Intake(store, blobs, rounds, roster), VerdictDesk(store, roster, SECRET)
        faces = service(store, blobs, rounds, intake, verdicts)
        operating = OperatorService(store, blobs, coordinator, roster)

        def add_public(target: grpc.aio.Server) -> None:
            aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(faces, target)
            add_health(target)

        def add_admin(target: grpc.aio.Server) -> None:
            operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(operating, target)
            add_health(target)

        public = stack.enter_context(serving(thread, add_public, server_kit or own, keeper()))
        admin = stack.enter_context(serving(thread, add_admin, server_kit or own, keeper()))
        yield Site(
            thread,
            folder,
            federation,
            public,
            admin,
            held_at,
            store,
            blobs,
            coordinator,
            held,
            client,
            faces,
        )
