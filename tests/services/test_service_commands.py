"""Commands beside a running service: health, backup, restore and the audit log."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import cohort
import pytest
import structlog
import typer
from click.testing import Result
from programs import CLIENTS, KEY_HOLDER, SERVER, Machine, session, task
from typer.testing import CliRunner

from secagg import audit
from secagg.cli import app as secagg_app
from secagg.wire.v1 import round_pb2
from secagg_keyholder.cli import app as key_holder_app
from secagg_server.cli import app as server_app

APPS = {SERVER: server_app, KEY_HOLDER: key_holder_app}


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave files in the working directory, or read settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Both programs, one round done, the next one open; for tests that change nothing."""
    with Machine(tmp_path_factory.mktemp("machine")) as running, ExitStack() as stack:
        for name in (KEY_HOLDER, SERVER):
            running.start(name)
        with running.operator() as operator:
            operator.create_task(task(rounds=2))
        sessions = [stack.enter_context(session(running, index)) for index in CLIENTS]
        for index, connected in enumerate(sessions):
            current = next(connected.rounds())
            values = cohort.contribution(current.context.plan, index)
            current.contribute(values, samples=cohort.samples(index))
        with running.operator() as operator:
            running.program(SERVER).wait_for(
                lambda: (
                    [row.state for row in operator.task("task").rounds]
                    == [round_pb2.ROUND_STATE_DONE, round_pb2.ROUND_STATE_COLLECTING]
                )
            )
        yield running
        assert running.stop() == [0, 0]


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *texts: str) -> None:
    """One line on standard error, nothing on standard output, and the exit code."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert "Traceback" not in said
    for text in texts:
        assert text in said


def health(machine: Machine, name: str, kit: str = "") -> Result:
    address = machine.server if name == SERVER else machine.key_holder
    kits = machine.kits / (kit or name)
    return run(APPS[name], "health", "--listen", address, "--kit", kits)


# --- health -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", APPS)
def test_a_service_that_works_is_ready(machine: Machine, name: str) -> None:
    machine.program(name).wait_for(lambda: health(machine, name).exit_code == 0)
    result = health(machine, name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ready\n", "")


@pytest.mark.slow
def test_a_server_without_its_key_holder_is_not_ready_and_lives(tmp_path: Path) -> None:
    with Machine(tmp_path / "m") as alone:
        alone.start(SERVER)
        alone.program(SERVER).wait_for(lambda: "not_ready" in alone.program(SERVER).tail())
        refused(health(alone, SERVER), 69, "UNAVAILABLE", "not; its log says why")
        alone.start(KEY_HOLDER)
        alone.program(SERVER).wait_for(lambda: health(alone, SERVER).exit_code == 0)
        assert alone.stop() == [0, 0]
        refused(health(alone, SERVER), 69, "UNAVAILABLE", "nothing answers")


def test_a_service_listening_everywhere_is_asked_on_this_machine(machine: Machine) -> None:
    port = machine.server.rpartition(":")[2]
    kit = machine.kits / "server"
    result = run(server_app, "health", "--listen", f"0.0.0.0:{port}", "--kit", kit)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", APPS)
def test_health_is_asked_with_a_kit_or_openly_without(machine: Machine, name: str) -> None:
    address = machine.server if name == SERVER else machine.key_holder
    refused(run(APPS[name], "health", "--listen", address), 78, "expected a kit")
    plain = run(APPS[name], "health", "--listen", address, "--insecure")
    refused(plain, 77, "PLAINTEXT", "this one speaks TLS")
    refused(run(APPS[name], "health", "--kit", "nowhere"), 77, "NO_CERTIFICATE")


# --- the server's audit log ---------------------------------------------------------------------


def audit_of(machine: Machine, output: object, kit: str = "operators/admin") -> Result:
    folder = machine.kits / kit
    return run(server_app, "audit", output, "--admin", machine.admin, "--kit", folder)


def test_the_audit_log_of_a_running_server_verifies(machine: Machine, tmp_path: Path) -> None:
    assert audit_of(machine, "log.jsonl").exit_code == 0
    entries = list(audit.read_entries(tmp_path / "log.jsonl"))
    last = audit.verify(entries)
    assert last is not None
    assert [entry.event for entry in entries].count("upload-accepted") == len(CLIENTS)
    head = last.hash.hex()
    verified = run(secagg_app, "audit", "verify", "log.jsonl", "--head", head)
    assert verified.exit_code == 0
    assert f"head   {head}" in verified.stdout
    text = (tmp_path / "log.jsonl").read_text()
    for index in CLIENTS:
        assert f"client-{index + 1}" not in text
        assert machine.client_kit(index).identity.public.hex() not in text


def test_a_log_that_was_changed_ends_with_65(machine: Machine, tmp_path: Path) -> None:
    assert audit_of(machine, "log.jsonl").exit_code == 0
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:2] + lines[3:]))
    refused(run(secagg_app, "audit", "verify", "cut.jsonl"), 65, "AUDIT_BROKEN")


def test_a_log_is_never_written_over_another_file(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    refused(audit_of(machine, "precious"), 65, "new file")
    refused(audit_of(machine, "nowhere/log.jsonl"), 65, "new file")
    assert (tmp_path / "precious").read_text() == "precious"
    refused(audit_of(machine, "log.jsonl", "clients/client-1"), 77, "WRONG_ROLE")
    assert not (tmp_path / "log.jsonl").exists()


# --- backup and restore -------------------------------------------------------------------------


def backup(state: Path, file: object) -> Result:
    return run(key_holder_app, "backup", "--state-dir", state, file)


def restore(file: object, state: object) -> Result:
    return run(key_holder_app, "restore", "--state-dir", state, file)


def test_a_backup_of_a_running_key_holder_holds_no_key_and_no_sum(
    machine: Machine, tmp_path: Path
) -> None:
    result = backup(machine.folder / KEY_HOLDER, "copy")
    assert (result.exit_code, result.stderr) == (0, "")
    data = (tmp_path / "copy").read_bytes()
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o600
    entries = machine.entries(KEY_HOLDER)
    released = [json.loads(e.details) for e in entries if e.event == "round-released"]
    assert len(released) == 1
    with machine.operator() as operator:
        sums, _ = operator.sums("task", 1)
    assert sums[:64] not in data
    for key in (machine.folder / KEY_HOLDER / "round-keys").iterdir():
        assert key.read_bytes() not in data
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
def test_a_restored_backup_runs_and_attempts_the_open_round_again(
    machine: Machine, tmp_path: Path
) -> None:
    assert backup(machine.folder / KEY_HOLDER, "copy").exit_code == 0
    with Machine(tmp_path / "m") as other:
        result = restore("copy", other.folder / KEY_HOLDER)
        assert (result.exit_code, result.stderr) == (0, "")
        other.start(KEY_HOLDER)
        assert other.stop() == [0]
        events = [(entry.event, entry.details) for entry in other.entries(KEY_HOLDER)]
    closed = [details for event, details in events if event == "round-closed"]
    assert len(closed) == 1
    assert '"reason":"RESTORED"' in closed[0]
    assert '"round_number":2' in closed[0]


def test_a_backup_is_never_written_over_another_file(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    refused(backup(machine.folder / KEY_HOLDER, "precious"), 78, "new file")
    refused(backup(machine.folder / KEY_HOLDER, "nowhere/copy"), 78, "new file")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_backup_of_nothing_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    """An empty backup that looks like a good one would be found out too late."""
    refused(backup(tmp_path / "nowhere", "copy"), 78, "has no ledger")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["ledger.sqlite3", "ledger.sqlite3-wal"])
def test_a_ledger_that_is_there_is_never_replaced(
    machine: Machine, tmp_path: Path, left: str
) -> None:
    assert backup(machine.folder / KEY_HOLDER, "copy").exit_code == 0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / left).write_bytes(b"what is left")
    refused(restore("copy", "state"), 78, "without a ledger")
    assert (tmp_path / "state" / left).read_bytes() == b"what is left"


def test_what_is_no_backup_is_not_restored(machine: Machine, tmp_path: Path) -> None:
    assert backup(machine.folder / KEY_HOLDER, "copy").exit_code == 0
    (tmp_path / "garbage").write_bytes(b"garbage" * 1000)
    (tmp_path / "cut").write_bytes((tmp_path / "copy").read_bytes()[:5000])
    for name in ("nowhere", "garbage", "cut"):
        refused(restore(name, "state"), 78)
        assert not (tmp_path / "state" / "ledger.sqlite3").exists()


@pytest.mark.slow
def test_a_plain_copy_of_the_ledger_is_not_restored(tmp_path: Path) -> None:
    """It could reopen rounds that were released after it was made."""
    with Machine(tmp_path / "m") as other:
        other.start(KEY_HOLDER)
        assert other.stop() == [0]
        plain = other.folder / KEY_HOLDER / "ledger.sqlite3"
        refused(restore(plain, "state"), 78, "copied some other way")
    assert not (tmp_path / "state" / "ledger.sqlite3").exists()
