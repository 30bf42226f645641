"""Who is let in: every crooked certificate and key, end to end, with what the caller is told.

Nothing may be accepted in any of these: what the services have stored stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cohort
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from federations import (
    AGGREGATION,
    KEY_HOLDING,
    OPERATING,
    Site,
    as_folder,
    authority_of,
    client_kit,
    expired,
    forged,
    from_the_future,
    kit,
    new_federation,
    shared,
    shared_other,
    site,
    swap_in,
)
from serving import LoopThread, loop_thread, quick_retry

from secagg.authority import Authority
from secagg.certificates import Kit, Role, identity_of
from secagg.encryptor import encrypt_quantized
from secagg.errors import (
    EarlyCertificateError,
    ExpiredCertificateError,
    IdentityError,
    MismatchError,
    NotEnrolledError,
    PlaintextError,
    RevokedError,
    SecaggError,
    UnavailableError,
    UntrustedCertificateError,
    WrongNameError,
    WrongRoleError,
)
from secagg.parameters import Plan
from secagg.receipts import SigningKey
from secagg.rpc import channels
from secagg.rpc.deadlines import DEADLINES_S
from secagg.rpc.gatekeeper import metadata
from secagg.rpc.lifecycle import check_health
from secagg.rpc.status import from_rpc_error
from secagg.upload import Upload
from secagg.wire import codec
from secagg.wire.v1 import aggregation_service_pb2 as pb
from secagg.wire.v1 import (
    aggregation_service_pb2_grpc,
    key_holder_service_pb2,
    operator_service_pb2,
)
from secagg_client.session import ClientKit, ClientSession
from secagg_server import operator
from secagg_server.key_holder import KeyHolderClient
from secagg_server.operator import Operator
from secagg_server.tasks import TaskSpec

PLAN = cohort.counts_plan()
DESCRIPTORS = {
    AGGREGATION: pb.DESCRIPTOR.services_by_name["AggregationService"],
    OPERATING: operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"],
    KEY_HOLDING: key_holder_service_pb2.DESCRIPTOR.services_by_name["KeyHolderService"],
}
METHODS = [(service, method.name) for service, d in DESCRIPTORS.items() for method in d.methods]
OWNERS = {AGGREGATION: Role.CLIENT, OPERATING: Role.OPERATOR, KEY_HOLDING: Role.SERVER}


def task(plan: Plan = PLAN) -> TaskSpec:
    """A task that waits long for its clients."""
    return TaskSpec("task", plan, 1, 600_000, 2, 3)


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    with loop_thread() as running:
        yield running


@pytest.fixture(scope="module")
def running(thread: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All services of one federation, with a round that collects."""
    with site(thread, tmp_path_factory.mktemp("site"), shared()) as made:
        made.create(task())
        with session(made.server, client_kit(shared(), "alice")) as asking:
            next(asking.rounds())
        yield made


@pytest.fixture
def closed(running: Site) -> Iterator[Site]:
    """The services, which must not have taken anything in when the test is over."""
    before = running.left_behind()
    yield running
    assert running.left_behind() == before == {"tasks": 1, "rounds": 1, "opened": 1}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that cannot be made are not waited for long."""
    monkeypatch.setattr(operator, "_CONNECT_S", 0.2)
    monkeypatch.setitem(DEADLINES_S, "OpenRound", 0.2)


def session(address: str, credentials: ClientKit) -> ClientSession:
    return ClientSession(address, "task", credentials, retry=quick_retry())


def as_client(tls: Kit, key: SigningKey | None = None) -> ClientKit:
    return ClientKit(tls, key or SigningKey.generate())


def address_of(where: Site, service: str) -> str:
    return {
        AGGREGATION: where.server,
        OPERATING: where.admin,
        KEY_HOLDING: where.key_holder,
    }[service]


@contextmanager
def raw(address: str, tls: Kit | None) -> Iterator[grpc.Channel]:
    """An attacker's connection: what the certificate is worth is left to the other side."""
    with channels.channel(address, tls) as channel:
        yield channel


