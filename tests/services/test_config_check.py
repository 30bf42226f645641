"""What cannot work is said before anything starts, by `run` and by `config check` alike."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import federations
import pytest
import structlog
from click.testing import Result
from federations import as_folder, expired, forged, from_the_future, shared, shared_other
from programs import KEY_HOLDER, SERVER, Machine, free_port
from typer.testing import CliRunner

from secagg.certificates import Kit, Role
from secagg.settings import only_process
from secagg_keyholder.cli import app as key_holder_app
from secagg_keyholder.ledger import Ledger
from secagg_server.cli import app as server_app
from secagg_server.store import Store

Flags = dict[str, str | None]

APPS = {SERVER: server_app, KEY_HOLDER: key_holder_app}
NAMES = {SERVER: "server", KEY_HOLDER: "key-holder"}
ROLES = {SERVER: Role.SERVER, KEY_HOLDER: Role.KEY_HOLDER}
DATA = {SERVER: "--data-dir", KEY_HOLDER: "--state-dir"}
DATABASES = {SERVER: "server.sqlite3", KEY_HOLDER: "ledger.sqlite3"}
SECRET = "hunter2"  # noqa: S105


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test may leave files in the working directory, read settings from outside, or serve."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)
    for program in (SERVER, KEY_HOLDER):
        monkeypatch.setattr(f"secagg_{program}.app.serve_until_stopped", it_serves)
    yield
    structlog.reset_defaults()  # commands send logs to a stream that the runner has closed


async def it_serves(*_: object) -> None:
    """In place of serving, so that a program that should have failed to start does not hang."""
    pytest.fail("it serves")


def kit_of(program: str) -> Path:
    return shared().kit(NAMES[program])


def sound(program: str) -> Flags:
    """Flags with which nothing is wrong."""
    passphrase = Path("passphrase")
    passphrase.write_text(federations.PASSPHRASE, "utf-8")
    passphrase.chmod(0o600)
    flags: Flags = {"--listen": "127.0.0.1:0", "--kit": str(kit_of(program))}
    flags["--monitor-listen"] = "127.0.0.1:0"
    flags[DATA[program]] = "data"
    if program == SERVER:
        return flags | {"--admin-listen": "127.0.0.1:0"}
    return flags | {"--passphrase-file": str(passphrase)}


def line(flags: Flags) -> list[str]:
    """A flag of None has no value; one of an empty text is not given at all."""
    return [part for flag, value in flags.items() if value != "" for part in (flag, value) if part]


def invoke(program: str, command: list[str], flags: Flags) -> Result:
    return CliRunner().invoke(APPS[program], [*command, *line(flags)])


def files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: mode, time of change and content."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (stat.st_mode, stat.st_mtime_ns if path.is_file() else 0, data)
    return found


def one_line(result: Result, code: int, reason: str) -> str:
    """A refusal is one line of ours on standard error, and the exit code."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith(f"{reason}: expected") or reason == "", said
    assert "Traceback" not in said
    assert SECRET not in said
    return said


def refused(program: str, changes: Flags, code: int, reason: str, *texts: str) -> None:
    """Run and check say the same, and check changes nothing on the disk."""
    flags = sound(program) | changes
    before = files(Path.cwd())
    checked = one_line(invoke(program, ["config", "check"], flags), code, reason)
    assert files(Path.cwd()) == before
    assert one_line(invoke(program, ["run"], flags), code, reason) == checked
    for text in texts:
        assert text in checked


# --- nothing is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("program", APPS)
def test_what_can_work_is_fine_and_nothing_is_made(program: str) -> None:
    flags = sound(program)
    before = files(Path.cwd())
    result = invoke(program, ["config", "check"], flags)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "the configuration is fine\n"
    assert files(Path.cwd()) == before


@pytest.mark.parametrize("program", APPS)
def test_plaintext_on_this_machine_is_fine_when_asked_for(program: str) -> None:
    changes: Flags = {"--kit": "", "--passphrase-file": "", "--insecure": None}
    assert invoke(program, ["config", "check"], sound(program) | changes).exit_code == 0
    assert not Path("data").exists()


# --- either program -----------------------------------------------------------------------------

