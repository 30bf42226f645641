"""Provisioning: makes a federation's authority, and the kits that it hands to every party.

::

    FOLDER/authority/          ca.pem  ca.key  enrolment.json  federation.json
    FOLDER/server/             ca.pem  certificate.pem  private.key  enrolment.json  key_holder.pub
    FOLDER/keyholder/          ca.pem  certificate.pem  private.key  enrolment.json  identity.key
    FOLDER/clients/NAME/       ca.pem  certificate.pem  private.key  signing.key  key_holder.pub
    FOLDER/operators/NAME/     ca.pem  certificate.pem  private.key
    FOLDER/monitors/NAME/      ca.pem  certificate.pem  private.key
    FOLDER/custodians/         passphrase, or share-1.txt to share-N.txt

The authority's folder stays where it is made, best offline. ``federation.json`` says everything;
the lists in the kits follow from it. Everything is readable by its owner only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secagg.authority import AUTHORITY_DAYS, Authority, host_name
from secagg.certificates import Role, check_private
from secagg.custodians import fresh_passphrase, split
from secagg.enrolment import Enrolment
from secagg.errors import ConfigurationError, SecaggError
from secagg.private_files import locked, make_folder, remove_drafts, write
from secagg.receipts import SigningKey
from secagg.register import KEY_HOLDER, SERVER, Party, Register

__all__ = ["DEFAULT_HOSTS", "Federation"]

DEFAULT_HOSTS = ("localhost", "127.0.0.1")
"""Where services are reached unless said otherwise: on one machine."""

_FOLDERS = {Role.CLIENT: "clients", Role.OPERATOR: "operators", Role.MONITOR: "monitors"}
_PINNING = (Role.SERVER, Role.CLIENT)
# OpenSSL reads no longer ones.
_MAX_PASSPHRASE_BYTES = 1023


class Federation:
    """The folder of one federation.

    Every change raises the serial of the enrolment, signs it anew and rewrites it in the kits of
    the server and the key holder. Two programs that change one folder wait for one another. A
    change that was interrupted is finished, or can be made again, the next time.

    Attributes:
        folder: where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        server_hosts: Sequence[str] = DEFAULT_HOSTS,
        key_holder_hosts: Sequence[str] = DEFAULT_HOSTS,
        clients: Sequence[str] = (),
        operators: Sequence[str] = ("admin",),
        monitors: Sequence[str] = ("prometheus",),
        days: int = 365,
        passphrase: str | None = None,
        custodians: tuple[int, int] | None = None,
    ) -> Federation:
        """A new authority, and a kit for every party.

        Args:
            folder: where to; made if it is not there.
            server_hosts, key_holder_hosts: DNS names and IP addresses they are reached at.
            clients, operators, monitors: their names.
            days: how long certificates are valid.
            passphrase: opens ``identity.key``; a fresh one is written to ``custodians/`` if None.
            custodians: how many of how many shares open it (``threshold, count``), in place of
                the whole passphrase.

        Raises:
            ConfigurationError: an authority is there already, or something here cannot be.
        """
        if not 1 <= days <= AUTHORITY_DAYS:
            raise ConfigurationError(
                f"expected certificates valid for 1 to {AUTHORITY_DAYS} days; got days={days}"
            )
        register = Register(days, custodians)
        register.add(Role.SERVER, SERVER, hosts=_checked_hosts(server_hosts))
        register.add(Role.KEY_HOLDER, KEY_HOLDER, hosts=_checked_hosts(key_holder_hosts))
        register.add(Role.CLIENT, *clients)
        register.add(Role.OPERATOR, *operators)
        register.add(Role.MONITOR, *monitors)
        unsealing = _Unsealing.choose(passphrase, custodians)
        federation, home = cls(folder), folder / "authority"
        with _disk():
            make_folder(folder)
            try:
                home.mkdir(mode=0o700)
            except FileExistsError:
                raise ConfigurationError(
                    f"expected a folder without an authority; {home} is there already; choose "
                    "another folder, or remove it if making it was interrupted"
                ) from None
            with locked(home):
                federation._fill(register, Authority.create(), unsealing)
        return federation

    @classmethod
    def load(cls, folder: Path) -> Federation:
        """The federation in a folder; finishes a change that was interrupted.

        Raises:
            ConfigurationError: none is there, or its files are damaged.
        """
        federation = cls(folder)
        register = federation._register()
        if federation._published() < register.serial:
            with federation._change():
                pass
        return federation

    def kit(self, name: str) -> Path:
        """The folder of a party's kit.

        Raises:
            ConfigurationError: nobody has that name.
        """
        return self._folder_of(name, self._register().party(name))

    def members(self) -> dict[str, Party]:
        """Every party by name: the server, the key holder, then the others as they joined."""
        return self._register().parties

    def add_monitors(self, *names: str) -> None:
        """Make kits for monitors, such as for a federation that began without any.

        Raises:
            ConfigurationError: not a name, or a name that is or was somebody's.
        """
        self._admit(Role.MONITOR, names)

    def enrol(self, *names: str) -> None:
        """Admit clients and make their kits.

        Raises:
            ConfigurationError: not a name, or a name that is or was somebody's.
        """
        self._admit(Role.CLIENT, names)

    def rotate_client(self, name: str, *, revoke_old: bool = False) -> None:
        """A new kit with a new signing key; the old key counts until :meth:`retire`.

        Args:
            name: of the client.
            revoke_old: its earlier certificates count no longer.

        Raises:
            ConfigurationError: no such client, a revoked one, or one that is being rotated.
        """
        self._rotate(name, Role.CLIENT, revoke_old)

    def rotate_operator(self, name: str, *, revoke_old: bool = False) -> None:
        """A new certificate for an operator; errors as for :meth:`rotate_client`."""
        self._rotate(name, Role.OPERATOR, revoke_old)

    def rotate_monitor(self, name: str, *, revoke_old: bool = False) -> None:
        """A new certificate for a monitor; errors as for :meth:`rotate_client`."""
        self._rotate(name, Role.MONITOR, revoke_old)

    def rotate_server(self, *, revoke_old: bool = False) -> None:
        """A new certificate for the server."""
        self._rotate(SERVER, Role.SERVER, revoke_old)

    def rotate_key_holder(self, passphrase: str | None = None, *, revoke_old: bool = False) -> None:
        """A new certificate, identity key and passphrase for the key holder.

        The old identity stays pinned until :meth:`retire_key_holder`, so that clients have time to
        take over their new ``key_holder.pub``.

        Args:
            passphrase: opens the new ``identity.key``; see :meth:`create`.
            revoke_old: its earlier certificates count no longer.

        Raises:
            ConfigurationError: it is being rotated already, or the passphrase cannot be used.
        """
        with self._change() as (register, authority):
            register.begin_rotation(KEY_HOLDER, Role.KEY_HOLDER, revoke_old=revoke_old)
            unsealing = _Unsealing.choose(passphrase, register.custodians)
            self._renew_key_holder(register, authority, unsealing)

    def retire(self, name: str) -> None:
        """Drop the old signing key of a client that has taken over its new kit.

        Raises:
            ConfigurationError: no such client, or it has no old key.
        """
        with self._change() as (register, _):
            register.end_rotation(name, Role.CLIENT)

    def retire_key_holder(self) -> None:
        """Drop the old identity of the key holder.

        Raises:
            ConfigurationError: it has none.
        """
        with self._change() as (register, _):
            register.end_rotation(KEY_HOLDER, Role.KEY_HOLDER)

    def revoke(self, name: str) -> None:
        """Shut out a client, an operator or a monitor for good, with every certificate it ever had.

        Raises:
            ConfigurationError: nobody has that name, or it is a service's.
        """
        with self._change() as (register, _):
            register.revoke(name)

    def _admit(self, role: Role, names: Sequence[str]) -> None:
        with self._change() as (register, authority):
            register.add(role, *names)
            for name in names:
                self._renew(register, authority, name)

    def _rotate(self, name: str, role: Role, revoke_old: bool) -> None:
        with self._change() as (register, authority):
            register.begin_rotation(name, role, revoke_old=revoke_old)
            self._renew(register, authority, name)

    def _renew(self, register: Register, authority: Authority, name: str) -> None:
        party = register.party(name)
        folder = self._folder_of(name, party)
        issued = authority.issue(party.role, name, hosts=party.hosts, days=register.days)
        write(folder / "private.key", issued.private_key)
        write(folder / "certificate.pem", issued.certificate)
        write(folder / "ca.pem", authority.ca_pem)
        party.certificates.append(issued.serial_number)
        party.expires = issued.not_after
        if party.role is Role.CLIENT:
            key = SigningKey.generate()
            write(folder / "signing.key", key.to_bytes())
            party.keys.insert(0, key.public)

    def _renew_key_holder(
        self, register: Register, authority: Authority, unsealing: _Unsealing
    ) -> None:
        self._renew(register, authority, KEY_HOLDER)
        identity = Ed25519PrivateKey.generate()
        pem = identity.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(unsealing.passphrase.encode()),
        )
        write(self.folder / "keyholder" / "identity.key", pem)
        register.party(KEY_HOLDER).keys.insert(0, identity.public_key().public_bytes_raw())
        # What opened the identity before opens nothing now, and would only mislead.
        for old in (self.folder / "custodians").glob("*"):
            old.unlink()
        for name, text in unsealing.files.items():
            write(self.folder / "custodians" / name, f"{text}\n".encode())

    def _fill(self, register: Register, authority: Authority, unsealing: _Unsealing) -> None:
        write(self.folder / "authority" / "ca.key", authority.key_pem())
        write(self.folder / "authority" / "ca.pem", authority.ca_pem)
        for name in register.parties:
            if name != KEY_HOLDER:
                self._renew(register, authority, name)
        self._renew_key_holder(register, authority, unsealing)
        self._publish(register, authority)

    @contextmanager
    def _change(self) -> Iterator[tuple[Register, Authority]]:
        home = self.folder / "authority"
        with _disk(), locked(home):
            remove_drafts(self.folder)
            check_private(home / "ca.key")
            ca, key = (home / "ca.pem").read_bytes(), (home / "ca.key").read_bytes()
            register, authority = self._register(), Authority.from_pem(ca, key)
            yield register, authority
            self._publish(register, authority)

    def _publish(self, register: Register, authority: Authority) -> None:
        register.serial += 1
        write(self.folder / "authority" / "federation.json", register.to_bytes())
        pins = "".join(f"{key.hex()}\n" for key in register.party(KEY_HOLDER).keys).encode()
        for name, party in register.parties.items():
            file = self._folder_of(name, party) / "key_holder.pub"
            # A kit that was moved to its owner is not begun again here.
            if party.role in _PINNING and file.parent.is_dir() and not _holds(file, pins):
                write(file, pins)
        signed = register.enrolment().to_bytes(authority.key)
        # The authority's own copy comes last: it says that everything else is written.
        for folder in ("server", "keyholder", "authority"):
            write(self.folder / folder / "enrolment.json", signed)

    def _register(self) -> Register:
        with _disk():
            return Register.from_bytes((self.folder / "authority" / "federation.json").read_bytes())

    def _published(self) -> int:
        home = self.folder / "authority"
        try:
            signed, ca = (home / "enrolment.json").read_bytes(), (home / "ca.pem").read_bytes()
            return Enrolment.from_bytes(signed, ca).serial
        except (OSError, SecaggError):
            return 0

    def _folder_of(self, name: str, party: Party) -> Path:
        if party.role is Role.SERVER:
            return self.folder / "server"
        if party.role is Role.KEY_HOLDER:
            return self.folder / "keyholder"
        return self.folder / _FOLDERS[party.role] / name


