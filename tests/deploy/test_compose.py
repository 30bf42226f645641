"""The Compose files: what they promise about each container, and that what they name exists."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

import secagg.cli
import secagg_client.cli
import secagg_keyholder.cli
import secagg_server.cli
from secagg.settings import Settings, validated
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import OperatorSettings, ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE, MONITORING = DEPLOY / "compose.yaml", DEPLOY / "compose.monitoring.yaml"
# The Compose Specification's own, which comes with this package.
SCHEMA = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"

PROGRAMS = {
    "secagg": secagg.cli.app,
    "secagg-server": secagg_server.cli.app,
    "secagg-keyholder": secagg_keyholder.cli.app,
    "secagg-client": secagg_client.cli.app,
}
SETTINGS: dict[str, type[Settings]] = {
    kind.env_prefix: kind
    for kind in (ServerSettings, KeyHolderSettings, ClientSettings, OperatorSettings)
}
CLIENTS = ("client-1", "client-2", "client-3")
# What runs on the machine of no party in particular: they make the kits, and are offline.
AUTHORITY = {"volumes", "provision", "authority"}
RUNNING = {"keyholder", "server", *CLIENTS}
TOOLS = {"operator", "authority"}

Service = dict[str, Any]


def _substituted(text: str) -> str:
    """A value as Compose reads it where no variable is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_substituted(path.read_text(encoding="utf-8")))
    return found


def _merged(base: Any, over: Any) -> Any:  # noqa: ANN401 - any part of a file
    """One Compose file on top of another, as far as ours go: mappings, and lists that grow."""
    if isinstance(base, dict) and isinstance(over, dict):
        together = dict(base)
        for key, value in over.items():
            together[key] = _merged(base[key], value) if key in base else value
        return together
    if isinstance(base, dict) and isinstance(over, list):
        return base | dict.fromkeys(over)
    if isinstance(base, list) and isinstance(over, dict):
        return dict.fromkeys(base) | over
    return [*base, *over] if isinstance(base, list) and isinstance(over, list) else over


def _both() -> dict[str, Any]:
    together: dict[str, Any] = _merged(_read(BASE), _read(MONITORING))
    return together


FILES = {"base": _read(BASE), "with monitoring": _both()}
_ALL = [
    pytest.param(file, name, id=f"{which}: {name}")
    for which, file in FILES.items()
    for name in file["services"]
]
every_service = pytest.mark.parametrize(("file", "name"), _ALL)
every_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


def _networks(service: Service) -> set[str]:
    return set(service.get("networks", ()))


def _mounts(service: Service) -> dict[str, tuple[str, str]]:
    """Source, and mode, of what is mounted, by where."""
    mounts = {}
    for text in service.get("volumes", ()):
        source, target, *mode = text.split(":")
        mounts[target] = (source, mode[0] if mode else "rw")
    return mounts


def _sources(service: Service) -> set[str]:
    return {source for source, _ in _mounts(service).values()}


def _with(file: Mapping[str, Any], volume: str) -> set[str]:
    return {name for name, each in file["services"].items() if volume in _sources(each)}


# What can be broken without anything being started


def _specification() -> jsonschema.protocols.Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


@pytest.mark.parametrize("path", [BASE, MONITORING], ids=lambda path: path.name)
def test_a_file_is_what_the_compose_specification_allows(path: Path) -> None:
    _specification().validate(_read(path))


def test_the_schema_notices_a_word_that_is_no_setting_of_a_service() -> None:
    file = copy.deepcopy(FILES["base"])
    file["services"]["server"]["read_onyl"] = True
    with pytest.raises(jsonschema.ValidationError, match="read_onyl"):
        _specification().validate(file)


@every_file
def test_every_volume_network_and_secret_is_declared_and_used(file: dict[str, Any]) -> None:
    services = file["services"].values()
    named = {source for each in services for source in _sources(each) if source[0] not in "./"}
    assert named == set(file["volumes"])
    assert set().union(*map(_networks, services)) == set(file["networks"])
    used = {s for each in services for s in each.get("build", {}).get("secrets", ())}
    assert used == set(file["secrets"])


@every_file
def test_whoever_is_waited_for_is_there_and_can_come_to_it(file: dict[str, Any]) -> None:
    services = file["services"]
    for name, service in services.items():
        awaited = service.get("depends_on", {})
        for other, how in awaited.items() if isinstance(awaited, dict) else ():
            target = services[other]
            condition = how["condition"]
            if condition == "service_healthy":
                assert target["healthcheck"]["test"], f"{name} waits for {other}, without check"
            else:
                assert condition == "service_completed_successfully"
                assert target["restart"] == "no", f"{other} never ends"