PLAIN: Flags = {"--kit": "", "--passphrase-file": "", "--insecure": None}
SETTINGS: dict[str, tuple[Flags, str]] = {
    "neither a kit nor plaintext": ({"--kit": ""}, "expected a kit for TLS; got none"),
    "a kit and plaintext": ({"--insecure": None}, "got both; drop one of them"),
    "a public address in plaintext": ({**PLAIN, "--listen": "0.0.0.0:7400"}, "plaintext is"),
    "an address in the network in plaintext": ({**PLAIN, "--listen": "10.1.2.3:7400"}, "plaintext"),
    "a name in plaintext": ({**PLAIN, "--listen": "server.example:7400"}, "plaintext"),
    "no address": ({"--listen": "nonsense"}, "'nonsense'"),
    "no port": ({"--listen": "127.0.0.1:"}, "host:port"),
    "no host": ({"--listen": ":7400"}, "host:port"),
    "a port beyond all": ({"--listen": "127.0.0.1:70000"}, "host:port"),
    "no address of a monitor": ({"--monitor-listen": "on"}, "host:port"),
    "no address of probes": ({"--probe-listen": "none"}, "host:port"),
    "an open monitor that is off": ({"--monitor-listen": "off", "--monitor-open": None}, "nothing"),
    "an open monitor on loopback": ({"--monitor-open": None}, "which it does nothing for"),
    "a public monitor in plaintext": ({**PLAIN, "--monitor-listen": "0.0.0.0:7403"}, "say monitor"),
    "one port for two": (
        {"--listen": "127.0.0.1:7400", "--monitor-listen": "127.0.0.1:7400"},
        "listen and monitor_listen have the same",
    ),
    "one port for probes": (
        {"--listen": "127.0.0.1:7400", "--probe-listen": "0.0.0.0:7400"},
        "listen and probe_listen have the same",
    ),
    "no workers": ({"--workers": "0"}, "workers"),
    "an unknown log level": ({"--log-level": "loud"}, "log_level"),
    "a ready file nowhere": ({"--ready-file": "nowhere/ready"}, "ready_file"),
    "no such configuration": ({"--config": "nowhere.toml"}, "nowhere.toml"),
}  # fmt: skip


@pytest.mark.parametrize("program", APPS)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_can_never_work_end_with_78(case: str, program: str) -> None:
    changes, text = SETTINGS[case]
    flags = sound(program) | changes
    checked, ran = (invoke(program, command, flags) for command in (["config", "check"], ["run"]))
    assert one_line(checked, 78, "CONFIGURATION" if "--config" in flags else "")
    assert text in checked.stderr
    assert checked.stderr.startswith("CONFIGURATION: ")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (78, "", checked.stderr)


FLOORS = {SERVER: "--min-clients", KEY_HOLDER: "--release-min-clients"}


@pytest.mark.parametrize("program", APPS)
def test_a_cohort_below_the_floor_ends_with_78(program: str) -> None:
    flags = sound(program) | {FLOORS[program]: "2"}
    for command in (["config", "check"], ["run"]):
        result = invoke(program, command, flags)
        assert (result.exit_code, result.stdout) == (78, "")
        assert "min_clients: Input should be greater than or equal to 3" in result.stderr


# What a key holder releases: flags, the file's [release], and what is said.
RELEASE: dict[str, tuple[Flags, str, str]] = {
    "an epsilon alone": ({"--release-max-epsilon": "8"}, "", "release_max_delta together"),
    "a delta alone": ({}, "max_delta = 1e-6", "release_max_delta together"),
    "no epsilon at all": ({}, "max_epsilon = 0\nmax_delta = 1e-6", "release_max_epsilon"),
    "an epsilon without end": ({}, "max_epsilon = inf\nmax_delta = 1e-6", "release_max_epsilon"),
    "an epsilon that is none": ({"--release-max-epsilon": "nan"}, "", "release_max_epsilon"),
    "a delta of one": ({}, "max_epsilon = 8\nmax_delta = 1", "release_max_delta"),
    "a row of one": ({}, "min_row_contributors = 1", "release_min_row_contributors"),
    "no attempts": ({}, "attempts_per_model = 0", "release_attempts_per_model"),
    "a truth that is none": ({}, 'require_privacy = "perhaps"', "release_require_privacy"),
    "another cohort": ({}, "min_client = 5", "did you mean 'release_min_clients'"),
}


@pytest.mark.parametrize("case", RELEASE)
def test_what_could_never_be_released_ends_with_78(case: str) -> None:
    changes, table, text = RELEASE[case]
    Path("settings.toml").write_text(f"[release]\n{table}\n", "utf-8")
    flags = sound(KEY_HOLDER) | changes | {"--config": "settings.toml"}
    for command in (["config", "check"], ["run"]):
        result = invoke(KEY_HOLDER, command, flags)
        assert (result.exit_code, result.stdout) == (78, "")
        assert text in result.stderr
    assert not Path("data").exists()


