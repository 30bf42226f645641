"""Wires the key holder together and runs it."""

from __future__ import annotations

import asyncio

import structlog

from secagg.audit import client_hash, load_audit_key
from secagg.certificates import Role
from secagg.enrolment import EnrolmentFile
from secagg.errors import ConfigurationError
from secagg.instruments import Meter
from secagg.monitor import Lookout
from secagg.private_files import write
from secagg.rpc import channels
from secagg.rpc.footprint import settle_in
from secagg.rpc.gatekeeper import Gatekeeper
from secagg.rpc.lifecycle import (
    add_health,
    serve_until_stopped,
    write_ready_file,
)
from secagg.rpc.workers import Workers
from secagg.settings import only_process
from secagg.wire.v1 import key_holder_service_pb2, key_holder_service_pb2_grpc
from secagg_keyholder import gauges
from secagg_keyholder.config import KeyHolderSettings, Opened
from secagg_keyholder.database import LEDGER
from secagg_keyholder.ledger import Ledger
from secagg_keyholder.metrics import METRICS
from secagg_keyholder.rounds import Rounds
from secagg_keyholder.service import KeyHolderService
from secagg_keyholder.vault import RoundKeys

__all__ = ["run"]

_SERVICE = key_holder_service_pb2.DESCRIPTOR.services_by_name["KeyHolderService"].full_name
_LOG = structlog.get_logger(__name__)


async def run(settings: KeyHolderSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigurationError, IdentityError: see `KeyHolderSettings.opened`, or the port is taken.
    """
    # Before any gRPC server exists: one that never ran cannot be disposed of cleanly.
    opened = settings.opened()
    settle_in()
    channels.check_listenable(settings.listen, encrypted=opened.kit is not None)
    Lookout.check(settings)
    with only_process(settings.state_dir):
        await _serve(settings, opened)


async def _serve(settings: KeyHolderSettings, opened: Opened) -> None:
    if opened.kit is None:
        write(settings.state_dir / "passphrase", opened.passphrase.encode())
        _LOG.warning("insecure", why="plaintext on loopback: anybody on this machine may call")
    meter = Meter(METRICS, process=True)
    audit_key = load_audit_key(settings.state_dir / "audit.key")
    ledger = Ledger(settings.state_dir / LEDGER, audit_key, meter=meter)
    keys = RoundKeys(settings.round_keys, opened.passphrase)
    workers = Workers(settings.workers, meter=meter)
    await asyncio.to_thread(workers.warm)
    rounds = Rounds(
        ledger, keys, opened.identity, opened.roster, opened.policy, workers.run, meter=meter
    )
    rounds.recover()
    gatekeeper = Gatekeeper(
        {_SERVICE: {Role.SERVER}},
        opened.roster,
        encrypted=opened.kit is not None,
        in_flight=settings.max_in_flight,
        hashed=lambda name: client_hash(audit_key, name),
        meter=meter,
    )
    server = channels.server([gatekeeper])
    key_holder_service_pb2_grpc.add_KeyHolderServiceServicer_to_server(
        KeyHolderService(rounds), server
    )
    gauges.watch(meter, ledger, opened.policy, opened.roster, opened.kit)
    healths = [add_health(server)]
    lookout = Lookout(settings, opened.kit, opened.roster, meter)
    addresses = {
        "listen": channels.add_listener(server, settings.listen, opened.kit),
        **await lookout.start(),
    }
    await server.start()
    _LOG.info("listening", **addresses)

    def announce() -> None:
        if settings.ready_file:
            write_ready_file(settings.ready_file, addresses)

    async def ready() -> None:
        await asyncio.to_thread(ledger.ping)
        if isinstance(opened.roster, EnrolmentFile):
            opened.roster.current()
            if opened.roster.problem:
                raise ConfigurationError(opened.roster.problem)

    async def on_stop() -> None:
        """Calls in flight end first; see `serve_until_stopped`."""

    servers = [server, *lookout.servers]
    healths += lookout.healths
    await serve_until_stopped(servers, healths, on_stop, [ready], announce)
    await lookout.stop()
    workers.close()
    ledger.close()
