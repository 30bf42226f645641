"""Configuration of every program: a TOML file, overlaid by the environment, overlaid by flags.

Unknown keys are refused with a suggestion. A leaf that needs the extra ``service``.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from secagg.errors import ConfigurationError

__all__ = [
    "Settings",
    "check_writable",
    "dialled",
    "load",
    "one_transport",
    "only_process",
    "read_toml",
    "validated",
]

_M = TypeVar("_M", bound=BaseModel)
_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """Base of a program's settings; subclasses set the prefix of their environment variables."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    env_prefix: ClassVar[str] = "SECAGG_"


def load(kind: type[_S], file: Path | None, flags: Mapping[str, object]) -> _S:
    """Settings from file, environment and flags; flags that are None count as not given.

    Raises:
        ConfigurationError: unreadable file, unknown key, or a value of the wrong kind.
    """
    values: dict[str, Any] = read_toml(file) if file else {}
    values |= _from_environment(kind)
    values |= {key: value for key, value in flags.items() if value is not None}
    return validated(kind, values)


def _from_environment(kind: type[Settings]) -> dict[str, str]:
    prefix = kind.env_prefix
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in os.environ.items()
        if name.startswith(prefix)
    }


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file's table.

    Raises:
        ConfigurationError: not there, or not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"expected a readable file; {file}: {error.strerror}") from None
    # Beside TOML's own error: an integer of thousands of digits, or as many levels.
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"expected TOML in {file}: {error}") from None


def validated(kind: type[_M], values: Mapping[str, object]) -> _M:
    """A checked model of these values.

    Raises:
        ConfigurationError: names every key that is unknown, missing or of the wrong kind.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            _problem(kind, item["loc"], item["type"], item["msg"]) for item in error.errors()
        ]
        raise ConfigurationError("; ".join(problems)) from None


def _problem(kind: type[BaseModel], loc: tuple[int | str, ...], what: str, text: str) -> str:
    key = ".".join(str(part) for part in loc)
    if what != "extra_forbidden":
        return f"{key}: {text}"
    close = difflib.get_close_matches(str(loc[-1]), kind.model_fields, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {sorted(kind.model_fields)}"
    return f"unknown key {key!r}{hint}"


def one_transport(kit: Path | None, insecure: bool) -> None:
    """Refuse to guess between TLS and plaintext.

    Raises:
        ConfigurationError: neither a kit nor the explicit wish for plaintext, or both.
    """
    if kit is None and not insecure:
        raise ConfigurationError(
            "expected a kit for TLS; got none; make one with `secagg provision init` and pass "
            "--kit, or ask for plaintext on this machine alone with --insecure"
        )
    if kit is not None and insecure:
        raise ConfigurationError("expected either a kit or --insecure; got both; drop one of them")


def check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that could not be written to, without making it.

    Raises:
        ConfigurationError: it, or the nearest folder above it that exists, is not writable.
    """
    existing = folder.absolute()
    try:
        while not existing.exists() and existing.parent != existing:
            existing = existing.parent
        # Permissions say yes to an administrator even where no file can be made, as below /proc.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError:
        raise ConfigurationError(
            f"expected a writable {name}; {str(folder)!r} is not; choose another or change its "
            "owner"
        ) from None


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; two services on one state would contradict each other.

    Raises:
        ConfigurationError: the folder cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigurationError(
            f"expected a writable folder; {str(folder)!r}: {error.strerror}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"expected {str(folder)!r} for this process alone; another one is using it; stop "
                "that one, or choose another folder"
            ) from None
        yield


def dialled(listen: str) -> str:
    """Where a service that listens here can be reached from the same machine."""
    host, _, port = listen.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "") else listen  # noqa: S104
