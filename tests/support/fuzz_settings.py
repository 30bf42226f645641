"""Fuzz target: settings of all programs, from TOML and from the environment, and task files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

from fuzz_inputs import Target, altered, refusable

from secagg.errors import ConfigurationError
from secagg.parameters import NormCheck
from secagg.rpc.channels import check_address
from secagg.settings import Settings, load
from secagg_client.config import ClientSettings
from secagg_keyholder.config import KeyHolderSettings
from secagg_server.config import OperatorSettings, ServerSettings
from secagg_server.task_files import read_task
from secagg_server.tasks import TaskSpec

__all__ = ["SETTINGS"]

_SAMPLES = Path(__file__).parents[2] / "docs" / "samples"


@cache
def _file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="secagg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "settings.toml"


def _in_file(kind: type[Settings]) -> Callable[[bytes], None]:
    def read(body: bytes) -> None:
        _file().write_bytes(body)
        _use(load(kind, _file(), {}))

    return read


def _in_environment(kind: type[Settings]) -> Callable[[bytes], None]:
    def read(body: bytes) -> None:
        pairs = [line.partition(b"=") for line in body.replace(b"\0", b"").split(b"\n")]
        found = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name}
        prefixed = {f"{kind.env_prefix}{name.upper()}": value for name, value in found.items()}
        with mock.patch.dict(os.environ, prefixed):
            _use(load(kind, None, {}))

    return read


def _use(settings: Settings) -> None:
    """What can be asked of settings without touching anything they name."""
    if isinstance(settings, KeyHolderSettings):
        assert settings.policy.min_clients >= 3
        assert settings.round_keys
    if isinstance(settings, ClientSettings):
        settings.limits()
        check_address(settings.server, encrypted=True)
    if isinstance(settings, ServerSettings):
        assert isinstance(settings.database, str)
        for address in (settings.listen, settings.admin_listen, settings.key_holder):
            check_address(address, encrypted=settings.kit is not None)
    if isinstance(settings, OperatorSettings):
        check_address(settings.admin, encrypted=False)


def _task(body: bytes) -> None:
    _file().write_bytes(body)
    spec = read_task(_file())
    assert TaskSpec.from_wire(spec.to_wire()) == spec
    assert spec.plan.norm_check is None or isinstance(spec.plan.norm_check, NormCheck)


def _address(body: bytes) -> None:
    text = body.decode(errors="surrogateescape")
    assert check_address(text, encrypted=False) == text


# Inputs that are kept count on these places: new ones go to the end.
_KINDS: tuple[Callable[[bytes], None], ...] = (
    *(_in_file(ServerSettings), _in_file(KeyHolderSettings), _in_file(ClientSettings)),
    *(_in_environment(ServerSettings), _in_environment(KeyHolderSettings)),
    *(_in_environment(ClientSettings), _in_file(OperatorSettings), _task, _address),
)


def _one(data: bytes) -> None:
    if not data:
        return
    with refusable(ConfigurationError):
        _KINDS[data[0] % len(_KINDS)](data[1:])


_WORDS = (
    *(b"true", b"false", b"0", b"-1", b"1e309", b"nan", b"-inf", b"1_000", b"0x10", b'""', b"''"),
    *(b"[]", b"{}", b"[[1]]", b"1979-05-27", b"07:32:00", b"9223372036854775808", b"1" * 5000),
    *(b'"\\u0000"', b'"\\uD800"', b'"' + b"a" * 200 + b'"', b"[" * 2000, b"0.5", b"3", b"1e-400"),
)


def _mutate(data: bytes, random: Random) -> bytes:
    """A line is lost, repeated or moved, or a value is another one."""
    lines = data[1:].split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(7)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(random.randrange(len(lines)), lines[at])
    elif kind == 2:
        return data[:1] + altered(data[1:], random)
    elif b"=" in lines[at]:
        name, _, value = lines[at].partition(b"=")
        if kind == 3:
            name = random.choice(lines).partition(b"=")[0] or name
        elif kind == 4:
            value = random.choice(lines).partition(b"=")[2] or value
        else:
            value = random.choice(_WORDS)
        lines[at] = name + b"=" + value
    return data[:1] + b"\n".join(lines)


def _seeds() -> dict[str, bytes]:
    names = ("server", "keyholder", "client")
    seeds = {
        f"{name} in a file": bytes([place]) + _bare((_SAMPLES / f"{name}.toml").read_bytes())
        for place, name in enumerate(names)
    }
    task = _bare((_SAMPLES / "task.toml").read_bytes())
    private = b"""task_id = "a"
max_clients = 9
rounds = 2
[update]
clip = 1.0
rows = 4
[[update.tensors]]
name = "t"
shape = [4, 2]
[privacy]
mode = "distributed"
epsilon = 8.0
delta = 1e-6
noise_multiplier = 2.0
[threshold]
least = 3
most_items = 2
"""
    return seeds | {
        "server in the environment": b"\3LISTEN=127.0.0.1:1\nWORKERS=2\nSTORE_URL=sqlite:///x",
        "keyholder in the environment": b"\4SHARE_FILES=a,b\nRELEASE_MAX_EPSILON=8\nWORKERS=1",
        "client in the environment": b"\5SILO=1\nSILOS=3\nMAX_EPSILON=2.5\nMODEL=ease",
        "operator": b'\6admin = "127.0.0.1:7401"\ninsecure = true',
        "a task": b"\7" + task,
        "a private task": b"\7" + private,
        "an address": b"\x08[::1]:7400",
    }


def _bare(toml: bytes) -> bytes:
    """Without comments."""
    lines = [line.partition(b" #")[0].rstrip() for line in toml.splitlines()]
    return b"\n".join(line for line in lines if line and not line.startswith(b"#"))


SETTINGS = Target(
    "settings",
    "settings of every program in TOML and in the environment, task files, addresses",
    ("settings.load", "read_task", "check_address"),
    _one,
    _seeds,
    _mutate,
    _file,
)
