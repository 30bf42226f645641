"""Wires the key holder together and runs it."""

from __future__ import annotations

import structlog

from secagg.rpc import channels
from secagg.rpc.lifecycle import (
    add_health,
    check_ready_file,
    serve_until_stopped,
    write_ready_file,
)
from secagg.wire.v1 import key_holder_service_pb2_grpc
from secagg_keyholder.config import KeyHolderSettings
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.service import KeyHolderService

__all__ = ["run"]

_LOG = structlog.get_logger(__name__)


async def run(settings: KeyHolderSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: an address that cannot be used.
    """
    # Before any gRPC server exists: one that never ran cannot be disposed of cleanly.
    check_ready_file(settings.ready_file)
    channels.check_listenable(settings.listen)
    server = channels.server()
    key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
        KeyHolderService(Rounds(settings.min_clients)), server
    )
    healths = [add_health(server)]
    addresses = {"listen": channels.add_listener(server, settings.listen)}
    await server.start()
    _LOG.info("listening", **addresses)
    if settings.ready_file:
        write_ready_file(settings.ready_file, addresses)

    async def on_stop() -> None:
        """Nothing outlives the process."""

    await serve_until_stopped([server], healths, on_stop)
