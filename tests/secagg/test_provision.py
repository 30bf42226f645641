"""Kits that work together; changes that survive a crash; old keys that count while they should."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner, Result

from secagg.certificates import Kit, Role, identity_of
from secagg.cli import app
from secagg.custodians import combine, fresh_passphrase
from secagg.enrolment import Enrolment, EnrolmentFile
from secagg.errors import (
    CertificateError,
    ConfigurationError,
    NotEnrolledError,
    RevokedError,
)
from secagg.private_files import locked, write
from secagg.provision import Federation
from secagg.receipts import SigningKey

KITS = {
    "server": Role.SERVER,
    "keyholder": Role.KEY_HOLDER,
    "clients/alice": Role.CLIENT,
    "clients/bob": Role.CLIENT,
    "operators/admin": Role.OPERATOR,
    "monitors/prometheus": Role.MONITOR,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "federation"


@pytest.fixture
def federation(folder: Path) -> Federation:
    return Federation.create(folder, clients=["alice", "bob"])


def enrolment(federation: Federation, owner: str = "authority") -> Enrolment:
    home = federation.folder
    ca = (home / "authority" / "ca.pem").read_bytes()
    return Enrolment.from_bytes((home / owner / "enrolment.json").read_bytes(), ca)


def signing_key(federation: Federation, name: str) -> bytes:
    return SigningKey.from_bytes((federation.kit(name) / "signing.key").read_bytes()).public


def identity(federation: Federation, passphrase: str) -> bytes:
    pem = (federation.folder / "keyholder" / "identity.key").read_bytes()
    key = load_pem_private_key(pem, passphrase.encode())
    assert isinstance(key, Ed25519PrivateKey)
    return key.public_key().public_bytes_raw()


def pins(folder: Path) -> list[bytes]:
    return [bytes.fromhex(line) for line in (folder / "key_holder.pub").read_text().splitlines()]


def passphrase(federation: Federation) -> str:
    return (federation.folder / "custodians" / "passphrase").read_text().strip()


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def certificate_serial(federation: Federation, name: str) -> int:
    return identity_of((federation.kit(name) / "certificate.pem").read_bytes()).serial_number


# A new federation.


def test_every_kit_loads_and_they_share_one_authority(federation: Federation) -> None:
    kits = [Kit.load(federation.folder / path, role) for path, role in KITS.items()]
    assert len({kit.ca for kit in kits}) == 1
    names = ["server", "key-holder", "alice", "bob", "admin", "prometheus"]
    assert [kit.identity.name for kit in kits] == names


def test_every_kit_has_its_files_and_no_other(federation: Federation) -> None:
    tls = {"ca.pem", "certificate.pem", "private.key"}
    expected = {
        "authority": {"ca.pem", "ca.key", "enrolment.json", "federation.json"},
        "server": tls | {"enrolment.json", "key_holder.pub"},
        "keyholder": tls | {"enrolment.json", "identity.key"},
        "clients/alice": tls | {"signing.key", "key_holder.pub"},
        "clients/bob": tls | {"signing.key", "key_holder.pub"},
        "operators/admin": tls,
        "monitors/prometheus": tls,
        "custodians": {"passphrase"},
    }
    found: dict[str, set[str]] = {}
    for path in snapshot(federation.folder):
        found.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))  # noqa: PTH119, PTH120
    assert found == expected


def test_the_enrolment_names_the_keys_in_the_kits(federation: Federation) -> None:
    roster = enrolment(federation)
    assert roster.active() == ["alice", "bob"]
    for name in ("alice", "bob"):
        assert roster.client_of(signing_key(federation, name)) == name
    own = identity(federation, passphrase(federation))
    assert roster.key_holder_identities == (own,)
    for owner in ("server", "clients/alice", "clients/bob"):
        assert pins(federation.folder / owner) == [own]
    signed = (federation.folder / "authority" / "enrolment.json").read_bytes()
    for owner in ("server", "keyholder"):
        assert (federation.folder / owner / "enrolment.json").read_bytes() == signed


def test_everything_is_for_its_owner_alone(federation: Federation) -> None:
    federation.enrol("carol")
    federation.rotate_key_holder()
    for path in [federation.folder, *federation.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path.name


def test_a_permissive_umask_changes_nothing(folder: Path) -> None:
    before = os.umask(0)
    try:
        test_everything_is_for_its_owner_alone(Federation.create(folder))
    finally:
        os.umask(before)


def test_no_private_key_is_in_two_kits(federation: Federation) -> None:
    names = ("private.key", "signing.key", "identity.key", "ca.key", "passphrase")
    secrets = [data for path, data in snapshot(federation.folder).items() if path.endswith(names)]
    assert len(set(secrets)) == len(secrets) == 11
    everything = b"".join(snapshot(federation.folder).values())
    assert all(everything.count(secret) == 1 for secret in secrets)


def test_a_second_authority_in_one_folder_is_refused(federation: Federation) -> None:
    before = snapshot(federation.folder)
    with pytest.raises(ConfigurationError, match="without an authority"):
        Federation.create(federation.folder, clients=["carol"])
    assert snapshot(federation.folder) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": ["alice", "alice"]},
        {"clients": ["alice", "Alice"]},
        {"clients": ["../alice"]},
        {"clients": [""]},
        {"clients": ["server"]},
        {"clients": ["admin"]},
        {"operators": ["key-holder"]},
        {"operators": ["a", "a"]},
        {"days": 0},
        {"days": 3651},
        {"server_hosts": []},
        {"key_holder_hosts": []},
        {"server_hosts": ["localhost:80"]},
        {"passphrase": ""},
        {"passphrase": " leading"},
        {"passphrase": "trailing\n"},
        {"passphrase": "x" * 1024},
        {"custodians": (1, 3)},
        {"custodians": (4, 3)},
        {"custodians": (2, 3), "passphrase": "correct horse"},
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, wrong: dict[str, object]
) -> None:
    with pytest.raises(ConfigurationError):
        Federation.create(folder, **wrong)  # type: ignore[arg-type]
    assert not folder.exists()


# Who opens the key holder's identity.


def test_a_given_passphrase_opens_the_identity_and_is_not_written(folder: Path) -> None:
    given = fresh_passphrase()
    federation = Federation.create(folder, passphrase=given)
    assert enrolment(federation).key_holder_identities == (identity(federation, given),)
    assert all(given.encode() not in data for data in snapshot(folder).values())
    with pytest.raises(ValueError, match="password"):
        identity(federation, fresh_passphrase())
    with pytest.raises(TypeError):
        load_pem_private_key((folder / "keyholder" / "identity.key").read_bytes(), None)


def test_enough_custodians_open_the_identity_and_one_fewer_do_not(folder: Path) -> None:
    federation = Federation.create(folder, custodians=(3, 4))
    files = sorted((folder / "custodians").iterdir())
    assert [file.name for file in files] == [f"share-{number}.txt" for number in range(1, 5)]
    shares = [file.read_text() for file in files]
    assert identity(federation, combine(shares[1:])) == pins(folder / "server")[0]
    with pytest.raises(ConfigurationError, match="bring 1 more"):
        combine(shares[:2])
    whole = combine(shares).encode()
    assert all(whole not in data for data in snapshot(folder).values())


def test_a_given_passphrase_is_split_for_custodians(folder: Path) -> None:
    given = fresh_passphrase()
    federation = Federation.create(folder, passphrase=given, custodians=(2, 2))
    shares = [file.read_text() for file in (folder / "custodians").iterdir()]
    assert combine(shares) == given
    identity(federation, given)


# Changes.


def test_a_new_client_is_enrolled_everywhere_at_once(federation: Federation) -> None:
    watched = EnrolmentFile(
        federation.folder / "server" / "enrolment.json",
        (federation.folder / "server" / "ca.pem").read_bytes(),
    )
    federation.enrol("carol", "dave")
    assert watched.active() == ["alice", "bob", "carol", "dave"]
    assert watched.client_of(signing_key(federation, "carol")) == "carol"
    assert watched.problem is None
    Kit.load(federation.kit("dave"), Role.CLIENT)
    assert pins(federation.kit("carol")) == pins(federation.kit("alice"))


def test_every_change_raises_the_serial_in_every_copy(federation: Federation) -> None:
    changes = [
        lambda: federation.enrol("carol"),
        lambda: federation.rotate_client("carol"),
        lambda: federation.retire("carol"),
        lambda: federation.rotate_operator("admin"),
        federation.rotate_server,
        federation.rotate_key_holder,
        federation.retire_key_holder,
        lambda: federation.revoke("carol"),
    ]
    for serial, change in enumerate(changes, start=2):
        change()
        for owner in ("authority", "server", "keyholder"):
            assert enrolment(federation, owner).serial == serial
        for path, role in KITS.items():
            Kit.load(federation.folder / path, role)


@pytest.mark.parametrize("names", [["alice"], ["ALICE"], ["carol", "carol"], ["c/d"], ["admin"]])
def test_names_that_cannot_be_enrolled_change_nothing(
    federation: Federation, names: list[str]
) -> None:
    before = snapshot(federation.folder)
    with pytest.raises(ConfigurationError) as refusal:
        federation.enrol("fine", *names)
    assert snapshot(federation.folder) == before
    assert names[0] not in str(refusal.value)


def test_a_clients_old_key_counts_until_it_is_retired(federation: Federation) -> None:
    old, old_certificate = signing_key(federation, "alice"), certificate_serial(federation, "alice")
    federation.rotate_client("alice")
    new = signing_key(federation, "alice")
    assert enrolment(federation).require("alice").signing_keys == (new, old)
    assert enrolment(federation).client_of(old) == "alice"
    assert certificate_serial(federation, "alice") != old_certificate
    enrolment(federation).check_certificate(old_certificate)
    assert federation.members()["alice"].state == "rotating"
    with pytest.raises(ConfigurationError, match="retire the old one first"):
        federation.rotate_client("alice")
    federation.retire("alice")
    assert enrolment(federation).require("alice").signing_keys == (new,)
    with pytest.raises(NotEnrolledError):
        enrolment(federation).client_of(old)
    with pytest.raises(ConfigurationError, match="no old key"):
        federation.retire("alice")
    Kit.load(federation.kit("alice"), Role.CLIENT)


@pytest.mark.parametrize("name", ["alice", "admin", "prometheus", "server", "key-holder"])
def test_replaced_certificates_are_revoked_when_told(federation: Federation, name: str) -> None:
    rotate = {
        "alice": lambda: federation.rotate_client("alice", revoke_old=True),
        "admin": lambda: federation.rotate_operator("admin", revoke_old=True),
        "prometheus": lambda: federation.rotate_monitor("prometheus", revoke_old=True),
        "server": lambda: federation.rotate_server(revoke_old=True),
        "key-holder": lambda: federation.rotate_key_holder(revoke_old=True),
    }
    old = certificate_serial(federation, name)
    rotate[name]()
    with pytest.raises(RevokedError):
        enrolment(federation).check_certificate(old)
    enrolment(federation).check_certificate(certificate_serial(federation, name))


def test_the_key_holders_old_identity_stays_pinned_until_it_is_retired(
    federation: Federation,
) -> None:
    old_passphrase = passphrase(federation)
    old = identity(federation, old_passphrase)
    federation.rotate_key_holder()
    new = identity(federation, passphrase(federation))
    assert new != old
    assert passphrase(federation) != old_passphrase
    for owner in ("server", "clients/alice", "clients/bob"):
        assert pins(federation.folder / owner) == [new, old]
    assert enrolment(federation).key_holder_identities == (new, old)
    with pytest.raises(ConfigurationError, match="retire the old one first"):
        federation.rotate_key_holder()
    assert identity(federation, passphrase(federation)) == new
    federation.retire_key_holder()
    for owner in ("server", "clients/alice", "clients/bob"):
        assert pins(federation.folder / owner) == [new]
    with pytest.raises(ConfigurationError, match="no old key"):
        federation.retire_key_holder()


def test_a_new_identity_is_sealed_as_the_first_was(folder: Path) -> None:
    federation = Federation.create(folder, custodians=(2, 3))
    old = combine([file.read_text() for file in (folder / "custodians").iterdir()])
    federation.rotate_key_holder()
    files = sorted((folder / "custodians").iterdir())
    assert len(files) == 3
    new = combine([file.read_text() for file in files[:2]])
    assert new != old
    identity(federation, new)


def test_a_passphrase_given_anew_leaves_no_stale_one_behind(federation: Federation) -> None:
    given = fresh_passphrase()
    federation.rotate_key_holder(given)
    identity(federation, given)
    assert list((federation.folder / "custodians").iterdir()) == []


def test_a_revoked_client_is_out_with_every_certificate_it_ever_had(
    federation: Federation,
) -> None:
    serials = [certificate_serial(federation, "alice")]
    for _ in range(2):
        federation.rotate_client("alice")
        serials.append(certificate_serial(federation, "alice"))
        federation.retire("alice")
    federation.rotate_client("alice")
    serials.append(certificate_serial(federation, "alice"))
    keys = enrolment(federation).require("alice").signing_keys
    federation.revoke("alice")
    roster = enrolment(federation)
    assert roster.active() == ["bob"]
    for serial in serials:
        with pytest.raises(RevokedError):
            roster.check_certificate(serial)
    for key in keys:
        with pytest.raises(RevokedError):
            roster.client_of(key)
    roster.check_certificate(certificate_serial(federation, "bob"))


def test_a_revoked_name_never_comes_back(federation: Federation) -> None:
    federation.revoke("alice")
    with pytest.raises(ConfigurationError, match="never were anybody's"):
        federation.enrol("alice")
    with pytest.raises(ConfigurationError, match="revoked for good"):
        federation.rotate_client("alice")
    federation.rotate_key_holder()
    assert enrolment(federation).members["alice"].revoked


def test_revoking_twice_is_revoking(federation: Federation) -> None:
    federation.revoke("alice")
    federation.revoke("alice")
    assert federation.members()["alice"].state == "revoked"


def test_an_operator_and_a_monitor_are_revoked_by_their_certificates(
    federation: Federation,
) -> None:
    for name, rotate in (
        ("admin", federation.rotate_operator),
        ("prometheus", federation.rotate_monitor),
    ):
        federation.revoke(name)
        with pytest.raises(RevokedError):
            enrolment(federation).check_certificate(certificate_serial(federation, name))
        with pytest.raises(ConfigurationError, match="revoked for good"):
            rotate(name)


def test_a_federation_without_monitors_gets_one_later(folder: Path) -> None:
    federation = Federation.create(folder, clients=["alice"], monitors=[])
    assert not (folder / "monitors").exists()
    later = Federation.load(folder)
    later.add_monitors("prometheus")
    assert Kit.load(later.kit("prometheus"), Role.MONITOR).identity.name == "prometheus"
    # A monitor is nobody who contributes.
    assert enrolment(federation).active() == ["alice"]
    with pytest.raises(NotEnrolledError):
        enrolment(federation).require("prometheus")


def test_parties_that_are_not_there_are_refused(federation: Federation) -> None:
    before = snapshot(federation.folder)
    for change in (
        lambda: federation.rotate_client("carol"),
        lambda: federation.rotate_client("admin"),
        lambda: federation.rotate_client("server"),
        lambda: federation.rotate_operator("alice"),
        lambda: federation.rotate_operator("prometheus"),
        lambda: federation.rotate_monitor("admin"),
        lambda: federation.retire("carol"),
        lambda: federation.retire("key-holder"),
        lambda: federation.revoke("carol"),
        lambda: federation.revoke("server"),
        lambda: federation.revoke("key-holder"),
        lambda: federation.kit("carol"),
    ):
        with pytest.raises(ConfigurationError, match="no such one is registered") as refusal:
            change()
        assert "carol" not in str(refusal.value)
    assert snapshot(federation.folder) == before


def test_a_kit_that_was_handed_over_is_not_begun_again(federation: Federation) -> None:
    kit = federation.kit("alice")
    kit.rename(federation.folder.parent / "handed over")
    federation.rotate_key_holder()
    assert not kit.exists()
    federation.rotate_client("alice")
    Kit.load(kit, Role.CLIENT)
    assert len(pins(kit)) == 2


def test_a_federation_comes_back_from_its_folder(federation: Federation) -> None:
    federation.rotate_client("alice")
    again = Federation.load(federation.folder)
    assert again.members() == federation.members()
    again.enrol("carol")
    # The first object sees it as well: the folder is what counts.
    federation.revoke("carol")
    assert enrolment(federation).active() == ["alice", "bob"]


def test_members_says_who_holds_what(folder: Path) -> None:
    federation = Federation.create(
        folder, clients=["alice"], days=30, operators=["root", "ops"], monitors=["graphs"]
    )
    members = federation.members()
    assert {name: (party.role, len(party.keys)) for name, party in members.items()} == {
        "server": (Role.SERVER, 0),
        "key-holder": (Role.KEY_HOLDER, 1),
        "alice": (Role.CLIENT, 1),
        "root": (Role.OPERATOR, 0),
        "ops": (Role.OPERATOR, 0),
        "graphs": (Role.MONITOR, 0),
    }
    for name, party in members.items():
        Kit.load(federation.kit(name), party.role, now=party.expires)
        assert party.certificates == [certificate_serial(federation, name)]


# Damage, crashes and company.


def test_a_folder_without_a_federation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="secagg provision init"):
        Federation.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 1, "serial": 1, "days": 1, "custodians": [1], "parties": {}}',
    ],
)
def test_a_damaged_register_is_refused_and_never_signed(
    federation: Federation, content: bytes
) -> None:
    (federation.folder / "authority" / "federation.json").write_bytes(content)
    before = snapshot(federation.folder)
    with pytest.raises(ConfigurationError, match=r"federation\.json is damaged"):
        Federation.load(federation.folder)
    with pytest.raises(ConfigurationError, match=r"federation\.json is damaged"):
        federation.enrol("carol")
    assert snapshot(federation.folder) == before


def test_a_register_whose_keys_were_mixed_up_is_refused(federation: Federation) -> None:
    path = federation.folder / "authority" / "federation.json"
    document = json.loads(path.read_bytes())
    document["parties"]["alice"]["keys"] = document["parties"]["bob"]["keys"]
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match="damaged"):
        federation.revoke("alice")


def test_an_authoritys_key_that_others_can_read_is_not_used(federation: Federation) -> None:
    (federation.folder / "authority" / "ca.key").chmod(0o640)
    with pytest.raises(CertificateError, match="0640"):
        federation.enrol("carol")
    assert enrolment(federation).serial == 1


class Crash(Exception):
    """The power goes out."""


@contextmanager
def crash(at: int) -> Iterator[None]:
    """The power goes out just before the ``at``-th file would be replaced."""
    real, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count >= at:
            raise Crash
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(Path, "replace", replace)
        yield


@pytest.mark.parametrize("at", range(1, 13))
@pytest.mark.parametrize("change", ["enrol", "rotate", "revoke", "key holder"])
def test_a_change_that_was_interrupted_can_be_made_again(
    federation: Federation, change: str, at: int
) -> None:
    make = {
        "enrol": lambda of: of.enrol("carol"),
        "rotate": lambda of: of.rotate_client("alice"),
        "revoke": lambda of: of.revoke("alice"),
        "key holder": lambda of: of.rotate_key_holder(),
    }[change]
    made = {
        "enrol": lambda of: "carol" in of.members(),
        "rotate": lambda of: of.members()["alice"].state == "rotating",
        "revoke": lambda of: of.members()["alice"].state == "revoked",
        "key holder": lambda of: of.members()["key-holder"].state == "rotating",
    }[change]
    with crash(at):
        make(federation)
    assert not list(federation.folder.rglob("*.draft"))

    again = Federation.load(federation.folder)
    if not made(again):
        make(again)
    assert made(again)
    register = json.loads((federation.folder / "authority" / "federation.json").read_bytes())
    lists = {enrolment(again, owner) == enrolment(again) for owner in ("server", "keyholder")}
    assert lists == {True}
    assert enrolment(again).serial == register["serial"] >= 2
    for name, party in again.members().items():
        Kit.load(again.kit(name), party.role)
        if party.role is Role.CLIENT and not party.revoked:
            assert signing_key(again, name) == party.keys[0]
            assert pins(again.kit(name)) == again.members()["key-holder"].keys
    assert identity(again, passphrase(again)) == again.members()["key-holder"].keys[0]


def test_drafts_of_a_program_that_was_killed_are_swept(federation: Federation) -> None:
    for place in ("authority", "clients/alice", "clients"):
        (federation.folder / place / ".private.key123.draft").write_bytes(b"secret")
    federation.enrol("carol")
    assert not list(federation.folder.rglob("*.draft"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_one_clear_error(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = snapshot(federation.folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        federation.revoke("alice")
    assert snapshot(federation.folder) == before


def test_changes_of_one_folder_wait_for_one_another(federation: Federation) -> None:
    def enrol(prefix: str) -> None:
        for number in range(4):
            Federation(federation.folder).enrol(f"{prefix}-{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enrol, "wxyz"))
    assert len(enrolment(federation).active()) == 2 + 16
    assert enrolment(federation).serial == 1 + 16


def test_a_locked_folder_cannot_be_locked_again(tmp_path: Path) -> None:
    with locked(tmp_path):
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


# The command line.


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["provision", *map(str, arguments)])


def test_the_command_makes_what_was_asked_for(folder: Path) -> None:
    result = run(
        *("init", folder, "--server-host", "secagg.example.org", "--key-holder-host", "192.0.2.7"),
        *("--client", "alice", "--clients", 2, "--operator", "ops", "--days", 30),
        *("--monitor", "graphs"),
        *("--custodians", 3, "--threshold", 2),
    )
    assert result.exit_code == 0, result.output
    members = Federation.load(folder).members()
    services = ["server", "key-holder"]
    assert list(members) == [*services, "alice", "client-1", "client-2", "ops", "graphs"]
    assert members["server"].hosts == ["secagg.example.org", "localhost", "127.0.0.1"]
    assert members["key-holder"].hosts == ["192.0.2.7", "localhost", "127.0.0.1"]
    for name in members:
        assert str(Federation.load(folder).kit(name)) in result.output
    assert "share-3.txt" in result.output
    for share in (folder / "custodians").iterdir():
        assert share.read_text().strip() not in result.output


def test_every_command_does_what_it_says(folder: Path) -> None:
    assert run("init", folder, "--client", "alice").exit_code == 0
    federation = Federation.load(folder)
    steps = [
        ("enrol", "bob", "carol"),
        ("rotate-client", "bob", "--revoke-old"),
        ("retire-client", "bob"),
        ("rotate-server",),
        ("rotate-operator", "admin"),
        ("add-monitor", "graphs"),
        ("rotate-monitor", "prometheus"),
        ("rotate-keyholder",),
        ("retire-keyholder",),
        ("revoke", "carol"),
        ("revoke", "graphs"),
    ]
    secret = passphrase(federation)
    for serial, (command, *arguments) in enumerate(steps, start=2):
        result = run(command, folder, *arguments)
        assert result.exit_code == 0, result.output
        assert "enrolment.json" in result.output
        assert secret not in result.output
        assert passphrase(federation) not in result.output
        assert enrolment(federation).serial == serial
    assert enrolment(federation).active() == ["alice", "bob"]
    assert len(enrolment(federation).revoked_certificates) == 3


def test_the_list_is_for_people_and_for_programs(federation: Federation) -> None:
    federation.rotate_client("alice")
    federation.revoke("bob")
    rows = json.loads(run("list", federation.folder, "--format", "json").output)
    assert [(row["name"], row["role"], row["keys"], row["state"]) for row in rows] == [
        ("server", "server", 0, "active"),
        ("key-holder", "key-holder", 1, "active"),
        ("alice", "client", 2, "rotating"),
        ("bob", "client", 1, "revoked"),
        ("admin", "operator", 0, "active"),
        ("prometheus", "monitor", 0, "active"),
    ]
    expires = federation.members()["alice"].expires
    assert rows[2]["expires"] == expires.isoformat()
    table = run("list", federation.folder).output
    assert all(word in table for word in ("alice", "rotating", "revoked"))


def test_a_passphrase_comes_from_a_file(folder: Path, tmp_path: Path) -> None:
    given = fresh_passphrase()
    (tmp_path / "secret").write_text(f"{given}\n")
    assert run("init", folder, "--passphrase-file", tmp_path / "secret").exit_code == 0
    identity(Federation.load(folder), given)


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("enrol", "alice"),
        ("revoke", "alice"),
        ("init", "--custodians", "3"),
        ("init", "--threshold", "3"),
        ("init", "--custodians", "3", "--threshold", "4"),
        ("init", "--client", "a/b"),
        ("init", "--client", "client-1", "--clients", "1"),
        ("init", "--passphrase-file", "nowhere"),
        ("init", "--server-host", "a:80"),
    ],
)
def test_what_cannot_be_ends_with_one_line_and_the_code_for_configurations(
    folder: Path, arguments: tuple[str, ...]
) -> None:
    result = run(arguments[0], folder, *arguments[1:])
    assert result.exit_code == 78
    assert "CONFIGURATION" in result.output
    assert "Traceback" not in result.output
    assert not folder.exists()
