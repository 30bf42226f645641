"""`secagg audit`: check, read and copy an audit log, without the service that wrote it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secagg.audit import Entry, export, read_entries, to_line, verify
from secagg.commands import OutputFormat, exits_cleanly, out, print_json, print_table
from secagg.transcript import DIGEST_BYTES

__all__ = ["app"]

app = typer.Typer(help="Check, read and copy audit logs.", no_args_is_help=True)

Log = Annotated[
    Path, typer.Argument(help="a service's SQLite file, or what `secagg audit export` wrote")
]


def _head(value: str) -> bytes:
    try:
        head = bytes.fromhex(value)
    except ValueError:
        head = b""
    if len(head) != DIGEST_BYTES:
        raise typer.BadParameter(f"expected {2 * DIGEST_BYTES} hex digits; got another text")
    return head


@app.command("verify")
@exits_cleanly
def verify_command(
    log: Log,
    head: Annotated[
        bytes | None,
        typer.Option(parser=_head, metavar="HEX", help="hash of an entry, noted earlier elsewhere"),
    ] = None,
) -> None:
    """Check that no entry was changed, removed, reordered or put in.

    Only with --head is it noticed that entries were removed at the end, or that all of the log was
    written anew. Note the hash that this command prints where the log's owner cannot change it.
    """
    entries = read_entries(log)
    first = next(entries, None)
    last = verify(entries if first is None else itertools.chain([first], entries), head=head)
    if first is None or last is None:
        _say("0 entries")
        return
    _say(f"{last.sequence} entries, all as they were written")
    _say(f"first  {first.time}")
    _say(f"last   {last.time}")
    _say(f"head   {last.hash.hex()}")


@app.command("show")
@exits_cleanly
def show_command(
    log: Log,
    event: Annotated[str | None, typer.Option(help="only entries of this event")] = None,
    format_: Annotated[OutputFormat, typer.Option("--format")] = OutputFormat.table,
) -> None:
    """Print the entries, as they are: `verify` says whether they were changed."""
    entries = (entry for entry in read_entries(log) if event is None or entry.event == event)
    if format_ is OutputFormat.json:
        print_json([json.loads(to_line(entry)) for entry in entries])
        return
    print_table(("entry", "time", "event", "details"), [_row(entry) for entry in entries])


@app.command("export")
@exits_cleanly
def export_command(
    log: Log,
    copy: Annotated[Path, typer.Argument(help="file to write; must not exist", metavar="OUT")],
) -> None:
    """Copy the entries to a file of JSON lines, as they are: `verify` checks the copy too."""
    last = export(read_entries(log), copy)
    _say(f"{last.sequence if last else 0} entries written to {copy}")
    if last:
        _say(f"head   {last.hash.hex()}")


def _row(entry: Entry) -> tuple[str, ...]:
    return str(entry.sequence), entry.time, escape(entry.event), escape(entry.details)


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
