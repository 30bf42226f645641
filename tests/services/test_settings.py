"""Settings: the file, then the environment, then flags; and a clear refusal of anything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from federations import PASSPHRASE, client_kit, kit, new_federation, shared, shared_other, swap_in

from secagg.accounting import Budget
from secagg.enrolment import OpenEnrolment
from secagg.errors import (
    ConfigurationError,
    NoCertificateError,
    SecaggError,
    UntrustedKeyError,
    WrongRoleError,
)
from secagg.settings import check_writable, dialled, load, one_transport, only_process, read_toml
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_keyholder.policy import Policy
from secagg_server.config import OperatorSettings, ServerSettings


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_win_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(
        tmp_path,
        'listen = "127.0.0.1:1"\nadmin_listen = "127.0.0.1:2"\nkey_holder = "127.0.0.1:3"\n',
    )
    monkeypatch.setenv("SECAGG_SERVER_ADMIN_LISTEN", "127.0.0.1:20")
    monkeypatch.setenv("SECAGG_SERVER_KEY_HOLDER", "127.0.0.1:30")
    found = load(ServerSettings, file, {"key_holder": "127.0.0.1:300"})
    assert found.listen == "127.0.0.1:1"
    assert found.admin_listen == "127.0.0.1:20"
    assert found.key_holder == "127.0.0.1:300"


def test_a_flag_that_was_not_given_changes_nothing(tmp_path: Path) -> None:
    file = toml(tmp_path, 'log_level = "debug"')
    assert load(ServerSettings, file, {"log_level": None}).log_level == "debug"


def test_without_any_source_the_defaults_hold() -> None:
    found = load(ServerSettings, None, {})
    assert found.listen == "127.0.0.1:7400"
    assert load(KeyHolderSettings, None, {}).release_min_clients == 3


def test_numbers_from_the_environment_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_RELEASE_MIN_CLIENTS", "7")
    assert load(KeyHolderSettings, None, {}).release_min_clients == 7


def test_what_is_released_is_a_table_in_the_file_and_a_name_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(
        tmp_path,
        """[release]
        min_clients = 5
        attempts_per_model = 2
        require_privacy = true
        max_epsilon = 4
        max_delta = 1e-6
        """,
    )
    assert load(KeyHolderSettings, file, {}).policy == Policy(5, 2, True, Budget(4.0, 1e-6), None)
    monkeypatch.setenv("SECAGG_KEYHOLDER_RELEASE_MAX_EPSILON", "3")
    monkeypatch.setenv("SECAGG_KEYHOLDER_RELEASE_MIN_ROW_CONTRIBUTORS", "7")
    monkeypatch.setenv("SECAGG_KEYHOLDER_RELEASE_ATTEMPTS_PER_MODEL", "9")
    found = load(KeyHolderSettings, file, {"release_attempts_per_model": 4})
    assert found.policy == Policy(5, 4, True, Budget(3.0, 1e-6), 7)
    assert load(KeyHolderSettings, None, {}).release_attempts_per_model == 9


def test_by_default_any_plan_of_three_is_released() -> None:
    assert load(KeyHolderSettings, None, {}).policy == Policy(3, 10, False, None, None)


def test_each_program_reads_its_own_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_LISTEN", "127.0.0.1:9")
    monkeypatch.setenv("SECAGG_DATA_DIR", "/data")
    assert load(ServerSettings, None, {}).listen == "127.0.0.1:7400"
    assert load(KeyHolderSettings, None, {}).listen == "127.0.0.1:9"


def test_an_unknown_key_in_the_file_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    file = toml(tmp_path, 'admin_lisen = "127.0.0.1:1"')
    with pytest.raises(ConfigurationError, match="'admin_lisen'; did you mean 'admin_listen'"):
        load(ServerSettings, file, {})


def test_an_unknown_variable_is_refused_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECAGG_SERVER_KEYHOLDER", "127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="'keyholder'; did you mean 'key_holder'"):
        load(ServerSettings, None, {})


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(ServerSettings, toml(tmp_path, "zzz = 1"), {})
    assert "unknown key 'zzz'" in str(caught.value)
    assert "'store_url'" in str(caught.value)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    file = toml(tmp_path, 'lisen = "127.0.0.1:1"\nlog_level = "loud"\nkey_holder = 5\n')
    with pytest.raises(ConfigurationError) as caught:
        load(ServerSettings, file, {})
    for key in ("'lisen'", "log_level", "key_holder"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("listen = 7400", "listen"),
        ('listen = ["127.0.0.1:1"]', "listen"),
        ("data_dir = 5", "data_dir"),
        ('log_level = "INFO"', "log_level"),
        ("[listen]\nport = 5", "listen"),
        ("ready_file = false", "ready_file"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(
    tmp_path: Path, text: str, key: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{key}"):
        load(ServerSettings, toml(tmp_path, text), {})


@pytest.mark.parametrize("value", ["2", "0", "-1", "three", "3.5", "", "nan"])
def test_a_cohort_below_the_floor_or_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_RELEASE_MIN_CLIENTS", value)
    with pytest.raises(ConfigurationError, match="min_clients"):
        load(KeyHolderSettings, None, {})


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"readable file; .*nowhere\.toml: No such file"):
        read_toml(tmp_path / "nowhere.toml")


def test_a_folder_for_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize("data", [b"listen = ", b"= 1", b"\xff\xfe", b"a = 1\na = 2", b"{}"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(data)
    with pytest.raises(ConfigurationError, match="expected TOML"):
        read_toml(file)


def test_settings_do_not_change_once_loaded() -> None:
    found = load(ServerSettings, None, {})
    with pytest.raises(ValueError, match="frozen"):
        found.listen = "127.0.0.1:1"  # type: ignore[misc]


def test_the_database_lies_in_the_data_directory_unless_a_url_says_otherwise(
    tmp_path: Path,
) -> None:
    found = load(ServerSettings, None, {"data_dir": tmp_path})
    assert found.database == f"sqlite:///{tmp_path}/server.sqlite3"
    assert load(ServerSettings, None, {"store_url": "sqlite:///x"}).database == "sqlite:///x"


# --- one transport -------------------------------------------------------------------------------


@pytest.mark.parametrize(("with_kit", "insecure"), [(False, False), (True, True)])
def test_nobody_has_to_guess_between_tls_and_plaintext(
    with_kit: bool, insecure: bool, tmp_path: Path
) -> None:
    chosen = {"kit": shared().kit("server") if with_kit else None, "insecure": insecure}
    text = "got both" if with_kit else "got none; make one with `secagg provision init`"
    folders = {"data_dir": tmp_path / "d"}
    for ask in (
        lambda: one_transport(chosen["kit"], insecure),
        lambda: load(ServerSettings, None, chosen | folders).opened(),
        lambda: load(ServerSettings, None, chosen).dialled(),
        lambda: load(KeyHolderSettings, None, chosen).opened(),
        lambda: load(KeyHolderSettings, None, chosen).dialled(),
        lambda: load(OperatorSettings, None, chosen).operator(),
        lambda: load(ClientSettings, None, chosen).credentials(),
    ):
        with pytest.raises(ConfigurationError, match=text):
            ask()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["listen", "admin_listen", "key_holder"])
def test_plaintext_stays_on_this_machine_and_tls_need_not(name: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {name: "0.0.0.0:7410", "data_dir": tmp_path / "d"}
    with pytest.raises(ConfigurationError, match="plaintext is for one machine only"):
        load(ServerSettings, None, values | {"insecure": True}).opened()
    encrypted = load(ServerSettings, None, values | {"kit": shared().kit("server")})
    assert encrypted.opened().kit == kit(shared(), "server")


def test_plaintext_lets_everybody_on_this_machine_in(tmp_path: Path) -> None:
    opened = load(ServerSettings, None, {"insecure": True, "data_dir": tmp_path / "d"}).opened()
    assert opened.kit is None
    assert isinstance(opened.roster, OpenEnrolment)


# --- kits ----------------------------------------------------------------------------------------


def server(folder: Path, **changes: Any) -> ServerSettings:  # noqa: ANN401
    values = {"kit": folder, "data_dir": folder.parent / "data"}
    return load(ServerSettings, None, values | changes)


def key_holder(folder: Path, **changes: Any) -> KeyHolderSettings:  # noqa: ANN401
    values = {"kit": folder, "state_dir": folder.parent / "state", "passphrase": PASSPHRASE}
    return load(KeyHolderSettings, None, values | changes)


def copied(name: str, to: Path) -> Path:
    shutil.copytree(shared().kit(name), to)
    return to


def test_checking_the_settings_changes_nothing(tmp_path: Path) -> None:
    ours = copied("server", tmp_path / "kit")
    server(ours).check()
    key_holder(copied("key-holder", tmp_path / "other")).opened()
    assert {path.name for path in tmp_path.iterdir()} == {"kit", "other"}


@pytest.mark.parametrize("name", ["alice", "admin", "key-holder"])
def test_the_server_takes_no_kit_but_its_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(WrongRoleError, match="kit of a server; got one of"):
        server(copied(name, tmp_path / "kit")).opened()


@pytest.mark.parametrize("name", ["alice", "admin", "server"])
def test_the_key_holder_takes_no_kit_but_its_own(name: str, tmp_path: Path) -> None:
    with pytest.raises(WrongRoleError, match="kit of a key-holder; got one of"):
        key_holder(copied(name, tmp_path / "kit")).opened()


@pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "private.key"])
def test_a_missing_file_of_a_kit_is_named(name: str, tmp_path: Path) -> None:
    for party, settings in (("server", server), ("key-holder", key_holder)):
        folder = copied(party, tmp_path / party)
        (folder / name).unlink()
        with pytest.raises(NoCertificateError, match=name):
            settings(folder).opened()


def test_the_server_needs_pins_and_an_enrolment(tmp_path: Path) -> None:
    for name in ("key_holder.pub", "enrolment.json"):
        folder = copied("server", tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ConfigurationError, match=name):
            server(folder).opened()


def test_an_enrolment_with_a_swapped_key_is_refused_at_the_start(tmp_path: Path) -> None:
    for party, settings in (("server", server), ("key-holder", key_holder)):
        folder = copied(party, tmp_path / party)
        document = json.loads((folder / "enrolment.json").read_text())
        members = document["enrolment"]["members"]
        members["alice"]["signing_keys"] = [
            client_kit(shared_other(), "alice").identity.public.hex()
        ]
        swap_in(folder / "enrolment.json", json.dumps(document).encode())
        with pytest.raises(UntrustedKeyError, match="the signature does not cover it"):
            settings(folder).opened()


def test_the_enrolment_of_another_federation_is_refused(tmp_path: Path) -> None:
    folder = copied("server", tmp_path / "kit")
    shutil.copy(shared_other().kit("server") / "enrolment.json", folder / "enrolment.json")
    with pytest.raises(UntrustedKeyError):
        server(folder).opened()


def test_an_identity_that_the_enrolment_does_not_name_is_refused(tmp_path: Path) -> None:
    folder = copied("key-holder", tmp_path / "kit")
    shutil.copy(shared_other().kit("key-holder") / "identity.key", folder / "identity.key")
    with pytest.raises(
        ConfigurationError, match="it names others, so clients would trust no round"
    ):
        key_holder(folder).opened()


@pytest.mark.parametrize(
    "changes", [{"passphrase": None}, {"passphrase": "another"}, {"passphrase": ""}]
)
def test_without_the_passphrase_the_key_holder_does_not_start(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="passphrase"):
        key_holder(copied("key-holder", tmp_path / "kit"), **changes).opened()


def test_shares_of_the_passphrase_come_as_a_list_with_commas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_SHARE_FILES", "a/share-1.txt,b/share-2.txt")
    found = load(KeyHolderSettings, None, {})
    assert found.share_files == [Path("a/share-1.txt"), Path("b/share-2.txt")]


def test_custodians_open_the_key_holder_together(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "plain")
    assert federation.kit("key-holder").is_dir()
    split = type(federation).create(tmp_path / "split", clients=["alice"], custodians=(2, 3))
    shares = sorted((split.folder / "custodians").iterdir())
    folder = split.kit("key-holder")
    found = key_holder(folder, passphrase=None, share_files=shares[1:])
    assert found.opened().identity.public in found.opened().roster.current().key_holder_identities  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError):
        key_holder(folder, passphrase=None, share_files=shares[:1]).opened()


def test_no_secret_is_shown(tmp_path: Path) -> None:
    settings = key_holder(copied("key-holder", tmp_path / "kit"))
    shown = f"{settings!r} {settings} {settings.opened()!r}"
    stored = load(ServerSettings, None, {"store_url": "postgresql://secagg:hunter2@db/secagg"})
    shown += f"{stored!r} {stored}"
    for secret in (PASSPHRASE, "hunter2", "PRIVATE KEY"):
        assert secret not in shown


def test_a_refused_passphrase_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(SecaggError) as caught:
        key_holder(copied("key-holder", tmp_path / "kit"), passphrase="hunter2").opened()  # noqa: S106
    assert "hunter2" not in str(caught.value)


# --- folders -------------------------------------------------------------------------------------


def test_a_file_in_the_folders_place_is_refused_without_making_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(ConfigurationError, match="writable data_dir"):
            check_writable(folder, "data_dir")
    check_writable(tmp_path / "new" / "below", "data_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from secagg.settings import only_process\n"
        "with only_process(Path(sys.argv[1])): print('alone')\n"
    )
    folder = tmp_path / "state"

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, folder],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    with only_process(folder):
        refused = other()
        assert refused.returncode != 0
        assert "another one is using it; stop that one" in refused.stderr
    assert other().stdout == "alone\n"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match="writable folder"),
        only_process(tmp_path / "file" / "below"),
    ):
        pass


@pytest.mark.parametrize(
    ("listen", "dial"),
    [
        ("0.0.0.0:7400", "127.0.0.1:7400"),
        ("[::]:7400", "127.0.0.1:7400"),
        ("127.0.0.1:7400", "127.0.0.1:7400"),
        ("server.example:7400", "server.example:7400"),
    ],
)
def test_a_listener_is_dialled_from_its_own_machine(listen: str, dial: str) -> None:
    assert dialled(listen) == dial
