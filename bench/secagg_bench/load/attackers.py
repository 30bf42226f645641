"""Hostile callers in a process of their own: enrolled ones that do not play by the rules, and
strangers that only connect. They go on until their standard input ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

import grpc

from secagg.certificates import Kit, Role
from secagg.encryptor import encrypt_quantized
from secagg.parameters import CHUNK_BYTES
from secagg.rpc.channels import channel
from secagg.rpc.gatekeeper import metadata
from secagg.wire.codec import admission_to_wire, context_id_to_wire
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import aggregation_service_pb2_grpc as aggregation
from secagg_bench.load.members import quantized
from secagg_bench.processes import Services
from secagg_client.session import ClientKit, ClientSession

__all__ = ["ATTACKS", "attacking"]

STREAMS = 16
SILENT = 2000
BURST = 500
_PUT = "/secagg.wire.v1.AggregationService/PutChunk"
_PAUSE_S = 0.05
_TIMEOUT_S = 20.0


@dataclass
class _Attack:
    """What an attacker knows, and how far it has come.

    Attributes:
        did: how often it did what.
    """

    server: str
    task: str
    kits: Path
    clients: Sequence[int]
    ended: threading.Event = field(default_factory=threading.Event)
    did: Counter[str] = field(default_factory=Counter)

    def kit(self, client: int) -> Kit:
        return Kit.load(self.kits / "clients" / f"client-{client + 1}", Role.CLIENT)

    def dial(self) -> socket.socket:
        host, _, port = self.server.rpartition(":")
        return socket.create_connection((host, int(port)), _TIMEOUT_S)

    def note(self, error: grpc.RpcError) -> None:
        self.did[str(cast(grpc.Call, error).code())] += 1

    def all_at_once(self, work: Callable[[int], None]) -> None:
        """Each client in a thread, until the end."""
        threads = [
            threading.Thread(target=work, args=(each,), daemon=True) for each in self.clients
        ]
        for thread in threads:
            thread.start()
        self.ended.wait()


def _leaves_streams(attack: _Attack) -> None:
    """Every client opens as many calls as a connection carries, and sends nothing."""

    def nothing() -> Iterator[bytes]:
        attack.ended.wait()
        yield from ()

    def one(client: int) -> None:
        with channel(attack.server, attack.kit(client)) as connection:
            put: Any = connection.stream_unary(_PUT)
            while not attack.ended.is_set():
                calls = [put.future(nothing(), metadata=metadata()) for _ in range(STREAMS)]
                attack.did["streams"] += STREAMS
                for call in calls:
                    if error := call.exception():
                        attack.note(error)

    attack.all_at_once(one)


def _never_finishes(attack: _Attack) -> None:
    """Every client announces an upload and sends all of it but the end, again and again."""

    def one(client: int) -> None:
        kit = ClientKit.load(attack.kits / "clients" / f"client-{client + 1}")
        with ClientSession(attack.server, attack.task, kit) as session:
            current = next(iter(session.rounds()))
        parts = quantized(current.context, client)
        upload = encrypt_quantized(current.context, parts, kit.identity, current.commitment)
        name: dict[str, Any] = {
            "context": context_id_to_wire(current.context.id),
            "client_key": kit.identity.public,
            "upload_digest": upload.admission.receipt.upload_digest,
        }
        how: dict[str, Any] = {"timeout": _TIMEOUT_S, "metadata": metadata()}
        with channel(attack.server, kit.tls) as connection:
            stub = aggregation.AggregationServiceStub(connection)
            while not attack.ended.is_set():
                try:
                    stub.OpenUpload(
                        pb.OpenUploadRequest(admission=admission_to_wire(upload.admission)), **how
                    )
                    for index in range(current.context.plan.chunks):
                        data = bytes(
                            upload.payload[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                        )
                        stub.PutChunk(
                            pb.PutChunkRequest(**name, chunk_index=index, data=data), **how
                        )
                        attack.did["chunks"] += 1
                except grpc.RpcError as error:
                    attack.note(error)

    attack.all_at_once(one)


def _floods(attack: _Attack) -> None:
    """Every client asks for the round without a pause, whatever it is told."""

    def one(client: int) -> None:
        with channel(attack.server, attack.kit(client)) as connection:
            stub = aggregation.AggregationServiceStub(connection)
            request = pb.GetRoundRequest(task_id=attack.task)
            while not attack.ended.is_set():
                attack.did["calls"] += 1
                try:
                    stub.GetRound(request, timeout=_TIMEOUT_S, metadata=metadata())
                except grpc.RpcError as error:
                    attack.note(error)

    attack.all_at_once(one)


def _sends_large_headers(attack: _Attack) -> None:
    """Every client sends headers of 48 KiB, three times what may be."""
    large = (*metadata(), ("x-large", "x" * (48 << 10)))
    options = [("grpc.max_metadata_size", 1 << 20), ("grpc.absolute_max_metadata_size", 1 << 20)]

    def one(client: int) -> None:
        kit = attack.kit(client)
        credentials = grpc.ssl_channel_credentials(kit.ca, kit.private_key, kit.certificate)
        with grpc.secure_channel(attack.server, credentials, options) as connection:
            stub = aggregation.AggregationServiceStub(connection)
            while not attack.ended.is_set():
                attack.did["calls"] += 1
                try:
                    stub.GetRound(pb.GetRoundRequest(), timeout=_TIMEOUT_S, metadata=large)
                except grpc.RpcError as error:
                    attack.note(error)

    attack.all_at_once(one)


def _connects_and_is_silent(attack: _Attack) -> None:
    """Strangers keep connections open that never begin a handshake."""
    held: list[socket.socket] = []
    while not attack.ended.wait(_PAUSE_S):
        for _ in range(BURST // 10):
            with contextlib.suppress(OSError):
                held.append(attack.dial())
                attack.did["connections"] += 1
        while len(held) > SILENT:
            held.pop(0).close()
    for each in held:
        each.close()


def _storms(attack: _Attack) -> None:
    """Strangers connect five hundred times a second, in bursts, half of them with a handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    while not attack.ended.is_set():
        began, burst = time.monotonic(), []
        for number in range(BURST):
            with contextlib.suppress(OSError):
                one = attack.dial()
                burst.append(one)
                attack.did["connections"] += 1
                if number % 2:
                    one.setblocking(False)
                    tls = context.wrap_socket(one, do_handshake_on_connect=False)
                    burst[-1] = tls
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.do_handshake()
        for each in burst:
            each.close()
        attack.ended.wait(max(0.0, 1.0 - (time.monotonic() - began)))


