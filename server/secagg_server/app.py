"""Wires the server together and runs it."""

from __future__ import annotations

import structlog

from secagg.errors import ConfigurationError
from secagg.rpc import channels
from secagg.rpc.lifecycle import (
    add_health,
    check_ready_file,
    serve_until_stopped,
    write_ready_file,
)
from secagg.wire.v1 import aggregation_service_pb2_grpc, operator_service_pb2_grpc
from secagg_server.blobs import BlobStore
from secagg_server.clock import SystemClock
from secagg_server.config import ServerSettings
from secagg_server.coordinator import Coordinator
from secagg_server.intake import Intake
from secagg_server.key_holder import KeyHolderClient
from secagg_server.rounds import OpenRounds
from secagg_server.services import AggregationService, OperatorService
from secagg_server.store import Store

__all__ = ["run"]

_LOG = structlog.get_logger(__name__)


def _open_data(settings: ServerSettings) -> tuple[Store, BlobStore]:
    try:
        blobs = BlobStore(settings.data_dir)
    except OSError as error:
        raise ConfigurationError(
            f"expected a writable data_dir; {settings.data_dir}: {error.strerror}"
        ) from None
    return Store(settings.database), blobs


async def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: an address or directory that cannot be used.
    """
    # Before any gRPC server exists: one that never ran cannot be disposed of cleanly.
    check_ready_file(settings.ready_file)
    for address in (settings.listen, settings.admin_listen):
        channels.check_listenable(address)
    channels.check_loopback(settings.key_holder)
    store, blobs = _open_data(settings)
    rounds = OpenRounds(clock := SystemClock())
    key_holder = KeyHolderClient(settings.key_holder)
    coordinator = Coordinator(store, blobs, rounds, key_holder, clock)
    public, admin = channels.server(), channels.server()
    aggregation_service_pb2_grpc.add_AggregationServiceServicer_to_server(
        AggregationService(store, blobs, rounds, Intake(store, blobs, rounds)), public
    )
    operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(
        OperatorService(store, blobs, coordinator), admin
    )
    healths = [add_health(public), add_health(admin)]
    addresses = {
        "listen": channels.add_listener(public, settings.listen),
        "admin_listen": channels.add_listener(admin, settings.admin_listen),
    }
    await public.start()
    await admin.start()
    coordinator.resume()
    _LOG.info("listening", **addresses)
    if settings.ready_file:
        write_ready_file(settings.ready_file, addresses)

    async def on_stop() -> None:
        await coordinator.stop()
        await key_holder.close()

    await serve_until_stopped([public, admin], healths, on_stop)
    store.close()
