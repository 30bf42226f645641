"""New certificates, keys and lists while everything runs: nobody who is entitled notices."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cohort
import grpc
import pytest
from cryptography import x509
from federations import Site, client_kit, forged, key_holder_identity, kit, new_federation, site
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LoopThread, loop_thread, quick_retry

from secagg.certificates import Kit, Role
from secagg.context import RoundContext
from secagg.endorsement import Endorsement
from secagg.errors import (
    DuplicateError,
    NotEnrolledError,
    RevokedError,
    SecaggError,
    UntrustedKeyError,
)
from secagg.provision import Federation
from secagg.rpc import channels
from secagg.rpc.diagnosis import _context
from secagg_client.session import ClientKit, ClientSession, CurrentRound
from secagg_server.key_holder import KeyHolderClient
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

PLAN = cohort.counts_plan()


def task(task_id: str = "task") -> TaskSpec:
    return TaskSpec(task_id, PLAN, 1, 600_000, 2, 3)


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return new_federation(tmp_path / "federation")


@pytest.fixture
def made(thread: LoopThread, federation: Federation, tmp_path: Path) -> Iterator[Site]:
    with site(thread, tmp_path / "site", federation) as running:
        running.create(task())
        yield running


def session(made: Site, credentials: ClientKit) -> ClientSession:
    return ClientSession(made.server, "task", credentials, retry=quick_retry())


def asked(asking: ClientSession) -> CurrentRound:
    """The open round, asked for anew."""
    return next(asking.rounds())


def contribute(current: CurrentRound, index: int = 0) -> None:
    current.contribute(cohort.contribution(PLAN, index))


def served(address: str, own: Kit) -> int:
    """The serial number of the certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 20) as connection,
        _context(own).wrap_socket(connection, server_hostname=host) as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def replace_half(made: Site, name: str, new: Kit) -> None:
    folder = made.federation.folder / "server"
    draft = folder / "draft"
    draft.write_bytes(new.certificate if name == "certificate.pem" else new.private_key)
    draft.chmod(0o600)
    draft.replace(folder / name)


# --- certificates of services ---------------------------------------------------------------------


def test_a_new_server_certificate_is_shown_to_whoever_connects_from_now_on(made: Site) -> None:
    alice = client_kit(made.federation, "alice")
    old = kit(made.federation, "server").identity.serial_number
    states: list[grpc.ChannelConnectivity] = []
    with channels.channel(made.server, alice.tls) as connected, session(made, alice) as asking:
        connected.subscribe(states.append)
        health = health_pb2_grpc.HealthStub(connected)
        health.Check(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True)
        asked(asking)
        assert served(made.server, alice.tls) == old

        made.federation.rotate_server()

        new = kit(made.federation, "server").identity.serial_number
        assert new != old
        assert served(made.server, alice.tls) == served(made.admin, alice.tls) == new
        contribute(asked(asking))
        health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert states.count(grpc.ChannelConnectivity.READY) == 1
        assert grpc.ChannelConnectivity.TRANSIENT_FAILURE not in states
        assert grpc.ChannelConnectivity.IDLE not in states[1:]
    with session(made, client_kit(made.federation, "bob")) as fresh:
        contribute(asked(fresh), 1)


def test_it_can_be_replaced_again_and_again(made: Site) -> None:
    alice = kit(made.federation, "alice")
    seen = {served(made.server, alice)}
    for _ in range(4):
        made.federation.rotate_server()
        seen.add(served(made.server, alice))
    assert len(seen) == 5


def test_a_half_replaced_kit_leaves_the_old_one_in_use(made: Site) -> None:
    alice = kit(made.federation, "alice")
    old = kit(made.federation, "server").identity.serial_number
    new = forged(made.federation, Role.SERVER, "server")
    replace_half(made, "certificate.pem", new)
    assert served(made.server, alice) == old
    with session(made, client_kit(made.federation, "alice")) as asking:
        contribute(asked(asking))
    replace_half(made, "private.key", new)
    assert served(made.server, alice) == new.identity.serial_number


@pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "private.key"])
@pytest.mark.parametrize("damage", ["garbage", "empty", "missing"])
def test_a_damaged_kit_leaves_the_old_one_in_use(name: str, damage: str, made: Site) -> None:
    alice = kit(made.federation, "alice")
    file = made.federation.folder / "server" / name
    old, serial = file.read_bytes(), kit(made.federation, "server").identity.serial_number
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"garbage" if damage == "garbage" else b"")
    assert served(made.server, alice) == serial
    file.write_bytes(old)
    file.chmod(0o600)
    made.federation.rotate_server()
    assert served(made.server, alice) != serial


@pytest.mark.parametrize("role", [Role.CLIENT, Role.KEY_HOLDER])
def test_a_kit_of_another_role_does_not_replace_the_servers(role: Role, made: Site) -> None:
    alice = kit(made.federation, "alice")
    old = kit(made.federation, "server").identity.serial_number
    other = forged(made.federation, role, "other")
    for name in ("certificate.pem", "private.key"):
        replace_half(made, name, other)
    assert served(made.server, alice) == old


# --- the server's own connection to the key holder ------------------------------------------------


def opens(client: KeyHolderClient, task_id: str) -> Callable[[], object]:
    return lambda: client.open_round(
        PLAN, task_id=task_id, round_number=1, attempt=1, model_digest=bytes(32)
    )


def test_the_server_takes_its_new_certificate_to_the_key_holder(made: Site) -> None:
    made.thread.run(opens(made.dialling, "before")())  # type: ignore[arg-type]
    made.federation.rotate_server(revoke_old=True)
    made.thread.run(opens(made.dialling, "after")())  # type: ignore[arg-type]


def test_a_half_replaced_kit_does_not_stop_the_server_from_asking(made: Site) -> None:
    new = forged(made.federation, Role.SERVER, "server")
    for number, name in enumerate(("certificate.pem", "private.key")):
        replace_half(made, name, new)
        made.thread.run(opens(made.dialling, f"task-{number}")())  # type: ignore[arg-type]
    # Whole again, the new one is in use: the key holder would not take it if it were revoked.
    assert made.dialling._kit is not None
    assert made.dialling._kit.identity == new.identity


