"""The README's docker lines: one for each image, locked down, with settings that there are.

`python -m deploy.rehearsal.by_hand` runs them; what can be known without an engine is held here.
"""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from deploy.rehearsal import IMAGES, RehearsalError
from deploy.rehearsal.by_hand import lines, script
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import ServerSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
SETTINGS = {"server": ServerSettings, "keyholder": KeyHolderSettings, "client": ClientSettings}
RUNS = [shlex.split(line) for line in lines(README) if line.startswith("docker run")]
BY_IMAGE = {words[-1].removeprefix("secagg-"): words for words in RUNS}


def _values(words: list[str], option: str) -> list[str]:
    return [after for before, after in itertools.pairwise(words) if before == option]


def test_there_is_one_line_for_each_image_and_one_that_builds_it() -> None:
    assert sorted(words[-1] for words in RUNS) == sorted(f"secagg-{name}" for name in IMAGES)
    built = [shlex.split(line) for line in lines(README) if line.startswith("docker build")]
    assert sorted(words[words.index("--target") + 1] for words in built) == sorted(IMAGES)
    for words in built:
        target = words[words.index("--target") + 1]
        assert words[words.index("-t") + 1] == f"secagg-{target}"
        assert f" AS {target}\n" in DOCKERFILE


@pytest.mark.parametrize("name", IMAGES)
def test_each_line_locks_its_container_down(name: str) -> None:
    assert "${LOCKED[@]}" in BY_IMAGE[name]
    (locked,) = (line for line in lines(README) if line.startswith("LOCKED="))
    for option in ("--read-only", "--cap-drop all", "no-new-privileges", "--tmpfs /tmp"):
        assert option in locked
    assert not {"--privileged", "--user", "-u", "--cap-add", "--pid"} & set(BY_IMAGE[name])


@pytest.mark.parametrize("name", IMAGES)
def test_each_line_mounts_its_own_kit_and_one_volume(name: str) -> None:
    volumes = _values(BY_IMAGE[name], "--volume")
    kits = [each for each in volumes if each.endswith(":/run/secagg/kit:ro")]
    own = {
        "server": "kits/server",
        "keyholder": "kits/keyholder",
        "client": "kits/clients/client-1",
    }
    assert kits == [f"$PWD/{own[name]}:/run/secagg/kit:ro"]
    writable = [each for each in volumes if not each.endswith(":ro")]
    assert [each.split(":")[1] for each in writable] == ["/var/lib/secagg"]
    if name != "keyholder":
        assert not any("custodians" in each for each in volumes)


@pytest.mark.parametrize("name", IMAGES)
def test_each_variable_is_a_setting_with_a_value_it_takes(name: str) -> None:
    kind = SETTINGS[name]
    values = dict(each.split("=", 1) for each in _values(BY_IMAGE[name], "--env"))
    fields = {key.removeprefix(kind.env_prefix).lower(): value for key, value in values.items()}
    assert all(key.startswith(kind.env_prefix) for key in values)
    kind(**fields)
    with pytest.raises(ValueError, match="kits"):
        kind(**(fields | {"kits": "one"}))


def test_published_ports_are_exposed_and_the_operators_one_on_loopback() -> None:
    exposed = set(re.findall(r"\d+", " ".join(re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.M))))
    published = _values(BY_IMAGE["server"], "--publish")
    assert published == ["7400:7400", "127.0.0.1:7401:7401"]
    assert {each.split(":")[-1] for each in published} <= exposed
    assert not any("--publish" in BY_IMAGE[name] for name in ("keyholder", "client"))


def test_what_is_rehearsed_is_every_line_but_the_builds() -> None:
    text = script(README)
    for line in lines(README):
        assert (line in text) != line.startswith("docker build"), line


def test_a_readme_without_the_block_is_noticed() -> None:
    with pytest.raises(RehearsalError, match="block of docker lines"):
        lines(README.replace("<!-- docker run -->", ""))
