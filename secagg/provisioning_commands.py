"""`secagg provision`: makes a federation's start kits and keeps them up to date. A leaf (`cli`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secagg.authority import AUTHORITY_DAYS
from secagg.certificates import Role
from secagg.commands import OutputFormat, exits_cleanly, out, print_json, print_table
from secagg.errors import ConfigurationError
from secagg.provision import DEFAULT_HOSTS, Federation
from secagg.register import KEY_HOLDER, SERVER

__all__ = ["app"]

app = typer.Typer(
    help="Make and renew the certificates and keys of a federation.", no_args_is_help=True
)

_REACHED = "DNS name or IP address of "
_REPEATABLE = f"repeatable; {' and '.join(DEFAULT_HOSTS)} come with it, for health checks"

FolderArgument = Annotated[Path, typer.Argument(help="folder of the federation")]
NameArgument = Annotated[str, typer.Argument(help="the party's name")]
RevokeOption = Annotated[
    bool, typer.Option("--revoke-old", help="the replaced certificates count no longer")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(help="file of the key holder's passphrase; else a fresh one is made and written"),
]


@app.command()
@exits_cleanly
def init(
    folder: FolderArgument,
    server_host: Annotated[
        list[str] | None, typer.Option(help=f"{_REACHED}the server; {_REPEATABLE}")
    ] = None,
    key_holder_host: Annotated[
        list[str] | None, typer.Option(help=f"{_REACHED}the key holder; {_REPEATABLE}")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="name of a client; repeatable")] = None,
    clients: Annotated[
        int, typer.Option(min=0, help="this many more, named client-1, client-2 and so on")
    ] = 0,
    operator: Annotated[
        list[str] | None, typer.Option(help="name of an operator; repeatable; else admin")
    ] = None,
    monitor: Annotated[
        list[str] | None, typer.Option(help="name of a monitor; repeatable; else prometheus")
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=AUTHORITY_DAYS, help="how long certificates are valid")
    ] = 365,
    custodians: Annotated[
        int | None, typer.Option(help="split the passphrase into this many shares")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(help="how many shares open the key holder's identity")
    ] = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a new authority, and a kit for every party."""
    if (custodians is None) != (threshold is None):
        raise ConfigurationError(
            "expected --custodians and --threshold together; got one of them; give both or none"
        )
    shares = None if custodians is None or threshold is None else (threshold, custodians)
    federation = Federation.create(
        folder,
        server_hosts=_with_local(server_host),
        key_holder_hosts=_with_local(key_holder_host),
        clients=[*(client or []), *(f"client-{number}" for number in range(1, clients + 1))],
        operators=operator or ("admin",),
        monitors=monitor or ("prometheus",),
        days=days,
        passphrase=_passphrase(passphrase_file),
        custodians=shares,
    )
    _wrote(folder / "authority", "the authority; keep it offline, with a copy")
    _say_kit(federation, SERVER)
    _say_key_holder(federation)
    for name, party in federation.members().items():
        if party.role in (Role.CLIENT, Role.OPERATOR, Role.MONITOR):
            _say_kit(federation, name)


@app.command()
@exits_cleanly
def enrol(
    folder: FolderArgument,
    names: Annotated[list[str], typer.Argument(help="names of the new clients")],
) -> None:
    """Admit new clients and make their kits."""
    federation = Federation.load(folder)
    federation.enrol(*names)
    for name in names:
        _say_kit(federation, name)
    _say_lists(federation)


@app.command("add-monitor")
@exits_cleanly
def add_monitor(
    folder: FolderArgument,
    names: Annotated[list[str], typer.Argument(help="names of the new monitors")],
) -> None:
    """Make kits for monitors, which may read the services' metrics and nothing else."""
    federation = Federation.load(folder)
    federation.add_monitors(*names)
    for name in names:
        _say_kit(federation, name)
    _say_lists(federation)


@app.command("rotate-client")
@exits_cleanly
def rotate_client(
    folder: FolderArgument, name: NameArgument, revoke_old: RevokeOption = False
) -> None:
    """Renew a client's certificate and signing key; the old key counts until `retire-client`."""
    federation = Federation.load(folder)
    federation.rotate_client(name, revoke_old=revoke_old)
    _say_kit(federation, name)
    _say_lists(federation)
    _say("next: once the client has taken it over, run `secagg provision retire-client`")