@dataclass(frozen=True, slots=True)
class _Unsealing:
    """What opens the key holder's identity, and the files that say it."""

    passphrase: str = field(repr=False)
    files: dict[str, str] = field(repr=False)

    @classmethod
    def choose(cls, given: str | None, custodians: tuple[int, int] | None) -> _Unsealing:
        passphrase = fresh_passphrase() if given is None else given
        size = len(passphrase.encode())
        if not 1 <= size <= _MAX_PASSPHRASE_BYTES or passphrase != passphrase.strip():
            raise ConfigurationError(
                f"expected a passphrase of 1 to {_MAX_PASSPHRASE_BYTES} bytes without white space "
                f"around it; got another of bytes={size}; leave the choice to this program"
            )
        if custodians is not None:
            shares = split(passphrase, *custodians)
            return cls(passphrase, {f"share-{n}.txt": text for n, text in enumerate(shares, 1)})
        # Whoever chose a passphrase has it already.
        return cls(passphrase, {"passphrase": passphrase} if given is None else {})


def _checked_hosts(hosts: Sequence[str]) -> Sequence[str]:
    if not hosts:
        raise ConfigurationError("expected at least one host that a service is reached at; got 0")
    for host in hosts:
        host_name(host)
    return hosts


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        raise ConfigurationError(
            f"expected the folder of a federation that can be read and written; {file}: "
            f"{error.strerror}; `secagg provision init` makes one"
        ) from None


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
