"""The server's settings, and what can be known to be wrong with them before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from secagg.certificates import Kit, Role
from secagg.endorsement import read_pins
from secagg.enrolment import EnrolmentFile, OpenEnrolment, Roster
from secagg.errors import ConfigurationError, MalformedError
from secagg.parameters import MIN_COHORT
from secagg.rpc.channels import check_address
from secagg.rpc.lifecycle import OFF, check_listeners, check_ready_file
from secagg.settings import Settings, check_writable, dialled, one_transport
from secagg_server.operator import Operator

__all__ = ["Opened", "OperatorSettings", "ServerSettings"]


class ServerSettings(Settings):
    """What `secagg-server run` needs; each field has a flag and a SECAGG_SERVER_<NAME> variable."""

    env_prefix: ClassVar[str] = "SECAGG_SERVER_"

    listen: str = Field("127.0.0.1:7400", description="host:port for clients")
    admin_listen: str = Field("127.0.0.1:7401", description="host:port for operators")
    key_holder: str = Field("127.0.0.1:7402", description="host:port of the key holder")
    monitor_listen: str = Field(
        "127.0.0.1:7403",
        description="host:port for metrics, health and the operator's page, by HTTP; or off",
    )
    monitor_open: bool = Field(
        False, description="monitor_listen in plaintext beyond loopback, without certificates"
    )
    probe_listen: str = Field(
        OFF, description="host:port for gRPC health checks in plaintext, and nothing else; or off"
    )
    kit: Path | None = Field(None, description="folder made by `secagg provision`; required")
    insecure: bool = Field(False, description="plaintext instead of a kit; loopback only")
    data_dir: Path = Field(Path("secagg-data/server"), description="models, uploads, database")
    store_url: SecretStr | None = Field(
        None, description="SQLAlchemy URL; a SQLite file in data_dir when not given"
    )
    min_clients: int = Field(
        MIN_COHORT, ge=MIN_COHORT, description="smallest cohort of any task here"
    )
    retain_days: float = Field(
        30.0, ge=0.0, description="days after which sums and old models of a round are removed"
    )
    workers: int = Field(1, ge=1, le=64, description="processes for sketches and the noise audit")
    max_in_flight: int = Field(64, ge=1, description="calls that are worked on at once")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_file: Path | None = Field(None, description="written once the server listens")

    @property
    def database(self) -> str:
        """The SQLAlchemy URL to use."""
        if self.store_url is not None:
            return self.store_url.get_secret_value()
        return f"sqlite:///{self.data_dir.absolute() / 'server.sqlite3'}"

    def dialled(self) -> tuple[str, Kit | None]:
        """Address and kit with which the running server can be asked for its health."""
        one_transport(self.kit, self.insecure)
        return dialled(self.listen), Kit.load(self.kit) if self.kit else None

    def opened(self) -> Opened:
        """Read and check everything the settings name, changing nothing.

        Raises:
            ConfigurationError: an address, folder or database that cannot be used.
            IdentityError: a kit that cannot be used; says which file and why.
        """
        check_ready_file(self.ready_file)
        one_transport(self.kit, self.insecure)
        check_address(self.key_holder, encrypted=self.kit is not None)
        check_listeners(
            self.kit,
            {"listen": self.listen, "admin_listen": self.admin_listen},
            monitor_listen=self.monitor_listen,
            monitor_open=self.monitor_open,
            probe_listen=self.probe_listen,
        )
        check_writable(self.data_dir, "data_dir")
        if self.kit is None:
            return Opened(None, OpenEnrolment())
        kit = Kit.load(self.kit, Role.SERVER)
        try:
            read_pins(kit.file("key_holder.pub").read_text(encoding="utf-8"))
        except (OSError, MalformedError, UnicodeDecodeError):
            raise ConfigurationError(
                f"expected key_holder.pub in the kit; {kit.folder} has none, or a damaged one; "
                "take the whole kit from the authority"
            ) from None
        return Opened(kit, EnrolmentFile(kit.file("enrolment.json"), kit.ca))

    def check(self) -> None:
        """What `opened` checks, and that the database answers and is of no newer version.

        Raises:
            ConfigurationError, IdentityError: see :meth:`opened`.
        """
        from secagg_server.store import Store  # slow to load, and needed here alone

        self.opened()
        if self.store_url is not None or (self.data_dir / "server.sqlite3").exists():
            Store(self.database, migrate=False).close()


@dataclass(frozen=True, slots=True)
class Opened:
    """What the settings name, read and checked: the kit for TLS, None for plaintext, and who may
    take part."""

    kit: Kit | None
    roster: Roster


class OperatorSettings(Settings):
    """How an operator reaches the server; each field has a SECAGG_OPERATOR_<NAME> variable."""

    env_prefix: ClassVar[str] = "SECAGG_OPERATOR_"

    admin: str = Field("127.0.0.1:7401", description="host:port of the server's admin listener")
    kit: Path | None = Field(None, description="folder that the authority handed out; required")
    insecure: bool = Field(False, description="plaintext instead of a kit; loopback only")

    def operator(self) -> Operator:
        """A connection to the server.

        Raises:
            ConfigurationError, IdentityError: an address or kit that cannot be used.
            UnavailableError: nothing answers.
        """
        one_transport(self.kit, self.insecure)
        return Operator(self.admin, Kit.load(self.kit, Role.OPERATOR) if self.kit else None)