@app.command("rotate-operator")
@exits_cleanly
def rotate_operator(
    folder: FolderArgument, name: NameArgument, revoke_old: RevokeOption = False
) -> None:
    """Renew an operator's certificate."""
    federation = Federation.load(folder)
    federation.rotate_operator(name, revoke_old=revoke_old)
    _say_kit(federation, name)
    _say_lists(federation)


@app.command("rotate-monitor")
@exits_cleanly
def rotate_monitor(
    folder: FolderArgument, name: NameArgument, revoke_old: RevokeOption = False
) -> None:
    """Renew a monitor's certificate."""
    federation = Federation.load(folder)
    federation.rotate_monitor(name, revoke_old=revoke_old)
    _say_kit(federation, name)
    _say_lists(federation)


@app.command("rotate-server")
@exits_cleanly
def rotate_server(folder: FolderArgument, revoke_old: RevokeOption = False) -> None:
    """Renew the server's certificate."""
    federation = Federation.load(folder)
    federation.rotate_server(revoke_old=revoke_old)
    _say_kit(federation, SERVER)
    _say_lists(federation)


@app.command("rotate-keyholder")
@exits_cleanly
def rotate_key_holder(
    folder: FolderArgument,
    passphrase_file: PassphraseOption = None,
    revoke_old: RevokeOption = False,
) -> None:
    """Renew the key holder's certificate, identity and passphrase.

    Clients trust the old identity too until `retire-keyholder`. Rounds that are open when the key
    holder takes the new kit over are abandoned, because their keys need the old passphrase.
    """
    federation = Federation.load(folder)
    federation.rotate_key_holder(_passphrase(passphrase_file), revoke_old=revoke_old)
    _say_key_holder(federation)
    _say_lists(federation)
    _say_pins(federation)
    _say(
        "next: let everybody have the new key_holder.pub, then start the key holder with its new "
        "kit, then run `secagg provision retire-keyholder`"
    )


@app.command("retire-client")
@exits_cleanly
def retire_client(folder: FolderArgument, name: NameArgument) -> None:
    """Drop a client's old signing key."""
    federation = Federation.load(folder)
    federation.retire(name)
    _say_lists(federation)


@app.command("retire-keyholder")
@exits_cleanly
def retire_key_holder(folder: FolderArgument) -> None:
    """Drop the key holder's old identity."""
    federation = Federation.load(folder)
    federation.retire_key_holder()
    _say_lists(federation)
    _say_pins(federation)


@app.command()
@exits_cleanly
def revoke(folder: FolderArgument, name: NameArgument) -> None:
    """Shut out a client, an operator or a monitor for good, with every certificate it ever had."""
    federation = Federation.load(folder)
    federation.revoke(name)
    _say_lists(federation)


@app.command("list")
@exits_cleanly
def list_command(
    folder: FolderArgument,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Everybody in the federation: expiry of the newest certificate, keys that count, state."""
    rows = [
        {
            "name": name,
            "role": str(party.role),
            "expires": party.expires.isoformat(),
            "keys": len(party.keys),
            "state": party.state,
        }
        for name, party in Federation.load(folder).members().items()
    ]
    if format_ is OutputFormat.json:
        print_json(rows)
        return
    columns = ("name", "role", "expires", "keys", "state")
    print_table(columns, [[row[column] for column in columns] for row in rows])


def _passphrase(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(
            f"expected a readable text file of the passphrase; {file} is not"
        ) from None


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def _wrote(file: Path, what: str) -> None:
    _say(f"wrote {file}: {what}")


def _say_kit(federation: Federation, name: str) -> None:
    _wrote(federation.kit(name), f"hand it to {name}, and to nobody else")


def _say_key_holder(federation: Federation) -> None:
    _say_kit(federation, KEY_HOLDER)
    files = sorted((federation.folder / "custodians").glob("*"))
    for file in files:
        to = "one custodian, then remove it" if len(files) > 1 else "whoever starts the key holder"
        _wrote(file, f"hand it to {to}")


def _say_lists(federation: Federation) -> None:
    for name in (SERVER, KEY_HOLDER):
        file = federation.kit(name) / "enrolment.json"
        _wrote(file, f"copy it to the {name}, which reads it while running")


def _say_pins(federation: Federation) -> None:
    file = federation.kit(SERVER) / "key_holder.pub"
    _wrote(file, "copy it into the kits of the server and of every client")


def _with_local(hosts: list[str] | None) -> list[str]:
    return list(dict.fromkeys([*(hosts or ()), *DEFAULT_HOSTS]))
