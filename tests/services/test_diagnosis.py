"""Why a connection fails: each thing that TLS can refuse has a name, and nothing else is blamed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import grpc.aio
import pytest
from federations import (
    expired,
    forged,
    from_the_future,
    kit,
    shared,
    shared_other,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LoopThread, loop_thread, serving

from secagg.certificates import Kit, Role
from secagg.errors import (
    EarlyCertificateError,
    ExpiredCertificateError,
    IdentityError,
    PlaintextError,
    UntrustedCertificateError,
    WrongNameError,
    WrongRoleError,
)
from secagg.rpc import channels, diagnosis
from secagg.rpc.diagnosis import why_unreachable
from secagg.rpc.lifecycle import add_health

SERVER = (Role.SERVER,)


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@contextmanager
def showing(thread: LoopThread, shown: Kit | None) -> Iterator[str]:
    def add(server: grpc.aio.Server) -> None:
        add_health(server)

    with serving(thread, add, shown) as address:
        yield address


def connects(address: str, own: Kit | None) -> bool:
    """Whether gRPC itself gets through."""
    with channels.channel(address, own) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
    return True


def server_kit() -> Kit:
    return kit(shared(), "server")


def alice() -> Kit:
    return kit(shared(), "alice")


# What a server may show to an honest client, and what the client is told.
SHOWN = {
    "expired": (
        lambda: expired(shared(), Role.SERVER, "server"),
        ExpiredCertificateError,
        "server certificate.*expired; rotate",
    ),
    "early": (
        lambda: from_the_future(shared(), Role.SERVER, "server"),
        EarlyCertificateError,
        "server certificate.*time has not come; check the clocks",
    ),
    "another authority's": (
        lambda: forged(shared_other(), Role.SERVER, "server", trusting=shared()),
        UntrustedCertificateError,
        "kit's own authority; another one issued it",
    ),
    "another host's": (
        lambda: forged(shared(), Role.SERVER, "server", hosts=["server.example"]),
        WrongNameError,
        "for the host dialled; it is for others",
    ),
    "no host's": (
        lambda: forged(shared(), Role.SERVER, "server", hosts=[]),
        WrongNameError,
        "for the host dialled; it is for others",
    ),
    "a client's": (
        lambda: forged(shared(), Role.CLIENT, "alice"),
        WrongRoleError,
        "another role of the party at this address",
    ),
    "an operator's": (
        lambda: forged(shared(), Role.OPERATOR, "admin"),
        WrongRoleError,
        "another role of the party at this address",
    ),
    "none": (lambda: None, PlaintextError, "speaks TLS; this one speaks plaintext"),
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_servers_certificate_is_named_by_what_is_wrong_with_it(
    case: str, thread: LoopThread
) -> None:
    make, kind, text = SHOWN[case]
    with showing(thread, make()) as address:
        found = why_unreachable(address, alice(), SERVER)
        assert type(found) is kind
        with pytest.raises(kind, match=text):
            raise found
        assert not connects(address, alice())


def test_a_key_holder_in_the_servers_place_is_a_wrong_role(thread: LoopThread) -> None:
    """Both may serve, so that TLS alone lets this pass."""
    with showing(thread, kit(shared(), "key-holder")) as address:
        assert type(why_unreachable(address, alice(), SERVER)) is WrongRoleError
        assert why_unreachable(address, alice(), (Role.KEY_HOLDER,)) is None
        assert why_unreachable(address, alice()) is None


# What a client may show to an honest server, and what it is told.
OWN = {
    "expired": (
        lambda: expired(shared(), Role.CLIENT, "alice"),
        ExpiredCertificateError,
        "take this certificate; its time is over",
    ),
    "early": (
        lambda: from_the_future(shared(), Role.CLIENT, "alice"),
        EarlyCertificateError,
        "take this certificate; its time has not come; check this machine's clock",
    ),
    "another authority's": (
        lambda: forged(shared_other(), Role.CLIENT, "alice", trusting=shared()),
        UntrustedCertificateError,
        "it ended the connection when it saw it",
    ),
    "of another federation altogether": (
        lambda: kit(shared_other(), "alice"),
        UntrustedCertificateError,
        "kit's own authority; another one issued it",
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_ones_own_certificate_is_named_by_what_is_wrong_with_it(
    case: str, thread: LoopThread
) -> None:
    make, kind, text = OWN[case]
    with showing(thread, server_kit()) as address:
        found = why_unreachable(address, make(), SERVER)
        assert type(found) is kind
        with pytest.raises(kind, match=text):
            raise found
        assert not connects(address, make())


def test_plaintext_to_a_server_that_wants_tls_is_named(thread: LoopThread) -> None:
    with showing(thread, server_kit()) as address:
        found = why_unreachable(address, None, SERVER)
        assert type(found) is PlaintextError
        assert "speaks plaintext; this one speaks TLS" in str(found)
        assert not connects(address, None)


# --- nothing to blame ---------------------------------------------------------------------------


def test_a_handshake_that_succeeds_is_not_blamed(thread: LoopThread) -> None:
    with showing(thread, server_kit()) as address:
        assert why_unreachable(address, alice(), SERVER) is None
        assert connects(address, alice())


def test_two_that_speak_plaintext_are_not_blamed(thread: LoopThread) -> None:
    with showing(thread, None) as address:
        assert why_unreachable(address, None) is None


@pytest.mark.parametrize("encrypted", [False, True])
def test_where_nobody_listens_nobody_is_blamed(encrypted: bool, thread: LoopThread) -> None:
    with showing(thread, None) as address:
        pass
    assert why_unreachable(address, alice() if encrypted else None, SERVER) is None


def test_a_host_that_cannot_be_found_is_not_blamed() -> None:
    assert why_unreachable("nowhere.invalid:7400", alice(), SERVER) is None


@contextmanager
def saying(first_words: bytes, *, close: bool) -> Iterator[str]:
    """A listener that is no server at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[socket.socket] = []

        def answer() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.sendall(first_words)
            kept.append(connection)
            if close:
                connection.close()

        talking = threading.Thread(target=answer)
        talking.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            talking.join(10)
            for connection in kept:
                connection.close()