def test_a_call_under_way_outlives_the_certificate_it_began_with(
    made: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, real = threading.Event(), threading.Event(), made.held.open

    def slow(*arguments: object) -> tuple[RoundContext, Endorsement]:
        if arguments[1] == "slow":
            entered.set()
            assert go_on.wait(20)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(made.held, "open", slow)

    async def both() -> None:
        first = asyncio.ensure_future(opens(made.dialling, "slow")())  # type: ignore[arg-type]
        await asyncio.to_thread(entered.wait, 20)
        before = made.dialling._channel
        await asyncio.to_thread(made.federation.rotate_server)
        await opens(made.dialling, "quick")()  # type: ignore[misc]
        assert made.dialling._channel is not before
        go_on.set()
        await first

    made.thread.run(both())


# --- the list of who may take part ----------------------------------------------------------------


def test_a_revoked_clients_very_next_call_fails_and_a_new_ones_succeeds(made: Site) -> None:
    alice, bob = client_kit(made.federation, "alice"), client_kit(made.federation, "bob")
    erins = replace(forged(made.federation, Role.CLIENT, "erin"), folder=bob.tls.folder)
    with (
        session(made, alice) as going,
        session(made, bob) as staying,
        session(made, ClientKit(erins, bob.identity)) as coming,
    ):
        current = asked(going)
        asked(staying)
        with pytest.raises(NotEnrolledError):
            asked(coming)

        made.federation.revoke("alice")
        made.federation.enrol("erin")

        with pytest.raises(RevokedError):
            contribute(current)
        with pytest.raises(RevokedError):
            asked(going)
        asked(coming)
        contribute(asked(staying), 1)
        with session(made, client_kit(made.federation, "erin")) as new:
            contribute(asked(new), 2)
    assert made.store.counts(("task", 1, 1)).accepted == 2


def test_whoever_is_revoked_in_the_middle_of_an_upload_does_not_finish_it(made: Site) -> None:
    alice = client_kit(made.federation, "alice")
    with session(made, alice) as asking:
        current = asked(asking)
        method, real = asking._stub.PutChunk, asking._call
        kinds: list[str] = []

        def revoked_before_the_chunk(each: object, request: object) -> object:
            kinds.append(type(request).__name__)
            if each is method:
                made.federation.revoke("alice")
            return real(each, request)  # type: ignore[arg-type]

        asking._call = revoked_before_the_chunk  # type: ignore[method-assign,assignment]
        with pytest.raises(RevokedError):
            contribute(current)
    assert kinds == ["OpenUploadRequest", "PutChunkRequest"]
    assert made.store.counts(("task", 1, 1)).accepted == 0


def test_an_operator_is_revoked_at_once_as_well(made: Site) -> None:
    operator = Operator(made.admin, kit(made.federation, "admin"))
    try:
        operator.tasks()
        made.federation.revoke("admin")
        with pytest.raises(RevokedError):
            operator.tasks()
    finally:
        operator.close()


def test_an_older_list_does_not_bring_anybody_back(made: Site) -> None:
    alice = client_kit(made.federation, "alice")
    file = made.federation.folder / "server" / "enrolment.json"
    older = file.read_bytes()
    with session(made, alice) as asking:
        asked(asking)
        made.federation.revoke("alice")
        with pytest.raises(RevokedError):
            asked(asking)
        file.write_bytes(older)
        with pytest.raises(RevokedError):
            asked(asking)
        file.unlink()
        with pytest.raises(RevokedError):
            asked(asking)


# --- signing keys ---------------------------------------------------------------------------------


def moved(federation: Federation, name: str, to: Path) -> ClientKit:
    """A copy of a client's kit as it is now."""
    shutil.copytree(federation.kit(name), to)
    return ClientKit.load(to)


def test_old_and_new_signing_key_count_side_by_side_until_the_old_one_is_retired(
    made: Site, tmp_path: Path
) -> None:
    old = moved(made.federation, "alice", tmp_path / "old")
    bob = moved(made.federation, "bob", tmp_path / "bob")
    for name in ("alice", "bob"):
        made.federation.rotate_client(name)
    new = client_kit(made.federation, "alice")
    assert new.identity.public != old.identity.public
    with session(made, old) as before, session(made, new) as after:
        contribute(asked(before))
        # One client, whatever it signs with.
        with pytest.raises(DuplicateError):
            contribute(asked(after))
    assert made.store.counts(("task", 1, 1)).accepted == 1

    made.federation.retire("bob")
    with session(made, bob) as retired, pytest.raises(NotEnrolledError):
        contribute(asked(retired), 1)
    with session(made, client_kit(made.federation, "bob")) as renewed:
        contribute(asked(renewed), 1)


# --- the key holder's identity --------------------------------------------------------------------


def test_both_identities_are_trusted_until_the_old_one_is_retired(
    thread: LoopThread, federation: Federation, tmp_path: Path
) -> None:
    old, carol = key_holder_identity(federation), moved(federation, "carol", tmp_path / "carol")
    federation.rotate_key_holder("another passphrase")
    new = key_holder_identity(federation, "another passphrase")
    alice = client_kit(federation, "alice")
    assert alice.pins() == {old.public, new.public}

    def tried(identity: object, credentials: ClientKit, folder: str) -> SecaggError | None:
        with site(
            thread, tmp_path / folder, federation, identity=identity  # type: ignore[arg-type]
        ) as made:  # fmt: skip
            made.create(task())
            try:
                with session(made, credentials) as asking:
                    contribute(asked(asking))
            except SecaggError as error:
                assert made.store.counts(("task", 1, 1)).accepted == 0
                return error
        return None

    assert tried(old, alice, "old") is None
    assert tried(new, alice, "new") is None
    # Whoever has not taken over the new pins trusts but the old one.
    assert tried(old, carol, "carol-old") is None
    assert type(tried(new, carol, "carol-new")) is UntrustedKeyError

    federation.retire_key_holder()
    assert alice.pins() == {new.public}
    assert tried(new, alice, "retired-new") is None
    # The server itself no longer takes the old one's rounds.
    with (
        site(thread, tmp_path / "retired-old", federation, identity=old) as made,
        pytest.raises(UntrustedKeyError, match="key holder that is pinned here"),
    ):
        thread.run(opens(made.dialling, "task")())  # type: ignore[arg-type]