def call(channel: grpc.Channel, service: str, method: str) -> SecaggError:
    """What a call without any content is refused with."""
    rpc = channel.stream_stream(f"/{service}/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        list(rpc(iter([b""]), timeout=20, metadata=metadata()))
    if caught.value.code() is grpc.StatusCode.UNAVAILABLE:
        assert not caught.value.trailing_metadata()
    return from_rpc_error(caught.value)


def refused(kind: type[SecaggError], text: str, work: Callable[[], object]) -> None:
    with pytest.raises(kind, match=text) as caught:
        work()
    assert type(caught.value) is kind
    for secret in ("alice", "bob", "mallory", "PRIVATE"):
        assert secret not in str(caught.value)


# --- certificates that TLS refuses ----------------------------------------------------------------


def issued_by_a_client() -> Kit:
    """Alice's certificate made into an authority's."""
    alice = kit(shared(), "alice")
    key: Any = serialization.load_pem_private_key(alice.private_key, None)
    minor = Authority(x509.load_pem_x509_certificate(alice.certificate), key)
    made = minor.issue(Role.CLIENT, "bob")
    chain = made.certificate + alice.certificate
    return Kit(Path("nowhere"), identity_of(made.certificate), alice.ca, chain, made.private_key)


def same_name_other_key() -> Kit:
    """An authority that has but the name of the real one."""
    real, fresh = authority_of(shared()), Authority.create()
    assert fresh.certificate.subject != real.certificate.subject
    impostor = Authority(real.certificate, fresh.key)
    made = impostor.issue(Role.CLIENT, "alice")
    identity = identity_of(made.certificate)
    return Kit(Path("nowhere"), identity, real.ca_pem, made.certificate, made.private_key)


def others() -> Kit:
    return forged(shared_other(), Role.CLIENT, "alice", trusting=shared())


UNTRUSTED = (UntrustedCertificateError, "it ended the connection when it saw it")
CROOKED: dict[str, tuple[Callable[[], Kit], type[SecaggError], str]] = {
    "expired": (
        lambda: expired(shared(), Role.CLIENT, "alice"),
        ExpiredCertificateError,
        "its time is over; have the authority rotate it",
    ),
    "early": (
        lambda: from_the_future(shared(), Role.CLIENT, "alice"),
        EarlyCertificateError,
        "its time has not come; check this machine's clock",
    ),
    "another authority's": (others, *UNTRUSTED),
    "another authority's of the same name": (same_name_other_key, *UNTRUSTED),
    "a client's own": (issued_by_a_client, *UNTRUSTED),
    "of another federation": (
        lambda: kit(shared_other(), "alice"),
        UntrustedCertificateError,
        "kit's own authority; another one issued it",
    ),
}


@pytest.mark.parametrize("case", CROOKED)
def test_a_client_with_a_crooked_certificate_is_told_which_way_it_is(
    case: str, closed: Site
) -> None:
    make, kind, text = CROOKED[case]
    with session(closed.server, as_client(make())) as asking:
        refused(kind, text, lambda: next(asking.rounds()))
    refused(kind, text, lambda: check_health(closed.server, make()))


@pytest.mark.parametrize("case", CROOKED)
@pytest.mark.usefixtures("impatient")
def test_so_is_an_operator(case: str, closed: Site) -> None:
    make, kind, text = CROOKED[case]
    refused(kind, text, lambda: Operator(closed.admin, make()))


@pytest.mark.parametrize("service", DESCRIPTORS)
@pytest.mark.parametrize("case", CROOKED)
def test_an_attacker_with_a_crooked_certificate_never_gets_a_connection(
    case: str, service: str, closed: Site
) -> None:
    with raw(address_of(closed, service), CROOKED[case][0]()) as channel:
        for name, method in METHODS:
            if name == service:
                assert type(call(channel, service, method)) is UnavailableError


@pytest.mark.parametrize(("service", "method"), METHODS)
def test_without_a_certificate_there_is_no_connection(
    service: str, method: str, closed: Site
) -> None:
    trust = grpc.ssl_channel_credentials(authority_of(shared()).ca_pem)
    with grpc.secure_channel(address_of(closed, service), trust) as channel:
        assert type(call(channel, service, method)) is UnavailableError


@pytest.mark.parametrize(("service", "method"), METHODS)
def test_without_tls_there_is_no_connection(service: str, method: str, closed: Site) -> None:
    with raw(address_of(closed, service), None) as channel:
        assert type(call(channel, service, method)) is UnavailableError


@pytest.mark.usefixtures("impatient")
def test_whoever_asks_for_plaintext_is_told_that_tls_is_wanted(closed: Site) -> None:
    text = "this one speaks TLS; pass a kit"
    key = SigningKey.generate()
    with ClientSession(closed.server, "task", key, insecure=True, retry=quick_retry()) as asking:
        refused(PlaintextError, text, lambda: next(asking.rounds()))
    refused(PlaintextError, text, lambda: Operator(closed.admin, None))
    refused(PlaintextError, text, lambda: check_health(closed.server, None))
    refused(PlaintextError, text, lambda: opens(closed.thread, closed.key_holder, None))


# --- what a server may show -----------------------------------------------------------------------


def opens(thread: LoopThread, address: str, own: Kit | None) -> None:
    """Ask a key holder for a round."""

    async def ask() -> None:
        client = KeyHolderClient(address, own)
        try:
            await client.open_round(
                PLAN, task_id="asked", round_number=1, attempt=1, model_digest=bytes(32)
            )
        finally:
            await client.close()

    thread.run(ask())


def checks(thread: LoopThread, address: str, own: Kit | None) -> None:
    """Ask a key holder whether it is ready."""

    async def ask() -> None:
        client = KeyHolderClient(address, own)
        try:
            await client.check()
        finally:
            await client.close()

    thread.run(ask())


Show = Callable[[Role, str], Kit]
SHOWN: dict[str, tuple[Show, type[SecaggError], str]] = {
    "expired": (
        lambda role, name: expired(shared(), role, name),
        ExpiredCertificateError,
        "it has expired; rotate it",
    ),
    "early": (
        lambda role, name: from_the_future(shared(), role, name),
        EarlyCertificateError,
        "its time has not come; check the clocks of both machines",
    ),
    "another authority's": (
        lambda role, name: forged(shared_other(), role, name, trusting=shared()),
        UntrustedCertificateError,
        "another one issued it",
    ),
    "another host's": (
        lambda role, name: forged(shared(), role, name, hosts=["server.example", "10.0.0.1"]),
        WrongNameError,
        "for the host dialled; it is for others",
    ),
    "a client's": (
        lambda _role, _name: forged(shared(), Role.CLIENT, "alice"),
        WrongRoleError,
        "another role of the party at this address",
    ),
}


@pytest.mark.parametrize("case", SHOWN)
@pytest.mark.usefixtures("impatient")
def test_a_server_with_a_crooked_certificate_gets_nothing_from_anybody(
    case: str, thread: LoopThread, tmp_path: Path
) -> None:
    make, kind, text = SHOWN[case]
    shown = {
        "server_kit": make(Role.SERVER, "server"),
        "key_holder_kit": make(Role.KEY_HOLDER, "key-holder"),
    }
    with site(thread, tmp_path, shared(), **shown) as made:
        with session(made.server, client_kit(shared(), "alice")) as asking:
            refused(kind, text, lambda: next(asking.rounds()))
        refused(kind, text, lambda: Operator(made.admin, kit(shared(), "admin")))
        refused(kind, text, lambda: check_health(made.server, kit(shared(), "alice")))
        own = kit(shared(), "server")
        refused(kind, text, lambda: opens(thread, made.key_holder, own))
        refused(kind, text, lambda: checks(thread, made.key_holder, own))
        assert made.left_behind() == {}


# --- roles ----------------------------------------------------------------------------------------

NAMES = {
    Role.SERVER: "server",
    Role.KEY_HOLDER: "key-holder",
    Role.CLIENT: "alice",
    Role.OPERATOR: "admin",
    Role.MONITOR: "prometheus",
}
WRONG = [
    (service, method, role)
    for service, method in METHODS
    for role in Role
    if role is not OWNERS[service]
]


@pytest.mark.parametrize(("service", "method", "role"), WRONG)
def test_every_method_is_closed_to_every_other_role(
    service: str, method: str, role: Role, closed: Site
) -> None:
    with raw(address_of(closed, service), kit(shared(), NAMES[role])) as channel:
        found = call(channel, service, method)
    assert type(found) is WrongRoleError
    assert f"may use {service}; the certificate is a {role.value}'s" in str(found)


def test_each_program_is_told_that_its_kit_is_for_another(closed: Site) -> None:
    with session(closed.server, as_client(kit(shared(), "server"))) as asking:
        refused(WrongRoleError, "is a server's", lambda: next(asking.rounds()))
    nosy = Operator(closed.admin, kit(shared(), "alice"))
    refused(WrongRoleError, "is a client's", nosy.tasks)
    refused(WrongRoleError, "is a client's", lambda: nosy.create_task(task()))
    nosy.close()
    for name in ("alice", "admin", "key-holder"):
        refused(
            WrongRoleError,
            f"is a {kit(shared(), name).identity.role.value}'s",
            lambda name=name: opens(closed.thread, closed.key_holder, kit(shared(), name)),
        )


def test_a_client_that_nobody_enrolled_is_told_so(closed: Site) -> None:
    stranger = as_client(forged(shared(), Role.CLIENT, "mallory"))
    with session(closed.server, stranger) as asking:
        refused(NotEnrolledError, "name of an enrolled client", lambda: next(asking.rounds()))


# --- one client in another's name -----------------------------------------------------------------


def noise(where: Site, key: SigningKey) -> Upload:
    """Bob's upload for the open round."""
    with session(where.server, client_kit(where.federation, "alice")) as asking:
        current = next(asking.rounds())
    return encrypt_quantized(current.context, cohort.quantized(current.context, 1), key)


def requests(upload: Upload) -> dict[str, Any]:
    receipt = upload.admission.receipt
    name = {
        "context": codec.context_id_to_wire(receipt.context),
        "client_key": receipt.client_key,
        "upload_digest": receipt.upload_digest,
    }
    return {
        "OpenUpload": pb.OpenUploadRequest(admission=codec.admission_to_wire(upload.admission)),
        "PutChunk": pb.PutChunkRequest(**name, chunk_index=0, data=upload.payload),
        "CommitUpload": pb.CommitUploadRequest(**name),
    }


def send(address: str, tls: Kit, method: str, request: Any) -> None:  # noqa: ANN401
    with raw(address, tls) as channel:
        stub = aggregation_service_pb2_grpc.AggregationServiceStub(channel)
        try:
            getattr(stub, method)(request, timeout=20, metadata=metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


@pytest.mark.parametrize("method", ["OpenUpload", "PutChunk", "CommitUpload"])
def test_a_client_cannot_use_anothers_signing_key(method: str, closed: Site) -> None:
    upload = noise(closed, client_kit(shared(), "bob").identity)
    refused(
        MismatchError,
        "signed by another one; use certificate and signing key of one kit",
        lambda: send(closed.server, kit(shared(), "alice"), method, requests(upload)[method]),
    )


@pytest.mark.parametrize("method", ["OpenUpload", "PutChunk", "CommitUpload"])
def test_a_key_that_nobody_enrolled_signs_nothing(method: str, closed: Site) -> None:
    upload = noise(closed, SigningKey.generate())
    refused(
        NotEnrolledError,
        "signing key of an enrolled client",
        lambda: send(closed.server, kit(shared(), "alice"), method, requests(upload)[method]),
    )


def test_a_session_of_two_kits_is_refused_before_anything_is_stored(closed: Site) -> None:
    mixed = replace(client_kit(shared(), "alice"), identity=client_kit(shared(), "bob").identity)
    with session(closed.server, mixed) as asking:
        current = next(asking.rounds())
        refused(
            MismatchError,
            "signed by another one",
            lambda: current.contribute(cohort.contribution(PLAN, 0)),
        )


def test_an_upload_under_way_is_out_of_others_reach(thread: LoopThread, tmp_path: Path) -> None:
    with site(thread, tmp_path, shared()) as made:
        made.create(task())
        upload = noise(made, client_kit(shared(), "bob").identity)
        asked = requests(upload)
        send(made.server, kit(shared(), "bob"), "OpenUpload", asked["OpenUpload"])
        announced = made.left_behind()
        for method in ("OpenUpload", "PutChunk", "CommitUpload"):
            refused(
                MismatchError,
                "signed by another one",
                lambda method=method: send(
                    made.server, kit(shared(), "alice"), method, asked[method]
                ),
            )
        assert made.left_behind() == announced
        for method in ("PutChunk", "CommitUpload"):
            send(made.server, kit(shared(), "bob"), method, asked[method])
        assert made.store.counts(("task", 1, 1)).accepted == 1


# --- revoked --------------------------------------------------------------------------------------


def test_a_revoked_client_is_shut_out_whatever_certificate_it_has(
    thread: LoopThread, tmp_path: Path
) -> None:
    federation = new_federation(tmp_path / "federation")
    alice, bob = client_kit(federation, "alice"), client_kit(federation, "bob")
    federation.revoke("alice")
    federation.rotate_client("bob", revoke_old=True)
    later = replace(alice, tls=forged(federation, Role.CLIENT, "alice"))
    with site(thread, tmp_path / "site", federation) as made:
        for credentials, text in (
            (alice, "certificate that counts; this one has been revoked"),
            (bob, "certificate that counts; this one has been revoked"),
            (later, "expected an enrolled client; this one has been revoked"),
        ):
            with session(made.server, credentials) as asking:
                refused(RevokedError, text, lambda asking=asking: next(asking.rounds()))
        assert made.left_behind() == {}


def test_a_revoked_operator_and_a_replaced_server_are_shut_out(
    thread: LoopThread, tmp_path: Path
) -> None:
    federation = new_federation(tmp_path / "federation")
    admin, server = kit(federation, "admin"), kit(federation, "server")
    federation.revoke("admin")
    federation.rotate_server(revoke_old=True)
    with site(thread, tmp_path / "site", federation) as made:
        asking = Operator(made.admin, admin)
        refused(RevokedError, "certificate that counts", asking.tasks)
        refused(RevokedError, "certificate that counts", lambda: asking.create_task(task()))
        asking.close()
        refused(
            RevokedError,
            "certificate that counts",
            lambda: opens(thread, made.key_holder, server),
        )
        assert made.left_behind() == {}


# --- kits, before anything is dialled -------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: expired(shared(), Role.CLIENT, "alice"), ExpiredCertificateError, "rotate"),
        (lambda: from_the_future(shared(), Role.CLIENT, "alice"), EarlyCertificateError, "clock"),
        (others, UntrustedCertificateError, "kits of one federation"),
        (lambda: forged(shared(), Role.SERVER, "server"), WrongRoleError, "kit of a client"),
    ],
    ids=["expired", "early", "another authority's", "a server's"],
)
def test_a_crooked_kit_is_refused_when_it_is_loaded(
    make: Callable[[], Kit], kind: type[IdentityError], text: str, tmp_path: Path
) -> None:
    folder = as_folder(make(), shared().kit("alice"), tmp_path / "kit")
    refused(kind, text, lambda: ClientKit.load(folder))


