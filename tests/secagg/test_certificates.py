"""A kit is believed only if all of it fits: authority, key, dates, role, uses and permissions."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from warnings import catch_warnings, simplefilter

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from secagg.authority import AUTHORITY_DAYS, Authority, host_name
from secagg.certificates import USES, Identity, Kit, Role, authority_of, identity_of, is_name
from secagg.errors import (
    CertificateError,
    ConfigurationError,
    EarlyCertificateError,
    ExpiredCertificateError,
    NoCertificateError,
    UntrustedCertificateError,
    WrongRoleError,
)

NOW = datetime(2030, 5, 17, 12, tzinfo=UTC)
OURS, OTHER = Authority.create(NOW), Authority.create(NOW)
CLIENT = OURS.issue(Role.CLIENT, "alice", now=NOW)
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH


def write_kit(
    folder: Path,
    certificate: bytes = CLIENT.certificate,
    private_key: bytes = CLIENT.private_key,
    ca: bytes = OURS.ca_pem,
) -> Path:
    (folder / "ca.pem").write_bytes(ca)
    (folder / "certificate.pem").write_bytes(certificate)
    (folder / "private.key").write_bytes(private_key)
    (folder / "private.key").chmod(0o600)
    return folder


def self_made(
    uris: Sequence[str],
    uses: Sequence[x509.ObjectIdentifier] | None = (CLIENT_AUTH,),
    authority: Authority = OURS,
) -> tuple[bytes, bytes]:
    """A certificate that the authority has signed but would never issue."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(1))
        .not_valid_after(NOW + timedelta(1))
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(pem), private


@pytest.mark.parametrize("role", list(Role))
def test_a_kit_of_every_role_loads_and_says_whose_it_is(tmp_path: Path, role: Role) -> None:
    issued = OURS.issue(role, "some-body.1", hosts=["localhost", "::1"], now=NOW)
    folder = write_kit(tmp_path, issued.certificate, issued.private_key)
    kit = Kit.load(folder, role, now=NOW)
    assert kit.identity == Identity(role, "some-body.1", issued.serial_number)
    assert kit.identity == identity_of(issued.certificate)
    assert (kit.ca, kit.certificate) == (OURS.ca_pem, issued.certificate)
    assert kit == Kit.load(folder, now=NOW)
    assert kit.file("signing.key") == folder / "signing.key"


def test_a_kit_of_one_of_several_roles_loads(tmp_path: Path) -> None:
    kit = Kit.load(write_kit(tmp_path), Role.OPERATOR, Role.CLIENT, now=NOW)
    assert kit.identity.role is Role.CLIENT


def test_the_present_is_assumed_when_no_time_is_given(tmp_path: Path) -> None:
    authority = Authority.create()
    issued = authority.issue(Role.CLIENT, "alice")
    Kit.load(write_kit(tmp_path, issued.certificate, issued.private_key, authority.ca_pem))
    with pytest.raises(EarlyCertificateError):
        Kit.load(write_kit(tmp_path))


@pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "private.key"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_kit(tmp_path) / name).unlink()
    with pytest.raises(NoCertificateError, match=rf"{name}.*secagg provision"):
        Kit.load(tmp_path, now=NOW)


def test_a_missing_folder_is_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(NoCertificateError, match=r"ca\.pem"):
        Kit.load(tmp_path / "nowhere", now=NOW)
    (tmp_path / "file").touch()
    with pytest.raises(NoCertificateError, match=r"ca\.pem"):
        Kit.load(tmp_path / "file", now=NOW)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (write_kit(tmp_path) / "ca.pem").unlink()
    (tmp_path / "ca.pem").mkdir()
    with pytest.raises(CertificateError, match="readable"):
        Kit.load(tmp_path, now=NOW)


@pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "private.key"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"\xff" * (65 * 1024),
    ],
    ids=["empty", "text", "certificate", "key", "oversized"],
)
def test_garbage_in_any_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (write_kit(tmp_path) / name).write_bytes(content)
    with pytest.raises(CertificateError):
        Kit.load(tmp_path, now=NOW)


@pytest.mark.parametrize("copies", [(CLIENT.certificate, CLIENT.certificate), (OURS.ca_pem,) * 2])
def test_two_certificates_in_one_file_are_refused(tmp_path: Path, copies: tuple[bytes]) -> None:
    with pytest.raises(CertificateError, match="got 2"):
        Kit.load(write_kit(tmp_path, certificate=b"".join(copies)), now=NOW)
    with pytest.raises(CertificateError, match="got 2"):
        Kit.load(write_kit(tmp_path, ca=b"".join(copies)), now=NOW)


def test_the_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    other = OURS.issue(Role.CLIENT, "alice", now=NOW)
    with pytest.raises(CertificateError, match="key of another"):
        Kit.load(write_kit(tmp_path, private_key=other.private_key), now=NOW)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(CertificateError, match="key of another"):
        Kit.load(write_kit(tmp_path, private_key=pem), now=NOW)


