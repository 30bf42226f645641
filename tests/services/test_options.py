"""Settings as flags: every one of them but secrets, and flags win over everything else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import typer
from click.testing import Result
from pydantic import BaseModel, Field, SecretStr, field_validator
from typer.testing import CliRunner

from secagg.commands import exits_cleanly
from secagg.options import with_settings
from secagg.settings import Settings
from secagg_client.cli import app as client_app
from secagg_client.config import ClientSettings
from secagg_keyholder.cli import app as key_holder_app
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.cli import app as server_app
from secagg_server.config import OperatorSettings, ServerSettings

# Wide enough that no flag is broken across lines.
WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1"}
SECRET = "correct horse battery staple"  # noqa: S105


class Shop(Settings):
    """Settings of every kind."""

    env_prefix = "SECAGG_SHOP_"
    name: str = "corner"
    count: int = Field(1, ge=0, description="things on the shelf")
    rate: float = 0.5
    open: bool = False
    mood: Literal["good", "bad"] = "good"
    folder: Path | None = None
    files: list[Path] = Field(default_factory=list)
    password: SecretStr | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


class Given(BaseModel):
    """What the command was given besides its settings."""

    shop: Shop
    what: str
    loud: bool


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("SECAGG_"):
            monkeypatch.delenv(name)


def opened(*arguments: str, fields: Sequence[str] = ()) -> Given:
    """The settings that a command line results in."""
    result, given = invoked(arguments, fields)
    assert result.exit_code == 0, result.output
    return given[0]


def invoked(arguments: Sequence[str], fields: Sequence[str] = ()) -> tuple[Result, list[Given]]:
    given: list[Given] = []
    app = typer.Typer()

    @app.command()
    @exits_cleanly
    @with_settings(Shop, fields)
    def visit(settings: Shop, what: str, loud: bool = False) -> None:
        given.append(Given(shop=settings, what=what, loud=loud))

    return CliRunner().invoke(app, ["bread", *arguments], env=WIDE), given


# --- which one wins -----------------------------------------------------------------------------


def test_without_any_source_the_defaults_hold() -> None:
    given = opened()
    assert given.shop == Shop()
    assert (given.what, given.loud) == ("bread", False)


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.toml").write_text('name = "file"\ncount = 2\nrate = 0.25\n', "utf-8")
    monkeypatch.setenv("SECAGG_SHOP_COUNT", "3")
    monkeypatch.setenv("SECAGG_SHOP_RATE", "0.75")
    shop = opened("--config", "shop.toml", "--rate", "1.5").shop
    assert (shop.name, shop.count, shop.rate) == ("file", 3, 1.5)


# A value of each kind: what is typed, and what it means.
VALUES: dict[str, tuple[list[str], str, object]] = {
    "name": (["--name", "big"], "big", "big"),
    "count": (["--count", "0"], "0", 0),
    "rate": (["--rate", "0.0"], "0.0", 0.0),
    "open": (["--open"], "true", True),
    "mood": (["--mood", "bad"], "bad", "bad"),
    "folder": (["--folder", "here"], "here", Path("here")),
    "files": (["--files", "a", "--files", "b"], "a,b", [Path("a"), Path("b")]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_of_every_kind_counts(name: str) -> None:
    """Also one that is 0, or empty of anything else: only one that is not given is none."""
    flags, _, meant = VALUES[name]
    assert getattr(opened(*flags).shop, name) == meant


@pytest.mark.parametrize("name", VALUES)
def test_a_variable_of_every_kind_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, meant = VALUES[name]
    monkeypatch.setenv(f"SECAGG_SHOP_{name.upper()}", text)
    assert getattr(opened().shop, name) == meant


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_of_every_kind_wins_over_the_variable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"name": "x", "count": "9", "rate": "9.0", "open": "false", "mood": "good"}
    monkeypatch.setenv(f"SECAGG_SHOP_{name.upper()}", others.get(name, "elsewhere"))
    flags, _, meant = VALUES[name]
    assert getattr(opened(*flags).shop, name) == meant


@pytest.mark.parametrize(
    ("text", "meant"), [("true", True), ("1", True), ("yes", True), ("false", False), ("0", False)]
)
def test_a_truth_from_the_environment_is_one(
    text: str, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECAGG_SHOP_OPEN", text)
    assert opened().shop.open is meant


@pytest.mark.parametrize("text", ["", "maybe", "2", "truee"])
def test_a_truth_that_is_none_is_refused_by_name(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECAGG_SHOP_OPEN", text)
    result, given = invoked([])
    assert (result.exit_code, given) == (78, [])
    assert "open" in result.stderr


@pytest.mark.parametrize(
    "flags", [["--count", "-1"], ["--mood", "sad"], ["--config", "nowhere.toml"]], ids=str
)
def test_a_value_that_cannot_be_ends_with_78(flags: list[str]) -> None:
    result, given = invoked(flags)
    assert (result.exit_code, given) == (78, [])
    assert flags[1] in result.stderr or flags[0].removeprefix("--") in result.stderr


@pytest.mark.parametrize(
    "flags",
    [["--colour", "red"], ["--count", "many"], ["--name"], ["--password", SECRET], ["--nam", "x"]],
    ids=str,
)
def test_a_flag_that_is_none_is_a_usage_error(flags: list[str]) -> None:
    result, given = invoked(flags)
    assert (result.exit_code, given) == (2, [])


def test_only_the_fields_that_a_command_needs_are_its_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others still come from file and environment: one file serves every command."""
    monkeypatch.setenv("SECAGG_SHOP_NAME", "from outside")
    shop = opened("--count", "5", fields=["count", "open"]).shop
    assert (shop.count, shop.name) == (5, "from outside")
    assert invoked(["--name", "x"], ["count", "open"])[0].exit_code == 2


