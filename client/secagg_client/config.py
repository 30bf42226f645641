"""The recommender client's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from secagg.settings import Settings

__all__ = ["ClientSettings"]


class ClientSettings(Settings):
    """What a silo of users needs; each field has a SECAGG_CLIENT_<NAME> variable."""

    env_prefix: ClassVar[str] = "SECAGG_CLIENT_"

    server: str = Field("127.0.0.1:7400", description="host:port of the server; loopback only")
    task: str = Field("recommender", description="task to join")
    dataset: Literal["ml-100k", "marketplace"] = Field("ml-100k", description="whose interactions")
    data_dir: Path | None = Field(None, description="folder of the data; ml-100k needs it")
    silo: int = Field(0, ge=0, description="which silo of users this client is, from 0")
    silos: int = Field(8, ge=1, description="silos that the users are dealt out to")
    state_dir: Path = Field(
        Path("secagg-data/client"), description="identity key and private user vectors"
    )
    dimensions: int = Field(16, ge=1, description="length of user and item vectors")
    local_epochs: int = Field(2, ge=1, description="passes over the silo's data in a round")
    seed: int = Field(0, ge=0, description="of partition, start and sampling; equal for all silos")
    repeatable_seed: int | None = Field(
        None, ge=0, description="round repeatably; for demos on one machine only"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
