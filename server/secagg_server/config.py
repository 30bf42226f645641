"""The server's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from secagg.settings import Settings

__all__ = ["ServerSettings"]


class ServerSettings(Settings):
    """What `secagg-server run` needs; each field has a flag and a SECAGG_SERVER_<NAME> variable."""

    env_prefix: ClassVar[str] = "SECAGG_SERVER_"

    listen: str = Field("127.0.0.1:7400", description="host:port for clients; loopback only")
    admin_listen: str = Field("127.0.0.1:7401", description="host:port for operators")
    key_holder: str = Field("127.0.0.1:7402", description="host:port of the key holder")
    data_dir: Path = Field(Path("secagg-data/server"), description="models, uploads, database")
    store_url: str | None = Field(
        None, description="SQLAlchemy URL; a SQLite file in data_dir when not given"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    ready_file: Path | None = Field(None, description="written once the server listens")

    @property
    def database(self) -> str:
        """The SQLAlchemy URL to use."""
        return self.store_url or f"sqlite:///{self.data_dir.absolute() / 'server.sqlite3'}"
