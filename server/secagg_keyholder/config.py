"""The key holder's settings, and what can be known to be wrong with them before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from secagg.accounting import Budget
from secagg.certificates import Kit, Role
from secagg.custodians import fresh_passphrase
from secagg.enrolment import EnrolmentFile, OpenEnrolment, Roster
from secagg.errors import ConfigurationError
from secagg.parameters import MAX_COHORT, MIN_COHORT
from secagg.receipts import SigningKey
from secagg.rpc.lifecycle import OFF, check_listeners, check_ready_file
from secagg.settings import Settings, check_writable, dialled, one_transport
from secagg_keyholder.database import LEDGER
from secagg_keyholder.database import check as check_ledger
from secagg_keyholder.policy import DEFAULT_ATTEMPTS, Policy
from secagg_keyholder.vault import load_identity, unsealing_passphrase

__all__ = ["KeyHolderSettings", "Opened"]


class KeyHolderSettings(Settings):
    """What `secagg-keyholder run` needs; each field has a flag and a SECAGG_KEYHOLDER_ variable.

    What begins with ``release_`` is what this key holder agrees to release, whatever the server
    asks (`Policy`): in the file, a table ``[release]``, whose keys go without that beginning.
    """

    env_prefix: ClassVar[str] = "SECAGG_KEYHOLDER_"

    listen: str = Field("127.0.0.1:7402", description="host:port for the server")
    monitor_listen: str = Field(
        "127.0.0.1:7404", description="host:port for metrics and health, by HTTP; or off"
    )
    monitor_open: bool = Field(
        False, description="monitor_listen in plaintext beyond loopback, without certificates"
    )
    probe_listen: str = Field(
        OFF, description="host:port for gRPC health checks in plaintext, and nothing else; or off"
    )
    kit: Path | None = Field(None, description="folder made by `secagg provision`; required")
    insecure: bool = Field(False, description="plaintext instead of a kit; loopback only")
    passphrase: SecretStr | None = Field(None, description="opens the identity key")
    passphrase_file: Path | None = Field(None, description="file that holds the passphrase")
    share_files: list[Path] = Field(
        default_factory=list, description="custodians' shares of the passphrase, one a file"
    )
    state_dir: Path = Field(Path("secagg-data/keyholder"), description="what was promised")
    round_key_dir: Path | None = Field(
        None, description="open rounds' keys; never in a backup; in state_dir when not given"
    )
    release_min_clients: int = Field(
        MIN_COHORT, ge=MIN_COHORT, description="smallest cohort that is ever opened here"
    )
    release_attempts_per_model: int = Field(
        DEFAULT_ATTEMPTS, ge=1, description="attempts at rounds that start from the same model"
    )
    release_require_privacy: bool = Field(False, description="refuse plans without privacy")
    release_max_epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="largest privacy budget of a task"
    )
    release_max_delta: float | None = Field(
        None, gt=0, lt=1, description="at this delta, or a smaller one"
    )
    release_min_row_contributors: int | None = Field(
        None, ge=2, le=MAX_COHORT, description="refuse plans with item rows of fewer contributors"
    )
    workers: int = Field(1, ge=1, le=64, description="processes that decrypt")
    max_in_flight: int = Field(64, ge=1, description="calls that are worked on at once")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_file: Path | None = Field(None, description="written once the key holder listens")

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, values: dict[str, Any]) -> dict[str, Any]:
        """One name for a setting in file, environment and flags; the file's table comes last."""
        table = values.get("release", {})
        if not isinstance(table, dict):
            raise ConfigurationError(
                "expected a table [release]; got another value of that name; name one of its "
                "settings, such as release_min_clients"
            )
        others = {key: value for key, value in values.items() if key != "release"}
        return {f"release_{key}": value for key, value in table.items()} | others

    @field_validator("share_files", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment has one text for all of them, with commas."""
        return value.split(",") if isinstance(value, str) else value

    @property
    def round_keys(self) -> Path:
        """Where the keys of open rounds lie."""
        return self.round_key_dir or self.state_dir / "round-keys"

    @property
    def policy(self) -> Policy:
        """What this key holder agrees to release.

        Raises:
            ConfigurationError: an epsilon without a delta, or the other way round.
        """
        epsilon, delta = self.release_max_epsilon, self.release_max_delta
        if (epsilon is None) != (delta is None):
            raise ConfigurationError(
                "expected release_max_epsilon and release_max_delta together: neither bounds "
                f"anything alone; got {epsilon=}, {delta=}; add the other, such as a delta of 1e-6"
            )
        return Policy(
            self.release_min_clients,
            self.release_attempts_per_model,
            self.release_require_privacy,
            None if epsilon is None or delta is None else Budget(epsilon, delta),
            self.release_min_row_contributors,
        )

    def dialled(self) -> tuple[str, Kit | None]:
        """Address and kit with which the running key holder can be asked for its health."""
        one_transport(self.kit, self.insecure)
        return dialled(self.listen), Kit.load(self.kit) if self.kit else None

    def opened(self) -> Opened:
        """Read and check everything the settings name, changing nothing.

        Raises:
            ConfigurationError: an address, folder or passphrase that cannot be used; or what can
                never be released, see :attr:`policy`.
            IdentityError: a kit that cannot be used; says which file and why.
        """
        policy = self.policy
        check_ready_file(self.ready_file)
        one_transport(self.kit, self.insecure)
        check_listeners(
            self.kit,
            {"listen": self.listen},
            monitor_listen=self.monitor_listen,
            monitor_open=self.monitor_open,
            probe_listen=self.probe_listen,
        )
        check_writable(self.state_dir, "state_dir")
        check_writable(self.round_keys, "round_key_dir")
        if self.kit is None:
            passphrase = _kept_passphrase(self.state_dir)
            return Opened(None, SigningKey.generate(), passphrase, OpenEnrolment(), policy)
        kit = Kit.load(self.kit, Role.KEY_HOLDER)
        passphrase = unsealing_passphrase(
            passphrase=self.passphrase,
            passphrase_file=self.passphrase_file,
            share_files=self.share_files,
        )
        identity = load_identity(kit.file("identity.key"), passphrase)
        roster = EnrolmentFile(kit.file("enrolment.json"), kit.ca)
        if identity.public not in roster.current().key_holder_identities:
            raise ConfigurationError(
                "expected an identity.key that the enrolment names; it names others, so clients "
                "would trust no round; use the identity.key and enrolment.json of one kit"
            )
        return Opened(kit, identity, passphrase, roster, policy)

    def check(self) -> None:
        """What `opened` checks, and that the ledger is one of this version.

        Raises:
            ConfigurationError, IdentityError: see :meth:`opened`.
        """
        self.opened()
        check_ledger(self.state_dir / LEDGER)


@dataclass(frozen=True, slots=True)
class Opened:
    """What the settings name, read and checked.

    Attributes:
        kit: for TLS; None for plaintext.
        identity: signs round keys.
        passphrase: seals what is at rest.
        roster: who may take part.
        policy: what may be released.
    """

    kit: Kit | None
    identity: SigningKey
    passphrase: str
    roster: Roster
    policy: Policy

    def __repr__(self) -> str:
        return "Opened(OMITTED)"


def _kept_passphrase(state_dir: Path) -> str:
    """Without a kit there is nobody to give a passphrase: one is kept beside what it seals."""
    file = state_dir / "passphrase"
    return file.read_text(encoding="utf-8") if file.exists() else fresh_passphrase()
