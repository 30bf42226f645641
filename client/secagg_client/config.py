"""The recommender client's settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from secagg.private_files import write
from secagg.receipts import SigningKey
from secagg.settings import Settings, one_transport
from secagg_client.session import ClientKit, Limits

__all__ = ["ClientSettings", "identity_in"]


class ClientSettings(Settings):
    """What a silo of users needs; each field has a SECAGG_CLIENT_<NAME> variable."""

    env_prefix: ClassVar[str] = "SECAGG_CLIENT_"

    server: str = Field("127.0.0.1:7400", description="host:port of the server")
    kit: Path | None = Field(None, description="folder that the authority handed out; required")
    insecure: bool = Field(False, description="plaintext instead of a kit; loopback only")
    task: str = Field("recommender", description="task to join")
    dataset: Literal[
        "ml-100k", "marketplace", "amazon-beauty", "amazon-reviews-2023", "amazon-products-2023"
    ] = Field("ml-100k", description="whose interactions")
    data_dir: Path | None = Field(
        None, description="folder of the data; all but the marketplace need it"
    )
    silo: int = Field(0, ge=0, description="which silo of users this client is, from 0")
    silos: int = Field(8, ge=1, description="silos that the users are dealt out to")
    partition: Literal["uniform", "dirichlet", "preference", "taste", "quantity"] = Field(
        "uniform", description="how the users are dealt out"
    )
    partition_alpha: float = Field(0.5, gt=0, description="of dirichlet; small is skewed")
    state_dir: Path = Field(
        Path("secagg-data/client"), description="identity key and private user vectors"
    )
    model: Literal["factorisation", "ease", "transitions", "session", "cohorts"] = Field(
        "factorisation", description="kind of model that the task is for"
    )
    cohort: str | None = Field(None, description="one's own, for a task that counts cohorts")
    dimensions: int = Field(16, ge=1, description="length of user and item vectors")
    max_epsilon: float | None = Field(
        None, gt=0, description="most epsilon to spend in a task, beyond what its budget allows"
    )
    require_privacy: bool = Field(False, description="refuse tasks that add no noise")
    example_epsilon: float | None = Field(
        None, gt=0, description="train by DP-SGD: most that all rounds may tell of an interaction"
    )
    example_delta: float = Field(1e-6, gt=0, lt=1, description="delta of example_epsilon")
    example_rounds: int = Field(25, ge=1, description="rounds that example_epsilon has to last for")
    example_rate: float = Field(
        0.25, gt=0, le=1, description="probability of an interaction to be in a step of DP-SGD"
    )
    example_steps: int = Field(8, ge=1, description="steps of DP-SGD in a round")
    example_samples: int = Field(
        10_000, ge=1, description="what the silo's interactions are taken to number, in public"
    )
    local_epochs: int = Field(2, ge=1, description="passes over the silo's data in a round")
    proximal: float = Field(0.0, ge=0, description="FedProx's mu, the pull to the round's model")
    error_feedback: bool = Field(
        True, description="add what compression has left out of an update to the next one"
    )
    max_train_seconds: float | None = Field(
        None, gt=0, description="train on fewer batches, for about so long a round"
    )
    max_upload_bytes: int | None = Field(
        None, gt=0, description="miss rounds, so as to upload no more in a task"
    )
    allow_server_scores: bool = Field(
        False, description="let a server's scores, fetched for all items, refine recommendations"
    )
    seed: int = Field(0, ge=0, description="of partition, start and sampling; equal for all silos")
    repeatable_seed: int | None = Field(
        None, ge=0, description="round repeatably; for demos on one machine only"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def credentials(
        self, identity: Callable[[], SigningKey] = SigningKey.generate
    ) -> ClientKit | SigningKey:
        """Who this client is to the server: its kit, or a signing key for plaintext.

        Raises:
            ConfigurationError: neither a kit nor the explicit wish for plaintext, or both.
            IdentityError: the kit cannot be used; says which file and why.
        """
        one_transport(self.kit, self.insecure)
        return ClientKit.load(self.kit) if self.kit else identity()

    def limits(self) -> Limits:
        """What this client may spend."""
        return Limits(self.max_epsilon, self.require_privacy)


def identity_in(folder: Path) -> SigningKey:
    """The signing key of a client without a kit, made at the first call."""
    path = folder / "identity.key"
    if not path.exists():
        write(path, SigningKey.generate().to_bytes())
    return SigningKey.from_bytes(path.read_bytes())
