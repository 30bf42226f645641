"""The audit log: entries chained by their hashes, so that no change of one goes unnoticed.

Each hash covers the entry and the hash before it. The chain holds no key: whoever may write the
whole log can cut its end or write all of it anew, and only a *head*, the hash of an entry, kept
where that writer cannot reach shows it. Entries name clients by a keyed hash, never by themselves.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from secagg.errors import AuditError, ConfigurationError, InputError, MalformedError
from secagg.transcript import DIGEST_BYTES, digest, encode

__all__ = [
    "GENESIS",
    "MAX_DETAILS",
    "Detail",
    "Entry",
    "client_hash",
    "details_json",
    "export",
    "from_line",
    "load_audit_key",
    "next_entry",
    "read_entries",
    "to_line",
    "verify",
]

GENESIS = bytes(DIGEST_BYTES)
"""What the first entry names as the hash before it."""

MAX_DETAILS = 1 << 18
"""Characters of an entry's details, so that a line always fits what a reader takes."""

_MAX_LINE = 1 << 20
_KEY_BYTES = 32
_CLIENT_BYTES = 16
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_EVENT = re.compile(r"[ -~]{1,64}")
_SQLITE = b"SQLite format 3\0"
_FIELDS = ("sequence", "time", "event", "details", "previous", "hash")

Scalar = str | int | bool | None
Detail = Scalar | Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of the log.

    Attributes:
        sequence: counts from 1, without gaps.
        time: UTC, ISO 8601 with microseconds and ``Z``; a clock may go back, the sequence never.
        event: what happened, 1 to 64 printable ASCII characters.
        details: JSON as `details_json` writes it, at most `MAX_DETAILS` characters.
        previous: hash of the entry before, 32 bytes; `GENESIS` for the first.
        hash: 32 bytes over all of the above.
    """

    sequence: int
    time: str
    event: str
    details: str
    previous: bytes
    hash: bytes


def details_json(details: Mapping[str, Detail]) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII; lists and tuples are the same.

    Raises:
        TypeError: a value that is no string, integer, boolean, None or flat list of them.
    """
    for name, value in details.items():
        if not isinstance(name, str):
            raise TypeError(f"expected a string as a detail's name; got {type(name).__name__}")
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, str | int | None):
                raise TypeError(
                    "expected details of strings, integers, booleans, None or lists of them; got "
                    f"{type(item).__name__}; write an exact text of it"
                )
    return json.dumps(details, sort_keys=True, separators=(",", ":"))


def next_entry(
    previous: Entry | None, event: str, details: Mapping[str, Detail], now: datetime
) -> Entry:
    """The entry that follows ``previous``, or the first one.

    Raises:
        TypeError: details that `details_json` refuses.
        ValueError: ``now`` without a time zone, an event that is none, or details too long.
    """
    if now.tzinfo is None:
        raise ValueError("expected a time with its zone; got one without; use datetime.now(UTC)")
    text = details_json(details)
    if not _EVENT.fullmatch(event):
        raise ValueError(
            f"expected an event of 1 to 64 printable ASCII characters; got {len(event)} characters"
        )
    if len(text) > MAX_DETAILS:
        raise ValueError(
            f"expected details of at most {MAX_DETAILS} characters; got {len(text)}; log a digest "
            "or a count instead"
        )
    sequence, before = (previous.sequence + 1, previous.hash) if previous else (1, GENESIS)
    time = now.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    unhashed = Entry(sequence, time, event, text, before, b"")
    return replace(unhashed, hash=_hash(unhashed))


def verify(entries: Iterable[Entry], *, head: bytes | None = None) -> Entry | None:
    """Check the chain from its first entry; the last entry, or None where there is none.

    Without ``head``, a hash noted earlier, a log that was cut at its end or written anew passes.

    Raises:
        AuditError: names the first entry that is missing, out of order, changed or put in, or
            says that no entry has the hash ``head``.
    """
    last: Entry | None = None
    found = False
    rest = iter(entries)
    for entry in rest:
        if problem := _problem(last, entry, rest):
            raise AuditError(f"{problem}; compare the log with a backup")
        found = found or entry.hash == head
        last = entry
    if head is not None and not found:
        raise AuditError(
            f"expected an entry with the hash {head.hex()}; none of {last.sequence if last else 0} "
            "has it: the log was cut or replaced after that hash was noted; compare the log with "
            "a backup"
        )
    return last


def _problem(last: Entry | None, entry: Entry, rest: Iterator[Entry]) -> str | None:
    number = last.sequence + 1 if last else 1
    if entry.sequence < number:
        return (
            f"expected entry {number}; got entry {entry.sequence} once more or too late: entries "
            "were repeated or reordered"
        )
    if entry.sequence > number:
        later = any(other.sequence == number for other in rest)
        how = "comes later: entries were reordered" if later else "is missing: entries were removed"
        return f"expected entry {number}; got entry {entry.sequence}; entry {number} {how}"
    if entry.hash != _hash(entry):
        return f"expected entry {number} as it was written; its hash differs: it was changed"
    if entry.previous != (last.hash if last else GENESIS):
        return (
            f"expected entry {number} to follow the hash before it; it follows another: an entry "
            "was replaced or put in"
        )
    return None


def _hash(entry: Entry) -> bytes:
    return digest("audit", entry.previous, entry.sequence, entry.time, entry.event, entry.details)


