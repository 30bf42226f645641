"""Settings: the file, then the environment, then flags; and a clear refusal of anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secagg.errors import ConfigurationError
from secagg.settings import load, read_toml
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import ServerSettings


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
    assert load(KeyHolderSettings, None, {}).min_clients == 3


def test_numbers_from_the_environment_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_MIN_CLIENTS", "7")
    assert load(KeyHolderSettings, None, {}).min_clients == 7


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
    monkeypatch.setenv("SECAGG_KEYHOLDER_MIN_CLIENTS", value)
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
