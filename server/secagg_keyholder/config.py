"""The key holder's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from secagg.parameters import MIN_COHORT
from secagg.settings import Settings

__all__ = ["KeyHolderSettings"]


class KeyHolderSettings(Settings):
    """What `secagg-keyholder run` needs; each field has a flag and a SECAGG_KEYHOLDER_ variable."""

    env_prefix: ClassVar[str] = "SECAGG_KEYHOLDER_"

    listen: str = Field("127.0.0.1:7402", description="host:port for the server; loopback only")
    min_clients: int = Field(
        MIN_COHORT, ge=MIN_COHORT, description="smallest cohort that is ever opened here"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_file: Path | None = Field(None, description="written once the key holder listens")