def test_nothing_starts_before_the_kits_are_made() -> None:
    services = FILES["base"]["services"]

    def before(name: str) -> set[str]:
        direct = set(services[name].get("depends_on", ()))
        return direct.union(*map(before, direct))

    for name in services.keys() - AUTHORITY - TOOLS:
        assert "provision" in before(name), name
    assert {"server", "prepare"} <= before("task")
    for client in CLIENTS:
        assert "task" in before(client)


# Hardening, for every container of both files


@every_service
def test_a_container_can_do_no_more_than_it_has_to(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    added = service.get("cap_add", [])
    assert added == (["CHOWN"] if name == "volumes" else [])
    user, group = service["user"].split(":")
    # The group of root is Grafana's own choice: its files are of that group.
    assert (int(user) == 0) == (name == "volumes")
    assert int(group) != 0 or name in ("volumes", "grafana")
    assert service["pids_limit"] <= 256
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    for word in (
        "privileged",
        "pid",
        "ipc",
        "uts",
        "userns_mode",
        "devices",
        "device_cgroup_rules",
    ):
        assert word not in service
    assert service.get("network_mode", "none") == "none", "the machine's own network is not ours"
    assert ("network_mode" in service) != ("networks" in service)
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


@every_service
def test_ports_are_for_this_machine_alone(file: dict[str, Any], name: str) -> None:
    for port in file["services"][name].get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)
    if name == "keyholder":
        assert "ports" not in file["services"][name]


@every_service
def test_nothing_of_the_machine_is_mounted_but_what_is_read(
    file: dict[str, Any], name: str
) -> None:
    for target, (source, mode) in _mounts(file["services"][name]).items():
        assert "docker.sock" not in source
        if source.startswith("."):
            assert mode == "ro"
            assert (DEPLOY / source).exists()
        if target == "/data":
            assert mode == "ro"


@every_file
def test_a_service_starts_again_and_a_step_does_not(file: dict[str, Any]) -> None:
    for name, service in file["services"].items():
        if name in CLIENTS:
            # Its part in a task ends, and then it shall not begin anew.
            assert service["restart"] == "on-failure"
        elif name in {"keyholder", "server", "prometheus", "grafana"}:
            assert service["restart"] == "unless-stopped"
        else:
            assert service["restart"] == "no"
            assert service["healthcheck"] == {"disable": True}
        assert bool(service.get("profiles")) == (name in TOOLS)


# Who has what


@every_file
def test_a_kit_is_with_its_party_alone_and_read_only(file: dict[str, Any]) -> None:
    parties = {
        "kit-server": {"server"},
        "kit-keyholder": {"keyholder"},
        "kit-admin": {"task", "operator"},
        **{f"kit-{client}": {client} for client in CLIENTS},
    }
    kits = {volume for volume in file["volumes"] if volume.startswith("kit-")}
    assert parties.keys() == kits
    for kit, owners in parties.items():
        assert _with(file, kit) == owners | AUTHORITY
    for name in file["services"].keys() - AUTHORITY:
        mounts = _mounts(file["services"][name])
        kits_here = [(at, mode) for at, (source, mode) in mounts.items() if source in kits]
        assert kits_here in ([], [("/run/secagg/kit", "ro")]), name
        assert bool(kits_here) == (name in {"task", "operator", *RUNNING})


@every_file
def test_the_authority_s_key_and_the_passphrase_are_nowhere_else(file: dict[str, Any]) -> None:
    assert _with(file, "authority") == AUTHORITY
    assert _with(file, "passphrase") == AUTHORITY | {"keyholder"}
    assert _with(file, "round-keys") == {"volumes", "keyholder"}
    for name in AUTHORITY:
        assert file["services"][name]["network_mode"] == "none"
    holder = file["services"]["keyholder"]
    file_of_it = Path(holder["environment"]["SECAGG_KEYHOLDER_PASSPHRASE_FILE"])
    assert _mounts(holder)[str(file_of_it.parent)] == ("passphrase", "ro")
    assert "SECAGG_KEYHOLDER_PASSPHRASE" not in holder["environment"]