def to_line(entry: Entry) -> str:
    """One line of JSON, without its newline; the details are an object in it."""
    values = (
        entry.sequence,
        entry.time,
        entry.event,
        json.loads(entry.details),
        entry.previous.hex(),
        entry.hash.hex(),
    )
    return json.dumps(dict(zip(_FIELDS, values, strict=True)), separators=(",", ":"))


def from_line(line: str) -> Entry:
    """The entry of a line, which must be byte for byte what `to_line` writes.

    Raises:
        MalformedError: anything else. Whether the hash is right is for `verify` to say.
    """
    try:
        values = json.loads(line)
        sequence, time, event, details, *hashes = (values[name] for name in _FIELDS)
        entry = _entry((sequence, time, event, details_json(details), *map(bytes.fromhex, hashes)))
        if to_line(entry) == line:
            return entry
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise MalformedError("expected one entry as `secagg audit export` writes it; got another line")


def read_entries(path: Path) -> Iterator[Entry]:
    """Entries of a SQLite file's table ``audit``, by sequence, or of a file that `export` wrote.

    The file is read as it goes, never written, and not verified.

    Raises:
        InputError: not there, or not readable.
        MalformedError: neither of the two, or an entry that is not one; a line that was torn off.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_SQLITE))
            file.seek(0)
            yield from _rows(path) if start == _SQLITE else _lines(file)
    except OSError as error:
        raise InputError(f"expected a readable audit log; {path}: {error.strerror}") from None


def _rows(path: Path) -> Iterator[Entry]:
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            yield from map(
                _entry,
                connection.execute(
                    "SELECT sequence, time, event, details, previous, hash FROM audit "
                    "ORDER BY sequence"
                ),
            )
    except sqlite3.Error as error:
        raise MalformedError(
            f"expected a SQLite file with a table `audit`; {path}: {error}; where it lies beside "
            "a -wal file, copy both to a folder you can write to"
        ) from None


def _lines(file: BinaryIO) -> Iterator[Entry]:
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise MalformedError(
                f"expected lines of at most {_MAX_LINE} bytes; line {number} is longer; this is "
                "not an audit log as `secagg audit export` writes it"
            )
        if not line.endswith(b"\n"):
            raise MalformedError(
                f"expected a newline after every entry; the last line, {number}, is torn: writing "
                "it was cut off, or its end was removed; export the log again"
            )
        try:
            yield from_line(line[:-1].decode("ascii"))
        except (UnicodeDecodeError, MalformedError):
            raise MalformedError(
                f"expected an entry on every line; line {number} is none as `secagg audit export` "
                "writes them; it was changed, or the file is not an audit log"
            ) from None


def _entry(values: tuple[object, ...]) -> Entry:
    sequence, time, event, details, previous, hash_ = values
    good = (
        (type(sequence) is int and 0 < sequence < 1 << 63)
        and (isinstance(time, str) and _TIME.fullmatch(time) is not None)
        and (isinstance(event, str) and _EVENT.fullmatch(event) is not None)
        and (isinstance(details, str) and len(details) <= MAX_DETAILS and _is_canonical(details))
        and all(isinstance(h, bytes) and len(h) == DIGEST_BYTES for h in (previous, hash_))
    )
    if not good:
        named = sequence if isinstance(sequence, int) else "?"
        raise MalformedError(
            f"expected fields as the audit log writes them; those of entry {named} are not; the "
            "entry was changed, or this is not an audit log"
        )
    return Entry(*cast(tuple[int, str, str, str, bytes, bytes], values))


def _is_canonical(details: str) -> bool:
    try:
        return details_json(json.loads(details)) == details
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def export(entries: Iterable[Entry], path: Path) -> Entry | None:
    """Write entries to a new file, one a line; the last entry. The file is whole or not there.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    last: Entry | None = None

    def lines() -> Iterator[bytes]:
        nonlocal last
        for last in entries:
            yield to_line(last).encode() + b"\n"

    try:
        _write_new(path, lines())
    except OSError as error:
        raise InputError(f"expected to write a new file; {path}: {error.strerror}") from None
    return last


def client_hash(key: bytes, client: str) -> str:
    """How the log names a client: 32 hex digits that say nothing without the audit key."""
    return hmac.digest(key, encode("audit/client", client), "sha256")[:_CLIENT_BYTES].hex()


def load_audit_key(path: Path) -> bytes:
    """The 32-byte key of `client_hash`; made on first use, readable by its owner only.

    Raises:
        ConfigurationError: not readable, not 32 bytes, or readable by others.
    """
    try:
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                _write_new(path, [os.urandom(_KEY_BYTES)])
        key, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise ConfigurationError(
            f"expected to read or make an audit key; {path}: {error.strerror}"
        ) from None
    if len(key) != _KEY_BYTES:
        raise ConfigurationError(
            f"expected an audit key of {_KEY_BYTES} bytes; {path} has bytes={len(key)}; restore it "
            "from a backup, or remove it to have a new one made: clients then get new hashes"
        )
    if mode & 0o077:
        raise ConfigurationError(
            f"expected an audit key that only its owner can read; {path} has mode "
            f"{mode & 0o777:04o}; chmod 600 it"
        )
    return key


def _write_new(path: Path, parts: Iterable[bytes]) -> None:
    """A file that is whole from the moment it is there; never replaces one."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        Path(draft).unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
