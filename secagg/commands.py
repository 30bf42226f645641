"""What every command line shares: one message and one exit code for each error. A leaf (`cli`)."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib.metadata import version as installed_version
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secagg.errors import SecaggError

__all__ = ["OutputFormat", "err", "exits_cleanly", "out", "print_json", "print_table", "version"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

out = Console()
err = Console(stderr=True)


class OutputFormat(StrEnum):
    """How a command prints its answer."""

    table = "table"
    json = "json"


def exits_cleanly(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn a `SecaggError` into one line on standard error and its exit code."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except SecaggError as error:
            err.print(
                f"[bold red]{error.reason}[/]: {escape(str(error))}",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return wrapped


def print_json(value: object) -> None:
    """One JSON document on standard output, for programs."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table on standard output, for people."""
    table = Table(*columns, title=title or None)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def version(show: bool) -> None:
    """Callback of ``--version``."""
    if show:
        out.print(f"secagg {installed_version('secagg')}", highlight=False)
        raise typer.Exit