@every_file
def test_what_a_party_keeps_is_its_own(file: dict[str, Any]) -> None:
    for volume in file["volumes"]:
        if volume.endswith("-state"):
            assert _with(file, volume) == {volume.removesuffix("-state")}


def test_every_folder_of_the_authority_is_given_to_its_user() -> None:
    services = FILES["base"]["services"]
    made = _mounts(services["volumes"])
    assert made.keys() - _mounts(services["provision"]).keys() == {"/round-keys"}
    assert services["provision"]["volumes"] == services["authority"]["volumes"]
    (command,) = services["volumes"]["command"]
    patterns = command.split()[2:]
    assert command.startswith("chown 10001:10001 ")
    for target in made:
        assert any(Path(target).match(pattern) for pattern in patterns), target


# Who reaches whom


@every_file
def test_only_the_server_shares_a_network_with_the_key_holder(file: dict[str, Any]) -> None:
    services = file["services"]
    holder = _networks(services["keyholder"])
    meets = {
        name for name in services if name != "keyholder" and holder & _networks(services[name])
    }
    assert meets == {"server"} | ({"prometheus"} & services.keys())
    for network in holder:
        assert file["networks"][network] == {"internal": True}
    members = {
        network: {name for name in services if network in _networks(services[name])}
        for network in file["networks"]
    }
    assert members["clients"] == {"server", *CLIENTS}
    for client in CLIENTS:
        assert _networks(services[client]) == {"clients"}
    assert file["networks"]["clients"] == {"internal": True}
    assert _networks(services["operator"]) == _networks(services["task"]) == {"operators"}


@every_file
def test_plain_http_is_for_networks_without_clients(file: dict[str, Any]) -> None:
    services = file["services"]
    for name, prefix in (("server", "SECAGG_SERVER_"), ("keyholder", "SECAGG_KEYHOLDER_")):
        environment = services[name]["environment"]
        if environment.get(f"{prefix}MONITOR_OPEN") != "true":
            continue
        host, _, port = environment[f"{prefix}MONITOR_LISTEN"].rpartition(":")
        own = services[name]["networks"]
        (network,) = [each for each, how in own.items() if host in (how or {}).get("aliases", ())]
        others = {each for each in services if network in _networks(services[each])} - {name}
        assert others <= {"prometheus", "grafana"}
        if "prometheus" in services:
            scraped = yaml.safe_load(
                (DEPLOY / "monitoring/prometheus/prometheus.yml").read_text(encoding="utf-8")
            )
            targets = [
                target
                for job in scraped["scrape_configs"]
                for each in job["static_configs"]
                for target in each["targets"]
            ]
            assert f"{name}:{port}" in targets
            assert network in _networks(services["prometheus"])


# What the files name exists


def test_the_images_are_those_of_the_dockerfile_and_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for name, service in FILES["base"]["services"].items():
        build, image = service["build"], service["image"]
        assert build["target"] in targets
        assert image == f"localhost/secagg-{build['target']}:{version}", name
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
        expected = {"authority": "keyholder", "volumes": "keyholder", "provision": "keyholder"}
        expected |= {"keyholder": "keyholder", "prepare": "client"}
        expected |= dict.fromkeys(CLIENTS, "client")
        assert build["target"] == expected.get(name, "server")


def test_images_of_others_are_pinned_and_named_in_full() -> None:
    for name, service in _read(MONITORING)["services"].items():
        if name != "keyholder":
            assert re.fullmatch(r"docker\.io/\w+/\w+:v?\d+\.\d+\.\d+", service["image"])


def _environment(service: Service) -> Iterator[tuple[type[Settings], dict[str, str]]]:
    """Settings with the variables that are meant for them, by their fields' names."""
    for prefix, kind in SETTINGS.items():
        given = {
            name.removeprefix(prefix).lower(): value
            for name, value in service.get("environment", {}).items()
            if name.startswith(prefix)
        }
        if given:
            yield kind, given