def test_a_listener_that_says_nothing_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "_TIMEOUT_S", 0.05)
    with saying(b"", close=False) as address:
        assert why_unreachable(address, alice(), SERVER) is None


def test_a_listener_of_another_kind_speaks_plaintext() -> None:
    with saying(b"SSH-2.0-OpenSSH_9.6\r\n", close=False) as address:
        assert type(why_unreachable(address, alice(), SERVER)) is PlaintextError


@pytest.mark.parametrize("words", [b"", b"\x15\x03\x03\x00\x02\x02\x28"])
def test_a_listener_that_hangs_up_is_an_error_of_ours_at_most(
    words: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_TIMEOUT_S", 0.5)
    with saying(words, close=True) as address:
        found = why_unreachable(address, alice(), SERVER)
    assert found is None or isinstance(found, IdentityError)


@pytest.mark.parametrize("listens", [False, True])
def test_a_proxy_that_hangs_up_is_not_a_refusal(listens: bool) -> None:
    """Its server is away and will be back, but whoever is refused gives up for good."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = listener.accept()
                    if listens:
                        connection.recv(4096)
                    connection.close()

        proxy = threading.Thread(target=hang_up)
        proxy.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert why_unreachable(address, alice(), SERVER) is None
        listener.shutdown(socket.SHUT_RDWR)
        proxy.join(10)


def test_the_private_key_does_not_stay_in_a_temporary_file(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Made before: the federation of all tests lies in a temporary folder as well.
    kits, ours = (server_kit(), expired(shared(), Role.SERVER, "server")), alice()
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(diagnosis.tempfile, "tempdir", str(folder))
    for shown in kits:
        with showing(thread, shown) as address:
            why_unreachable(address, ours, SERVER)
    assert list(folder.iterdir()) == []


def test_no_message_names_anybody_or_shows_a_key(thread: LoopThread) -> None:
    for make, _, _ in OWN.values():
        with showing(thread, server_kit()) as address:
            text = repr(why_unreachable(address, make(), SERVER))
        assert "alice" not in text
        assert "PRIVATE" not in text
