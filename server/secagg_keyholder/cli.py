"""The `secagg-keyholder` command."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from secagg import logs
from secagg.commands import exits_cleanly, out, version
from secagg.options import with_settings
from secagg.rpc.lifecycle import check_health
from secagg_keyholder.app import run as run_key_holder
from secagg_keyholder.backup import backup_ledger, restore_ledger
from secagg_keyholder.config import KeyHolderSettings

__all__ = ["app"]

app = typer.Typer(help="The key holder: opens only sums.", no_args_is_help=True)
config_app = typer.Typer(help="Look at the configuration without starting.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@exits_cleanly
@with_settings(KeyHolderSettings)
def run(settings: KeyHolderSettings) -> None:
    """Serve until stopped. Flags win over SECAGG_KEYHOLDER_* variables, which win over the file."""
    logs.configure(settings.log_level)
    asyncio.run(run_key_holder(settings))


@config_app.command()
@exits_cleanly
@with_settings(KeyHolderSettings)
def check(settings: KeyHolderSettings) -> None:
    """Say what `run` would refuse, with the same message and exit code, without starting."""
    settings.check()
    out.print("the configuration is fine")


@app.command()
@exits_cleanly
@with_settings(KeyHolderSettings, ["listen", "kit", "insecure"])
def health(settings: KeyHolderSettings) -> None:
    """Ask the running key holder whether it is ready; 0 if it is, 69 if not."""
    check_health(*settings.dialled())
    out.print("ready")


@app.command()
@exits_cleanly
@with_settings(KeyHolderSettings, ["state_dir"])
def backup(
    settings: KeyHolderSettings,
    file: Annotated[Path, typer.Argument(help="file to write; must not exist")],
) -> None:
    """Copy what was promised into one file, while the key holder runs. No key is in it."""
    backup_ledger(settings.state_dir, file)
    out.print(f"wrote {file}; keep the kit and its passphrase in other places")


@app.command()
@exits_cleanly
@with_settings(KeyHolderSettings, ["state_dir"])
def restore(
    settings: KeyHolderSettings,
    file: Annotated[Path, typer.Argument(help="a file that `backup` has written")],
) -> None:
    """Put a backup in the place of a lost state_dir. Rounds it believes open are abandoned."""
    restore_ledger(file, settings.state_dir)
    out.print(f"restored into {settings.state_dir}; every open round will be attempted again")


if __name__ == "__main__":
    app()
