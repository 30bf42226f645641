"""Which kit, state folder and key holder either side of a Flower app uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from secagg.errors import ConfigurationError
from secagg.flower.settings import KIT_VARIABLE, node_settings, server_settings

HOLDER = {"secagg-key-holder": "127.0.0.1:7402"}


def context(run: dict[str, Any], node: dict[str, Any] | None = None) -> Context:
    return Context(1, 1, node or {}, RecordDict(), run)


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    for name in ("client-1", "client-10", "client-2"):
        (tmp_path / "clients" / name).mkdir(parents=True)
    (tmp_path / "clients" / "notes.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("partition", "name"), [(0, "client-1"), (1, "client-10"), (2, "client-2")]
)
def test_a_partition_has_the_kit_at_its_place(kits: Path, partition: int, name: str) -> None:
    found = node_settings(context({"secagg-kits": str(kits)}, {"partition-id": partition}))
    assert found.kit == kits / "clients" / name
    assert (found.state, found.limits.max_epsilon, found.limits.require_privacy) == (
        None,
        None,
        False,
    )


def test_the_nodes_own_settings_win(kits: Path) -> None:
    run = {"secagg-kits": str(kits), "secagg-state": "/shared", "secagg-kit": "/server's"} | HOLDER
    node = {"partition-id": 0, "secagg-kit": "~/mine", "secagg-state": "/own"}
    limits = {"secagg-max-epsilon": 3, "secagg-require-privacy": True}
    found = node_settings(context(run, node | limits))
    assert (found.kit, found.state) == (Path.home() / "mine", Path("/own"))
    assert (found.limits.max_epsilon, found.limits.require_privacy) == (3.0, True)
    assert found.key_holder == "127.0.0.1:7402"
    shared = node_settings(context(run, {"partition-id": 1}))
    assert shared.state == Path("/shared/client-10")


@pytest.mark.parametrize(
    ("run", "node", "match"),
    [
        ({}, {}, "expected a client's kit; got none"),
        ({"secagg-kits": ""}, {"partition-id": 0, "secagg-kit": ""}, "got none"),
        ({"secagg-kits": "KITS"}, {}, "got none"),
        ({"secagg-kits": "KITS"}, {"partition-id": 3}, "got 3 kits in .* and partition-id=3"),
        ({"secagg-kits": "KITS/nowhere"}, {"partition-id": 0}, "No such file"),
        ({"secagg-kits": 3}, {"partition-id": 0}, "secagg-kits to be a text"),
        ({}, {"secagg-kit": True}, "secagg-kit to be a text"),
        ({}, {"secagg-kit": "k", "secagg-max-epsilon": "much"}, "a number above 0"),
        ({}, {"secagg-kit": "k", "secagg-max-epsilon": -1.0}, "a number above 0"),
        ({}, {"secagg-kit": "k", "secagg-require-privacy": 1}, "true or false"),
    ],
)
def test_a_node_without_usable_settings_is_refused(
    kits: Path, run: dict[str, Any], node: dict[str, Any], match: str
) -> None:
    found = {k: v.replace("KITS", str(kits)) if isinstance(v, str) else v for k, v in run.items()}
    with pytest.raises(ConfigurationError, match=match):
        node_settings(context(found, node))


def test_the_servers_kit_is_named_in_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KIT_VARIABLE, raising=False)
    assert server_settings(context(HOLDER | {"secagg-kits": "all"})).kit == Path("all/server")
    monkeypatch.setenv(KIT_VARIABLE, "/from-environment")
    found = server_settings(context(HOLDER | {"secagg-kits": "all", "secagg-kit": ""}))
    assert (found.kit, found.key_holder) == (Path("/from-environment"), "127.0.0.1:7402")
    assert server_settings(context(HOLDER | {"secagg-kit": "named"})).kit == Path("named")


@pytest.mark.parametrize(
    ("run", "match"), [({}, "secagg-key-holder in the run config"), (HOLDER, "the server's kit")]
)
def test_a_server_without_usable_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch, run: dict[str, Any], match: str
) -> None:
    monkeypatch.delenv(KIT_VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match=match):
        server_settings(context(run))
