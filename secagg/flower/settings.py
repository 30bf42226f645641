"""Where a Flower app finds its kits and the key holder, from what Flower hands to both sides.

A node's own configuration (``flower-supernode --node-config``) wins over the run's (the app's
``[tool.flwr.app.config]``, or ``flwr run --run-config``). An empty text counts as not set.

* `secagg-key-holder` (run): `host:port` of the key holder.
* `secagg-kits` (run): the folder that `secagg provision init` made, where all is on one machine;
  the server takes `server` in it, the node of partition i the i-th of `clients`, sorted by name.
* `secagg-kit`: the folder of one kit; in the run's configuration the server's, in a node's its own.
* `secagg-state` (node, or run): folder of a client's ledger, pause switch and newest upload. In the
  run's configuration, each client has a folder in it, named like its kit.
* `secagg-max-epsilon`, `secagg-require-privacy` (node): see `secagg_client.ledger.Limits`; the
  former needs a state folder.

The server's kit may also be named by `SECAGG_FLOWER_KIT` in the ServerApp's environment. Relative
paths start at the working directory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, UserConfigValue

from secagg.errors import ConfigurationError
from secagg_client.ledger import Limits

__all__ = ["KIT_VARIABLE", "NodeSettings", "ServerSettings", "node_settings", "server_settings"]

KIT_VARIABLE = "SECAGG_FLOWER_KIT"
"""Environment variable of the ServerApp that names the folder of the server's kit."""

_PARTITION = "partition-id"  # Flower's own, in a node's configuration

Config = Mapping[str, UserConfigValue]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What a node takes part with.

    Attributes:
        kit: folder of the client's kit.
        state: folder of its ledger and switch; None for none.
        limits: what it may spend.
        key_holder: ``host:port`` by the run's configuration; empty if that does not say.
    """

    kit: Path = field(repr=False)
    state: Path | None = field(repr=False)
    limits: Limits
    key_holder: str


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a ServerApp opens rounds with.

    Attributes:
        kit: folder of the server's kit.
        key_holder: ``host:port``.
    """

    kit: Path = field(repr=False)
    key_holder: str


def node_settings(context: Context) -> NodeSettings:
    """A node's settings.

    Raises:
        ConfigurationError: no kit is named, or a setting is not of its kind.
    """
    node, run = context.node_config, context.run_config
    kit = _folder(node, "secagg-kit") or _kit_of_partition(node, run)
    state = _folder(node, "secagg-state")
    if state is None and (shared := _folder(run, "secagg-state")):
        state = shared / kit.name
    limits = Limits(_number(node, "secagg-max-epsilon"), _truth(node, "secagg-require-privacy"))
    return NodeSettings(kit, state, limits, _text(run, "secagg-key-holder"))


def server_settings(context: Context) -> ServerSettings:
    """The ServerApp's settings.

    Raises:
        ConfigurationError: no key holder or no kit is named, or a setting is not of its kind.
    """
    run = context.run_config
    key_holder = _text(run, "secagg-key-holder")
    if not key_holder:
        raise ConfigurationError(
            "expected secagg-key-holder in the run config, host:port of the key holder; got none; "
            'add secagg-key-holder = "127.0.0.1:7402" to [tool.flwr.app.config]'
        )
    named = _folder(run, "secagg-kit") or _expanded(os.environ.get(KIT_VARIABLE, ""))
    kits = _folder(run, "secagg-kits")
    if named is None and kits is None:
        raise ConfigurationError(
            "expected the server's kit; got none; set secagg-kit in the run config, "
            f"{KIT_VARIABLE} in the environment, or secagg-kits to the folder that "
            "`secagg provision init` made"
        )
    return ServerSettings(named or (kits or Path()) / "server", key_holder)


def _kit_of_partition(node: Config, run: Config) -> Path:
    kits, partition = _folder(run, "secagg-kits"), node.get(_PARTITION)
    if kits is None or not isinstance(partition, int):
        raise ConfigurationError(
            "expected a client's kit; got none; start the node with --node-config "
            "'secagg-kit=\"FOLDER\"', or in a simulation set secagg-kits in the run config"
        )
    try:
        found = sorted(path for path in (kits / "clients").iterdir() if path.is_dir())
    except OSError as error:
        raise ConfigurationError(
            f"expected kits of clients in {kits / 'clients'}: {error.strerror}; secagg-kits is the "
            "folder that `secagg provision init` made"
        ) from None
    if not 0 <= partition < len(found):
        raise ConfigurationError(
            f"expected a kit for each partition; got {len(found)} kits in {kits / 'clients'} and "
            f"partition-id={partition}; `secagg provision` makes more"
        )
    return found[partition]


def _folder(config: Config, key: str) -> Path | None:
    return _expanded(_text(config, key))


def _expanded(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _text(config: Config, key: str) -> str:
    value = config.get(key, "")
    if not isinstance(value, str):
        raise _wrong(key, "a text in quotation marks", value)
    return value


def _number(config: Config, key: str) -> float | None:
    value = config.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _wrong(key, "a number above 0", value)
    return float(value)


def _truth(config: Config, key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _wrong(key: str, kind: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"expected {key} to be {kind}; got {value!r}; change the config")