ATTACKS: dict[str, Callable[[_Attack], None]] = {
    "streams left open": _leaves_streams,
    "uploads never finished": _never_finishes,
    "a flood of calls": _floods,
    "large headers": _sends_large_headers,
    "silent connections": _connects_and_is_silent,
    "500 connections a second": _storms,
}
"""What attackers do, by what it is called in tables."""


@contextlib.contextmanager
def attacking(
    name: str, services: Services, task_id: str, clients: Sequence[int], did: dict[str, int]
) -> Iterator[None]:
    """Attack meanwhile; in the end, ``did`` has how often what was done, and how it was answered.

    Args:
        clients: enrolled ones, who attack where strangers do not.
    """
    asked = [name, services.server, task_id, str(services.kits), json.dumps(list(clients))]
    attackers = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__, *asked],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        cast(TextIO, attackers.stdout).readline()
        yield
        found, _ = attackers.communicate()
        did |= json.loads(found)
    finally:
        attackers.kill()
        attackers.communicate()


def _main(name: str, server: str, task: str, kits: str, clients: str) -> None:
    attack = _Attack(server, task, Path(kits), json.loads(clients))
    thread = threading.Thread(target=ATTACKS[name], args=(attack,), daemon=True)
    thread.start()
    print("on", flush=True)
    sys.stdin.read()
    attack.ended.set()
    thread.join(2.0)
    print(json.dumps(dict(attack.did)), flush=True)
    os._exit(0)  # calls that nobody answers would keep the interpreter


if __name__ == "__main__":
    _main(*sys.argv[1:])