@every_service
def test_every_variable_is_a_setting_that_takes_its_value(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    ours = {each for each in service.get("environment", {}) if each.startswith("SECAGG_")}
    told = 0
    for kind, given in _environment(service):
        assert all(isinstance(value, str) for value in given.values())
        validated(kind, given)
        told += len(given)
    assert told == len(ours), "every variable has the prefix of one program"


def test_clients_are_silos_of_one_task_that_is_the_prepared_one() -> None:
    services = FILES["base"]["services"]
    given = [dict(_environment(services[client]))[ClientSettings] for client in CLIENTS]
    assert [int(each.pop("silo")) for each in given] == list(range(int(given[0]["silos"])))
    server = {each.pop("server") for each in given}
    assert server == {"server:7400"}
    prepared = dict(_environment(services["prepare"]))[ClientSettings]
    assert all(each == prepared for each in given)


def _calls(service: Service) -> Iterator[list[str]]:
    """What a container runs, and what looks after it: calls of our programs."""
    program = {"server": "secagg-server", "keyholder": "secagg-keyholder"}.get(
        service["build"]["target"], "secagg-client"
    )
    entry, command = service.get("entrypoint", [program]), service.get("command", [])
    if entry == ["/bin/sh", "-c"]:
        words = shlex.split(" ".join(command))
        starts = [place for place, word in enumerate(words) if word in PROGRAMS]
        for start, end in itertools.pairwise([*starts, len(words)]):
            yield words[start:end]
    else:
        yield [*entry, *command]
    if test := service.get("healthcheck", {}).get("test"):
        assert test[0] == "CMD"
        yield test[1:]


def _wrong(call: list[str]) -> str:
    """The first word of a call that its program does not know, or nothing."""
    command = get_command(PROGRAMS[call[0]])
    for word in call[1:]:
        if word.startswith("--"):
            flags = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
            if word not in flags | {"--help"}:
                return word
        elif isinstance(command, TyperGroup):
            found = command.get_command(command.make_context("", [], resilient_parsing=True), word)
            if found is None:
                return word
            command = found
    return ""


def test_every_command_is_one_of_ours() -> None:
    found = [call for each in FILES["base"]["services"].values() for call in _calls(each)]
    assert [*map(_wrong, found)] == [""] * len(found)
    assert ["secagg-server", "health"] in found
    assert ["secagg-keyholder", "health"] in found
    assert any(call[:3] == ["secagg", "provision", "init"] for call in found)
    assert _wrong(["secagg-server", "task", "make"]) == "make"
    assert _wrong(["secagg", "provision", "init", "/x", "--client-names", "3"]) == "--client-names"


def test_the_certificates_are_for_the_names_that_are_dialled() -> None:
    services = FILES["base"]["services"]
    (call,) = [call for call in _calls(services["provision"]) if call[0] == "secagg"]
    names = dict(itertools.pairwise(call))
    dialled = {
        value.rpartition(":")[0]
        for service in services.values()
        for variable, value in service.get("environment", {}).items()
        if variable.endswith(("_SERVER", "_ADMIN", "_KEY_HOLDER"))
    }
    assert dialled == {names["--server-host"], names["--key-holder-host"]}
    assert dialled == {"server", "keyholder"}
    assert int(names["--clients"]) == len(CLIENTS)


# What the page says


def _page() -> str:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    return text[text.index("\n## Compose\n") : text.index("\n## Kubernetes\n")]


def test_the_page_explains_the_variables_of_the_files_and_no_others() -> None:
    found = re.findall(r"\$\{(\w+):-([^}]*)\}", BASE.read_text(encoding="utf-8"))
    rows = [line for line in _page().splitlines() if line.startswith("| `SECAGG_")]
    explained = {name for row in rows for name in re.findall(r"`(SECAGG_\w+)`", row)}
    assert {name for name, _ in found} == explained
    defaults = dict(found)
    assert len(set(found)) == len(defaults), "one variable has two defaults"
    for row in rows:
        names, told, _ = (cell.strip() for cell in row.strip("|").split("|"))
        for name, value in zip(re.findall(r"\w+", names), told.split(", "), strict=False):
            assert value in (defaults[name], "none", "this version"), row


def test_the_page_s_commands_are_of_services_that_can_do_them() -> None:
    services, checked = FILES["base"]["services"], 0
    for line in re.findall(r"^\$ (?:dc|docker compose) (.*)$", _page(), re.MULTILINE):
        words = shlex.split(line)
        if words[0] == "exec":
            assert words[1] in services
            assert not _wrong(words[2:])
            checked += 1
        if words[0] != "run":
            continue
        # Options of Compose itself come before the service's name; one of them takes a word.
        others = [word for word in words[1:] if not word.startswith("--")]
        if "--entrypoint" in words:
            others.remove(words[words.index("--entrypoint") + 1])
        name, *command = others
        service = services[name]
        if command and "--entrypoint" not in words:
            program = next(_calls(service))[0]
            assert not _wrong([program, *command]), line
        checked += 1
    assert checked > 6
