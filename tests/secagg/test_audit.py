"""An audit log: what cannot be changed in one unnoticed, and what needs a head to be noticed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from secagg import audit, commands
from secagg.audit import (
    GENESIS,
    MAX_DETAILS,
    Entry,
    client_hash,
    details_json,
    export,
    from_line,
    load_audit_key,
    next_entry,
    read_entries,
    to_line,
    verify,
)
from secagg.cli import app
from secagg.errors import AuditError, ConfigurationError, InputError, MalformedError, SecaggError

NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("task created", {"task": "movies", "rounds": 2}),
    ("upload accepted", {"task": "movies", "client": "0f" * 16, "late": False}),
    ("upload refused", {"client": "1e" * 16, "reason": "OFF_GRID", "note": "größer\n[bold]"}),
    ("uploads judged", {"accepted": ["0f" * 16, "1e" * 16], "sizes": [1, None, True], "of": None}),
    ("sum released", {"digest": "ab" * 32, "count": 2**70}),
    ("round finished", {}),
]


def chain(events: Iterable[tuple[str, dict[str, Any]]], start: datetime = NOON) -> list[Entry]:
    entries: list[Entry] = []
    for index, (event, details) in enumerate(events):
        now = start + timedelta(milliseconds=index)
        entries.append(next_entry(entries[-1] if entries else None, event, details, now))
    return entries


ENTRIES = chain(EVENTS)
LINES = [to_line(entry).encode() + b"\n" for entry in ENTRIES]
HEAD = ENTRIES[-1].hash


def rehashed(entry: Entry) -> Entry:
    """The entry as somebody would write it who knows how hashes are made."""
    return replace(entry, hash=audit._hash(entry))


def lines_file(folder: Path, lines: Iterable[bytes]) -> Path:
    file = folder / "log.jsonl"
    file.write_bytes(b"".join(lines))
    return file


def sqlite_file(folder: Path, rows: Iterable[tuple[object, ...]]) -> Path:
    file = folder / "service.sqlite3"
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute(
            "CREATE TABLE audit (sequence INTEGER PRIMARY KEY, time TEXT, event TEXT, "
            "details TEXT, previous BLOB, hash BLOB)"
        )
        database.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", rows)
    return file


def row(entry: Entry) -> tuple[object, ...]:
    return (
        entry.sequence,
        entry.time,
        entry.event,
        entry.details,
        entry.previous,
        entry.hash,
    )


def names(folder: Path) -> list[str]:
    return [child.name for child in folder.iterdir()]


# --- making entries ---------------------------------------------------------------------------


def test_an_honest_log_is_accepted() -> None:
    assert [entry.sequence for entry in ENTRIES] == [1, 2, 3, 4, 5, 6]
    assert ENTRIES[0].previous == GENESIS
    assert verify(ENTRIES) == ENTRIES[-1]
    assert verify([]) is None


def test_an_entry_is_hashed_as_it_was_when_logs_were_first_written() -> None:
    """Logs outlive versions: this hash must never change."""
    entry = next_entry(None, "task created", {"b": [1, None, True], "a": "é"}, NOON)
    assert entry.time == "2024-05-06T12:00:00.000000Z"
    assert entry.details == '{"a":"\\u00e9","b":[1,null,true]}'
    assert entry.hash.hex() == ("99df2ff8aad8786f090da5064dc6f9f7674e8571d3f5e14a6a97405431d09d3e")


def test_a_time_is_written_in_utc_whatever_zone_it_came_in() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=-3, minutes=-30)))
    assert next_entry(None, "x", {}, elsewhere) == next_entry(None, "x", {}, NOON)


def test_a_clock_that_goes_back_breaks_nothing() -> None:
    first = next_entry(None, "x", {}, NOON)
    verify([first, next_entry(first, "y", {}, NOON - timedelta(days=1))])


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        next_entry(None, "x", {}, datetime(2024, 5, 6))


@pytest.mark.parametrize("event", ["", "x" * 65, "a\nb", "\x1b[2J", "größe", "\ud800"])
def test_an_event_that_is_none_is_refused(event: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        next_entry(None, event, {}, NOON)


@pytest.mark.parametrize(
    "value", [1.5, float("nan"), b"x", {"a": 1}, {1}, [1.5], [b"x"], [[1]], [{}], object(), NOON]
)
def test_details_that_have_no_exact_text_are_refused(value: object) -> None:
    with pytest.raises(
        TypeError, match=type(value[0] if isinstance(value, list) else value).__name__
    ):
        details_json({"x": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", [1, None, True, b"x"])
def test_names_of_details_are_text(name: object) -> None:
    with pytest.raises(TypeError, match=type(name).__name__):
        details_json({name: 1})  # type: ignore[dict-item]


def test_details_that_no_reader_would_take_are_refused() -> None:
    room = MAX_DETAILS - len('{"x":""}')
    entry = next_entry(None, "x", {"x": "a" * room}, NOON)
    assert from_line(to_line(entry)) == entry
    with pytest.raises(ValueError, match="digest"):
        next_entry(None, "x", {"x": "a" * (room + 1)}, NOON)


def test_the_order_of_details_does_not_matter() -> None:
    assert details_json({"a": 1, "b": (1, 2)}) == details_json({"b": [1, 2], "a": 1})


# --- what verify finds ------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(ENTRIES)))
@pytest.mark.parametrize(
    "change",
    [
        {"details": '{"a":1}'},
        {"time": "2024-05-06T12:00:01.000000Z"},
        {"event": "nothing"},
        {"previous": b"p" * 32},
        {"hash": b"h" * 32},
        {"hash": GENESIS},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_entry_is_named(index: int, change: dict[str, Any]) -> None:
    changed = [*ENTRIES]
    changed[index] = replace(changed[index], **change)
    with pytest.raises(AuditError, match=rf"entry {index + 1} .*changed"):
        verify(changed)


@pytest.mark.parametrize("index", range(len(ENTRIES) - 1))
def test_a_change_with_a_new_hash_breaks_the_entry_that_follows(index: int) -> None:
    changed = [*ENTRIES]
    changed[index] = rehashed(replace(changed[index], details='{"a":1}'))
    with pytest.raises(AuditError, match=rf"entry {index + 2} .*replaced"):
        verify(changed)


@pytest.mark.parametrize("index", range(len(ENTRIES) - 1))
def test_a_removed_entry_is_named(index: int) -> None:
    with pytest.raises(AuditError, match=f"entry {index + 1} is missing"):
        verify(ENTRIES[:index] + ENTRIES[index + 1 :])


@pytest.mark.parametrize("index", range(1, len(ENTRIES)))
def test_a_removed_beginning_is_noticed(index: int) -> None:
    with pytest.raises(AuditError, match="entry 1 is missing"):
        verify(ENTRIES[index:])


def test_a_removed_entry_is_noticed_when_those_after_it_are_renumbered() -> None:
    moved = [rehashed(replace(entry, sequence=entry.sequence - 1)) for entry in ENTRIES[3:]]
    with pytest.raises(AuditError, match=r"entry 3 .*replaced or put in"):
        verify([*ENTRIES[:2], *moved])


def test_reordered_entries_are_named() -> None:
    swapped = [ENTRIES[0], ENTRIES[2], ENTRIES[1], *ENTRIES[3:]]
    with pytest.raises(AuditError, match="entry 2 comes later: entries were reordered"):
        verify(swapped)
    with pytest.raises(AuditError, match="entry 1 comes later"):
        verify(reversed(ENTRIES))


def test_a_repeated_entry_is_named() -> None:
    with pytest.raises(AuditError, match="expected entry 3; got entry 2"):
        verify([*ENTRIES[:2], *ENTRIES[1:]])


def test_an_inserted_entry_is_named() -> None:
    inserted = next_entry(ENTRIES[1], "sum released", {}, NOON)
    with pytest.raises(AuditError, match="expected entry 4; got entry 3"):
        verify([*ENTRIES[:2], inserted, *ENTRIES[2:]])
    moved = [replace(entry, sequence=entry.sequence + 1) for entry in ENTRIES[2:]]
    with pytest.raises(AuditError, match=r"entry 4 .*changed"):
        verify([*ENTRIES[:2], inserted, *moved])
    with pytest.raises(AuditError, match=r"entry 4 .*put in"):
        verify([*ENTRIES[:2], inserted, *map(rehashed, moved)])


@pytest.mark.parametrize("kept", range(len(ENTRIES)))
def test_a_cut_end_is_noticed_with_a_head_alone(kept: int) -> None:
    verify(ENTRIES[:kept])
    with pytest.raises(AuditError, match=f"{HEAD.hex()}; none of {kept} .*cut or replaced"):
        verify(ENTRIES[:kept], head=HEAD)


def test_a_log_written_anew_is_noticed_with_a_head_alone() -> None:
    anew = chain([*EVENTS[:-2], ("sum released", {}), EVENTS[-1]])
    verify(anew)
    with pytest.raises(AuditError, match="cut or replaced"):
        verify(anew, head=HEAD)


@pytest.mark.parametrize("index", range(len(ENTRIES)))
def test_a_log_may_grow_beyond_the_head_that_was_noted(index: int) -> None:
    assert verify(ENTRIES, head=ENTRIES[index].hash) == ENTRIES[-1]


@pytest.mark.parametrize("head", [b"", GENESIS, HEAD[:16], b"x" * 32])
def test_a_head_of_no_entry_is_refused(head: bytes) -> None:
    for entries in ([], ENTRIES):
        with pytest.raises(AuditError, match="cut or replaced"):
            verify(entries, head=head)


scalars = st.none() | st.booleans() | st.integers() | st.text()
details = st.dictionaries(st.text(), scalars | st.lists(scalars, max_size=3), max_size=3)
events = st.tuples(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=64), details
)
logs = st.lists(events, max_size=5)


@given(logs)
def test_whatever_is_logged_is_read_back(log: list[tuple[str, dict[str, Any]]]) -> None:
    entries = chain(log)
    assert [from_line(to_line(entry)) for entry in entries] == entries
    assert all("\n" not in to_line(entry) for entry in entries)
    verify(entries, head=entries[-1].hash if entries else None)


@given(logs, logs)
def test_two_different_logs_never_share_a_head(
    one: list[tuple[str, dict[str, Any]]], other: list[tuple[str, dict[str, Any]]]
) -> None:
    first, second = chain(one), chain(other)
    heads = [entries[-1].hash if entries else GENESIS for entries in (first, second)]
    assert (first == second) == (heads[0] == heads[1])
    # A value and its text, say 1 and "1", or True and 1, are different details.
    assert (first == second) == ([*map(typed, one)] == [*map(typed, other)])


def typed(event: tuple[str, dict[str, Any]]) -> tuple[str, str]:
    name, table = event
    return name, repr(sorted((key, repr(value)) for key, value in table.items()))


# --- files ------------------------------------------------------------------------------------


def test_both_kinds_of_file_hold_the_same_entries(tmp_path: Path) -> None:
    database = sqlite_file(tmp_path, [row(entry) for entry in reversed(ENTRIES)])
    copy = tmp_path / "copy.jsonl"
    assert export(read_entries(database), copy) == ENTRIES[-1]
    assert list(read_entries(database)) == list(read_entries(copy)) == ENTRIES
    assert copy.read_bytes() == b"".join(LINES)


@given(st.data())
def test_any_changed_byte_of_an_export_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(b"".join(LINES))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    file = lines_file(tmp_path_factory.mktemp("export"), [bytes(content)])
    with pytest.raises((AuditError, MalformedError)):
        verify(read_entries(file))


@given(st.data())
def test_any_removed_or_inserted_byte_of_an_export_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = b"".join(LINES)
    place = data.draw(st.integers(0, len(content) - 1))
    put = data.draw(st.sampled_from([b"", None]) | st.binary(min_size=1, max_size=3))
    changed = content[:place] + (put or b"") + content[place + (0 if put else 1) :]
    file = lines_file(tmp_path_factory.mktemp("export"), [changed])
    with pytest.raises((AuditError, MalformedError)):
        verify(read_entries(file))


@pytest.mark.parametrize("cut", [1, 2, 60, len(LINES[-1]) - 1])
def test_a_torn_last_line_is_called_so(cut: int, tmp_path: Path) -> None:
    file = lines_file(tmp_path, [*LINES[:-1], LINES[-1][:-cut]])
    with pytest.raises(MalformedError, match="last line, 6, is torn"):
        verify(read_entries(file))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + LINES[0][:-1],
        LINES[0][:-1] + b" ",
        LINES[0][:-1] + b"\r",
        LINES[0][:-1].replace(b":1,", b":1.0,", 1),
        LINES[0][:-1].replace(b":1,", b":true,", 1),
        LINES[0][:-1].replace(b":1,", b":0,", 1),
        LINES[0][:-1].replace(b":1,", b":-1,", 1),
        LINES[0][:-1].replace(b":1,", b":18446744073709551616,", 1),
        LINES[0][:-1].replace(b":1,", b":" + b"1" * 5000 + b",", 1),
        LINES[0][:-1].replace(b'"movies"', b"1.5"),
        LINES[0][:-1].replace(b'"movies"', b"NaN"),
        LINES[0][:-1].replace(b'"movies"', b'{"a":1}'),
        LINES[0][:-1].replace(b'"movies"', b"[" * 100_000),
        LINES[0][:-1].replace(b'"movies"', b"[" * 500 + b"]" * 500),
        LINES[0][:-1].replace(b'"details":{', b'"details":[{').replace(b"},", b"}],"),
        LINES[0][:-1].replace(b"Z", b"+00:00"),
        LINES[0][:-1].replace(b"task created", b"task\\u001b[2J"),
        LINES[0][:-1].replace(b"task created", b""),
        LINES[0][:-1].replace(
            ENTRIES[0].hash.hex().encode(), ENTRIES[0].hash.hex().upper().encode()
        ),
        LINES[0][:-1].replace(ENTRIES[0].hash.hex().encode(), b"00"),
        LINES[0][:-1].replace(b'{"sequence"', b'{"extra":1,"sequence"'),
        LINES[0][:-1].replace(b'{"sequence"', b'{"sequence":7,"sequence"'),
        LINES[0][:-1].replace(b'"event"', b'"Event"'),
    ],
)
def test_a_line_that_is_no_entry_is_named(line: bytes, tmp_path: Path) -> None:
    assert line != LINES[0][:-1]
    file = lines_file(tmp_path, [LINES[0], line + b"\n", LINES[1]])
    with pytest.raises(MalformedError, match="line 2 "):
        list(read_entries(file))


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = lines_file(tmp_path, [LINES[0], b"x" * (1 << 20), b"\n"])
    with pytest.raises(MalformedError, match="line 2 is longer"):
        list(read_entries(file))


def test_an_empty_file_has_no_entries(tmp_path: Path) -> None:
    assert list(read_entries(lines_file(tmp_path, []))) == []
    assert list(read_entries(sqlite_file(tmp_path, []))) == []


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_log_that_cannot_be_read_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readable audit log"):
        list(read_entries(tmp_path / place))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (1, None),
        (1, "yesterday"),
        (1, b"2024-05-06T12:00:00.000000Z"),
        (2, None),
        (2, b"x"),
        (2, "\x1b[2J"),
        (3, None),
        (3, "not json"),
        (3, "[]"),
        (3, '{"a": 1}'),
        (3, '{"b":1,"a":1}'),
        (3, '{"a":1.5}'),
        (3, '{"a":1,"a":1}'),
        (3, "[" * 100_000),
        (3, '{"a":"' + "x" * MAX_DETAILS + '"}'),
        (4, None),
        (4, "00" * 32),
        (4, b""),
        (5, bytes(31)),
        (5, bytes(33)),
    ],
)
def test_a_row_that_is_no_entry_is_named(column: int, value: object, tmp_path: Path) -> None:
    rows = [list(row(entry)) for entry in ENTRIES]
    rows[1][column] = value
    with pytest.raises(MalformedError, match="entry 2 "):
        verify(read_entries(sqlite_file(tmp_path, map(tuple, rows))))


def test_a_changed_row_is_found(tmp_path: Path) -> None:
    file = sqlite_file(tmp_path, map(row, ENTRIES))
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute('UPDATE audit SET details = \'{"client":"00"}\' WHERE sequence = 2')
    with pytest.raises(AuditError, match=r"entry 2 .*changed"):
        verify(read_entries(file))
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM audit WHERE sequence = 2")
    with pytest.raises(AuditError, match="entry 2 is missing"):
        verify(read_entries(file))


def test_a_negative_sequence_is_no_entry(tmp_path: Path) -> None:
    file = sqlite_file(tmp_path, [row(replace(ENTRIES[0], sequence=-1))])
    with pytest.raises(MalformedError, match="entry -1 "):
        verify(read_entries(file))


def test_a_database_without_an_audit_log_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.sqlite3"
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE other (x)")
    with pytest.raises(MalformedError, match="table `audit`"):
        list(read_entries(file))


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    file = sqlite_file(tmp_path, map(row, ENTRIES))
    file.write_bytes(file.read_bytes()[:100] + os.urandom(3000))
    with pytest.raises(MalformedError, match="SQLite"):
        list(read_entries(file))


def test_a_database_in_use_is_read_up_to_its_last_commit_and_never_written(tmp_path: Path) -> None:
    file = sqlite_file(tmp_path, map(row, ENTRIES[:3]))
    copy = tmp_path / "copy"
    copy.mkdir()
    with contextlib.closing(sqlite3.connect(file)) as service:
        service.execute("PRAGMA journal_mode=WAL")
        with service:
            service.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", row(ENTRIES[3]))
        assert list(read_entries(file)) == ENTRIES[:4]
        for part in tmp_path.glob(f"{file.name}*"):
            shutil.copy(part, copy)
    # As after a crash: whoever opened these to write would empty the -wal file into the other.
    parts = [copy / file.name, copy / f"{file.name}-wal"]
    before = [part.read_bytes() for part in parts]
    assert list(read_entries(parts[0])) == ENTRIES[:4]
    assert [part.read_bytes() for part in parts] == before


@pytest.mark.parametrize("name", ["a b", "50%", "what?", "x#y", "größe"])
def test_any_folder_will_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    file = sqlite_file(tmp_path / name, map(row, ENTRIES))
    assert list(read_entries(file)) == ENTRIES
    assert [child.name for child in tmp_path.iterdir()] == [name]


def test_an_export_replaces_nothing(tmp_path: Path) -> None:
    file = lines_file(tmp_path, LINES[:2])
    with pytest.raises(InputError, match="new file"):
        export(ENTRIES, file)
    assert file.read_bytes() == b"".join(LINES[:2])
    assert names(tmp_path) == [file.name]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    torn = lines_file(tmp_path, [LINES[0], LINES[1][:-1]])
    with pytest.raises(MalformedError):
        export(read_entries(torn), tmp_path / "copy.jsonl")
    assert names(tmp_path) == [torn.name]
    with pytest.raises(InputError, match="new file"):
        export(ENTRIES, tmp_path / "nowhere" / "copy.jsonl")


# --- clients ----------------------------------------------------------------------------------


def test_a_client_is_named_by_a_keyed_hash() -> None:
    key = bytes(range(32))
    assert client_hash(key, "alice") == "5f73593c5d4f61d5efca75f7b971a3e2"
    assert client_hash(key, "alice") != client_hash(key, "alicf")
    assert client_hash(key, "alice") != client_hash(bytes(32), "alice")


def test_an_audit_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "audit.key"
    key = load_audit_key(file)
    assert (len(key), file.read_bytes(), load_audit_key(file)) == (32, key, key)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert names(tmp_path) == [file.name]
    assert load_audit_key(tmp_path / "other.key") != key


def test_an_audit_key_made_by_many_at_once_is_one(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    keys: list[bytes] = []

    def load() -> None:
        start.wait()
        keys.append(load_audit_key(tmp_path / "audit.key"))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert names(tmp_path) == ["audit.key"]


@pytest.mark.parametrize("size", [0, 31, 33])
def test_an_audit_key_of_another_size_is_refused_and_kept(size: int, tmp_path: Path) -> None:
    file = tmp_path / "audit.key"
    file.write_bytes(bytes(size))
    file.chmod(0o600)
    with pytest.raises(ConfigurationError, match=f"bytes={size}; restore"):
        load_audit_key(file)
    assert file.read_bytes() == bytes(size)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_an_audit_key_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "audit.key"
    load_audit_key(file)
    file.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{mode:04o}; chmod 600"):
        load_audit_key(file)


@pytest.mark.parametrize("place", ["nowhere/audit.key", "."])
def test_an_audit_key_that_cannot_be_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="audit key"):
        load_audit_key(tmp_path / place)


# --- the command ------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def refused(result: Result, *texts: str) -> None:
    assert (result.exit_code, result.stdout) == (65, "")
    (line,) = result.stderr.splitlines()
    assert all(text in line for text in texts), line


Write = Callable[[Path], Path]
KINDS: dict[str, Write] = {
    "SQLite": lambda folder: sqlite_file(folder, map(row, ENTRIES)),
    "lines": lambda folder: lines_file(folder, LINES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_verify_prints_what_it_checked(kind: str, tmp_path: Path) -> None:
    file = KINDS[kind](tmp_path)
    for head in ([], ["--head", HEAD.hex()], ["--head", ENTRIES[0].hash.hex().upper()]):
        result = run("verify", file, *head)
        assert (result.exit_code, result.stderr) == (0, "")
        for text in ("6 entries", ENTRIES[0].time, ENTRIES[-1].time, HEAD.hex()):
            assert text in result.stdout


def test_verify_of_an_empty_log_says_that_it_is_empty(tmp_path: Path) -> None:
    file = lines_file(tmp_path, [])
    assert run("verify", file).stdout == "0 entries\n"
    refused(run("verify", file, "--head", HEAD.hex()), "AUDIT_BROKEN", "none of 0")


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ([*LINES[:2], *LINES[3:]], ["AUDIT_BROKEN", "entry 3 is missing"]),
        (LINES[1:], ["AUDIT_BROKEN", "entry 1 is missing"]),
        ([LINES[0], LINES[1].replace(b"0f", b"00"), *LINES[2:]], ["AUDIT_BROKEN", "entry 2"]),
        ([*LINES[:-1], LINES[-1][:-9]], ["MALFORMED", "torn"]),
        ([b"hello\n"], ["MALFORMED", "line 1"]),
    ],
)
def test_verify_of_a_broken_log_ends_with_65_and_one_line(
    lines: list[bytes], texts: list[str], tmp_path: Path
) -> None:
    refused(run("verify", lines_file(tmp_path, lines)), *texts)


def test_verify_notices_a_cut_end_by_the_head(tmp_path: Path) -> None:
    file = lines_file(tmp_path, LINES[:4])
    assert run("verify", file).exit_code == 0
    refused(run("verify", file, "--head", HEAD.hex()), "AUDIT_BROKEN", HEAD.hex(), "cut")


def test_verify_of_no_file_ends_with_65(tmp_path: Path) -> None:
    refused(run("verify", tmp_path / "nowhere"), "INVALID_INPUT", "nowhere")


@pytest.mark.parametrize("head", ["", "00", "x" * 64, HEAD.hex()[:-1], HEAD.hex() + "00"])
def test_a_head_that_is_no_hash_is_a_usage_error(head: str, tmp_path: Path) -> None:
    result = run("verify", lines_file(tmp_path, LINES), "--head", head)
    assert result.exit_code == 2
    assert "64 hex digits" in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_entries_as_they_are(kind: str, tmp_path: Path) -> None:
    file = KINDS[kind](tmp_path)
    shown = json.loads(run("show", file, "--format", "json").stdout)
    assert shown == [json.loads(line) for line in LINES]
    chosen = json.loads(run("show", file, "--format", "json", "--event", "upload refused").stdout)
    assert chosen == [shown[2]]
    assert json.loads(run("show", file, "--format", "json", "--event", "nothing").stdout) == []


def test_show_for_people_obeys_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands.out, "width", 200)
    result = run("show", lines_file(tmp_path, LINES))
    assert result.exit_code == 0
    assert "[bold]" in result.stdout
    assert "sum released" in result.stdout


def test_show_still_shows_a_log_whose_chain_is_broken(tmp_path: Path) -> None:
    result = run("show", lines_file(tmp_path, LINES[2:]), "--format", "json")
    assert len(json.loads(result.stdout)) == 4


def test_export_copies_what_verify_then_checks(tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    result = run("export", KINDS["SQLite"](tmp_path), copy)
    assert (result.exit_code, result.stderr) == (0, "")
    assert HEAD.hex() in result.stdout
    assert copy.read_bytes() == b"".join(LINES)
    assert run("verify", copy, "--head", HEAD.hex()).exit_code == 0


def test_export_replaces_nothing(tmp_path: Path) -> None:
    file = lines_file(tmp_path, LINES)
    refused(run("export", file, file), "INVALID_INPUT", "new file")


def test_errors_of_a_log_repeat_nothing_of_it(tmp_path: Path) -> None:
    client = "a-client-that-nobody-may-read"
    for lines in (
        [client.encode() + b"\n"],
        [LINES[0].replace(b"movies", client.encode())],
        [LINES[0][:-1].replace(b"movies", client.encode())],
        [LINES[0].replace(b"task created", client.encode() + b"\\u0000")],
    ):
        with pytest.raises(SecaggError) as caught:
            verify(read_entries(lines_file(tmp_path, lines)))
        assert client not in str(caught.value)
