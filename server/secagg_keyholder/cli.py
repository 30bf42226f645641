"""The `secagg-keyholder` command."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from secagg import logs
from secagg.commands import exits_cleanly, version
from secagg.settings import load
from secagg_keyholder.app import run as run_key_holder
from secagg_keyholder.config import KeyHolderSettings

__all__ = ["app"]

app = typer.Typer(help="The key holder: opens only sums.", no_args_is_help=True)


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@exits_cleanly
def run(
    config: Annotated[Path | None, typer.Option(help="TOML file")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port for the server")] = None,
    min_clients: Annotated[int | None, typer.Option(help="smallest cohort ever opened")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="written once listening")] = None,
) -> None:
    """Serve until stopped. Flags win over SECAGG_KEYHOLDER_* variables, which win over the file."""
    settings = load(
        KeyHolderSettings,
        config,
        {
            "listen": listen,
            "min_clients": min_clients,
            "log_level": log_level,
            "ready_file": ready_file,
        },
    )
    logs.configure(settings.log_level)
    asyncio.run(run_key_holder(settings))


if __name__ == "__main__":
    app()