# --- a signing key swapped in the enrolment -------------------------------------------------------


def test_a_signing_key_swapped_in_the_enrolment_lets_nobody_in(
    thread: LoopThread, tmp_path: Path
) -> None:
    federation = new_federation(tmp_path / "federation")
    mine = SigningKey.generate()
    alice = client_kit(federation, "alice")
    with site(thread, tmp_path / "site", federation) as made:
        made.create(task())
        upload = noise(made, mine)
        for folder in ("server", "keyholder"):
            file = federation.folder / folder / "enrolment.json"
            document = json.loads(file.read_text())
            document["enrolment"]["serial"] += 1
            document["enrolment"]["members"]["alice"]["signing_keys"] = [mine.public.hex()]
            swap_in(file, json.dumps(document).encode())
        before = made.left_behind()
        for method, request in requests(upload).items():
            refused(
                NotEnrolledError,
                "this key is nobody's",
                lambda method=method, request=request: send(
                    made.server, alice.tls, method, request
                ),
            )
        assert made.left_behind() == before
        verdict = made.held.judge(upload.admission.receipt.context, [upload.admission])
        assert verdict == ["NOT_ENROLLED"]
        # The list in force goes on.
        with session(made.server, alice) as asking:
            next(asking.rounds()).contribute(cohort.contribution(PLAN, 0))