def test_the_settings_of_releases_from_before_they_had_a_table_are_named() -> None:
    for old in ("min_clients", "attempts_per_model"):
        Path("settings.toml").write_text(f"{old} = 5\n", "utf-8")
        flags = sound(KEY_HOLDER) | {"--config": "settings.toml"}
        result = invoke(KEY_HOLDER, ["config", "check"], flags)
        assert result.exit_code == 78
        assert f"'{old}'; did you mean 'release_{old}'" in result.stderr


def test_something_else_of_the_tables_name_is_refused() -> None:
    Path("settings.toml").write_text("release = 5\n", "utf-8")
    flags = sound(KEY_HOLDER) | {"--config": "settings.toml"}
    refused(KEY_HOLDER, flags, 78, "CONFIGURATION", "expected a table [release]")


@pytest.mark.parametrize("program", APPS)
@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/secagg", "/proc/self/x/y"])
def test_data_that_cannot_be_written_end_with_78(program: str, where: str) -> None:
    Path("taken").write_text("a file")
    folder = {"a file": "taken", "below a file": "taken/x"}.get(where, where)
    refused(program, {DATA[program]: folder}, 78, "CONFIGURATION", folder, "is not; choose another")


@pytest.mark.parametrize("program", APPS)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(program: str) -> None:
    Path("settings.toml").write_text('listn = "127.0.0.1:1"\n', "utf-8")
    flags = sound(program) | {"--config": "settings.toml"}
    for command in (["config", "check"], ["run"]):
        result = invoke(program, command, flags)
        assert (result.exit_code, result.stdout) == (78, "")
        assert "unknown key 'listn'; did you mean 'listen'" in result.stderr