def test_a_key_under_a_passphrase_is_refused(tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(CLIENT.private_key, None)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    with pytest.raises(CertificateError, match="without a passphrase"):
        Kit.load(write_kit(tmp_path, private_key=pem), now=NOW)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_private_key_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    (write_kit(tmp_path) / "private.key").chmod(mode)
    with pytest.raises(CertificateError, match=f"{mode:04o}"):
        Kit.load(tmp_path, now=NOW)


def test_a_private_key_that_only_its_owner_reads_is_fine(tmp_path: Path) -> None:
    (write_kit(tmp_path) / "private.key").chmod(0o400)
    Kit.load(tmp_path, now=NOW)


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedCertificateError, match="another one issued it"):
        Kit.load(write_kit(tmp_path, ca=OTHER.ca_pem), now=NOW)


def test_a_certificate_that_only_claims_its_issuer_is_refused(tmp_path: Path) -> None:
    forger = Authority(OURS.certificate, OTHER.key)
    forged = forger.issue(Role.CLIENT, "alice", now=NOW)
    with pytest.raises(UntrustedCertificateError):
        Kit.load(write_kit(tmp_path, forged.certificate, forged.private_key), now=NOW)


def test_a_party_cannot_be_an_authority(tmp_path: Path) -> None:
    # A client that signs a certificate with its own key, and offers its own as ca.pem.
    certificate = x509.load_pem_x509_certificate(CLIENT.certificate)
    key = serialization.load_pem_private_key(CLIENT.private_key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forged = Authority(certificate, key).issue(Role.SERVER, "server", now=NOW)
    folder = write_kit(tmp_path, forged.certificate, forged.private_key, CLIENT.certificate)
    with pytest.raises(CertificateError, match="of an authority"):
        Kit.load(folder, now=NOW)
    with pytest.raises(CertificateError, match="of an authority"):
        authority_of(CLIENT.certificate)
    with pytest.raises(CertificateError, match="of an authority"):
        Authority.from_pem(CLIENT.certificate, CLIENT.private_key)


def test_dates_are_checked_to_the_second(tmp_path: Path) -> None:
    issued = OURS.issue(Role.CLIENT, "alice", days=30, now=NOW)
    folder = write_kit(tmp_path, issued.certificate, issued.private_key)
    assert issued.not_after == NOW + timedelta(30)
    Kit.load(folder, now=issued.not_after)
    with pytest.raises(ExpiredCertificateError, match=r"certificate\.pem.*2030-06-16"):
        Kit.load(folder, now=issued.not_after + timedelta(seconds=1))
    start = x509.load_pem_x509_certificate(issued.certificate).not_valid_before_utc
    Kit.load(folder, now=start)
    with pytest.raises(EarlyCertificateError, match=r"certificate\.pem.*clock"):
        Kit.load(folder, now=start - timedelta(seconds=1))


def test_an_expired_authority_is_named(tmp_path: Path) -> None:
    late = NOW + timedelta(AUTHORITY_DAYS + 1)
    key = serialization.load_pem_private_key(CLIENT.private_key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    own = x509.load_pem_x509_certificate(CLIENT.certificate)
    outliving = (
        x509.CertificateBuilder(extensions=list(own.extensions))
        .subject_name(own.subject)
        .issuer_name(own.issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(late + timedelta(1))
        .sign(OURS.key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    Kit.load(write_kit(tmp_path, outliving), now=NOW)
    with pytest.raises(ExpiredCertificateError, match=r"ca\.pem"):
        Kit.load(tmp_path, now=late)


def test_no_certificate_outlives_its_authority() -> None:
    later = NOW + timedelta(AUTHORITY_DAYS - 10)
    issued = OURS.issue(Role.CLIENT, "alice", days=365, now=later)
    assert issued.not_after == OURS.certificate.not_valid_after_utc


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("wanted", list(Role))
def test_a_kit_of_another_role_is_refused(tmp_path: Path, role: Role, wanted: Role) -> None:
    if role is wanted:
        return
    issued = OURS.issue(role, "x", now=NOW)
    folder = write_kit(tmp_path, issued.certificate, issued.private_key)
    with pytest.raises(WrongRoleError, match=f"of a {wanted}; got one of a {role}"):
        Kit.load(folder, wanted, now=NOW)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("uses", [None, [SERVER_AUTH], [CLIENT_AUTH]])
def test_a_certificate_without_the_uses_of_its_role_is_refused(
    tmp_path: Path, role: Role, uses: list[x509.ObjectIdentifier] | None
) -> None:
    folder = write_kit(tmp_path, *self_made([f"urn:secagg:{role}:x"], uses))
    if USES[role] <= set(uses or ()):
        Kit.load(folder, role, now=NOW)
        return
    with pytest.raises(WrongRoleError, match="usages"):
        Kit.load(folder, role, now=NOW)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["urn:uuid:1"],
        ["urn:secagg:client:a", "urn:secagg:client:b"],
        ["urn:secagg:client:a", "urn:secagg:client:a"],
        ["urn:secagg:client:a", "urn:secagg:server:a"],
        ["urn:secagg:client:a", "urn:secagg:"],
        ["urn:secagg:"],
        ["urn:secagg:client"],
        ["urn:secagg:client:"],
        ["urn:secagg:root:a"],
        ["urn:secagg:Client:a"],
        ["urn:secagg:client:../a"],
        ["urn:secagg:client:a:b"],
        ["urn:secagg:client:a\n"],
        ["urn:secagg:client: a"],
        ["urn:secagg:client:" + "a" * 65],
        ["URN:secagg:client:a"],
    ],
)
def test_a_certificate_without_exactly_one_identity_is_refused(
    tmp_path: Path, uris: list[str]
) -> None:
    certificate, private_key = self_made(uris)
    with pytest.raises(CertificateError, match="urn:secagg:"):
        identity_of(certificate)
    with pytest.raises(CertificateError, match="urn:secagg:"):
        Kit.load(write_kit(tmp_path, certificate, private_key), now=NOW)


def test_foreign_uris_beside_the_identity_are_fine() -> None:
    certificate, _ = self_made(["https://example.org", "urn:secagg:operator:x"])
    assert identity_of(certificate).role is Role.OPERATOR


@given(st.binary(max_size=600))
def test_no_bytes_but_certificates_name_anybody(data: bytes) -> None:
    for text in (data, _pem(data)):
        with pytest.raises(CertificateError):
            identity_of(text)


DER = x509.load_pem_x509_certificate(CLIENT.certificate).public_bytes(serialization.Encoding.DER)


@given(st.integers(0, len(DER) - 1), st.integers(1, 255), st.booleans())
def test_a_damaged_certificate_is_refused_or_read_but_nothing_else(
    position: int, change: int, cut: bool
) -> None:
    damaged = bytearray(DER)
    damaged[position] ^= change
    pem = _pem(bytes(damaged[:position] if cut else damaged))
    for read in (identity_of, authority_of):
        _or_refused(read, pem)


def test_a_damaged_certificate_never_passes_as_a_kit(tmp_path: Path) -> None:
    signed = x509.load_pem_x509_certificate(CLIENT.certificate).tbs_certificate_bytes
    passed = 0
    for position in range(len(DER)):
        damaged = bytearray(DER)
        damaged[position] ^= 0x01
        (write_kit(tmp_path) / "certificate.pem").write_bytes(_pem(bytes(damaged)))
        with suppress(CertificateError, UntrustedCertificateError):
            kit = Kit.load(tmp_path, now=NOW)
            passed += 1
            read = x509.load_pem_x509_certificate(kit.certificate).tbs_certificate_bytes
            assert read == signed
    # The count of unused bits before the signature is not signed; nothing else may change.
    assert passed <= 1


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_serial_number_below_one_is_refused(action: Literal["ignore", "error"]) -> None:
    position = DER.index(b"\x02\x14") + 2
    negative = DER[:position] + b"\xff" + DER[position + 1 :]
    with catch_warnings():
        simplefilter(action)
        with pytest.raises(CertificateError, match="got 0 that can be read"):
            identity_of(_pem(negative))


def _or_refused(read: Callable[[bytes], object], pem: bytes) -> None:
    try:
        read(pem)
    except CertificateError:
        return


def _pem(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


@given(st.text(max_size=70))
def test_names_are_one_path_segment_of_plain_characters(text: str) -> None:
    if is_name(text):
        assert 1 <= len(text) <= 64
        assert text.isascii()
        assert Path(text).name == text
        assert text[0].isalnum()


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "é", "a" * 65])
def test_other_names_are_never_issued(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ConfigurationError, match="expected a name"):
        OURS.issue(Role.CLIENT, name, now=NOW)


@pytest.mark.parametrize(
    "host", ["", "a b", "localhost:80", "[::1]", "*.example.org", "-a", "é.org"]
)
def test_hosts_that_cannot_be_in_a_certificate_are_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="DNS name or an IP address"):
        host_name(host)


def test_hosts_become_names_and_addresses() -> None:
    hosts = ["secagg.example.org", "localhost", "192.0.2.7", "2001:db8::1"]
    issued = OURS.issue(Role.SERVER, "server", hosts=hosts, now=NOW)
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == hosts[:2]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == hosts[2:]


def test_an_authority_comes_back_from_its_files() -> None:
    again = Authority.from_pem(OURS.ca_pem, OURS.key_pem())
    certificate = x509.load_pem_x509_certificate(
        again.issue(Role.CLIENT, "bob", now=NOW).certificate
    )
    certificate.verify_directly_issued_by(OURS.certificate)
    with pytest.raises(CertificateError, match="key of another"):
        Authority.from_pem(OURS.ca_pem, OTHER.key_pem())


def test_no_two_certificates_share_a_serial_number() -> None:
    serials = {OURS.issue(Role.CLIENT, "alice", now=NOW).serial_number for _ in range(20)}
    assert len(serials) == 20


def test_neither_keys_nor_names_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "alice"
    folder.mkdir()
    kit = Kit.load(write_kit(folder), now=NOW)
    secret = CLIENT.private_key.splitlines()[1].decode()
    for shown in (repr(kit), repr(CLIENT), repr(OURS)):
        assert "alice" not in shown
        assert secret not in shown
    assert os.fspath(folder) not in repr(kit)
