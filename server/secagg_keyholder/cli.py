"""The `secagg-keyholder` command.

What only serving needs is loaded by `run` alone: containers ask for health every few seconds.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from secagg import logs
from secagg.commands import OutputFormat, exits_cleanly, out, print_json, print_table, version
from secagg.options import with_settings
from secagg.rpc.lifecycle import check_health
from secagg_keyholder.accounts import Account, accounts
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
    from secagg_keyholder.app import run as serve

    logs.configure(settings.log_level)
    asyncio.run(serve(settings))


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
def budget(
    settings: KeyHolderSettings,
    format_: Annotated[
        OutputFormat, typer.Option("--format", help="table or json")
    ] = OutputFormat.table,
) -> None:
    """Show what each task has spent of its privacy budget, by the ledger; running or not."""
    found = accounts(settings.state_dir)
    if format_ is OutputFormat.json:
        print_json([_plain(each) for each in found])
        return
    print_table(_COLUMNS, [_row(each) for each in found])
    out.print(_LEGEND, highlight=False)


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


_COLUMNS = ("task", "noise", "multiplier", "releases", "epsilon spent", "of", "at delta", "left")
_LEGEND = (
    "Releases: sums that left, and rounds passed over, which count as released. Left: how many "
    "more will leave at all."
)


def _row(found: Account) -> tuple[object, ...]:
    privacy, counted = found.privacy, found.releases + found.passed_over
    if privacy is None:
        return (found.task_id, "exact sums", "-", counted, "no bound", "-", "-", "no bound")
    return (
        found.task_id,
        privacy.mode,
        f"{privacy.noise_multiplier:g}",
        counted,
        f"{found.epsilon:.4g}",
        f"{privacy.epsilon:g}",
        f"{privacy.delta:g}",
        found.left,
    )


def _plain(found: Account) -> dict[str, object]:
    """An account for programs; null where there is no bound."""
    return {
        "task": found.task_id,
        "privacy": asdict(found.privacy) if found.privacy else None,
        "releases": found.releases,
        "passed_over": found.passed_over,
        "rho_spent": found.rho if found.privacy else None,
        "epsilon_spent": found.epsilon if found.privacy else None,
        "releases_left": found.left,
    }


if __name__ == "__main__":
    app()