@pytest.mark.parametrize("program", APPS)
def test_an_unknown_variable_is_refused_with_the_one_that_was_meant(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SECAGG_{program.upper()}_LISTN", SECRET)
    for command in (["config", "check"], ["run"]):
        result = invoke(program, command, sound(program))
        assert (result.exit_code, result.stdout) == (78, "")
        assert "did you mean 'listen'" in result.stderr
        assert SECRET not in result.output


# --- kits ---------------------------------------------------------------------------------------


def copy(program: str) -> Path:
    return Path(shutil.copytree(kit_of(program), "kit"))


def without(program: str, name: str) -> Path:
    (copy(program) / name).unlink()
    return Path("kit")


def with_certificate(program: str, made: Kit) -> Path:
    return as_folder(made, kit_of(program), Path("kit"))


def open_to_all(program: str) -> Path:
    (copy(program) / "private.key").chmod(0o644)
    return Path("kit")


def with_file(program: str, name: str, data: bytes) -> Path:
    (copy(program) / name).write_bytes(data)
    return Path("kit")


def foreign(program: str) -> Path:
    role = ROLES[program]
    made = forged(shared_other(), role, NAMES[program], trusting=shared())
    return with_certificate(program, made)


def enrolment_of_others(program: str) -> Path:
    other = shared_other().kit(NAMES[program]) / "enrolment.json"
    return with_file(program, "enrolment.json", other.read_bytes())


KITS: dict[str, tuple[Callable[[str], Path], int, str, str]] = {
    "missing": (lambda _: Path("nowhere"), 77, "NO_CERTIFICATE", "nowhere"),
    "a file": (lambda _: Path("passphrase"), 77, "NO_CERTIFICATE", "secagg provision"),
    "without key": (lambda p: without(p, "private.key"), 77, "NO_CERTIFICATE", "private.key"),
    "without ca": (lambda p: without(p, "ca.pem"), 77, "NO_CERTIFICATE", "ca.pem"),
    "foreign": (foreign, 77, "UNTRUSTED_CERTIFICATE", "another one issued it"),
    "expired": (
        lambda p: with_certificate(p, expired(shared(), ROLES[p], NAMES[p])),
        77, "CERTIFICATE_EXPIRED", "rotate it",
    ),
    "early": (
        lambda p: with_certificate(p, from_the_future(shared(), ROLES[p], NAMES[p])),
        77, "CERTIFICATE_NOT_YET_VALID", "clock",
    ),
    "a client's": (lambda _: shared().kit("alice"), 77, "WRONG_ROLE", "got one of a client"),
    "the other program's": (
        lambda p: kit_of(SERVER if p == KEY_HOLDER else KEY_HOLDER), 77, "WRONG_ROLE", "right kit",
    ),
    "readable by all": (open_to_all, 77, "INVALID_CERTIFICATE", "0644"),
    "of garbage": (
        lambda p: with_file(p, "certificate.pem", b"\xff\xfe"), 77, "INVALID_CERTIFICATE", "PEM",
    ),
    "without enrolment": (
        lambda p: without(p, "enrolment.json"), 78, "CONFIGURATION", "enrolment.json",
    ),
    "with an enrolment of others": (enrolment_of_others, 77, "UNTRUSTED_KEY", "sign"),
}  # fmt: skip


@pytest.mark.parametrize("program", APPS)
@pytest.mark.parametrize("case", KITS)
def test_a_kit_that_cannot_be_used_is_named_by_what_is_wrong(case: str, program: str) -> None:
    make, code, reason, text = KITS[case]
    refused(program, {"--kit": str(make(program))}, code, reason, text)


@pytest.mark.parametrize("data", [None, b"", b"no key\n", b"\xff\xfe\n"])
def test_a_server_whose_pins_cannot_be_read_ends_with_78(data: bytes | None) -> None:
    make = without if data is None else lambda p, name: with_file(p, name, data)
    kit = make(SERVER, "key_holder.pub")
    refused(SERVER, {"--kit": str(kit)}, 78, "CONFIGURATION", "key_holder.pub")


# --- the key holder's secrets -------------------------------------------------------------------


def secret_file(name: str, text: str, mode: int = 0o600) -> str:
    Path(name).write_text(text, "utf-8")
    Path(name).chmod(mode)
    return name


SECRETS: dict[str, tuple[Callable[[], Flags], str]] = {
    "none": (lambda: {"--passphrase-file": ""}, "exactly one of"),
    "two": (lambda: {"--share-files": "passphrase"}, "exactly one of"),
    "wrong": (lambda: {"--passphrase-file": secret_file("w", SECRET)}, "open with the passphrase"),
    "empty": (lambda: {"--passphrase-file": secret_file("e", " \n")}, "bytes of text in e"),
    "missing": (lambda: {"--passphrase-file": "nowhere"}, "nowhere"),
    "open to all": (
        lambda: {"--passphrase-file": secret_file("o", SECRET, 0o644)}, "for its owner alone",
    ),
    "a missing share": (
        lambda: {"--passphrase-file": "", "--share-files": "nowhere"}, "nowhere",
    ),
    "a share open to all": (
        lambda: {"--passphrase-file": "", "--share-files": secret_file("s", SECRET, 0o604)}, "0604",
    ),
    "a share that is none": (
        lambda: {"--passphrase-file": "", "--share-files": secret_file("s", SECRET)}, "share",
    ),
    "a share that is a folder": (
        lambda: {"--passphrase-file": "", "--share-files": "/"}, "readable file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SECRETS)
def test_a_passphrase_that_does_not_do_ends_with_78(case: str) -> None:
    make, text = SECRETS[case]
    sound(KEY_HOLDER)
    refused(KEY_HOLDER, make(), 78, "CONFIGURATION", text)


def test_an_empty_passphrase_from_the_environment_ends_with_78(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_PASSPHRASE", "")
    refused(KEY_HOLDER, {"--passphrase-file": ""}, 78, "CONFIGURATION", "it is empty")


def test_an_identity_of_another_federation_ends_with_78() -> None:
    """It opens with the passphrase, and clients would trust no round all the same."""
    other = shared_other().kit("key-holder") / "identity.key"
    kit = with_file(KEY_HOLDER, "identity.key", other.read_bytes())
    refused(KEY_HOLDER, {"--kit": str(kit)}, 78, "CONFIGURATION", "identity.key that the enrolment")


@pytest.mark.parametrize("data", [None, b"", b"-----BEGIN PRIVATE KEY-----\n"])
def test_an_identity_that_cannot_be_read_ends_with_78(data: bytes | None) -> None:
    make = without if data is None else lambda p, name: with_file(p, name, data)
    kit = make(KEY_HOLDER, "identity.key")
    refused(KEY_HOLDER, {"--kit": str(kit)}, 78, "CONFIGURATION", "identity.key", "provision")


# --- databases ----------------------------------------------------------------------------------


def database(program: str) -> Path:
    """The database that the program has made, as it leaves it."""
    path = Path("data").absolute() / DATABASES[program]
    path.parent.mkdir()
    if program == SERVER:
        Store(f"sqlite:///{path}").close()
    else:
        Ledger(path, bytes(32)).close()
    return path


def newer(program: str) -> None:
    with closing(sqlite3.connect(database(program))) as db:
        if program == SERVER:
            db.execute("UPDATE alembic_version SET version_num = '9999'")
        else:
            db.execute("PRAGMA user_version = 99")
        db.commit()


@pytest.mark.parametrize("program", APPS)
def test_the_programs_own_database_is_fine_and_stays_as_it_is(program: str) -> None:
    database(program)
    flags = sound(program)
    before = files(Path.cwd())
    assert invoke(program, ["config", "check"], flags).exit_code == 0
    assert files(Path.cwd()) == before


@pytest.mark.parametrize("program", APPS)
def test_a_database_of_a_newer_version_ends_with_78(program: str) -> None:
    newer(program)
    refused(program, {}, 78, "CONFIGURATION", "newer")


@pytest.mark.parametrize("program", APPS)
def test_a_database_that_is_none_ends_with_78(program: str) -> None:
    Path("data").mkdir()
    (Path("data") / DATABASES[program]).write_bytes(b"not a database at all" * 100)
    refused(program, {}, 78, "CONFIGURATION")


@pytest.mark.parametrize("program", APPS)
def test_a_folder_in_the_place_of_the_database_ends_with_78(program: str) -> None:
    (Path("data") / DATABASES[program]).mkdir(parents=True)
    refused(program, {}, 78, "CONFIGURATION")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://secagg:{SECRET}@127.0.0.1:1/secagg",
        f"mysql://secagg:{SECRET}@127.0.0.1/secagg",
        f"nonsense {SECRET}",
        f"sqlite:////nonexistent/{SECRET}/x.sqlite3",
        "",
    ],
)
def test_a_database_that_does_not_answer_ends_with_78_and_keeps_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECAGG_SERVER_STORE_URL", url)
    flags = sound(SERVER)
    checked, ran = (invoke(SERVER, command, flags) for command in (["config", "check"], ["run"]))
    for result in (checked, ran):
        assert "store" in one_line(result, 78, "CONFIGURATION")
    if "nonexistent" not in url:  # to check means not to make the database
        assert ran.stderr == checked.stderr


# --- what only a start can find -----------------------------------------------------------------


@contextmanager
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("program", "flag"),
    [
        (SERVER, "--listen"),
        (SERVER, "--admin-listen"),
        (SERVER, "--monitor-listen"),
        (SERVER, "--probe-listen"),
        (KEY_HOLDER, "--listen"),
        (KEY_HOLDER, "--monitor-listen"),
        (KEY_HOLDER, "--probe-listen"),
    ],
)
def test_a_port_that_is_taken_ends_with_78(program: str, flag: str) -> None:
    with taken() as address:
        flags = sound(program) | {flag: address}
        said = one_line(invoke(program, ["run"], flags), 78, "CONFIGURATION")
        assert invoke(program, ["config", "check"], flags).exit_code == 0
    assert address in said
    assert "free port" in said
    assert not Path("data").exists()


@pytest.mark.parametrize("program", APPS)
def test_a_second_program_on_the_same_data_ends_with_78(program: str) -> None:
    with only_process(Path("data")):
        said = one_line(invoke(program, ["run"], sound(program)), 78, "CONFIGURATION")
    assert "'data' for this process alone" in said


# --- as processes -------------------------------------------------------------------------------


def ran(program: str, command: list[str], flags: Flags) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"secagg_{program}.cli", *command, *line(flags)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("program", APPS)
def test_a_program_that_cannot_start_ends_with_one_line_and_its_code(program: str) -> None:
    newer(program)
    checked, started = (
        ran(program, command, sound(program)) for command in (["config", "check"], ["run"])
    )
    assert started == checked
    assert (started[0], started[1]) == (78, "")
    (said,) = started[2].splitlines()
    assert said.startswith("CONFIGURATION: expected")


@pytest.mark.slow
def test_programs_that_run_already_keep_their_data_and_ports(tmp_path: Path) -> None:
    with Machine(tmp_path) as machine:
        for program in (KEY_HOLDER, SERVER):
            machine.start(program)
            module, run, *arguments = machine.command(program)
            again = [sys.executable, "-m", module, run, *arguments]
            ports = [f"127.0.0.1:{free_port()}" for _ in range(2)]
            elsewhere = [*again, "--listen", ports[0]]
            elsewhere += ["--admin-listen", ports[1]] if program == SERVER else []
            for command, text in ((again, "free port"), (elsewhere, "for this process alone")):
                done = subprocess.run(command, capture_output=True, text=True, timeout=30)
                assert (done.returncode, done.stdout) == (78, "")
                (said,) = done.stderr.splitlines()
                assert said.startswith("CONFIGURATION: expected")
                assert text in said
        assert machine.stop() == [0, 0]