def test_a_commands_own_options_stay_beside_the_settings() -> None:
    given = opened("--loud", "--count", "5")
    assert (given.what, given.loud, given.shop.count) == ("bread", True, 5)


# --- secrets ------------------------------------------------------------------------------------


def test_a_secret_comes_from_environment_or_file_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.toml").write_text(f'password = "{SECRET}"', "utf-8")
    found = opened("--config", "shop.toml")
    monkeypatch.setenv("SECAGG_SHOP_PASSWORD", SECRET)
    for given in (found, opened()):
        assert given.shop.password is not None
        assert given.shop.password.get_secret_value() == SECRET
        assert SECRET not in repr(given) + str(given)


def test_a_secret_in_a_variable_of_the_wrong_name_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECAGG_SHOP_PASSWRD", SECRET)
    result, _ = invoked([])
    assert result.exit_code == 78
    assert "did you mean 'password'" in result.stderr
    assert SECRET not in result.output


# --- the programs -------------------------------------------------------------------------------

PROGRAMS: dict[str, tuple[typer.Typer, list[str], type[Settings]]] = {
    "server": (server_app, ["run"], ServerSettings),
    "server check": (server_app, ["config", "check"], ServerSettings),
    "key holder": (key_holder_app, ["run"], KeyHolderSettings),
    "key holder check": (key_holder_app, ["config", "check"], KeyHolderSettings),
    "client": (client_app, ["join"], ClientSettings),
    "operator": (server_app, ["task", "list"], OperatorSettings),
}
SECRETS = {"store_url", "passphrase"}


def flags_of(program: str) -> set[str]:
    app, command, _ = PROGRAMS[program]
    shown = CliRunner().invoke(app, [*command, "--help"], env=WIDE)
    assert shown.exit_code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", shown.stdout))


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_has_a_flag_except_secrets(program: str) -> None:
    flags = flags_of(program)
    for name in PROGRAMS[program][2].model_fields:
        flag = f"--{name.replace('_', '-')}"
        assert (flag in flags) is (name not in SECRETS), flag
    assert "--config" in flags


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_the_types_hold_as_a_secret_is_what_has_no_flag(program: str) -> None:
    fields = PROGRAMS[program][2].model_fields
    hidden = {name for name, field in fields.items() if "SecretStr" in str(field.annotation)}
    assert hidden == SECRETS & fields.keys()


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("server", ["--store-url", f"postgresql://u:{SECRET}@h/d"]),
        ("key holder", ["--passphrase", SECRET]),
        ("server", ["--listn", "127.0.0.1:1"]),
        ("client", ["--password", SECRET]),
    ],
    ids=str,
)
def test_an_unknown_flag_is_a_usage_error(program: str, flags: list[str]) -> None:
    app, command, _ = PROGRAMS[program]
    result = CliRunner().invoke(app, [*command, *flags], env=WIDE)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_files_of_shares_come_from_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECAGG_KEYHOLDER_SHARE_FILES", "/one,/two")
    app = typer.Typer()
    seen: list[list[Path]] = []

    @app.command()
    @with_settings(KeyHolderSettings)
    def look(settings: KeyHolderSettings) -> None:
        seen.append(settings.share_files)

    for flags in ([], ["--share-files", "/three"]):
        assert CliRunner().invoke(app, flags).exit_code == 0
    assert seen == [[Path("/one"), Path("/two")], [Path("/three")]]
