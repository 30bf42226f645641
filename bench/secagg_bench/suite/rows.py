"""Results as tidy rows: one figure each, checked before it is written and after it is read.

A repetition has a seed of its own, so that figures of one seed belong together: ratios are taken
between them, and only then is there a median.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secagg.errors import ConfigurationError

__all__ = ["UNITS", "Metric", "Row", "read", "write"]


class Metric(StrEnum):
    """What is measured; `UNITS` has the unit of each.

    Attributes:
        CLIENT: quantise, encrypt, serialise; one client.
        ADD: parse, validate, add; the server, for one client.
        ADD_UNAUTHENTICATED: the same without receipt and digest, where a system has these.
        HAND_OVER: the server, once: what it gives to whoever opens the sum.
        OPEN: parse, decrypt, decode; whoever opens the sum, once.
        UPLOAD: what one client sends.
        HANDED_OVER: what goes to whoever opens the sum.
        ERROR: largest difference of a mean from the true one.
        MEMORY: most memory that the process held which did all of this, clients and all.
        ROUND: a whole round by gRPC and mutual TLS, from its first client's start to the operator's
            sums. Wall time, as are its parts. Those of the clients are added up over all of them,
            which overlap where several processes are clients. What measuring itself does between
            clients is in none of the parts.
        FETCHING: read the kit, connect, ask for the round, download the model; all clients.
        ENCRYPTING: quantise, encrypt, seal, sign; all clients.
        UPLOADING: send that, and be told that it was accepted; all clients.
        LEAST: what FETCHING and UPLOADING take at least on a line of that rate and delay.
        CONCLUDING: from the last such word until the operator has the sums.
        CLIENTS_CPU: processor time that all clients took for their parts of that round.
        SERVER_CPU: of the server, with its workers, in that round.
        KEY_HOLDER_CPU: of the key holder, with its workers, in that round.
        SERVER_MEMORY: most memory that the server held in it, with its workers; memory that these
            share counts in each.
        KEY_HOLDER_MEMORY: the same of the key holder.
    """

    CLIENT = "client"
    ADD = "add"
    ADD_UNAUTHENTICATED = "add unauthenticated"
    HAND_OVER = "hand over"
    OPEN = "open"
    UPLOAD = "upload"
    HANDED_OVER = "handed over"
    ERROR = "error"
    MEMORY = "memory"
    ROUND = "round"
    FETCHING = "fetching"
    ENCRYPTING = "encrypting"
    UPLOADING = "uploading"
    LEAST = "least of the line"
    CONCLUDING = "concluding"
    CLIENTS_CPU = "clients' processor"
    SERVER_CPU = "server's processor"
    KEY_HOLDER_CPU = "key holder's processor"
    SERVER_MEMORY = "server's memory"
    KEY_HOLDER_MEMORY = "key holder's memory"


UNITS = {
    **dict.fromkeys(
        (
            *(Metric.CLIENT, Metric.ADD, Metric.ADD_UNAUTHENTICATED),
            *(Metric.HAND_OVER, Metric.OPEN, Metric.ROUND, Metric.FETCHING, Metric.ENCRYPTING),
            *(Metric.UPLOADING, Metric.LEAST),
            *(Metric.CONCLUDING, Metric.CLIENTS_CPU, Metric.SERVER_CPU, Metric.KEY_HOLDER_CPU),
        ),
        "s",
    ),
    **dict.fromkeys(
        (
            *(Metric.UPLOAD, Metric.HANDED_OVER, Metric.MEMORY),
            *(Metric.SERVER_MEMORY, Metric.KEY_HOLDER_MEMORY),
        ),
        "B",
    ),
    Metric.ERROR: "1",
}
"""Seconds (of one core's processor time where `Metric` says no other), bytes, or a plain number."""

_Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\r\n]+$")]
_Count = Annotated[int, Field(ge=1)]


class Row(BaseModel):
    """One figure.

    Attributes:
        scenario: name of a scenario.
        system: who did it, and with which options.
        version: of the system and of what its figure depends on.
        parameters: of the model.
        clients: of the cohort.
        value: in the unit of the metric; finite, zero or more.
        seed: of the repetition.
        machine: what it ran on; no name of a host.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenario: _Text
    system: _Text
    version: _Text
    parameters: _Count
    clients: _Count
    metric: Metric
    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    unit: str
    seed: Annotated[int, Field(ge=0)]
    machine: _Text

    @model_validator(mode="after")
    def _has_its_unit(self) -> Self:
        if self.unit != UNITS[self.metric]:
            raise ValueError(f"expected {UNITS[self.metric]} for {self.metric}; got {self.unit!r}")
        return self


_COLUMNS = tuple(Row.model_fields)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, whole or not at all.

    Args:
        path: the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(row.model_dump(mode="json") for row in rows)
    draft.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ConfigurationError: it cannot be read, or a row is not as it must be; the message
            names its line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file)
            if tuple(lines.fieldnames or ()) != _COLUMNS:
                raise ConfigurationError(
                    f"expected the columns {', '.join(_COLUMNS)} in {path.name}; got "
                    f"{', '.join(lines.fieldnames or ()) or 'none'}; measure again"
                )
            return [_row(path, number, line) for number, line in enumerate(lines, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(
            f"expected a file of results; {path.name} cannot be read ({type(error).__name__}); "
            "`secagg-bench run` writes it"
        ) from None


def _row(path: Path, number: int, line: dict[str, str]) -> Row:
    try:
        return Row.model_validate(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigurationError(
            f"expected a row of results in line {number} of {path.name}; {where or 'the row'}: "
            f"{first['msg']}; measure again"
        ) from None
