"""Wires the server together and runs it."""

from __future__ import annotations

import asyncio

import structlog

from secagg.audit import client_hash, load_audit_key
from secagg.certificates import Role
from secagg.enrolment import EnrolmentFile
from secagg.errors import ConfigurationError, StorageError
from secagg.instruments import Meter
from secagg.monitor import Lookout
from secagg.rpc import channels
from secagg.rpc.footprint import settle_in
from secagg.rpc.gatekeeper import Gatekeeper
from secagg.rpc.lifecycle import (
    Check,
    add_health,
    serve_until_stopped,
    write_ready_file,
)
from secagg.rpc.workers import Workers
from secagg.settings import only_process
from secagg.wire.v1 import (
    aggregation_service_pb2,
    aggregation_service_pb2_grpc,
    operator_service_pb2,
    operator_service_pb2_grpc,
)
from secagg_server import gauges
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.config import Opened, ServerSettings
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.key_holder import KeyHolderClient
from secagg_server.metrics import METRICS
from secagg_server.overview import Overview
from secagg_server.page import page_routes
from secagg_server.retention import keep_tidy
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService, OperatorService
from secagg_server.store import Store
from secagg_server.verdicts import VerdictDesk

__all__ = ["run"]

MIN_FREE_BYTES = 64 << 20
_AGGREGATION = aggregation_service_pb2.DESCRIPTOR.services_by_name["AggregationService"].full_name
_OPERATOR = operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name
_LOG = structlog.get_logger(__name__)


async def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError, IdentityError: see `ServerSettings.opened`, or a port is taken.
    """
    # Before any gRPC server exists: one that never ran cannot be disposed of cleanly.
    opened = settings.opened()
    settle_in()
    for address in (settings.listen, settings.admin_listen):
        channels.check_listenable(address, encrypted=opened.kit is not None)
    Lookout.check(settings)
    with only_process(settings.data_dir):
        await _serve(settings, opened)


async def _serve(settings: ServerSettings, opened: Opened) -> None:
    if opened.kit is None:
        _LOG.warning("insecure", why="plaintext on loopback: anybody on this machine may call")
    meter = Meter(METRICS, process=True)
    audit_key = load_audit_key(settings.data_dir / "audit.key")
    store = Store(settings.database, audit_key, meter=meter)
    blobs = BlobStore(settings.data_dir)
    workers = Workers(settings.workers, meter=meter)
    rounds = OpenRounds(clock := SystemClock())
    key_holder = KeyHolderClient(settings.key_holder, opened.kit)
    coordinator = Coordinator(
        *(store, blobs, rounds, key_holder, clock, opened.roster),
        compute=workers.run,
        secret=audit_key,
        workers=settings.workers,
        meter=meter,
    )
    gatekeeper = Gatekeeper(
        {_AGGREGATION: {Role.CLIENT}, _OPERATOR: {Role.OPERATOR}},
        opened.roster,
        encrypted=opened.kit is not None,
        in_flight=settings.max_in_flight,
        hashed=lambda name: client_hash(audit_key, name),
        meter=meter,
    )
    public, admin = channels.server([gatekeeper]), channels.server([gatekeeper])
    intake = Intake(store, blobs, rounds, opened.roster, meter=meter)
    verdicts = VerdictDesk(store, opened.roster, audit_key)
    aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(
        AggregationService(store, blobs, rounds, intake, verdicts, meter=meter), public
    )
    operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(
        OperatorService(store, blobs, coordinator, opened.roster, settings.min_clients), admin
    )
    gauges.watch(meter, store, blobs, opened.roster, opened.kit)
    healths = [add_health(public), add_health(admin)]
    page = page_routes(Overview(store, meter, audit_key))
    lookout = Lookout(settings, opened.kit, opened.roster, meter, page)
    addresses = {
        "listen": channels.add_listener(public, settings.listen, opened.kit),
        "admin_listen": channels.add_listener(admin, settings.admin_listen, opened.kit),
        **await lookout.start(),
    }
    # First, so that no client that comes back finds its round not open yet: to it that is final.
    coordinator.resume()
    await public.start()
    await admin.start()
    tidy = asyncio.create_task(keep_tidy(store, blobs, clock, settings.retain_days))
    _LOG.info("listening", **addresses)

    def announce() -> None:
        if settings.ready_file:
            write_ready_file(settings.ready_file, addresses)

    async def on_stop() -> None:
        tidy.cancel()
        await coordinator.stop()
        await key_holder.close()

    checks = _checks(store, blobs, key_holder, opened)
    servers = [public, admin, *lookout.servers]
    healths += lookout.healths
    await serve_until_stopped(servers, healths, on_stop, checks, announce)
    await lookout.stop()
    workers.close()
    store.close()


def _checks(
    store: Store, blobs: BlobStore, key_holder: KeyHolderClient, opened: Opened
) -> list[Check]:
    """What must work for the server to be of use to anybody."""

    async def storing() -> None:
        await asyncio.to_thread(store.ping)

    async def room() -> None:
        if await asyncio.to_thread(blobs.free_bytes) < MIN_FREE_BYTES:
            raise StorageError("expected room on the disk; it is almost full")

    async def enrolment() -> None:
        if isinstance(opened.roster, EnrolmentFile):
            opened.roster.current()
            if opened.roster.problem:
                raise ConfigurationError(opened.roster.problem)

    return [storing, room, enrolment, key_holder.check]
